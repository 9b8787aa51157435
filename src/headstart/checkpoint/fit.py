"""Whether a file has exactly the tensors of the network that is built for it.

Otherwise one sentence: how many do not fit, three of them, and the nearest architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from headstart.checkpoint.dtypes import FLOATS, UNREAD, unsupported
from headstart.checkpoint.families import FAMILIES, Shapes
from headstart.checkpoint.tensors import TITLES, Part

MOST_NAMES = 3
"""Names of a list in an error."""
LONGEST = 120
"""Characters of a name in an error; the longest of a known file has 130."""


class Misfit(NamedTuple):
    """The sentence, and its lists in full."""

    sentence: str
    details: tuple[str, ...] = ()


def misfit(part: Part, expected: Shapes) -> Misfit | None:
    """What is wrong with a part whose network has the `expected` tensors; None: it fits."""
    shapes = part.shapes
    unknown = set(part.checkpoint.split().get("", {}).values())
    duplicates = [name for name in part.strays if name not in unknown]
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()) + duplicates,
        "of another shape": [
            f"{name[:LONGEST]} {list(shape)} instead of {list(expected[name])}"
            for name, shape in sorted(shapes.items())
            if name in expected and shape != expected[name]
        ],
        "not floating point": [
            f"{name[:LONGEST]} {part.dtype(name)}"
            for name in sorted(shapes)
            if name in expected and part.dtype(name) not in FLOATS
        ],
    }
    lines = [f"{len(names)} {p}: {first_few(names)}" for p, names in problems.items() if names]
    if not lines:
        return _unread(part)
    fix = _nearest(part) or ". Fetch the file again, or take one of a known family"
    if problems["unexpected"] and len(lines) == 1:
        fix += "; `--allow NAME` (allow=) lets such tensors be"
    details = tuple(
        "\n  ".join([f"{problem}:", *names])
        for problem, names in problems.items()
        if len(names) > MOST_NAMES
    )
    return Misfit(f"the {TITLES[part.name]} does not fit. {'; '.join(lines)}{fix}", details)


def _unread(part: Part) -> Misfit | None:
    dtypes = [part.dtype(name) for name in part.shapes]
    unread = min((dtype for dtype in dtypes if dtype in UNREAD), default=None)
    if unread is None:
        return None
    count = dtypes.count(unread)
    return Misfit(f"the {TITLES[part.name]} has {count} tensors of {unsupported(unread)}")


def first_few(names: Sequence[str]) -> str:
    """The first three, for a message."""
    more = ", ..." if len(names) > MOST_NAMES else ""
    return ", ".join(name[: 2 * LONGEST] for name in names[:MOST_NAMES]) + more


def _nearest(part: Part) -> str:
    """For a UNet: the full-size architecture of its widths with the nearest tensor count."""
    if part.name != "unet":
        return ""
    width = (*part.shapes.get("conv_in.weight", ()), 0)[0]
    contexts = (s[-1] for n, s in part.shapes.items() if n.endswith("attn2.to_k.weight") and s)
    context, count = next(contexts, 0), len(part.shapes)
    alike = [row for row in FAMILIES.values() if row.signature[1:] == (width, context)]
    if not alike:
        return ""
    near = min(alike, key=lambda row: abs(row.signature.tensors - count))
    return (
        f". The nearest known architecture is {near.name}, which has {near.signature.tensors} "
        f"tensors; this file has {count}: fetch it again, or give a model of a known family"
    )
