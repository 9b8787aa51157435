"""Whether a file's tensors are those of the network built for them: all of them, and no other.

What does not fit is told in one error, grouped, with the architecture that comes nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headstart.checkpoint.families import FAMILIES
from headstart.checkpoint.tensors import FLOATS, Part
from headstart.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

SHOWN = 12
"""More names than this are told as counts a block; the exception's notes list every one."""


def check_fit(part: Part, expected: Shapes) -> None:
    """Raise CheckpointError unless the part has exactly these tensors, in floating point.

    The message groups what is missing, unexpected, of another shape and not floating point. Where
    a group is long it counts by block, and `__notes__` of the error holds the whole list.
    """
    shapes = part.shapes
    shared = expected.keys() & shapes.keys()
    complaints = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()) + list(part.strays),
        "of another shape": [
            f"{name} {list(shapes[name])} instead of {list(expected[name])}"
            for name in sorted(shared)
            if shapes[name] != expected[name]
        ],
        "not floating point": [
            f"{name} {part.dtype(name)}"
            for name in sorted(shared)
            if part.dtype(name) not in FLOATS
        ],
    }
    told = {what: names for what, names in complaints.items() if names}
    if not told:
        return
    lines = [f"{len(names)} {what}: {_grouped(names)}" for what, names in told.items()]
    error = CheckpointError(
        f"{part.checkpoint.files[0]}: the {part.name} does not fit. "
        + "; ".join(lines)
        + _nearest(part)
    )
    for what, names in told.items():
        if len(names) > SHOWN:
            error.add_note("\n".join([f"{what}:", *(f"  {name}" for name in names)]))
    raise error


def _grouped(names: Sequence[str]) -> str:
    if len(names) <= SHOWN:
        return ", ".join(names)
    counts: dict[str, int] = {}
    for name in names:
        block = ".".join(name.split(" ")[0].split(".")[:2])
        counts[block] = counts.get(block, 0) + 1
    return ", ".join(f"{block} ({count})" for block, count in counts.items())


def _nearest(part: Part) -> str:
    """Of a UNet: the full-size row of that width and context with the nearest tensor count."""
    if part.name != "unet":
        return ""
    width = part.shapes.get("conv_in.weight", (0,))[0]
    contexts = (s[-1] for n, s in part.shapes.items() if n.endswith("attn2.to_k.weight"))
    context, count = next(contexts, 0), len(part.shapes)
    near = min(
        FAMILIES.values(),
        key=lambda family: (
            family.signature.context_dim != context,
            family.signature.width != width,
            abs(family.signature.tensors - count),
        ),
    )
    if near.signature.context_dim != context or near.signature.width != width:
        return ""
    return (
        f". The nearest known architecture is {near.name}, which has {near.signature.tensors} "
        f"tensors; this file has {count}: fetch it again, or give a model of a known family"
    )
