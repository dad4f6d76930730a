"""Cake model plugin: Stable Diffusion and its kin over diffusers."""
