"""Triton kernels, one file a family; `group_norm` has its arithmetic on sizes and its list of calls beside it."""
