"""What a claim about the kernels is held to, on a machine without a GPU. It is not in the wheel.

    oracle        every kernel of a step in float64, with the magnitude of its terms; `bounds` has
                  the layers'
    aot           the kernels compiled for GPUs that are not here, and what the compiler says
    ptx           that machine code, run: memory, masks, and bits
    fake_tensors  CUDA tensors without memory; `card` counts what they would take on a GPU
    audit         every operator of a callable on such tensors, against a table of hazards
    fake_cuda     torch.cuda with the rules of a GPU: streams that race, pools that overwrite
    gpu           a whole machine: CUDA tensors that hold values, and `torch_cuda`, its torch.cuda

What none of it can show: that a library's kernels may be captured, latency, and real memory. Tests
have it on their path; a benchmark that imports `harness` has it, too.
"""
