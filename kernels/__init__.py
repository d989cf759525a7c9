"""Triton kernels, one file a family."""
