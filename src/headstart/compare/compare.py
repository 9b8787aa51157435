"""One prompt and the same seeds by base, distilled, hybrid and skip-first.

row = (network passes, seconds for all images, diversity in each space, Vendi, prompt score)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from headstart.conditioning.texts import final_text
from headstart.diversify.method import Method
from headstart.diversify.select import Select
from headstart.engine.engine import Engine
from headstart.errors import InputError
from headstart.metrics.gram import group_features
from headstart.metrics.metrics import diversity_heads, vendi, word_of
from headstart.metrics.resample import Interval, bootstrap_seeds
from headstart.pictures.sheet import Row, draw_sheet
from headstart.plan.table import StepTable
from headstart.sampler import State
from headstart.spaces.extractor import Distance, Extractor, Judge

PLANS = ("base", "distilled", "hybrid", "skip-first")
MIN_RUN_S, MOST_ROUNDS = 1.0, 3
"""A plan is run until its runs took MIN_RUN_S together, at most MOST_ROUNDS times, as torch's
`benchmark.Timer.blocked_autorange(min_run_time=)` does. Short runs are noisy and cheap to repeat:
one run of the bundled base takes as long as three runs of each of the others."""


class SeedVariety(NamedTuple):
    """How varied images are in one space. Diversity needs two images, its interval three."""

    diversity: Interval | None
    vendi: float

    @classmethod
    def of(cls, images: NDArray[np.uint8], extractor: Extractor) -> SeedVariety:
        features = group_features(extractor, images)
        several = len(features) > 1
        diversity = bootstrap_seeds(features, extractor.distance) if several else None
        return cls(diversity, vendi(features))

    def to_json(self) -> dict[str, Any]:
        value, *ends = self.diversity.rounded() if self.diversity else (None,)
        has_ends = self.diversity is not None and self.diversity.has_ends
        return {
            "diversity": value,
            "diversity_95": ends if has_ends else None,
            "vendi": round(self.vendi, 4),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One plan's images uint8 [n, H, W, 3], what they cost, and how varied they are by space."""

    name: str
    passes: int
    latency_s: float
    """The median of `rounds` runs."""
    rounds: int
    images: NDArray[np.uint8]
    spaces: dict[str, SeedVariety]
    score: float | None

    @property
    def variety(self) -> SeedVariety:
        """In the first space."""
        return next(iter(self.spaces.values()))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passes": self.passes,
            "latency_s": round(self.latency_s, 4),
            "rounds": self.rounds,
            "images": len(self.images),
            **self.variety.to_json(),
            "score": None if self.score is None else round(self.score, 4),
            "spaces": {name: variety.to_json() for name, variety in self.spaces.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The outcomes for one prompt: of all plans in the order of PLANS, then of methods."""

    prompt: str
    seeds: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    spaces: tuple[str, ...]
    """Extractors, the one of `diversity` first."""
    setting: str
    """Device, threads and versions, in words."""
    distances: tuple[Distance, ...]
    """How features are compared in each of the spaces."""
    scored_by: str | None = None

    def to_json(self, sheet: str) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "seeds": list(self.seeds),
            "sheet": sheet,
            "extractor": self.spaces[0],
            "spaces": list(self.spaces),
            "scored_by": self.scored_by,
            "setting": self.setting,
            "plans": [outcome.to_json() for outcome in self.outcomes],
        }

    def __str__(self) -> str:
        """The table for a terminal."""
        width = max(12, *(len(outcome.name) + 2 for outcome in self.outcomes))
        head = f"{'plan':<{width}}{'passes':>8}{'seconds':>9}{'':4}"
        head += "".join(f"{word:>11}{'95 %':>16}" for word in diversity_heads(self.spaces))
        lines = [head + f"{'Vendi':>8}{'score':>8}"]
        for row in self.outcomes:
            line = f"{row.name:<{width}}{row.passes:>8}{row.latency_s:>9.2f}{f' x{row.rounds}':<4}"
            for diversity, _ in row.spaces.values():
                value = ends = "-"
                if diversity is not None:
                    value = f"{diversity.value:.3f}"
                    if diversity.has_ends:
                        ends = f"{diversity.low:.3f} .. {diversity.high:.3f}"
                line += f"{value:>11}{ends:>16}"
            score = "-" if row.score is None else f"{row.score:.2f}"
            lines.append(f"{line}{row.variety.vendi:>8.2f}{score:>8}")
        return "\n".join(lines)


def compare_tables(
    engine: Engine,
    *,
    preset: str | None = None,
    steps: int | None = None,
    handoff: float | None = None,
) -> dict[str, StepTable]:
    """The tables of the four plans; `steps` are the distilled model's, the base has its own.

    handoff   the level at or below which the distilled model takes over
    """
    levels = {"hybrid": handoff, "skip-first": handoff}
    tables = {
        name: engine.compile(name, preset=preset, steps=steps, handoff=levels.get(name))
        for name in PLANS[1:]
    }
    return {"base": engine.compile("base", preset=preset), **tables}


def compare(
    engine: Engine,
    prompt: str,
    seeds: Sequence[int],
    judge: Judge,
    *,
    tables: dict[str, StepTable] | None = None,
    methods: Sequence[Method] = (),
    rounds: int | None = None,
    on_step: Callable[[State], object] | None = None,
) -> Comparison:
    """Sample `prompt` with the same seeds by each plan, in turns.

    methods   each a row of its own, on the distilled plan
    rounds    how often each plan runs; None: until its runs took MIN_RUN_S together, once at least
              and MOST_ROUNDS times at most

    Seconds are the wall time of text, rows and decoding for all images, the median over a plan's
    runs. One run of the hybrid and one guided row come first and are not counted, as the first
    calls of a network also pay for memory and code. The images are those of the last run. Raises
    InputError for fewer than one round.
    """
    if rounds is not None and rounds < 1:
        raise InputError(f"rounds: expected at least 1, got {rounds}")
    tables = tables or compare_tables(engine)
    runs: dict[str, tuple[StepTable, tuple[Method, ...]]] = {n: (t, ()) for n, t in tables.items()}
    runs |= {str(method): (tables["distilled"], (method,)) for method in methods}
    for table, diversify in runs.values():  # checked before anything runs
        engine.iterate(prompt, plan=table, seeds=seeds, diversify=diversify)
    engine.sample(prompt, plan=tables["hybrid"], seeds=seeds)
    next(engine.iterate(prompt, plan=tables["base"], seeds=seeds))
    images: dict[str, NDArray[np.uint8]] = {}
    passes: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    while names := [name for name in runs if _runs_again(seconds[name], rounds)]:
        for name in names:
            table, diversify = runs[name]
            start = time.perf_counter()
            trajectory = engine.sample(
                prompt, plan=table, seeds=seeds, diversify=diversify, on_step=on_step
            )
            images[name] = trajectory.rgb.cpu().numpy()
            seconds[name].append(time.perf_counter() - start)
            passes[name] = trajectory.passes
    texts, score = [final_text(prompt)] * len(seeds), judge.score
    outcomes = [
        Outcome(
            name=name,
            passes=passes[name],
            latency_s=statistics.median(seconds[name]),
            rounds=len(seconds[name]),
            images=rgb,
            spaces={space.name: SeedVariety.of(rgb, space) for space in judge.spaces},
            score=None if score is None else float(score(rgb, texts).mean()),
        )
        for name, rgb in images.items()
    ]
    return Comparison(
        prompt=prompt,
        seeds=tuple(seeds),
        outcomes=tuple(outcomes),
        spaces=tuple(space.name for space in judge.spaces),
        setting=_setting(engine),
        distances=tuple(space.distance for space in judge.spaces),
        scored_by=judge.scored_by,
    )


def _runs_again(seconds: Sequence[float], rounds: int | None) -> bool:
    """Whether a plan runs once more, after runs of so many seconds."""
    if rounds is not None:
        return len(seconds) < rounds
    return not seconds or (len(seconds) < MOST_ROUNDS and sum(seconds) < MIN_RUN_S)


def sheet_of(comparison: Comparison) -> Image.Image:
    """The contact sheet, with what each row cost beside it."""
    diversities = (outcome.variety.diversity for outcome in comparison.outcomes)
    highest = max((d.value for d in diversities if d is not None), default=0.0)
    rows = [_sheet_row(outcome, highest) for outcome in comparison.outcomes]
    count = len(comparison.seeds)
    return draw_sheet(
        rows,
        title=f"“{comparison.prompt}”",
        subtitle=f"the same {count} seeds in every row · bar: diversity" if count > 1 else "",
        columns=[str(seed) for seed in comparison.seeds],
        footer=footer_of(comparison),
    )


def footer_of(comparison: Comparison) -> str:
    """The meaning of the numbers, and the device they were measured on."""
    count, (first, *others) = len(comparison.seeds), comparison.spaces
    images = "the image" if count == 1 else f"all {count} images"
    main, *distances = comparison.distances
    same = set(distances) == {main}
    further = "".join(
        f" · {word_of(other)}: {'the same' if same else f'mean {distance} distance'} of {other} "
        "features"
        for other, distance in zip(others, distances, strict=True)
    )
    scorer = comparison.scored_by
    scores = "" if scorer in (None, first) else f" · score: by {scorer}"
    selects = "".join(
        f" · {outcome.name}: images of the seeds that it chose"
        for outcome in comparison.outcomes
        if outcome.name.startswith(f"{Select.name}:")
    )
    most = max(outcome.rounds for outcome in comparison.outcomes)
    medians = f", x{most}: median of {most} interleaved runs" if most > 1 else ""
    return (
        f"passes: network passes an image · seconds: text, sampling and decoding of {images}"
        f"{medians} · diversity: mean pairwise {main} distance of {first} "
        f"features{further}{scores}{selects} · {comparison.setting}"
    )


def _sheet_row(outcome: Outcome, highest: float) -> Row:
    notes = [f"{outcome.passes} passes · {outcome.latency_s:.2f} s x{outcome.rounds}"]
    bar = None
    if (diversity := outcome.variety.diversity) is not None:
        values = [variety.diversity for variety in outcome.spaces.values()]
        texts = ["-" if value is None else f"{value.value:.3f}" for value in values]
        heads = diversity_heads([*outcome.spaces])
        notes.append(" · ".join(map(" ".join, zip(heads, texts, strict=True))))
        bar = diversity.value / highest if highest > 0 else 0.0
    if outcome.score is not None:
        notes.append(f"prompt score {outcome.score:.2f}")
    accent = outcome.name == "hybrid"
    return Row(name=outcome.name, images=outcome.images, notes=tuple(notes), bar=bar, accent=accent)


def _setting(engine: Engine) -> str:
    kind = str(engine.weights.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    cores = f", {threads} thread{'s' * (threads > 1)}" if engine.device.type == "cpu" else ""
    return f"{engine.device.type}{cores}, {kind}, torch {torch.__version__}"
