"""DT-visualisation: what a model is aiming at, at every step (arXiv:2503.10637, figures 3 to 5).

trajectories with x0 kept -> decoder -> pictures and numbers -> sheet, animation, page, table
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import headstart_weights
from headstart.engine.trajectory import Trajectory
from headstart.errors import InputError, first_line
from headstart.metrics.features import SCORER, open_features
from headstart.traces.animation import Animation, animate
from headstart.traces.branches import Branch
from headstart.traces.decoders import Decoder
from headstart.traces.filmstrip import draw_filmstrip
from headstart.traces.page import write_page
from headstart.traces.strip import Strip
from headstart.traces.structure import Figures, Space, feature_space, measure, moved, pixel_space
from headstart.traces.timeline import ConceptScorer, DecodedRun, curves_text, phrase_of, watch

Traced: TypeAlias = Trajectory | Branch
"""A finished run, or one that went on from a step of it."""


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
        timelines = [strip.timeline for strip in self.strips if strip.timeline is not None]
        return f"{text} · {curves_text(timelines)}" if timelines else text

    def to_json(self) -> dict[str, Any]:
        """All numbers; `share_by_seed` is [steps][seeds]."""
        return {
            "prompt": self.prompt,
            "decoder": self.decoder,
            "space": self.space,
            "problems": list(self.problems),
            "plans": [strip.to_json() for strip in self.strips],
        }

    def __str__(self) -> str:
        """The table for a terminal."""
        return "\n\n".join(map(str, self.strips))


def trace(
    trajectories: Mapping[str, Traced] | Sequence[Traced],
    decoder: Decoder,
    *,
    space: Space | None = None,
    phrases: Sequence[str] = (),
    controls: Mapping[str, Mapping[str, Traced]] | None = None,
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
    controls      phrase -> runs under the same names, seeds and plans, of the prompt without it
                  (`without` takes it out). A phrase without one counts as not asked for, and is
                  never called there; see `headstart.traces.timeline`
    every         look at every n-th row of the longest run, and at all rows of a shorter one
    on_step       called after each picture row, for progress

    The blank is the decoder's picture of latents that are 0, which is what a network knows before
    it has seen anything. Raises InputError for runs without x0, for a decoder of another family,
    and for a family that the bundled scorer was not made for.
    """
    runs = _by_name(trajectories)
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
        controls_of = _controls(name, run, controls or {}, phrases)
        runs_of = {id(other): other for other in (run, *controls_of.values())}
        pictures = {
            key: _decode(name, other, rows, decoder, problems, on_step)
            for key, other in runs_of.items()
        }
        _, frames, good = pictures[id(run)]
        decoded_controls = {phrase: pictures[id(other)] for phrase, other in controls_of.items()}
        space = space or _space(lineage, frames.shape[2:4])
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
                measured=measure(steps, frames, good, blank, space),
                timeline=scorer and watch(pictures[id(run)], phrases, decoded_controls, scorer),
                **_branch_fields(run, space),
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


def _branch_fields(run: Traced, space: Space) -> dict[str, Any]:
    if not isinstance(run, Branch):
        return {}
    distance = moved(run.rgb.cpu().numpy(), run.original.cpu().numpy(), space)
    return {"from_step": run.from_step, "moved": distance}


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
    score, names = open_features("scorer").scores, headstart_weights.manifest().concepts
    assert score is not None
    return ConceptScorer(
        name=SCORER,
        score=score,
        meaning="cosine of picture and phrase",
        unasked=tuple(map(phrase_of, names)),
    )


def _space(lineage: str | None, size: tuple[int, ...]) -> Space:
    if lineage == "demo":
        return feature_space(open_features("scorer").extractor)
    return pixel_space(size[0], size[1])


def _by_name(trajectories: Mapping[str, Traced] | Sequence[Traced]) -> dict[str, Traced]:
    if isinstance(trajectories, Mapping):
        runs = dict(trajectories)
    else:
        names = [run.table.name for run in trajectories]
        runs = dict(zip(names, trajectories, strict=True))
        if repeated := [name for name in runs if names.count(name) > 1]:
            raise InputError(f"two runs are called {repeated[0]!r}: give them as {{name: run}}")
    if not runs:
        raise InputError("a trace needs at least one run")
    return runs


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
) -> DecodedRun:
    """x0 of the rows as pictures, and which of them are there."""
    assert run.x0 is not None
    _, batch, _, height, width = run.x0.shape
    shape = (batch, height * decoder.scale, width * decoder.scale, 3)
    frames = np.zeros((len(rows), *shape), np.uint8)
    good = np.zeros((len(rows), batch), np.bool_)
    for index, row in enumerate(rows):
        try:
            parts = (run.x0[row][i : i + run.chunk] for i in range(0, batch, run.chunk))
            pictures = [decoder(part) for part in parts]
            frames[index] = torch.cat([picture.rgb for picture in pictures]).cpu().numpy()
            good[index] = torch.cat([picture.finite for picture in pictures]).cpu().numpy()
        except (RuntimeError, ValueError) as error:
            problem = f"failed: {first_line(error)}"
        else:
            bad = [run.seeds[i] for i in np.flatnonzero(~good[index]).tolist()]
            problem = f"gave NaN or infinity for seed(s) {bad}" if bad else ""
        if problem:
            problems.append(f"{name}, step {row}: the {decoder.name} decoder {problem}")
        if on_step is not None:
            on_step()
    return DecodedRun(run.prompts[0], frames, good)


def _controls(
    name: str,
    run: Traced,
    controls: Mapping[str, Mapping[str, Traced]],
    phrases: Sequence[str],
) -> dict[str, Traced]:
    """The run without each phrase that has one. Raises InputError for one of another plan."""
    if unknown := sorted(set(controls) - set(phrases)):
        raise InputError(f"a control for {unknown[0]!r}, which is not watched: add it to phrases")
    controls_of: dict[str, Traced] = {}
    for phrase, runs in controls.items():
        control = runs.get(name)
        if control is None:
            raise InputError(f"the control of {phrase!r} has no run {name!r}: it has {list(runs)}")
        if (control.table, control.seeds) != (run.table, run.seeds) or control.x0 is None:
            raise InputError(
                f"the control of {phrase!r} is no twin of run {name!r}: sample it with the same "
                "plan and seeds, and keep_x0=True"
            )
        controls_of[phrase] = control
    return controls_of


def _blank(run: Traced, decoder: Decoder) -> NDArray[np.uint8]:
    assert run.x0 is not None
    return decoder(torch.zeros_like(run.x0[0, :1])).rgb[0].cpu().numpy()
