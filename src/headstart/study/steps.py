"""Every step's picture of many seeds, decoded a few at a time; only numbers of them are kept.

x0 of a run [S, B, C, h, w] -> parts of seeds of at most `PART` pixels a row -> rgb uint8 -> numbers

100 seeds of 30 steps at 1024 px are 9 GB of pictures. No more than `PART` pixels are decoded at
once, and latents of at most `GROUP` pixels a row are in memory: 16 seeds, 126 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart.conditioning.texts import Size
from headstart.engine.engine import Engine
from headstart.errors import InputError
from headstart.metrics.resample import bootstrap_mean, interval_json
from headstart.plan.request import check_size
from headstart.plan.table import StepTable
from headstart.spaces.extractor import Array, Judge, Rgb
from headstart.study.store import Arrays
from headstart.traces.decoders import Decoder

TextScorer = Callable[[Rgb], Array]
"""Pictures -> cosines [n, P] with P phrases."""
PART, GROUP = 2**20, 2**24
"""Pixels: one picture of 1024 x 1024 px decoded at once, sixteen of them sampled together."""
MOST = 16
"""Small pictures decoded at once: 30 steps of them have 8 MB of 2048 features."""
REMEDY = (
    "a half-precision decoder overflowed, or the VAE is not this model's; load with "
    "dtype='float32' or 'bfloat16'"
)


class Setting(NamedTuple):
    """The engine, seeds and plans of an experiment, and the judge of its pictures.

    plans  name -> rows
    size   in pixels; None: the model's own
    """

    engine: Engine
    seeds: Sequence[int]
    plans: Mapping[str, StepTable]
    judge: Judge
    size: Size = None

    @property
    def passes(self) -> float:
        """Network passes of one run of every plan and seed."""
        return float(sum(table.passes() for table in self.plans.values()) * len(self.seeds))

    def seed_groups(self) -> Iterator[Sequence[int]]:
        """The seeds, as many at once as have `GROUP` pixels together."""
        count = self._capacity(GROUP)
        return (self.seeds[i : i + count] for i in range(0, max(1, len(self.seeds)), count))

    def sides(self) -> tuple[int, int]:
        weights = self.engine.weights
        return check_size(self.size, weights.image_size, max(8, weights.downscale))

    def _capacity(self, pixels: int) -> int:
        """The number of pictures that have no more than `pixels` together, at least 1."""
        height, width = self.sides()
        return max(1, pixels // (height * width))

    def x0_parts(self, prompt: str, table: StepTable) -> Iterator[Tensor]:
        """The x0 of every row, a few seeds at a time: [S, n, C, h, w], n*H*W <= `PART`."""
        part = min(MOST, self._capacity(PART))
        for group in self.seed_groups():
            states = self.engine.iterate(prompt, plan=table, seeds=group, size=self.size)
            rows = [state.x0 for state in states]
            for begin in range(0, len(group), part):
                yield torch.stack([row[begin : begin + part] for row in rows])


def blank(setting: Setting, decoder: Decoder) -> Rgb:
    """[1, H, W, 3], the picture of latents that are 0. Raises InputError for NaN."""
    weights = setting.engine.weights
    cells = (side // weights.downscale for side in setting.sides())
    latents = torch.zeros((1, weights.latent_channels, *cells), device=setting.engine.device)
    picture = decoder(latents).host()
    if not picture.finite.all():
        raise InputError(
            f"the {decoder.name} decoder gave NaN or infinity for latents that are 0: {REMEDY}"
        )
    return picture.rgb


def check_pictures(
    finite: NDArray[np.bool_], prompt: str, table: StepTable, decoder: Decoder
) -> None:
    """Raise InputError where a row of `finite` [S, B] has no picture of any seed."""
    rows = finite.any(1)
    if not rows.all():
        raise InputError(
            f"{prompt!r}, plan {table.name!r}, step {int(np.argmin(rows))}: the {decoder.name} "
            f"decoder gave NaN or infinity for every seed: {REMEDY}"
        )


def text_scorer(judge: Judge, phrases: Sequence[str]) -> TextScorer:
    """Cosines [n, P] of pictures with phrases. Raises InputError for a judge without text, at once,
    and for a score that is not finite."""
    pairs, table = judge.score, judge.scores
    if pairs is None:
        names = ", ".join(space.name for space in judge.spaces)
        raise InputError(
            f"{names}: nothing scores pictures with text: give the bundled scorer for the bundled "
            "pair, or a folder with a CLIP model"
        )

    def score(rgb: Rgb) -> Array:
        if table is not None:
            scores = table(rgb, phrases)
        else:
            scores = np.stack([pairs(rgb, [phrase] * len(rgb)) for phrase in phrases], axis=1)
        if not np.isfinite(scores).all():
            raise InputError(f"{judge.scored_by} gave scores that are not finite")
        return scores

    return score


def passes_so_far(table: StepTable) -> NDArray[np.int64]:
    """[S]: network passes an image up to and with each row."""
    return np.cumsum([step.passes for step in table])


def plans_of(cells: Sequence[Arrays], field: str) -> tuple[str, ...]:
    """The plans of which cells have `field`, in their order.

    Raises InputError for no cells, and for those of another experiment.
    """
    if not cells:
        raise InputError("no cells: nothing has been measured yet")
    end = f"/{field}"
    plans = tuple(key.removesuffix(end) for key in cells[0] if key.endswith(end))
    if not plans:
        raise InputError(f"cells of another experiment: none of {sorted(cells[0])} ends in {end!r}")
    return plans


def stacked(cells: Sequence[Arrays], key: str) -> Array:
    """[P, ...] of all cells. Raises InputError where they are not of the same plans and seeds."""
    try:
        return np.stack([np.asarray(cell[key], np.float64) for cell in cells])
    except (KeyError, ValueError) as error:
        shapes = {cell[key].shape if key in cell else None for cell in cells}
        raise InputError(
            f"cells of other plans, steps or seeds: {key!r} has shapes {shapes}; measure all "
            "prompts alike"
        ) from error


def interval(values: Array) -> dict[str, float | None]:
    """The mean over prompts [P] with its 95 % ends; these are None for one prompt."""
    return interval_json(bootstrap_mean(values))
