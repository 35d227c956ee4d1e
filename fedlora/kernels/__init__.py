"""Triton kernels for what PyTorch does in many passes over a GPU's memory; each has a caller that does without."""
