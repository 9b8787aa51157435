"""A GPU's rules on a machine without one: what a captured graph does, and what it must not do.

    recorder   operators recorded once and replayed into the same memory, as a CUDA graph does
    host       the part of torch.cuda that capturing uses, on CPU tensors, for real use
    fake_cuda  the same with the rules of a GPU: streams that race, pools that overwrite, no waiting
    gpu        a whole machine: CUDA tensors that hold values, and torch_cuda, its torch.cuda
    audit      every operator of a callable on fake CUDA tensors, against a table of hazards

None of it needs a GPU, a driver or a compiler. What it cannot show: that a library's kernels may be
captured, latency, real memory, and races inside a kernel.
"""
