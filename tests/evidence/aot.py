"""Kernels compiled for GPUs that are not here, and what their machine code says of itself.

`compiled(case, target)` runs Triton and the assembler for an architecture without a driver; `Facts`
are read from the PTX, the SASS and the resource section, or from AMD's metadata. Evidence class:
compiled. Nothing here was run.
"""

# Triton and its compiler carry no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headstart_kernels.device.adapter import down_kernel, up_kernel
from headstart_kernels.device.draw import philox_normal_kernel
from headstart_kernels.device.gate import geglu_kernel
from headstart_kernels.device.layernorm import add_layernorm_kernel
from headstart_kernels.device.norm import affine_kernel, apply_kernel, moments_kernel
from headstart_kernels.device.picture import (
    decode_flat_kernel,
    decode_planes_kernel,
    preview_rgb_kernel,
)
from headstart_kernels.device.step import fused_step_kernel, scale_input_kernel
from headstart_kernels.impl import (
    triton_adapter,
    triton_gate,
    triton_noise,
    triton_norm,
    triton_rgb,
    triton_step,
)
from headstart_kernels.launch import OPTIONS

NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942", "gfx1100")
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel with the types of its arguments; a pointer that is not named is absent.

    A type is Triton's name ("*fp16", "i32", "fp32"); `aligned` says that pointers and integers are
    multiples of 16, which is how the launcher finds the tensors of a real run.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict[str, object])
    aligned: bool = True

    def source(self) -> Any:
        names = self.kernel.arg_names
        signature = {name: self.types.get(name, "constexpr") for name in names}
        absent = {n: None for n in names if n not in self.types and n not in self.constants}
        attributes = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if self.aligned and self._is_aligned(name)
        }
        return ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs={**absent, **self.constants},
            attrs=attributes,
        )

    def _is_aligned(self, name: str) -> bool:
        parameter = next(p for p in self.kernel.params if p.name == name)
        kind = self.types.get(name, "")
        if parameter.do_not_specialize_on_alignment:
            return False
        return kind.startswith("*") or (kind.startswith("i") and not parameter.do_not_specialize)


@dataclass(frozen=True, slots=True)
class Facts:
    """What one compiled kernel uses. `widest_*` are bits of the widest access to global memory."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    widest_load_bits: int
    widest_store_bits: int
    double_instructions: int
    contractible_instructions: int
    """Those that are a contraction of a*b + c, or that an assembler may contract."""
    approximate_instructions: int
    """Divisions, roots and exponentials that are not correctly rounded: a device's own bits."""

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def compiled(case: Case, target: str) -> Facts:
    """Compile for "sm_90", "gfx942", ... with the options of every launch, and read the result."""
    if target.startswith("sm_"):
        machine = GPUTarget("cuda", int(target[3:]), 32)
        return _nvidia(triton.compile(case.source(), target=machine, options=dict(OPTIONS)))
    machine = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    options = {**OPTIONS, "num_stages": 2}  # AMD's pipeliner asks for two
    if case.kernel in (fused_step_kernel, scale_input_kernel):
        case = replace(case, constants={**case.constants, "BLOCK": 1024})
    return _amd(triton.compile(case.source(), target=machine, options=options))


def _nvidia(kernel: Any) -> Facts:
    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    sass = _tool("nvdisasm", "-c", cubin)
    # An assembler contracts a product and a sum only where neither names its rounding.
    loose = re.findall(r"\b(?:(?:add|sub|mul)(?:\.ftz)?|fma\.rn(?:\.ftz)?)\.f32(?:x2)?\b", ptx)
    return Facts(
        registers=used["REG"],
        spilled_bytes=used["STACK"] + used["LOCAL"] + 4 * len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared_bytes=kernel.metadata.shared,
        widest_load_bits=_widest(r"LDG\.E(?:\.\w+)*?(?:\.(\d+))?(?:\.\w+)* ", sass),
        widest_store_bits=_widest(r"STG\.E(?:\.\w+)*?(?:\.(\d+))?(?:\.\w+)* ", sass),
        double_instructions=len(re.findall(r"\bD(?:ADD|MUL|FMA|SETP)\b|F2F\.F64", sass)),
        contractible_instructions=len(loose),
        approximate_instructions=len(re.findall(r"\b\w+\.(?:approx|full)\b", ptx)),
    )


def _widest(pattern: str, sass: str) -> int:
    return max((int(bits or 32) for bits in re.findall(pattern, sass)), default=0)


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / name), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(kernel: Any) -> Facts:
    code = kernel.asm["amdgcn"]
    counts = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)\b", code)}
    words = {"b32": 32, "b64": 64, "b96": 96, "b128": 128}
    words |= {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}

    def widest(verb: str) -> int:
        widths = re.findall(rf"\b(?:global|buffer)_{verb}_(\w+)", code)
        return max((words.get(kind, 16) for kind in widths), default=0)

    return Facts(
        registers=counts["vgpr_count"],
        spilled_bytes=4 * (counts["vgpr_spill_count"] + counts["sgpr_spill_count"]),
        shared_bytes=counts["group_segment_fixed_size"],
        widest_load_bits=widest("load"),
        widest_store_bits=widest("store"),
        double_instructions=len(re.findall(r"\bv_(?:add|mul|fma)_f64\b", code)),
        contractible_instructions=len(re.findall(r"\bv_(?:fma|fmac|mad)_f32\b", code)),
        approximate_instructions=len(re.findall(r"\bv_(?:rcp|rsq|sqrt|exp|log)_f32", code)),
    )


def step_case(dtype: str = "fp16", *, aligned: bool = True, **change: object) -> Case:
    """`fused_step` with guidance, noise from memory, x0 and a doubled next input, from a device
    table at a device step; `change` names constants, or pointers given as types or as None."""
    types: dict[str, str] = dict.fromkeys(("x_ptr", "noise_ptr", "x_next_ptr", "x0_ptr"), "*fp32")
    types |= dict.fromkeys(("f_cond_ptr", "f_uncond_ptr", "x_in_ptr"), f"*{dtype}")
    types |= {"table_ptr": "*fp32", "step_ptr": "*i64", "plane": "i32", "size": "i32"}
    types |= dict.fromkeys(("row", "last", "first_row", "parts"), "i32")
    numbers = ("c_in", "c_skip", "c_out", "keep", "add", "carry", "scale")
    types |= dict.fromkeys(numbers, "fp32")
    constants: dict[str, object] = {
        **{"CHANNELS": 1, "F_LAST": False, "X_IN_LAST": False, "COPIES": 2},
        **{"WHOLE_BLOCKS": True, "PACKED": True, "STEP_STRIDE": 0},
        **{"FLAGS": 0, "BLOCK": triton_step.BLOCK},
    }
    for name, value in change.items():
        if name in constants:
            constants[name] = value
        elif value is None:
            del types[name]
        else:
            types[name] = str(value)
    return Case(fused_step_kernel, types, constants, aligned)


_DRAW: dict[str, Any] = {"noise_ptr": None, "seeds_ptr": "*i64", "samples_ptr": "*i64"}
_NOTICED: dict[str, Any] = {"finite_ptr": "*u8", "FLAGS": 1}
_PICTURE: dict[str, Any] = {
    "rgb_ptr": "*u8",
    "factors_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "CHANNELS": 4,
}
_NORM = {"channels": "i32", "plane": "i32"}


def _tile(sizes: tuple[int, int], last: bool) -> dict[str, object]:
    return {"CHANNELS_LAST": last, "PIXELS": sizes[0], "WIDTH": sizes[1]}


def cases() -> dict[str, Case]:
    """Every kernel in the form a run of SDXL gives it, named as the reports name it."""
    half = "*fp16"
    rank = {"TOKENS": triton_adapter.TOKENS, "RANK": 16}
    tokens = {"tokens": "i32", "width": "i32", "rank": "i32", "strength_ptr": "*fp32"}
    found = {f"fused_step {dtype}": step_case(dtype) for dtype in ("fp32", "fp16", "bf16")}
    found |= {
        "fused_step drawn": step_case(**_DRAW, **_NOTICED),
        "fused_step drawn, row a sample": step_case(
            **_DRAW, **_NOTICED, first_row_ptr="*i64", STEP_STRIDE=1
        ),
        "fused_step drawn + preview": step_case(**_DRAW, **_PICTURE, **_NOTICED),
        "fused_step channels-last": step_case(CHANNELS=4, F_LAST=True, X_IN_LAST=True),
    }
    scale = {"x_ptr": "*fp32", "x_in_ptr": half, "table_ptr": "*fp32", "step_ptr": "*i64"}
    scale |= {"row": "i32", "c_in": "fp32", "count": "i32"}
    found["scale_input"] = Case(scale_input_kernel, scale, {"BLOCK": triton_step.BLOCK})
    draw = {"seeds_ptr": "*i64", "samples_ptr": "*i64", "step_ptr": "*i64", "out_ptr": "*fp32"}
    draw |= {"step": "i32", "count": "i32"}
    constants = {"STEP_STRIDE": 0, "BLOCK": triton_noise.BLOCK}
    found["philox_normal"] = Case(philox_normal_kernel, draw, constants)
    picture = {"x0_ptr": "*fp32", "factors_ptr": "*fp32", "bias_ptr": "*fp32", "rgb_ptr": "*u8"}
    form = {"CHANNELS": 4, "UPSCALE": 1, "PACKED": True, "BLOCK": triton_rgb.BLOCK}
    found["preview_rgb"] = Case(preview_rgb_kernel, {**picture, "width": "i32"}, form)
    pixels = {"pixels_ptr": half, "rgb_ptr": "*u8"}
    packed = {"PACKED": True, "BLOCK": triton_rgb.BLOCK}
    found["decode_u8"] = Case(decode_planes_kernel, {**pixels, "plane": "i32"}, packed)
    flat = {**pixels, "count": "i32"}
    found["decode_u8 channels-last"] = Case(decode_flat_kernel, flat, {"BLOCK": triton_rgb.BLOCK})
    moments = {"x_ptr": half, "mean_ptr": "*fp32", "spread_ptr": "*fp32", **_NORM}
    applied = {"x_ptr": half, "y_ptr": half, "scale_ptr": "*fp32", "shift_ptr": "*fp32", **_NORM}
    for name, sizes, last in (
        ("", triton_norm.PLANES, False),
        (" channels-last", triton_norm.LAST, True),
    ):
        found[f"groupnorm moments{name}"] = Case(moments_kernel, moments, _tile(sizes, last))
        tile = _tile(sizes, last)
        found[f"groupnorm apply{name}"] = Case(apply_kernel, applied, {**tile, "SILU": True})
    found["groupnorm apply channels-last, no SiLU"] = Case(
        apply_kernel, applied, {**_tile(triton_norm.LAST, True), "SILU": False}
    )
    joined = {"mean_ptr": "*fp32", "spread_ptr": "*fp32", "scale_ptr": "*fp32"}
    joined |= {"shift_ptr": "*fp32", "weight_ptr": half, "bias_ptr": half, **_NORM}
    joined |= {"tiles": "i32", "eps": "fp32"}
    parts = {"PIXELS": triton_norm.PLANES[0], "WIDTH": 16, "JOINED": 1024}
    found["groupnorm affine"] = Case(affine_kernel, joined, parts)
    shifted = {**joined, "added_ptr": half}
    found["groupnorm affine, shifted"] = Case(affine_kernel, shifted, parts)
    names = ("x_ptr", "y_ptr", "weight_ptr", "bias_ptr", "h_ptr", "n_ptr")
    rows = {**dict.fromkeys(names, half), "width": "i32", "eps": "fp32"}
    found["add_layernorm"] = Case(add_layernorm_kernel, rows, {"BLOCK": 2048})
    gate = {"x_ptr": half, "y_ptr": half, "width": "i32"}
    found["geglu"] = Case(geglu_kernel, gate, {"BLOCK": triton_gate.BLOCK})
    down = {"x_ptr": half, "down_ptr": half, "h_ptr": half, **tokens}
    up = {"y_ptr": half, "h_ptr": half, "up_ptr": half, **tokens}
    inner, outer = {"INNER": triton_adapter.INNER}, {"OUTER": triton_adapter.OUTER}
    found["low_rank_add down"] = Case(down_kernel, down, {**rank, **inner})
    found["low_rank_add up"] = Case(up_kernel, up, {**rank, **outer})
    return found
