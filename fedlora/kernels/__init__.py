"""Triton kernels for what PyTorch does in many passes over a GPU's memory; it does so where a kernel does not apply."""
