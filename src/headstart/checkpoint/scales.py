"""Eight-bit weights and their scales: which tensor of a file scales which, and how.

    number = float32(weight) * float32(scale)      one scale a tensor, a row, or (Quanto) a column

Without its scale such a weight is wrong by an unknown factor, so anything that does not match is an
error. Decided from names, dtypes and shapes; only short descriptions are read as data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, cast

from headstart.checkpoint.cast import widen
from headstart.checkpoint.header import Entry, fail, parse_object
from headstart.lazy import Array, np

Entries = Mapping[str, Entry]
Read = Callable[[str], memoryview]

SCALED = {f"{dtype}*scale": dtype for dtype in ("F8_E4M3", "F8_E5M2", "I8")}
"""The dtype of a weight that has a scale -> the dtype of its stored numbers.

A separate name, so that code for plain F8_E4M3 cannot take the stored numbers for the weight."""
DESCRIPTION_BYTES = 4096

Layout = Literal["tensor", "rows", "columns"]


class Scale(NamedTuple):
    """The stored name of a weight's scale, and its divisor."""

    name: str
    divisor: float = 1.0


class _Rule(NamedTuple):
    """Names: the scale is `module + scale`, its weight `module + weight`, ours `module.weight`."""

    scale: str
    weight: str
    scheme: str
    divisor: float = 1.0


_RULES = (
    # github.com/comfyanonymous/ComfyUI, comfy/ops.py `scaled_fp8_ops`
    _Rule(".scale_weight", ".weight", "ComfyUI"),
    # ComfyUI's QUANTIZATION.md; torchao's, compressed-tensors' and diffusers' exports
    _Rule(".weight_scale", ".weight", "weight_scale"),
    # github.com/huggingface/optimum-quanto, tensor/weights/qbytes.py
    _Rule(".weight._scale", ".weight._data", "optimum-quanto"),
    # arXiv:2208.07339, section 2: absmax of each row, which 127 steps of int8 reach
    _Rule(".SCB", ".weight", "bitsandbytes", 127.0),
)
LAYERS = "_quantization_metadata"
"""Metadata with ComfyUI's description of each layer."""
_MARKER, _DESCRIPTION, _ORDER = "scaled_fp8", ".comfy_quant", ".weight_format"
_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_COMPANIONS = (_DESCRIPTION, _ORDER, ".scale_input", ".input_scale", ".output_scale")
"""Scales of inputs and outputs only matter for rounding activations, not for weights."""
_FIX = "take a release in F16, BF16 or F32, or in eight bits with one scale a tensor or a row"

_UNSUPPORTED = (
    (".quant_state.bitsandbytes__nf4", "bitsandbytes' 4-bit nf4"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes' 4-bit fp4"),
    (".weight.absmax", "bitsandbytes' 4-bit weights"),
    (".smooth_factor", "nunchaku's 4-bit weights (SVDQuant)"),
    (".wscales", "nunchaku's 4-bit weights (SVDQuant)"),
    (".g_idx", "GPTQ's 4-bit weights"),
    (".qweight", "AWQ's or GPTQ's 4-bit weights"),
    (".weight_scale_2", "NVFP4, 4-bit weights with two scales"),
    (".weight_scale_inv", "float8 with a scale for each block (weight_scale_inv)"),
    (".weight._shift", "optimum-quanto's weights of fewer than 8 bits"),
    ("._weight_qdata", "torchao's packed weights"),
)
"""Ending of a tensor name -> its scheme, for schemes that are not supported."""

_LAST_WORDS = {ending.rpartition(".")[2] for ending, _ in _UNSUPPORTED} | {
    *(rule.scale.rpartition(".")[2] for rule in _RULES),
    *(ending[1:] for ending in _COMPANIONS),
    _MARKER,
}
"""Last components of names that only files with scales have."""


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a file's eight-bit weights.

    scheme   "float8 with a scale for each weight (ComfyUI)", or None: nothing scaled
    of       weight -> its scale
    renamed  name in the file -> our name of the weight, where they differ; stored: the reverse
    dropped  names of scales and markers, which are no weights
    """

    scheme: str | None = None
    of: Mapping[str, Scale] = field(default_factory=dict[str, Scale])
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])
    stored: Mapping[str, str] = field(default_factory=dict[str, str])
    dropped: frozenset[str] = frozenset()

    def with_dtype(self, name: str, entry: Entry) -> Entry:
        """The entry of a stored tensor, with the dtype of `SCALED` if it has a scale."""
        scaled = self.renamed.get(name, name) in self.of
        return entry._replace(dtype=f"{entry.dtype}*scale") if scaled else entry


def find(path: Path, entries: Entries, metadata: Mapping[str, str], read: Read) -> Scales:
    """The scales of the file `path`. `read` returns the bytes of a small tensor.

    Raises CheckpointError for an unsupported scheme; for a scale without a weight, of a wrong
    shape, or of a weight that is not eight-bit; and for a weight without a
    scale beside others with one.
    """
    if LAYERS not in metadata and not any(n.rpartition(".")[2] in _LAST_WORDS for n in entries):
        return Scales()  # 0.3 ms for SDXL's UNet of 1680 names; all that follows takes 8
    for ending, scheme in _UNSUPPORTED:  # the most specific first
        if name := next((name for name in entries if name.endswith(ending)), None):
            fail(path, f"{name[:120]!r} is of {scheme}, which is not read: {_FIX}")
    of: dict[str, Scale] = {}
    renamed: dict[str, str] = {}
    schemes: dict[str, None] = {}
    for name, entry in entries.items():
        rule = next((rule for rule in _RULES if name.endswith(rule.scale)), None)
        if rule is None:
            continue
        module = name.removesuffix(rule.scale)
        weight = module + rule.weight
        _check_pair(path, name, entry, weight, entries)
        if weight in of:
            fail(path, f"{weight[:120]!r} has two scales, {of[weight].name[-60:]!r} and "
                       f"{name[-60:]!r}: expected one")  # fmt: skip
        of[weight] = Scale(name, rule.divisor)
        if weight != (ours := f"{module}.weight"):
            if ours in entries:
                fail(path, f"{weight[:120]!r} and {ours[:120]!r} are one weight")
            renamed[weight] = ours
        dtype = "int8" if entries[weight].dtype == "I8" else "float8"
        schemes[f"{dtype} with a scale for each weight ({rule.scheme})"] = None
    companions = _companions(path, entries, of, read)
    _check_descriptions(path, entries, metadata, of, read)
    if of and (bare := [n for n in entries if _needs_scale(n, entries[n]) and n not in of]):
        fail(path, f"{next(iter(schemes))}, and {len(bare)} weights have none, such as "
                   f"{bare[0][:120]!r}: fetch the file again, or take another release")  # fmt: skip
    return Scales(
        scheme="; ".join(schemes) or None,
        of={renamed.get(weight, weight): scale for weight, scale in of.items()},
        renamed=renamed,
        stored={ours: name for name, ours in renamed.items()},
        dropped=frozenset(companions | {scale.name for scale in of.values()}),
    )


def factor(
    path: Path, scale: Scale, entry: Entry, raw: memoryview, weight: tuple[int, ...]
) -> Array:
    """A scale in float32: [], or of the weight's rank, so that it broadcasts.

    Raises CheckpointError unless it is positive and finite. An absmax may be 0, for a row of zeros.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        values = widen(raw, entry.dtype).astype("<f4") / np.float32(scale.divisor)
    valid = np.isfinite(values) & (values >= 0 if scale.divisor != 1 else values > 0)
    if not valid.all():
        fail(path, f"the scale {scale.name[:120]!r} holds {values[np.argmin(valid)]:g}: expected "
                   "positive finite numbers; the file is damaged, fetch it again")  # fmt: skip
    shapes = {"rows": (-1, *[1] * (len(weight) - 1)), "columns": (1, -1), "tensor": ()}
    return values.reshape(shapes[layout(weight, entry.shape) or "tensor"])


def layout(weight: tuple[int, ...], scale: tuple[int, ...]) -> Layout | None:
    """How a scale applies to its weight; None: it does not fit. "columns" is for matrices."""
    if math.prod(scale) == 1:
        return "tensor"
    if weight and scale in ((weight[0],), (weight[0], *[1] * (len(weight) - 1))):
        return "rows"
    return "columns" if len(weight) == 2 and scale == (1, weight[1]) else None


def _needs_scale(name: str, entry: Entry) -> bool:
    matrix = name.endswith((".weight", ".weight._data")) and len(entry.shape) > 1
    return matrix and entry.dtype in SCALED.values()


def _check_pair(path: Path, name: str, scale: Entry, weight: str, entries: Entries) -> None:
    if weight not in entries:
        fail(path, f"{name[:120]!r} is the scale of {weight[:120]!r}, which is not in the file: it "
                   "is torn; fetch it again")  # fmt: skip
    dtype, shape = entries[weight][:2]
    if dtype not in SCALED.values():
        fail(path, f"{name[:120]!r} is the scale of an eight-bit weight, and {weight[:120]!r} is "
                   f"{dtype}: it may have been widened without its scale; take the file it "
                   "was made from")  # fmt: skip
    if scale.dtype not in ("F64", "F32", "F16", "BF16"):
        fail(path, f"{name[:120]!r}: expected a scale in F32, F16 or BF16, got {scale.dtype}")
    if layout(shape, scale.shape) is None:
        fail(path, f"{name[:120]!r}: a scale {list(scale.shape)} for a weight {list(shape)}"
                   ": expected one number, or one for each row; one for each block is not read"
             )  # fmt: skip


def _companions(path: Path, entries: Entries, of: Mapping[str, Scale], read: Read) -> set[str]:
    """Names of markers, descriptions and activation scales beside scaled weights."""
    leads = {""} | {name[: at + 1] for name in of for at, sign in enumerate(name) if sign == "."}
    companions: set[str] = set()
    for name, entry in entries.items():
        ending = next((end for end in _COMPANIONS if name.endswith(end)), None)
        if name.rpartition(".")[2] == _MARKER:
            if not of or name.removesuffix(_MARKER) not in leads:
                fail(path, f"{name[:120]!r} says that weights are float8 with scales (ComfyUI), "
                           "and none has one: the scales are lost; fetch the file again"
                     )  # fmt: skip
        elif ending is not None:
            module = name.removesuffix(ending)
            weights = of.keys() if ending in (_DESCRIPTION, _ORDER) or not of else entries.keys()
            if not weights & {module + rule.weight for rule in _RULES}:
                fail(path, f"{name[:120]!r} is written beside an eight-bit weight with a scale, "
                           f"and there is no such {module[:120] + '.weight'!r}: the file is torn; "
                           "fetch it again")  # fmt: skip
            if ending == _ORDER and (entry.dtype != "U8" or any(read(name)[:8])):
                fail(path, f"{name[:120]!r}: int8 weights in an order of tiles (bitsandbytes), "
                           f"which is not read: {_FIX}")  # fmt: skip
        else:
            continue
        companions.add(name)
    return companions


def _check_descriptions(
    path: Path, entries: Entries, metadata: Mapping[str, str], of: Mapping[str, Scale], read: Read
) -> None:
    """ComfyUI's JSON of each layer must have one scale a tensor or row, and no rotation."""
    formats: dict[str, object] = {}
    if (text := metadata.get(LAYERS)) is not None:
        layers = parse_object(text.encode(), path).get("layers")
        if not isinstance(layers, dict):
            fail(path, f"metadata {LAYERS}: expected an object `layers`")
        formats |= cast(dict[str, object], layers)
    for name, entry in entries.items():
        if name.endswith(_DESCRIPTION):
            if entry.dtype != "U8" or entry.end - entry.begin > DESCRIPTION_BYTES:
                fail(path, f"{name[:120]!r}: expected a short JSON text as bytes")
            formats[name.removesuffix(_DESCRIPTION)] = parse_object(bytes(read(name)), path)
    modules = {name.removesuffix(".weight") for name in of}
    modules |= {name.removeprefix("model.diffusion_model.") for name in modules}
    for module, value in formats.items():
        layer = cast(dict[str, object], value) if isinstance(value, dict) else {"format": value}
        name = layer.get("format")
        if name not in _FORMATS:
            fail(path, f"{module[:120]!r} is quantised as {name!r:.60} (ComfyUI), which is not "
                       f"read: {_FIX}")  # fmt: skip
        if layer.get("convrot"):
            fail(path, f"{module[:120]!r} is int8 with its columns rotated (ComfyUI's convrot), "
                       f"which is not read: {_FIX}")  # fmt: skip
        if module not in modules:
            fail(path, f"{module[:120]!r} is declared as {name} with a scale (ComfyUI), and no "
                       "such weight has one: the file is torn; fetch it again")  # fmt: skip
