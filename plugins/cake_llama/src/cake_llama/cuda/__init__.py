"""Decoding on NVIDIA GPUs: kernels of our own in Triton, captured with the rest of a step in a CUDA graph."""
