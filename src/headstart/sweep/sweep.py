"""Many cases into a folder, in batches across prompts, each image whole or absent.

batch b of rank r: b % world == r      a finished case is verified and skipped

Batches depend on the list of cases alone, so neither the number of ranks nor an interruption
changes a bit; the size of a batch changes an image by the networks' rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from headstart.sweep.jobs import Case, batches
from headstart.sweep.ledger import Ledger

Draw = Callable[[Sequence[Case]], Sequence[bytes]]
"""Cases of one shape -> a PNG file each."""


class SweepResult(NamedTuple):
    """Images written and skipped by one rank; whether the manifest of all ranks is complete."""

    written: int
    skipped: int
    complete: bool


class Work(NamedTuple):
    """A rank's share: its unfinished batches, the numbers of their unfinished cases (pending), and
    how many cases of its batches are finished (skipped)."""

    batches: tuple[tuple[Case, ...], ...]
    pending: frozenset[int]
    skipped: int


def share(cases: Sequence[Case], ledger: Ledger, batch: int, least: int = 1) -> Work:
    """This rank's batches, without those whose images are all finished; reads every image once."""
    rank, world = ledger.shard
    rank_batches = batches(cases, batch, least)[rank::world]
    rank_cases = [case for group in rank_batches for case in group]
    pending = frozenset(case.number for case in rank_cases if not ledger.intact(case))
    unfinished = tuple(
        group for group in rank_batches if not pending.isdisjoint(case.number for case in group)
    )
    return Work(unfinished, pending, len(rank_cases) - len(pending))


def sweep(
    cases: Sequence[Case],
    draw: Draw,
    ledger: Ledger,
    *,
    batch: int,
    on_cases: Callable[[int], object] = lambda _: None,
    work: Work | None = None,
) -> SweepResult:
    """Draw this rank's share, and write the manifest if that was the last of all.

    on_cases  called with the number of images written
    work      the result of `share`, if the caller has it already

    A batch that was interrupted is drawn whole, so that it has the same bits, and only the images
    it lacks are written.
    """
    work = share(cases, ledger, batch) if work is None else work
    if work.pending:
        ledger.begin()
    for group in work.batches:
        pngs = zip(group, draw(group), strict=True)
        missing = [(case, png) for case, png in pngs if case.number in work.pending]
        ledger.add(missing)
        on_cases(len(missing))
    return SweepResult(len(work.pending), work.skipped, ledger.merge(cases))
