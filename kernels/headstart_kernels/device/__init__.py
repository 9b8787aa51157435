"""Code that Triton kernels inline: what several of them compute, written once."""
