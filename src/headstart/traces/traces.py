"""DT-visualisation: what a model is aiming at, at every step (arXiv:2503.10637, figures 3 to 5).

trajectories with x0 kept -> decoder -> pictures and numbers -> sheet, animation, page, table
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from headstart.errors import InputError
from headstart.metrics.features import SCORER, bundled_scorer, open_features
from headstart.plan.table import StepTable
from headstart.traces.animation import Animation, animate
from headstart.traces.branches import Branch
from headstart.traces.decoders import Decoder
from headstart.traces.filmstrip import draw_filmstrip
from headstart.traces.page import write_page
from headstart.traces.strip import Strip
from headstart.traces.structure import (
    Figures,
    Space,
    feature_space,
    measure,
    moved,
    pixel_space,
    plain,
)
from headstart.traces.timeline import ConceptScorer, watch

DEMO_THRESHOLD = 0.5
"""Of the bundled scorer's cosine. Over 5 subjects x 8 seeds of the hybrid, finished pictures scored
0.55 to 0.76 with their own noun and at most 0.46 with any of the other 27."""


class Traced(Protocol):
    """A finished run: a Trajectory, or a Branch of one."""

    @property
    def rgb(self) -> Tensor: ...
    @property
    def x0(self) -> Tensor | None: ...
    @property
    def table(self) -> StepTable: ...
    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    @property
    def chunk(self) -> int: ...
    @property
    def lineage(self) -> str | None: ...


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Pictures and numbers of several plans for one prompt.

    decoder   what the pictures of x0 were made with; space: what they were compared in
    problems  steps for which the decoder failed: they have no picture and no numbers
    """

    prompt: str
    decoder: str
    space: str
    strips: tuple[Strip, ...]
    problems: tuple[str, ...] = ()

    def sheet(self, *, columns: int = 8) -> Image.Image:
        """The contact sheet, with at most `columns` steps a plan beside the finished images."""
        if columns < 1:
            raise InputError(f"a sheet has at least 1 column, not {columns}")
        return draw_filmstrip(
            self.strips,
            title=f"“{self.prompt}”",
            subtitle="what each step is aiming at (x0), by noise level from left to right",
            footer=self.footer(),
            most=columns,
        )

    def animation(self) -> Animation:
        """Plans side by side, all at the same noise level, from the first row to the images."""
        return animate(self.strips, title=f"“{self.prompt}”")

    def page(self) -> str:
        """One self-contained HTML page to scrub through, with nothing from elsewhere."""
        return write_page(self.strips, prompt=self.prompt, footer=self.footer())

    def table(self) -> dict[str, tuple[Figures, ...]]:
        """Plan -> one row of numbers a looked-at step, over all seeds."""
        return {strip.name: strip.measured.figures for strip in self.strips}

    def footer(self) -> str:
        """What the numbers mean."""
        count = max(len(strip.seeds) for strip in self.strips)
        text = (
            f"under a picture: share of final structure, how far it is on the way from a blank to "
            f"the last step's picture · by {self.space}, {self.decoder} decoder · "
            f"{count} seed{'s' * (count > 1)}"
        )
        if any(strip.moved is not None for strip in self.strips):
            text += " · moved by: the same distance, from the image without the change"
        scorers = {s.timeline.scorer: s.timeline.meaning for s in self.strips if s.timeline}
        told = [f"curves: {meaning} by {name}" for name, meaning in scorers.items()]
        return " · ".join([text, *told])

    def to_json(self) -> dict[str, Any]:
        """All numbers; `share_by_seed` is [steps][seeds]."""
        return {
            "prompt": self.prompt,
            "decoder": self.decoder,
            "space": self.space,
            "problems": list(self.problems),
            "plans": [_strip_json(strip) for strip in self.strips],
        }

    def __str__(self) -> str:
        """The table for a terminal."""
        return "\n\n".join(map(_strip_text, self.strips))


def trace(
    trajectories: Mapping[str, Traced] | Sequence[Traced],
    decoder: Decoder,
    *,
    space: Space | None = None,
    phrases: Sequence[str] = (),
    scorer: ConceptScorer | None = None,
    every: int = 1,
    on_step: Callable[[], object] | None = None,
) -> Trace:
    """Decode what every row predicted, and measure it.

        runs = {plan: engine.sample("a fox", plan=plan, seeds=range(4), keep_x0=True)
                for plan in ("base", "distilled", "hybrid")}
        hs.trace(runs, hs.decoder(engine, "tiny")).sheet().save("trace.png")

    trajectories  runs of one prompt each, sampled with keep_x0=True; by the name to show, or named
                  by their tables
    space         what pictures are compared in; None: the bundled scorer's features for the demo
                  family, colours on a grid for any other
    phrases       concepts to watch for; scorer: what says if they are there, None: the bundled one
    every         look at every n-th row of the longest run; a run of fewer rows is seen whole
    on_step       called after each picture row, for progress

    The blank is the decoder's picture of latents that are 0, which is what a network knows before
    it has seen anything. Raises InputError for runs without x0, for a decoder of another family,
    and for a family that the bundled scorer was not made for.
    """
    runs = _named(trajectories)
    if every < 1:
        raise InputError(f"every is at least 1, got {every}")
    for name, run in runs.items():
        _check(name, run, decoder)
    lineage = next(iter(runs.values())).lineage
    if phrases and scorer is None:
        scorer = demo_scorer(lineage)
    longest = max(len(run.table) for run in runs.values())
    problems: list[str] = []
    strips: list[Strip] = []
    for name, run in runs.items():
        rows = looked_at(len(run.table), longest, every)
        frames, good = _decode(name, run, rows, decoder, problems, on_step)
        chosen = space or _space(lineage, frames.shape[2:4])
        space = chosen
        steps = [(row, run.table[row]) for row in rows]
        blank = _blank(run, decoder) if good.any() else None
        strips.append(
            Strip(
                name=name,
                prompt=run.prompts[0],
                seeds=run.seeds,
                table=run.table,
                rows=rows,
                frames=frames,
                good=good,
                final=run.rgb.cpu().numpy(),
                measured=measure(steps, frames, good, blank, chosen),
                timeline=None if scorer is None else watch(frames, good, phrases, scorer),
                **_changed(run, chosen),
            )
        )
    assert space is not None
    return Trace(
        prompt=strips[0].prompt,
        decoder=decoder.name,
        space=space.name,
        strips=tuple(strips),
        problems=tuple(problems),
    )


def _changed(run: Traced, space: Space) -> dict[str, Any]:
    if not isinstance(run, Branch):
        return {}
    far = moved(run.rgb.cpu().numpy(), run.original.cpu().numpy(), space)
    return {"from_step": run.from_step, "moved": far}


def looked_at(count: int, longest: int, every: int) -> tuple[int, ...]:
    """Row numbers: every n-th and the last; all of a run that has no more than the longest keeps.

    >>> looked_at(30, 30, 10), looked_at(4, 30, 10)
    ((0, 10, 20, 29), (0, 1, 2, 3))
    """
    if count <= -(-longest // every) + 1:
        return tuple(range(count))
    return tuple(sorted({*range(0, count, every), count - 1}))


def demo_scorer(lineage: str | None = "demo") -> ConceptScorer:
    """The bundled scorer. Raises InputError for pictures of a family it was not trained on."""
    if lineage != "demo":
        raise InputError(
            "the bundled scorer knows the bundled pair's pictures only: name one for yours, a "
            "folder with a CLIP model (scorer=clip_scorer(FOLDER), --scorer FOLDER)"
        )
    scorer = bundled_scorer()

    def score(rgb: NDArray[np.uint8], phrases: Sequence[str]) -> NDArray[np.float64]:
        pixels = torch.as_tensor(rgb).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        return scorer.score(pixels, phrases).double().numpy()

    return ConceptScorer(
        name=SCORER,
        score=score,
        threshold=DEMO_THRESHOLD,
        meaning="cosine of picture and phrase",
    )


def _space(lineage: str | None, size: tuple[int, ...]) -> Space:
    if lineage == "demo":
        return feature_space(open_features("scorer").extractor)
    return pixel_space(size[0], size[1])


def _named(trajectories: Mapping[str, Traced] | Sequence[Traced]) -> dict[str, Traced]:
    if isinstance(trajectories, Mapping):
        named = dict(trajectories)
    else:
        named: dict[str, Traced] = {}
        for run in trajectories:
            if run.table.name in named:
                raise InputError(
                    f"two runs are called {run.table.name!r}: give them as {{name: run}}"
                )
            named[run.table.name] = run
    if not named:
        raise InputError("a trace needs at least one run")
    return named


def _check(name: str, run: Traced, decoder: Decoder) -> None:
    if run.x0 is None:
        raise InputError(
            f"run {name!r} kept no x0: sample it with keep_x0=True (a trace looks at every row)"
        )
    if len(set(run.prompts)) != 1:
        raise InputError(
            f"run {name!r} has {len(set(run.prompts))} prompts: a trace compares seeds of one"
        )
    decoder.check_space(run.lineage)
    decoder.check(run.x0[0])


def _decode(
    name: str,
    run: Traced,
    rows: Sequence[int],
    decoder: Decoder,
    problems: list[str],
    on_step: Callable[[], object] | None,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Pictures uint8 [S, B, H, W, 3] of the rows, and which of them are there [S, B]."""
    assert run.x0 is not None
    _, batch, _, height, width = run.x0.shape
    shape = (batch, height * decoder.scale, width * decoder.scale, 3)
    frames = np.zeros((len(rows), *shape), np.uint8)
    good = np.zeros((len(rows), batch), np.bool_)
    for index, row in enumerate(rows):
        try:
            parts = (run.x0[row][i : i + run.chunk] for i in range(0, batch, run.chunk))
            drawn = [decoder(part) for part in parts]
            frames[index] = torch.cat([picture.rgb for picture in drawn]).cpu().numpy()
            good[index] = torch.cat([picture.finite for picture in drawn]).cpu().numpy()
        except (RuntimeError, ValueError) as error:
            told = str(error).strip().splitlines() or [type(error).__name__]
            problems.append(f"{name}, step {row}: the {decoder.name} decoder failed: {told[0]}")
        else:
            if not good[index].all():
                bad = [run.seeds[i] for i in np.flatnonzero(~good[index]).tolist()]
                problems.append(
                    f"{name}, step {row}: the {decoder.name} decoder gave NaN or infinity for "
                    f"seed(s) {bad}"
                )
        if on_step is not None:
            on_step()
    return frames, good


def _blank(run: Traced, decoder: Decoder) -> NDArray[np.uint8]:
    assert run.x0 is not None
    return decoder(torch.zeros_like(run.x0[0, :1])).rgb[0].cpu().numpy()


def _strip_json(strip: Strip) -> dict[str, Any]:
    timeline = strip.timeline
    return {
        "name": strip.name,
        "prompt": strip.prompt,
        "seeds": list(strip.seeds),
        "passes": strip.table.passes(),
        "handoffs": list(strip.table.handoffs),
        "from_step": strip.from_step,
        "moved": None if strip.moved is None else [plain(part) for part in strip.moved],
        "steps": [figures.to_json() for figures in strip.measured.figures],
        "share_by_seed": [
            [round(v, 4) if np.isfinite(v) else None for v in row]
            for row in strip.measured.share.tolist()
        ],
        "timeline": None if timeline is None else timeline.to_json(strip.seeds, strip.rows),
    }


def _strip_text(strip: Strip) -> str:
    lines = [
        strip.name + _told_moved(strip),
        f"{'step':>4}  {'model':<10}{'timestep':>9}{'sigma':>9}{'A':>9}"
        f"{'distance':>10}{'share':>8}{'95 %':>16}{'spread':>9}",
    ]
    for row in strip.measured.figures:
        share = row.share
        ends = "" if np.isnan(share.low) else f"{share.low:.2f} .. {share.high:.2f}"
        spread = "" if np.isnan(row.spread.value) else f"{row.spread.value:.3f}"
        lines.append(
            f"{row.step:>4}  {row.model:<10.9}{row.timestep:>9.4g}{row.sigma:>9.3f}"
            f"{row.amplification:>9.4g}{row.distance.value:>10.3f}{share.value:>8.2f}{ends:>16}"
            f"{spread:>9}"
        )
    if strip.timeline is not None:
        lines += [_fates(strip, number) for number in range(len(strip.timeline.phrases))]
    return "\n".join(lines)


def _told_moved(strip: Strip) -> str:
    if strip.moved is None:
        return ""
    value, low, high = strip.moved
    ends = "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]"
    return f": moves the image by {value:.3f}{ends}"


def _fates(strip: Strip, phrase: int) -> str:
    assert strip.timeline is not None
    told: list[str] = []
    for seed, courses in zip(strip.seeds, strip.timeline.courses, strict=True):
        course = courses[phrase]
        if course.appears is None:
            told.append(f"seed {seed} never")
        elif course.abandoned is None:
            told.append(f"seed {seed} from step {strip.rows[course.appears]}")
        else:
            begin, end = strip.rows[course.appears], strip.rows[course.abandoned]
            told.append(f"seed {seed} from step {begin}, gone at {end}")
    return f"  {strip.timeline.phrases[phrase]!r}: {'; '.join(told)}"
