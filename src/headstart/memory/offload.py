"""Which weights stay on a device, and which take turns in one arena: decided before loading.

    device bytes = weights that stay + arena + work of a stage
    saved by an arena of s bytes = sum over its parts of min(bytes, s) - s

Only what does not fit is moved: of a part that takes turns, the bytes beyond the arena stay on the
device. These measures are tried in this order, from the cheapest to the dearest:

    1. smaller chunks, then a decode in bands     (`budget.chunks`; nothing is moved)
    2. text encoders and the distilled model take turns     a new prompt moves the arena's bytes
       twice, the second time while the base's rows run
    3. text encoders, base and distilled take turns         a picture moves the arena's bytes twice

The results stay the same to the bit, except for a decode in bands (equal up to rounding).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from headstart.errors import InputError
from headstart.memory.budget import BANDS, SAFE_SHARE, Chunks, Footprint, Free, Shape, chunks

SPREAD = 0.06
"""Share of the weights that the allocator's segments waste where tensors are allocated one by one:
SDXL's take 5.6 % more than their bytes (counted, `tests/evidence/card.py`). An arena is one
allocation."""
RESERVE = 2**28
"""Bytes for the workspaces of libraries (cuBLAS: 32 MiB on Hopper) and for kernels, loaded at their
first use. An estimate, not measured."""
HOST_BYTES_PER_S = 25e9
"""From pinned memory over PCIe 4.0 x16 (31.5e9 in theory). An estimate, not measured."""
_RUN = ("text", "base", "distilled")
ORDER = ("text", "distilled", "base")
"""The parts that may take turns, the cheapest first: the distilled model can be copied back while
the base's rows run."""
_SINGLE = Chunks(1, 1)
_PASSES = 2
"""Rows of a guided base for each sample."""


class Move(NamedTuple):
    """A copy of a part to the device, and the stage that runs meanwhile, if one does."""

    part: str
    size_bytes: int
    behind: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One device's part of a plan.

    weights   part ("text", "base", "distilled", "vae") -> bytes of its weights on this device
    work      stage -> bytes besides weights, of one picture
    turns     parts that take turns, in the order of a run; arena: the bytes that they share
    fits      samples at once, for the planned size and batch
    free      bytes that were free, None where that is unknown
    float8    whether UNets are stored as float8 already
    """

    device: str
    weights: Mapping[str, int]
    work: Mapping[str, int]
    turns: tuple[str, ...] = ()
    arena: int = 0
    fits: Chunks = _SINGLE
    free: int | None = None
    float8: bool = False

    def moving(self, part: str) -> int:
        """Bytes of a part that are copied at every turn."""
        return min(self.weights[part], self.arena) if part in self.turns else 0

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights on the device, in any stage."""
        return self.arena + sum(size - self.moving(part) for part, size in self.weights.items())

    @property
    def need(self) -> int:
        """Bytes that must be free: weights, the allocator's waste, the largest stage's work."""
        waste = sum(size for part, size in self.weights.items() if part not in self.turns) * SPREAD
        work = max(self.work.values(), default=0) / SAFE_SHARE
        return int(self.resident_bytes + waste + work) + RESERVE

    @property
    def by_prompt(self) -> tuple[Move, ...]:
        """What a new prompt moves besides `by_picture`."""
        if "text" not in self.turns:
            return ()
        moves = [Move("text", self.moving("text"))]
        if not self.by_picture:
            other = next(part for part in self.turns if part != "text")
            behind = "base" if other == "distilled" and "base" in self.weights else None
            moves.append(Move(other, self.moving(other), behind))
        return tuple(moves)

    @property
    def by_picture(self) -> tuple[Move, ...]:
        """What every picture moves: the two models, where both take turns."""
        if not {"base", "distilled"} <= set(self.turns):
            return ()
        behind = None if "text" in self.turns else "decode"
        base = Move("base", self.moving("base"), behind)
        return base, Move("distilled", self.moving("distilled"))


def place(
    weights: Mapping[str, int],
    values: Footprint,
    shape: Shape,
    free: int | None,
    *,
    device: str = "cuda",
    float8: bool = False,
) -> Placement:
    """The cheapest placement that fits `free` bytes, for pictures of this shape with a guided base,
    and for a prompt and a negative prompt of one piece each.

    weights   part -> bytes, of the parts on this device

    Raises InputError where none fits; the message says what would.
    """
    states, row = shape.state_bytes, values.row_bytes(shape)
    least = {  # one sample at a time, decoded in bands
        "text": values.text_bytes(2, 77),
        "base": states + _PASSES * row,
        "distilled": states + row,
        "decode": states + min(values.decode_bytes(shape, bands) for bands in BANDS),
    }
    stages = {"decode" if part == "vae" else part for part in weights}
    work = {stage: size for stage, size in least.items() if stage in stages}
    placement = Placement(device=device, weights=weights, work=work, free=free, float8=float8)
    movable = [part for part in ORDER if part in weights]
    for count in (0, *range(2, len(movable) + 1)):
        turns = tuple(part for part in _RUN if part in movable[:count])
        placement = replace(placement, turns=turns, arena=0)
        excess = 0 if free is None else placement.need - free
        if excess <= 0:
            return _with_chunks(placement, values, shape)
        if (arena := arena_bytes([weights[part] for part in turns], excess)) is not None:
            return _with_chunks(replace(placement, arena=arena), values, shape)
    raise InputError(refusal(placement))


def arena_bytes(sizes: Sequence[int], excess: int) -> int | None:
    """The smallest arena s with sum(min(size, s)) - s >= excess; None where none saves so much.

    >>> arena_bytes([2, 5, 5], 3), arena_bytes([2, 5, 5], 8)
    (2, None)
    """
    below = 0  # of parts that fit in the arena as a whole
    for index, size in enumerate(sorted(sizes)[:-1]):
        larger = len(sizes) - index
        arena = -(-(excess - below) // (larger - 1))
        if arena <= size:
            return max(arena, 1)
        below += size
    return None


def _with_chunks(placement: Placement, values: Footprint, shape: Shape) -> Placement:
    weights = placement.weights
    if "vae" not in weights or not {"base", "distilled"} & set(weights):
        return placement
    most = int(max(placement.work.values(), default=0) / SAFE_SHARE)
    free = None if placement.free is None else placement.free - placement.need + most
    fits = chunks(shape, values, _PASSES, Free(free, free), device=placement.device)
    return replace(placement, fits=fits)


def note(placement: Placement) -> str | None:
    """For a person: what was chosen, what it costs, and how to choose otherwise."""
    names = [_NAMES[part] for part in placement.turns]
    if not names:
        return None
    moved = {"a picture": placement.by_picture, "for a new prompt": placement.by_prompt}
    costs = [f"{_cost(moves)} {occasion}" for occasion, moves in moved.items() if moves]
    least = max(placement.work.values(), default=0)
    return (
        f"memory: {_gb(placement.free or 0)} are free on {placement.device}, for "
        f"{_gb(sum(placement.weights.values()))} of weights and at least {_gb(least)} of work: so "
        f"{', '.join([*names[:-2], ' and '.join(names[-2:])])} take turns in "
        f"{_gb(placement.arena)} of it, out of the host's memory, which moves "
        f"{' and '.join(costs)}, estimated at {HOST_BYTES_PER_S / 1e9:.0f} GB/s; the results are "
        "the same to the bit. Otherwise: memory='none' (--memory none) moves nothing; "
        f"{_others(placement)}"
    )


def _cost(moves: Sequence[Move]) -> str:
    """`7.1 GB (285 ms, 140 of them beside the decode)`."""
    size = sum(move.size_bytes for move in moves)
    hidden = [
        f", {milliseconds(move.size_bytes):.0f} of them beside the {_BESIDE[move.behind]}"
        for move in moves
        if move.behind
    ]
    return f"{_gb(size)} ({milliseconds(size):.0f} ms{''.join(hidden)})"


def milliseconds(size_bytes: int) -> float:
    """The time of a copy to the device, at `HOST_BYTES_PER_S`."""
    return size_bytes / HOST_BYTES_PER_S * 1e3


def _others(placement: Placement) -> str:
    """Ways to need less memory that change the results."""
    lines, weights = list[str](), placement.weights
    models = [weights[part] for part in ("base", "distilled") if part in weights]
    if models and not placement.float8:
        lines.append(
            f"dtype='float8' (--dtype float8) stores {_gb(sum(models))} of UNets in about "
            f"{_gb(sum(models) // 2)}, rounded to eight bits"
        )
    if len(models) == 2:
        lines.append(
            "the distilled model as a LoRA on the base (`headstart transfer --base B --tuned D "
            "--rank 64 --out L`, then --distilled-lora L) leaves one UNet, and what it captures of "
            "the distilled one is printed; base and distilled may have a device each (--device "
            "base=cuda:0,distilled=cuda:1)"
        )
    return "; ".join(lines) or "take a model of fewer weights"


def refusal(most: Placement) -> str:
    """The message where weights do not fit even in turns; `most`: with all that may in turns."""
    sizes = [most.weights[part] for part in most.turns]
    need = most.need - sum(sizes) + max(sizes, default=0)
    return (
        f"the weights are {_gb(sum(most.weights.values()))}, and need {_gb(need)} of "
        f"{most.device} with its work even where they take turns; {_gb(most.free or 0)} are free, "
        f"or what memory= (--memory) allows of it: {_others(most)}; plan for a smaller picture "
        "(plan_size=, --size); or run on device='cpu'"
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


_NAMES = {"text": "the text encoders", "base": "the base", "distilled": "the distilled model"}
_BESIDE = {"base": "base's rows", "decode": "decode"}
