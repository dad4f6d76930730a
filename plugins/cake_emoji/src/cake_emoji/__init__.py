"""A tiny embedded Stable Diffusion that paints emoji, the default image model of Cake."""
