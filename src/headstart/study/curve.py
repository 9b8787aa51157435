"""When is a picture decided? Figure 5 of arXiv:2503.10637 on any pair, in any feature space.

share_s = 1 - sqrt(d(f(x0_s), f(x0_last)) / d(f(blank), f(x0_last)))       mean over seeds

as `headstart.traces.structure` defines it: the share of the finished picture that x0 of a row
shows. Beside it how far seeds are apart at that row, which is the diversity already decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headstart.errors import InputError
from headstart.metrics.metrics import off_diagonal_mean
from headstart.metrics.resample import RESAMPLES
from headstart.spaces.extractor import Array, Rgb
from headstart.study.steps import (
    Setting,
    blank,
    check_pictures,
    interval,
    passes_so_far,
    plans_of,
    stacked,
)
from headstart.study.store import Arrays
from headstart.traces.decoders import Decoder
from headstart.traces.structure import Space, between, feature_space, features_of, toward

AGAINST = "base"
"""The plan whose steps are counted until it shows as much as another plan's first step."""


def measure(setting: Setting, prompt: str, decoder: Decoder) -> dict[str, NDArray[Any]]:
    """One prompt: for each plan share and distance [S, B], spread [S], timestep and passes [S].

    share and distance are NaN where the decoder gave no picture, spread where fewer than two seeds
    have one, and in a wide space (`Extractor.wide`). Pictures are compared with the last row's of
    the same decoder: take the full one. Raises InputError where no seed of a row has a share.
    """
    decoder.check_space(setting.engine.weights.lineage)
    space = feature_space(setting.judge.extractor)
    blank_rgb = blank(setting, decoder)
    cell: dict[str, NDArray[Any]] = {"space": np.array(space.extractor.name)}
    for plan, table in setting.plans.items():
        parts = [
            _measure_pictures(x0, decoder, space, blank_rgb)
            for x0 in setting.x0_parts(prompt, table)
        ]
        finite, distance, share, features = (
            np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)
        )
        check_pictures(finite & finite[-1], prompt, table, decoder)
        if not np.isfinite(share).any(1).all():
            raise InputError(
                f"{prompt!r}, plan {plan!r}: finished pictures are the {decoder.name} decoder's "
                "blank, so no share of them is known: look at the pictures"
            )
        cell |= {
            f"{plan}/share": share,
            f"{plan}/distance": distance,
            f"{plan}/spread": _spreads(features, finite, space),
            f"{plan}/timestep": np.array([step.timestep for step in table]),
            f"{plan}/passes": passes_so_far(table),
        }
    return cell


def numbers(cells: Sequence[Arrays]) -> dict[str, Any]:
    """From the cells of all prompts, with 95 % intervals over prompts:

        {"space": str, "seeds": int,
         "plans": {plan: {"passes": [int], "timesteps": [float],    up to each step, and of it
                          "share": [Interval], "distance": [Interval],
                          "spread": [Interval|null],      null: one seed, or a wide space
                          "missing": int}},               pictures that were not finite
         "matches": {plan: int},                steps of the base until it shows as much as this
         "matches_95": {plan: [int, int]|null}} plan's first step, and between which, by prompts

    Raises InputError for no cells, and for cells of other plans, steps or numbers of seeds.
    """
    plans = plans_of(cells, "share")
    shares = {plan: np.nanmean(stacked(cells, f"{plan}/share"), axis=2) for plan in plans}
    matches = {
        plan: _match(shares[AGAINST], share)
        for plan, share in shares.items()
        if AGAINST in plans and plan != AGAINST
    }
    return {
        "space": str(cells[0]["space"]),
        "seeds": int(cells[0][f"{plans[0]}/share"].shape[1]),
        "plans": {plan: _plan(cells, plan, shares[plan]) for plan in plans},
        "matches": {plan: count for plan, (count, _) in matches.items()},
        "matches_95": {plan: ends for plan, (_, ends) in matches.items()},
    }


def _measure_pictures(
    x0: Tensor, decoder: Decoder, space: Space, blank_rgb: Rgb
) -> tuple[NDArray[np.bool_], Array, Array, NDArray[np.float32]]:
    """Of x0 [S, n, C, h, w] and the blank [1, H, W, 3]: whether there is a picture, distance and
    share [S, n]; features [S, n, d], of a wide space, where they are millions, [S, n, 0]."""
    pictures = [decoder(row).host() for row in x0]
    finite = np.stack([row.finite for row in pictures])
    if space.extractor.wide:  # inner products of one seed's pictures are all that is needed
        by_seed = [
            features_of(space, np.concatenate([row.rgb[[seed]] for row in pictures] + [blank_rgb]))
            for seed in range(finite.shape[1])
        ]
        toward_last = [toward(rows[:-1, None], rows[-2:-1], rows[-1:], space) for rows in by_seed]
        distance, share = np.concatenate(toward_last, axis=2)
        features = np.empty((*finite.shape, 0))
    else:
        features = np.stack([features_of(space, row.rgb) for row in pictures])
        distance, share = toward(features, features[-1], features_of(space, blank_rgb), space)
    distance, share = np.where(finite & finite[-1], (distance, share), np.nan)
    return finite, distance, share, features.astype(np.float32)


def _spreads(features: NDArray[np.float32], finite: NDArray[np.bool_], space: Space) -> Array:
    """[S]: the mean distance between the seeds that have a picture."""
    spreads = np.full(len(finite), np.nan)
    for row, seeds in enumerate(finite) if features.size else ():
        if seeds.sum() > 1:
            distances = between(features[row, seeds].astype(np.float64), space)
            spreads[row] = off_diagonal_mean(distances)
    return spreads


def _plan(cells: Sequence[Arrays], plan: str, share: Array) -> dict[str, Any]:
    distances = stacked(cells, f"{plan}/distance")
    spreads = stacked(cells, f"{plan}/spread").T
    return {
        "passes": cells[0][f"{plan}/passes"].tolist(),
        "timesteps": [round(value, 3) for value in cells[0][f"{plan}/timestep"].tolist()],
        "share": [interval(step) for step in share.T],
        "distance": [interval(step) for step in np.nanmean(distances, axis=2).T],
        "spread": [interval(step) if np.isfinite(step).all() else None for step in spreads],
        "missing": int(np.isnan(distances).sum()),
    }


def _match(base: Array, other: Array) -> tuple[int, list[int] | None]:
    """The first step of base [P, S] with the share of the first of other [P, S'], and 95 % ends."""

    def steps(picks: NDArray[np.int64]) -> NDArray[np.int64]:
        """[R], from the means over prompts [R, P]; the last step's share is 1, so there is one."""
        return 1 + (base[picks].mean(1) >= other[picks].mean(1)[:, :1]).argmax(1)

    count = len(base)
    step = int(steps(np.arange(count)[None])[0])
    if count == 1:
        return step, None
    picks = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.quantile(steps(picks), [0.025, 0.975])
    return step, [int(low), int(high)]
