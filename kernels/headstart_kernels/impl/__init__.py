"""Implementations of the kernels; none imports another."""
