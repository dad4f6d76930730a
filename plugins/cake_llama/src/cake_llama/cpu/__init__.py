"""Layers on the CPU at the width of their file: with cake-kernels where it is installed, else with PyTorch alone."""
