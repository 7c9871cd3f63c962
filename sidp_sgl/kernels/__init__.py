"""Triton kernels, each beside a PyTorch reference of the same signature."""
