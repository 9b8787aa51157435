"""An emulator of NVIDIA's PTX in numpy: what Triton emits for a GPU, executed on CPU tensors.

    with emulated(90) as gpu:
        fused_step(x, f, table, step, impl="triton")      # compiled for sm_90, run from its PTX
        print(gpu.traffic)

All threads of a batch of blocks run in lockstep, with divergence. Every access is held to the
storage of the tensors that were passed, to its alignment and to races; an instruction that is not
known fails. Not modelled: time, the order of blocks, and the last bits of approximate instructions
(`ex2.approx`, `div.full`) and of tensor-core sums, which are computed as exactly as float64 allows.
"""

from evidence.ptx.driver import Emulator, Launch, emulated
from evidence.ptx.machine import run
from evidence.ptx.memory import Allocation, Fault, Memory, Traffic
from evidence.ptx.program import Program, parse

__all__ = [
    "Allocation",
    "Emulator",
    "Fault",
    "Launch",
    "Memory",
    "Program",
    "Traffic",
    "emulated",
    "parse",
    "run",
]
