"""The main job: one prompt and the same seeds by base, distilled, hybrid and skip-first.

row = (network passes, seconds for all images, diversity, Vendi, score against the prompt)
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
from torch import Tensor

from headstart.engine.engine import Engine
from headstart.errors import CheckpointError, InputError
from headstart.metrics.metrics import Extractor, pixel_extractor, vendi
from headstart.metrics.resample import Interval, bootstrap_seeds
from headstart.metrics.scorer import Scorer, load_scorer
from headstart.pictures.sheet import Row, draw_sheet
from headstart.plan.table import StepTable
from headstart.sampler import State

PLANS = ("base", "distilled", "hybrid", "skip-first")
DEMO_SCORER = "headstart-demo-scorer"


class Judge(NamedTuple):
    """What diversity is measured on, and what scores images against the prompt, if anything."""

    extractor: Extractor
    scorer: Scorer | None = None

    def score(self, rgb: NDArray[np.uint8], prompt: str) -> float | None:
        """Mean cosine of images uint8 [n, H, W, 3] with the prompt."""
        if self.scorer is None:
            return None
        return float(self.scorer.score(_pixels(rgb), [prompt]).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One plan's images uint8 [n, H, W, 3] and what they cost. Diversity needs two images."""

    name: str
    passes: int
    latency_s: float
    images: NDArray[np.uint8]
    diversity: Interval | None
    vendi: float
    score: float | None

    def to_json(self) -> dict[str, Any]:
        found = self.diversity
        return {
            "name": self.name,
            "passes": self.passes,
            "latency_s": round(self.latency_s, 4),
            "images": len(self.images),
            "diversity": None if found is None else round(found.value, 4),
            "diversity_95": None if found is None else [round(found.low, 4), round(found.high, 4)],
            "vendi": round(self.vendi, 4),
            "score": None if self.score is None else round(self.score, 4),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The outcomes of all plans for one prompt, in the order of PLANS."""

    prompt: str
    seeds: tuple[int, ...]
    rounds: int
    """How often each plan ran, in turns; seconds are medians."""
    outcomes: tuple[Outcome, ...]
    extractor: str
    setting: str
    """Where it ran, in words: device, threads, versions."""

    def to_json(self, sheet: str) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "seeds": list(self.seeds),
            "rounds": self.rounds,
            "sheet": sheet,
            "extractor": self.extractor,
            "setting": self.setting,
            "plans": [outcome.to_json() for outcome in self.outcomes],
        }

    def __str__(self) -> str:
        """The table for a terminal."""
        lines = [f"{'plan':<12}{'passes':>8}{'seconds':>9}{'diversity':>11}{'95 %':>16}"]
        lines[0] += f"{'Vendi':>8}{'score':>8}"
        return "\n".join([*lines, *map(_line, self.outcomes)])


def compare_tables(
    engine: Engine, *, preset: str | None = None, steps: int | None = None
) -> dict[str, StepTable]:
    """The tables of the four plans; `steps` are the distilled model's, the base has its own."""
    tables = {name: engine.compile(name, preset=preset, steps=steps) for name in PLANS[1:]}
    return {"base": engine.compile("base", preset=preset), **tables}


def compare(
    engine: Engine,
    prompt: str,
    seeds: Sequence[int],
    judge: Judge,
    *,
    tables: dict[str, StepTable] | None = None,
    rounds: int = 1,
    on_step: Callable[[State], object] | None = None,
) -> Comparison:
    """Sample `prompt` with the same seeds by each plan, in turns, `rounds` times over.

    Seconds are the median over the rounds of the wall time of text, rows and decoding together, for
    all images, after one run of the hybrid and one guided row that are not counted: the first calls
    of a network also pay for memory and code that later ones find ready. The images are those of
    the last round. Raises InputError for fewer than one round.
    """
    if rounds < 1:
        raise InputError(f"rounds: expected at least 1, got {rounds}")
    tables = tables or compare_tables(engine)
    _warm_up(engine, prompt, seeds, tables)
    images: dict[str, NDArray[np.uint8]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in tables}
    for _ in range(rounds):
        for name, table in tables.items():
            start = time.perf_counter()
            trajectory = engine.sample(prompt, plan=table, seeds=seeds, on_step=on_step)
            images[name] = trajectory.rgb.cpu().numpy()
            seconds[name].append(time.perf_counter() - start)
    outcomes = [
        _judged(name, table.passes(), statistics.median(seconds[name]), images[name], prompt, judge)
        for name, table in tables.items()
    ]
    return Comparison(
        prompt=prompt,
        seeds=tuple(seeds),
        rounds=rounds,
        outcomes=tuple(outcomes),
        extractor=judge.extractor.name,
        setting=_setting(engine),
    )


def demo_judge() -> Judge:
    """The bundled image-text scorer. Raises CheckpointError if its file is missing or damaged."""
    import headstart_weights

    try:
        path = headstart_weights.path("scorer")
    except headstart_weights.WeightsError as error:
        raise CheckpointError(f"the bundled scorer cannot be used: {error}") from error
    scorer = load_scorer(path)

    def features(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
        with torch.inference_mode():
            return scorer.features(_pixels(rgb)).double().numpy()

    return Judge(Extractor(DEMO_SCORER, features), scorer)


def pixel_judge() -> Judge:
    """For weights that the bundled scorer knows nothing about: colours of an 8 x 8 grid."""
    return Judge(pixel_extractor(8))


def sheet_of(comparison: Comparison) -> Image.Image:
    """The contact sheet, with what each row cost beside it."""
    found = [outcome.diversity for outcome in comparison.outcomes]
    highest = max((interval.value for interval in found if interval is not None), default=0.0)
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
    """What the numbers mean and where they were taken."""
    return (
        f"passes: network passes an image · seconds: text, sampling and decoding of all "
        f"{len(comparison.seeds)} images{_medians(comparison.rounds)} · diversity: mean pairwise "
        f"cosine distance of {comparison.extractor} features · {comparison.setting}"
    )


def _medians(rounds: int) -> str:
    return f", median of {rounds} interleaved runs" if rounds > 1 else ""


def _warm_up(
    engine: Engine, prompt: str, seeds: Sequence[int], tables: dict[str, StepTable]
) -> None:
    engine.sample(prompt, plan=tables["hybrid"], seeds=seeds)
    next(engine.iterate(prompt, plan=tables["base"], seeds=seeds))


def _judged(
    name: str, passes: int, seconds: float, rgb: NDArray[np.uint8], prompt: str, judge: Judge
) -> Outcome:
    features = judge.extractor.features(rgb)
    return Outcome(
        name=name,
        passes=passes,
        latency_s=seconds,
        images=rgb,
        diversity=bootstrap_seeds(features) if len(features) > 1 else None,
        vendi=vendi(features),
        score=judge.score(rgb, prompt),
    )


def _sheet_row(outcome: Outcome, highest: float) -> Row:
    notes = [f"{outcome.passes} passes · {outcome.latency_s:.2f} s"]
    bar = None
    if outcome.diversity is not None:
        notes.append(f"diversity {outcome.diversity.value:.3f}")
        bar = outcome.diversity.value / highest if highest > 0 else 0.0
    if outcome.score is not None:
        notes.append(f"prompt score {outcome.score:.2f}")
    return Row(
        name=outcome.name,
        images=outcome.images,
        notes=tuple(notes),
        bar=bar,
        accent=outcome.name == "hybrid",
    )


def _line(outcome: Outcome) -> str:
    found, score = outcome.diversity, outcome.score
    spread = "-" if found is None else f"{found.low:.3f} .. {found.high:.3f}"
    return (
        f"{outcome.name:<12}{outcome.passes:>8}{outcome.latency_s:>9.2f}"
        f"{'-' if found is None else f'{found.value:.3f}':>11}{spread:>16}"
        f"{outcome.vendi:>8.2f}{'-' if score is None else f'{score:.2f}':>8}"
    )


def _setting(engine: Engine) -> str:
    kind = str(engine.weights.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    cores = f", {threads} thread{'s' * (threads > 1)}" if engine.device.type == "cpu" else ""
    return f"{engine.device.type}{cores}, {kind}, torch {torch.__version__}"


def _pixels(rgb: NDArray[np.uint8]) -> Tensor:
    """uint8 [n, H, W, 3] -> [n, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(np.ascontiguousarray(rgb)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
