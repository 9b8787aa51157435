"""The dtypes of tensors in a file, by safetensors' names: which are read, widened or refused."""

from __future__ import annotations

from headstart.checkpoint.gguf import BLOCKS
from headstart.checkpoint.header import DTYPE_BITS
from headstart.checkpoint.scales import SCALED

FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
UNREAD = frozenset(d for d in DTYPE_BITS if d.startswith(("F8_", "F6_", "F4"))) - FLOAT8
FLOATS = frozenset({"F64", "F32", "F16", "BF16", *FLOAT8, *SCALED, *BLOCKS, *UNREAD})
WIDENED = frozenset({*FLOAT8, *SCALED, *BLOCKS})
"""Weights of fewer bits than a network computes with, which `Checkpoint.tensor` widens."""
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def unsupported(dtype: str) -> str:
    """A clause for dtypes that are only known by name: six bits, rare float8, complex."""
    return (
        f"{dtype}, which is not supported: take a release of this model in F16, BF16 or F32, or in "
        "F8_E4M3 or F8_E5M2"
    )
