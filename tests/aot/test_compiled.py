"""Every kernel compiled for GPUs that are not here: wide accesses, no spills, no doubles."""

from __future__ import annotations

import pytest
import triton
import triton.language as tl

from evidence import aot
from evidence.aot import AMD, NVIDIA, Case, cases, compiled, step_case

REGISTERS = 128
"""Four warps of 128 registers: four blocks fit on a multiprocessor of 65536, a quarter of its
threads, which is enough for kernels that wait for memory."""
CASES = cases()
FORMS = ("fused_step fp16", "philox_normal", "preview_rgb", "geglu", "low_rank_add up")
FORMS += ("add_layernorm",)
QUICK = [(name, "sm_90") for name in CASES]
QUICK += [(name, target) for target in (*NVIDIA, *AMD) if target != "sm_90" for name in FORMS]
REST = [
    pytest.param(name, target, marks=pytest.mark.slow)
    for name in CASES
    for target in (*NVIDIA, *AMD)
    if (name, target) not in QUICK
]
NARROW_STORES = (
    *("preview_rgb", "decode_u8", "scale_input"),
    *("groupnorm moments", "groupnorm affine", "low_rank_add down"),
)
"""Three words for four pixels, 16 bits for 32, and a few numbers a tile: their warps still fill
whole sectors, which tests/ptx/test_traffic.py counts."""
NARROW_LOADS = ("philox_normal", "groupnorm affine")
"""Two numbers an image, and one number a tile."""


@pytest.mark.parametrize(("name", "target"), [*QUICK, *REST])
def test_a_kernel_is_wide_and_keeps_its_values_in_registers(name: str, target: str) -> None:
    facts = compiled(CASES[name], target)
    assert facts.spilled_bytes == 0 and facts.double_instructions == 0
    assert facts.registers <= REGISTERS
    # AMD's compiler joins less of a 16-bit access; the state is moved in 128 bits all the same.
    if target in NVIDIA or name.startswith("fused_step"):
        if not name.startswith(NARROW_LOADS):
            assert facts.widest_load_bits == 128
        if not name.startswith(NARROW_STORES):
            assert facts.widest_store_bits == 128
    # Matrix products contract by definition, erf and exp bring their own fused steps, and AMD's
    # correctly rounded square root is made of them.
    if name.startswith(("fused_step", "preview", "decode", "scale")) and "drawn" not in name:
        assert facts.contractible_instructions == 0
    # Those that define their bits; AMD has no correctly rounded root, and refines an estimate.
    if name.startswith(("fused_step", "preview", "decode", "scale", "philox")):
        assert facts.approximate_instructions == 0 or target in AMD


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_unaligned_tensors_cost_the_vectors(dtype: str) -> None:
    facts = compiled(step_case(dtype, aligned=False), "sm_90")
    assert facts.widest_load_bits == 64, "the step, an int64, is the widest that is left"
    assert facts.widest_store_bits == 32


@triton.jit
def double_kernel(x_ptr, BLOCK: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) * 3.0 + 1.0)


def test_double_precision_would_be_seen() -> None:
    facts = compiled(Case(double_kernel, {"x_ptr": "*fp64"}, {"BLOCK": 128}), "sm_90")
    assert facts.double_instructions > 0


def test_spills_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(aot.OPTIONS, "maxnreg", 24)
    facts = compiled(CASES["fused_step drawn + preview"], "sm_90")
    assert facts.registers <= 24 and facts.spilled_bytes > 0


@triton.jit
def root_kernel(x_ptr, BLOCK: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)
    tl.store(at, 1.0 / tl.sqrt(tl.load(at)))


def test_approximate_instructions_would_be_seen() -> None:
    facts = compiled(Case(root_kernel, {"x_ptr": "*fp32"}, {"BLOCK": 128}), "sm_90")
    assert facts.approximate_instructions == 2


def test_contraction_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(aot.OPTIONS, "enable_fp_fusion", True)
    for target in ("sm_90", "gfx942"):
        assert compiled(CASES["fused_step fp32"], target).contractible_instructions > 0
