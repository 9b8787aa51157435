"""Confidence intervals over prompts and over seeds, and paired tests of plans.

over prompts  prompts are drawn with replacement: what other prompts would have given
over seeds    prompts stay, the seeds of each are drawn: what other seeds would have given
paired        two plans on the same prompts and seeds: the same draws for both, then a - b
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from headstart.errors import InputError
from headstart.metrics.metrics import distances, off_diagonal_mean
from headstart.spaces.extractor import Array, Distance

Statistic = Callable[[Array], float]
RESAMPLES = 2000
EXACT_FLIPS = 14
"""Up to this many prompts all 2^P sign patterns are tried; beyond it RANDOM_FLIPS of them."""
RANDOM_FLIPS = 20_000
TAILS = (0.025, 0.975)
"""Of a 95 % interval."""


class Interval(NamedTuple):
    """A value and the ends of its confidence interval; NaN where it has none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def has_ends(self) -> bool:
        return not math.isnan(self.low)

    @property
    def span(self) -> tuple[float, float]:
        """From low to high; without ends the value itself."""
        return (self.low, self.high) if self.has_ends else (self.value, self.value)

    def rounded(self, digits: int = 4) -> list[float]:
        return [round(number, digits) for number in self]


class PromptValues(NamedTuple):
    """One number a prompt.

    values  [P], the number
    draws   [P, R], the same of R draws of the prompt's seeds; the draws depend on R, the number of
            seeds and the prompt's position alone, so two plans have the same ones
    """

    values: Array
    draws: Array

    @property
    def mean(self) -> float:
        return float(self.values.mean())


class Paired(NamedTuple):
    """a - b on the same prompts and seeds.

    difference    the mean of a - b
    over_prompts  None for one prompt
    over_seeds    None for one seed a prompt, or a diversity of two
    p_value       two-sided sign-flip permutation test over prompts: how often prompts whose signs
                  are drawn at random give a mean at least as far from 0. At least 2^(1-P); None
                  for one prompt
    """

    difference: float
    over_prompts: Interval | None
    over_seeds: Interval | None
    p_value: float | None


def measure_diversity(
    groups: Sequence[Array], distance: Distance = "cosine", *, resamples: int = RESAMPLES
) -> PromptValues:
    """Mean pairwise distance of features [n, d] for each prompt.

    A sample drawn twice is not a pair: its distance 0 to itself would bias every draw down by about
    1/n. Where no prompt has more than two images there are no draws: all would be that one pair.
    Raises InputError for fewer than two images of a prompt.
    """
    if all(len(group) == 2 for group in groups):
        resamples = 0
    values: list[float] = []
    draws: list[Array] = []
    for prompt, group in enumerate(groups):
        matrix = distances(group, distance)
        counts = _seed_counts(len(matrix), resamples, prompt)
        pairs = counts.sum(1) ** 2 - np.square(counts).sum(1)
        counts[pairs == 0] = 1.0  # one image n times over has no pair: take all of them once
        pairs[pairs == 0] = len(matrix) * (len(matrix) - 1)
        values.append(off_diagonal_mean(matrix))
        draws.append(((counts @ matrix) * counts).sum(1) / pairs)
    return PromptValues(np.array(values), np.stack(draws))


def measure_mean(groups: Sequence[Array], *, resamples: int = RESAMPLES) -> PromptValues:
    """Mean of values [n] for each prompt, such as scores of its images."""
    draws = [
        _seed_counts(len(group), resamples, prompt) @ group / len(group)
        for prompt, group in enumerate(groups)
    ]
    return PromptValues(np.array([group.mean() for group in groups]), np.stack(draws))


def measure_each(groups: Sequence[Array], statistic: Statistic) -> PromptValues:
    """Any statistic(features [n, d]) for each prompt, without draws of seeds.

    For Vendi: a sample drawn twice lowers it, and there is no repair.
    """
    values = np.array([statistic(group) for group in groups])
    return PromptValues(values, np.empty((len(values), 0)))


def over_prompts(per_prompt: PromptValues) -> Interval | None:
    """The mean over prompts and its percentile interval; None for one prompt."""
    return None if len(per_prompt.values) < 2 else bootstrap_mean(per_prompt.values)


def bootstrap_mean(values: Array, resamples: int = RESAMPLES) -> Interval:
    """The mean of values [n], of prompts or seeds, and its 95 % interval; NaN ends for n = 1."""
    if len(values) < 2:
        return Interval(float(values.mean()))
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    return percentiles(float(values.mean()), values[picks].mean(1))


def over_seeds(per_prompt: PromptValues) -> Interval | None:
    """The mean over exactly these prompts; None where seeds were not drawn."""
    if not per_prompt.draws.size:
        return None
    return percentiles(per_prompt.mean, per_prompt.draws.mean(0))


def paired(a: PromptValues, b: PromptValues) -> Paired:
    """Plan a minus plan b. Raises InputError unless both are of the same prompts and seeds."""
    if a.draws.shape != b.draws.shape or len(a.values) != len(b.values):
        raise InputError(
            f"a paired test needs the same prompts and seeds of both plans, got {len(a.values)} "
            f"and {len(b.values)} prompts: compare only what they share"
        )
    difference = PromptValues(a.values - b.values, a.draws - b.draws)
    p_value = sign_flip(difference.values) if len(difference.values) > 1 else None
    return Paired(difference.mean, over_prompts(difference), over_seeds(difference), p_value)


def recovered(
    plan: Array, base: Array, distilled: Array, *, resamples: int = RESAMPLES
) -> Interval:
    """(plan - distilled)/(base - distilled), a ratio of means over prompts, of three numbers [P].

    The share of what distilling lost that comes back; prompts are drawn together for all three.
    """
    gain, loss = plan - distilled, base - distilled
    picks = np.random.default_rng(0).integers(len(plan), size=(resamples, len(plan)))
    with np.errstate(divide="ignore", invalid="ignore"):  # where nothing was lost
        ratios = gain[picks].mean(1) / loss[picks].mean(1)
        value = np.divide(gain.mean(), loss.mean())
    return percentiles(float(value), ratios)


def sign_flip(differences: Array) -> float:
    """Two-sided p of mean(differences [P]) = 0 under independent random signs (Fisher, 1935).

    Exact for P <= 14. Beyond, (1 + hits)/(1 + draws), which is never 0.
    """
    count = len(differences)
    magnitudes, observed = np.abs(differences), abs(differences.mean())
    exact = count <= EXACT_FLIPS
    if exact:
        bits = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1
    else:
        bits = np.random.default_rng(0).integers(0, 2, (RANDOM_FLIPS, count))
    means = np.abs((1.0 - 2.0 * bits) @ magnitudes) / count
    hits = int((means >= observed * (1.0 - 1e-12)).sum())  # sums in another order round differently
    return hits / len(means) if exact else (1 + hits) / (1 + len(means))


def bootstrap_seeds(
    features: Array, distance: Distance = "cosine", *, resamples: int = RESAMPLES
) -> Interval:
    """Diversity of features [n, d] of one prompt, its samples resampled.

    Two samples are one pair, so nothing varies between draws: the ends are NaN.
    """
    per_prompt = measure_diversity([features], distance, resamples=resamples)
    return over_seeds(per_prompt) or Interval(per_prompt.mean)


def percentiles(value: float, draws: Array) -> Interval:
    """A value with the 95 % percentile interval of its draws [R]."""
    low, high = np.quantile(draws, TAILS)
    return Interval(value, float(low), float(high))


def interval_json(interval: Interval) -> dict[str, float | None]:
    """For JSON: six digits, and null for what is not finite."""
    return {name: finite_or_none(value) for name, value in interval._asdict().items()}


def finite_or_none(value: float, digits: int = 6) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def stratified_counts(sizes: Sequence[int], resamples: int) -> Array:
    """[R, sum of sizes]: how often each image is drawn, every prompt keeping its number."""
    return np.concatenate([_seed_counts(n, resamples, p) for p, n in enumerate(sizes)], axis=1)


def prompt_counts(sizes: Sequence[int], resamples: int) -> Array:
    """[R, sum of sizes]: how often each image is drawn with its whole prompt, prompts resampled."""
    count = len(sizes)
    counts = np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), resamples)
    return np.repeat(counts.astype(np.float64), sizes, axis=1)


def _seed_counts(count: int, resamples: int, prompt: int) -> Array:
    rng = np.random.default_rng([prompt, count])
    return rng.multinomial(count, np.full(count, 1.0 / count), resamples).astype(np.float64)
