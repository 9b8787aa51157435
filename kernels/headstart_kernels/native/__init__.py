"""The sampler's kernels in C for a CPU: one pass over memory, the bits of the reference."""
