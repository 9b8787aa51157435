"""Many cases into a folder, in batches across prompts, each image whole or absent.

batch b of rank r: b % world == r      a finished case is verified and skipped

Batches are fixed by the list of cases, so which ranks there are and where they were interrupted
changes no bit; the size of a batch changes an image by the networks' rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from headstart.sweep.jobs import Case, batches
from headstart.sweep.ledger import Ledger

Draw = Callable[[Sequence[Case]], Sequence[bytes]]
"""Cases of one shape -> a PNG file each."""


class Swept(NamedTuple):
    """What one rank did. complete: whether the manifest of all ranks is written."""

    written: int
    skipped: int
    complete: bool


class Work(NamedTuple):
    """A rank's share: batches of which some case is unfinished, and the cases that are not."""

    batches: tuple[tuple[Case, ...], ...]
    pending: frozenset[int]
    skipped: int


def share(cases: Sequence[Case], ledger: Ledger, batch: int, least: int = 1) -> Work:
    """This rank's of `batches`, without those whose images are all in place; reads every image
    once."""
    rank, world = ledger.shard
    own = batches(cases, batch, least)[rank::world]
    pending = frozenset(c.number for part in own for c in part if not ledger.intact(c))
    left = tuple(part for part in own if not pending.isdisjoint(c.number for c in part))
    return Work(left, pending, sum(map(len, own)) - len(pending))


def sweep(
    cases: Sequence[Case],
    draw: Draw,
    ledger: Ledger,
    *,
    batch: int,
    on_cases: Callable[[int], object] = lambda _: None,
    work: Work | None = None,
) -> Swept:
    """Draw this rank's share, and write the manifest if that was the last of all.

    on_cases  called with the number of images put in place
    work      of `share`, where the caller wanted to know it first

    A batch that was interrupted is drawn whole, so that it has the same bits, and only the images
    it lacks are written.
    """
    work = share(cases, ledger, batch) if work is None else work
    if work.pending:
        ledger.begin()
    for part in work.batches:
        drawn = zip(part, draw(part), strict=True)
        missing = [(case, png) for case, png in drawn if case.number in work.pending]
        ledger.add(missing)
        on_cases(len(missing))
    return Swept(len(work.pending), work.skipped, ledger.merge(cases))
