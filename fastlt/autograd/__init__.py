"""Recorded forward passes, saved tensors that are recomputed, tangent rules, and the kernels for them."""
