"""The numbers of a trace: as JSON, as a table for a terminal, and what its curves mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headstart.metrics.resample import finite_or_none
from headstart.plan.table import level_text
from headstart.traces.strip import Strip
from headstart.traces.timeline import FALSE_RATE, Timeline


def curves_text(timelines: Sequence[Timeline]) -> str:
    """What the curves of watched phrases are, and how often they would be wrong."""
    nulls = [null for timeline in timelines for null in timeline.nulls if null is not None]
    text = (
        "curves: how far a phrase is beyond the same run without it, by "
        f"{timelines[0].scorer} ({timelines[0].meaning})"
    )
    if not nulls:
        return text
    courses, crossed = sum(n.courses for n in nulls), sum(n.crossed for n in nulls)
    share = 100 * (1 - FALSE_RATE)
    return (
        f"{text} · 1: further than {share:.0f} % of what nobody asked for ({crossed} of {courses} "
        "come further)"
    )


def strip_json(strip: Strip) -> dict[str, Any]:
    timeline = strip.timeline
    return {
        "name": strip.name,
        "prompt": strip.prompt,
        "seeds": list(strip.seeds),
        "passes": strip.table.passes(),
        "handoffs": list(strip.table.handoffs),
        "from_step": strip.from_step,
        "moved": None if strip.moved is None else [finite_or_none(part) for part in strip.moved],
        "steps": [figures.to_json() for figures in strip.measured.figures],
        "share_by_seed": [
            [finite_or_none(share, 4) for share in row] for row in strip.measured.share.tolist()
        ],
        "timeline": None if timeline is None else timeline.to_json(strip.seeds, strip.rows),
    }


def strip_text(strip: Strip) -> str:
    lines = [
        strip.name + _moved_text(strip),
        f"{'step':>4}  {'model':<10}{'timestep':>9}{'sigma':>9}{'A':>9}"
        f"{'distance':>10}{'share':>8}{'95 %':>16}{'spread':>9}",
    ]
    for row in strip.measured.figures:
        share = row.share
        ends = "" if np.isnan(share.low) else f"{share.low:.2f} .. {share.high:.2f}"
        spread = "" if np.isnan(row.spread.value) else f"{row.spread.value:.3f}"
        lines.append(
            f"{row.step:>4}  {row.model:<10.9}{row.timestep:>9.4g}{level_text(row.sigma, '.3f'):>9}"
            f"{row.amplification:>9.4g}{row.distance.value:>10.3f}{share.value:>8.2f}{ends:>16}"
            f"{spread:>9}"
        )
    if strip.timeline is not None:
        lines += [_fates(strip, number) for number in range(len(strip.timeline.phrases))]
    return "\n".join(lines)


def _moved_text(strip: Strip) -> str:
    if strip.moved is None:
        return ""
    value, low, high = strip.moved
    ends = "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]"
    return f": moves the image by {value:.3f}{ends}"


def _fates(strip: Strip, phrase: int) -> str:
    assert strip.timeline is not None
    name, null = strip.timeline.phrases[phrase], strip.timeline.nulls[phrase]
    if null is None:
        return f"  {name!r}: not asked for"
    pairs = zip(strip.seeds, strip.timeline.courses, strict=True)
    fates = [f"seed {seed} {courses[phrase].fate(strip.rows)}" for seed, courses in pairs]
    return f"  {name!r}, beyond {null.without!r}: {'; '.join(fates)}"
