"""Triton kernels for what PyTorch does in many passes over a GPU's memory. Where one does not apply, PyTorch does it."""
