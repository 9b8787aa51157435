"""One adapter at many strengths: for each plan one batch of all strengths times all seeds.

image[i, j] = sample(seed j, strength i)        score[i] = mean over j of cos(image[i, j], caption)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headstart.conditioning.texts import named_adapters
from headstart.engine.engine import Engine
from headstart.errors import InputError
from headstart.pictures.sheet import Row, draw_sheet
from headstart.plan.table import StepTable
from headstart.sampler import State
from headstart.spaces.extractor import Judge


class PlanSlide(NamedTuple):
    """One plan: images uint8 [strengths, seeds, H, W, 3], their cost, and a score a strength."""

    plan: str
    passes: int
    latency_s: float
    images: NDArray[np.uint8]
    scores: tuple[float, ...] | None

    def to_json(self) -> dict[str, Any]:
        scores = None if self.scores is None else [round(score, 4) for score in self.scores]
        return {
            "name": self.plan,
            "passes": self.passes,
            "latency_s": round(self.latency_s, 4),
            "images": self.images.shape[0] * self.images.shape[1],
            "scores": scores,
        }


class Strip(NamedTuple):
    """The result of `slide`, in the order of its plans."""

    prompt: str
    adapter: str
    strengths: tuple[float, ...]
    seeds: tuple[int, ...]
    toward: str | None
    plans: tuple[PlanSlide, ...]

    def to_json(self, out: str) -> dict[str, Any]:
        facts = self._asdict()
        del facts["plans"]
        return {**facts, "sheet": out, "plans": [plan.to_json() for plan in self.plans]}

    def __str__(self) -> str:
        """The table for a terminal."""
        scored = self.toward is not None
        head = f"{'plan':<14}{'passes':>7}{'seconds':>9}"
        lines = [head + "".join(f"{s:>+8g}" for s in self.strengths) * scored]
        for plan in self.plans:
            line = f"{plan.plan:<14}{plan.passes:>7}{plan.latency_s:>9.2f}"
            lines.append(line + "".join(f"{score:>8.3f}" for score in plan.scores or ()))
        return "\n".join(lines)


def slide(
    engine: Engine,
    prompt: str,
    adapter: str,
    strengths: Sequence[float],
    seeds: Sequence[int],
    tables: Mapping[str, StepTable],
    *,
    judge: Judge | None = None,
    toward: str | None = None,
    on_step: Callable[[State], object] | None = None,
) -> Strip:
    """Sample `prompt` at every strength of an attached adapter, the same seeds for each.

    The adapter keeps the legs and timesteps that it was attached for; others keep their strengths.
    toward  a caption that images are scored against, with the judge's scorer

    Raises InputError for a caption and a judge that scores nothing, and for a prompt that says a
    strength of this adapter itself.
    """
    if adapter in named_adapters([prompt]):
        raise InputError(
            f"the prompt says the strength of adapter {adapter!r} itself, in <lora:{adapter}:...>, "
            "which holds whatever the strengths of the slide are, so that all columns would show "
            "it: take the tag out of the prompt"
        )
    score = None if judge is None else judge.score
    if toward is not None and score is None:
        raise InputError(
            "toward= needs a judge that scores images: the bundled scorer for the bundled pair, or "
            "open_features(a folder with a CLIP model)"
        )
    plans: list[PlanSlide] = []
    by_sample = tuple(strength for strength in strengths for _ in seeds)
    adapters = {adapter: replace(engine.adapters[adapter].strength, value=by_sample)}
    for name, table in tables.items():
        start = time.perf_counter()
        run = engine.sample(
            prompt, plan=table, seeds=[*seeds] * len(strengths), adapters=adapters, on_step=on_step
        )
        rgb = run.rgb.cpu().numpy()
        seconds = time.perf_counter() - start
        images = rgb.reshape(len(strengths), len(seeds), *rgb.shape[1:])
        scores = None
        if score is not None and toward is not None:
            scores = tuple(float(score(part, [toward] * len(part)).mean()) for part in images)
        plans.append(PlanSlide(name, run.passes, seconds, images, scores))
    return Strip(prompt, adapter, tuple(strengths), tuple(seeds), toward, tuple(plans))


def strip_of(strip: Strip) -> Image.Image:
    """One row a plan and seed, one column a strength."""
    rows = [
        Row(
            name=plan.plan if seed == strip.seeds[0] else "",
            images=plan.images[:, column],
            notes=(f"seed {seed}",),
            accent=plan.plan == "hybrid",
        )
        for plan in strip.plans
        for column, seed in enumerate(strip.seeds)
    ]
    scored = f" · scores: cosine with “{strip.toward}”" if strip.toward else ""
    return draw_sheet(
        rows,
        title=f"“{strip.prompt}”, {strip.adapter}",
        subtitle=f"strength {strip.strengths[0]:+g} to {strip.strengths[-1]:+g}, every row one "
        "seed, every plan one batch",
        columns=[f"{strength:+g}" for strength in strip.strengths],
        footer="one adapter on both models; columns: its strength" + scored,
    )
