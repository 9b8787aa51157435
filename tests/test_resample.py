"""Intervals cover what they should, and paired tests are the tests they say they are."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from headstart.errors import InputError
from headstart.metrics.metrics import diversity, vendi
from headstart.metrics.resample import (
    PromptValues,
    bootstrap_mean,
    bootstrap_seeds,
    measure_diversity,
    measure_each,
    measure_mean,
    over_prompts,
    over_seeds,
    paired,
    prompt_counts,
    sign_flip,
    stratified_counts,
)


def gaussian(n: int, d: int, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_interval_over_seeds_contains_the_value_and_narrows_with_more_samples() -> None:
    few, many = bootstrap_seeds(gaussian(8, 16)), bootstrap_seeds(gaussian(64, 16))
    assert few.low < few.value < few.high
    assert few.value == pytest.approx(diversity(gaussian(8, 16)))
    assert many.high - many.low < few.high - few.low


def test_a_sample_drawn_twice_is_not_a_pair() -> None:
    # every true pair is at distance 1, so every resample must say exactly 1
    interval = bootstrap_seeds(np.eye(6))
    assert interval.low == pytest.approx(1.0, abs=1e-12) == interval.high


def test_interval_over_prompts_covers_the_mean_at_its_level() -> None:
    rng, covered = np.random.default_rng(3), 0
    for _ in range(200):
        interval = bootstrap_mean(rng.normal(5.0, 1.0, 30), resamples=400)
        covered += interval.low <= 5.0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_an_interval_repeats() -> None:
    assert bootstrap_seeds(gaussian(8, 4)) == bootstrap_seeds(gaussian(8, 4))


def test_an_interval_over_seeds_covers_the_expected_diversity_at_its_level() -> None:
    expected = diversity(gaussian(4000, 6) + 0.5)
    covered = 0
    for trial in range(200):
        groups = [gaussian(24, 6, seed=1000 * trial + prompt) + 0.5 for prompt in range(4)]
        interval = over_seeds(measure_diversity(groups, resamples=300))
        assert interval is not None
        covered += interval.low <= expected <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_mean_is_measured_as_its_own_formula_says() -> None:
    groups = [np.array([1.0, 2.0, 6.0]), np.array([4.0, 4.0, 4.0])]
    measured = measure_mean(groups)
    assert measured.values.tolist() == [3.0, 4.0]
    assert (measured.draws[1] == 4.0).all()
    assert abs(measured.draws[0].mean() - 3.0) < 5 * groups[0].std() / np.sqrt(3 * 2000)
    # the variance of a bootstrap mean is the population variance over n
    assert measured.draws[0].var() == pytest.approx(groups[0].var() / 3, rel=0.15)


def test_the_same_draws_are_made_for_two_plans_so_a_pair_cancels_what_they_share() -> None:
    shared = [gaussian(12, 5, seed) for seed in range(6)]
    scores = [group[:, 0] for group in shared]
    difference = paired(measure_mean([s + 0.25 for s in scores]), measure_mean(scores))
    assert difference.over_seeds == pytest.approx((0.25, 0.25, 0.25))
    assert difference.over_prompts == pytest.approx((0.25, 0.25, 0.25))
    assert difference.p_value == 2 / 2**6


def test_a_plan_does_not_differ_from_itself() -> None:
    measured = measure_diversity([gaussian(8, 4, seed) for seed in range(5)])
    same = paired(measured, measured)
    assert same == (0.0, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 1.0)


def test_the_sign_flip_test_counts_every_pattern() -> None:
    differences = np.array([0.9, -0.2, 0.4, 0.7, 0.1])
    means = [abs(np.mean(np.multiply(signs, differences))) for signs in product((1, -1), repeat=5)]
    expected = np.mean([mean >= abs(differences.mean()) - 1e-12 for mean in means])
    assert sign_flip(differences) == expected


def test_many_prompts_are_flipped_at_random_to_the_same_answer() -> None:
    differences = gaussian(14, 1, seed=4)[:, 0] + 0.3
    exact = sign_flip(differences)
    # a prompt at 0 flips to itself, so it changes no mean but takes the random branch
    random = sign_flip(np.append(differences, 0.0))
    assert random == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000) + 1e-4)
    assert sign_flip(np.ones(20)) == 1 / 20_001


def test_under_no_difference_the_test_rejects_at_its_level() -> None:
    rejections = [sign_flip(gaussian(8, 1, seed)[:, 0]) <= 0.05 for seed in range(400)]
    assert 0.02 <= np.mean(rejections) <= 0.08


def test_one_prompt_has_an_interval_over_seeds_and_vendi_one_over_prompts() -> None:
    one = measure_diversity([gaussian(6, 3)])
    assert over_prompts(one) is None and over_seeds(one) is not None
    assert paired(one, one).p_value is None
    several = measure_each([gaussian(6, 3, seed) for seed in range(4)], vendi)
    assert over_seeds(several) is None
    interval = over_prompts(several)
    assert interval is not None and interval.low < interval.value < interval.high


def test_two_images_drawn_as_one_take_both() -> None:
    measured = measure_diversity([np.eye(2), np.eye(3)])
    assert (measured.draws == 1.0).all() and measured.draws.shape == (2, 2000)


def test_two_images_are_one_pair_and_have_no_interval_over_seeds() -> None:
    pairs = measure_diversity([np.eye(2), gaussian(2, 3)])
    assert over_seeds(pairs) is None and over_prompts(pairs) is not None
    one = measure_diversity([np.eye(2)])
    assert paired(one, one) == (0.0, None, None, None)
    value, *ends = bootstrap_seeds(np.eye(2))
    assert value == 1.0 and np.isnan(ends).all()


def test_strata_keep_their_sizes() -> None:
    counts = stratified_counts([3, 5], 50)
    assert counts.shape == (50, 8)
    assert (counts[:, :3].sum(1) == 3).all() and (counts[:, 3:].sum(1) == 5).all()


def test_a_prompt_is_drawn_whole() -> None:
    counts = prompt_counts([3, 5, 1], 60)
    assert counts.shape == (60, 9)
    per_prompt = counts[:, [0, 3, 8]]
    assert (per_prompt.sum(1) == 3).all() and len(np.unique(per_prompt, axis=0)) > 5
    assert (counts == np.repeat(per_prompt, [3, 5, 1], axis=1)).all()


def test_what_cannot_be_paired_or_resampled_is_refused() -> None:
    assert np.isnan(bootstrap_mean(np.ones(1))[1:]).all()
    with pytest.raises(InputError, match="same prompts and seeds"):
        paired(measure_mean([np.ones(3)]), measure_mean([np.ones(3)] * 2))
    with pytest.raises(InputError, match="n >= 2"):
        measure_diversity([gaussian(1, 3)])
    assert PromptValues(np.array([1.0, 3.0]), np.empty((2, 0))).mean == 2.0
    assert diversity(gaussian(4, 3)) > 0
