"""Known answers: diversity, Vendi, Frechet distance and their intervals."""

import math

import numpy as np
import pytest

from headstart.errors import InputError
from headstart.metrics import (
    bootstrap_prompts,
    bootstrap_seeds,
    diversity,
    frechet,
    frechet_gaussian,
    pixel_extractor,
    vendi,
)

RNG = np.random.default_rng(20250310)
EPS = np.finfo(np.float64).eps


def gaussian(n: int, d: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((n, d))


def test_identical_features_have_diversity_0_and_vendi_1() -> None:
    same = np.tile(RNG.standard_normal(12), (9, 1))
    assert diversity(same) == pytest.approx(0.0, abs=64 * EPS)
    assert vendi(same) == pytest.approx(1.0, abs=1e-12)


def test_n_orthogonal_features_have_diversity_1_and_vendi_n() -> None:
    orthogonal = np.linalg.qr(gaussian(10, 10))[0] * np.arange(1.0, 11.0)[:, None]
    assert diversity(orthogonal) == pytest.approx(1.0, abs=64 * EPS)
    assert vendi(orthogonal) == pytest.approx(10.0, rel=1e-12)


def test_two_equal_clusters_of_orthogonal_features_have_vendi_2() -> None:
    assert vendi(np.repeat(np.eye(2), 6, axis=0)) == pytest.approx(2.0, rel=1e-12)


def test_diversity_is_the_mean_over_pairs() -> None:
    features = gaussian(6, 4)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [1 - unit[i] @ unit[j] for i in range(6) for j in range(6) if i != j]
    assert diversity(features) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


def test_diversity_ignores_the_length_of_a_feature() -> None:
    features = gaussian(5, 8)
    assert diversity(features) == pytest.approx(diversity(features * [[3], [1], [9], [2], [5]]))


def test_frechet_of_commuting_gaussians_equals_the_closed_form() -> None:
    rotation = np.linalg.qr(gaussian(5, 5))[0]
    a, b = np.array([4.0, 1.0, 0.25, 9.0, 0.0]), np.array([1.0, 1.0, 4.0, 0.0, 0.5])
    mean_a, mean_b = np.zeros(5), np.arange(5.0)
    expected = 30.0 + float(np.square(np.sqrt(a) - np.sqrt(b)).sum())
    cov_a, cov_b = (rotation * a) @ rotation.T, (rotation * b) @ rotation.T
    assert frechet_gaussian(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-7)


def test_frechet_of_2x2_gaussians_equals_the_closed_form() -> None:
    # tr (AB)^1/2 = sqrt(tr AB + 2 sqrt(det A det B)) for 2x2 positive matrices
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    cross = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = np.trace(a) + np.trace(b) - 2 * cross
    assert frechet_gaussian(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_a_set_with_itself_is_0_and_of_a_shifted_set_is_the_shift_squared() -> None:
    features = gaussian(40, 6)
    assert frechet(features, features) == pytest.approx(0.0, abs=1e-6)
    assert frechet(features, features + 2.0) == pytest.approx(24.0, rel=1e-6)


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
    for trial in range(200):
        values = [np.full((1, 1), x) for x in rng.normal(5.0, 1.0, 30)]
        interval = bootstrap_prompts(values, lambda v: float(v[0, 0]), resamples=400, seed=trial)
        covered += interval.low <= 5.0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_an_interval_repeats_for_its_seed() -> None:
    assert bootstrap_seeds(gaussian(8, 4), seed=5) == bootstrap_seeds(gaussian(8, 4), seed=5)


def test_pixel_features_are_cell_means_and_the_extractor_is_named() -> None:
    rgb = np.zeros((2, 10, 12, 3), np.uint8)
    rgb[1, :5] = 255
    extractor = pixel_extractor(2)
    features = extractor.features(rgb).reshape(2, 2, 2, 3)
    assert extractor.name == "pixels-2x2"
    assert (features[0] == -1.0).all() and (features[1, 0] == 1.0).all()
    assert (features[1, 1] == -1.0).all()


@pytest.mark.parametrize(
    ("features", "says"),
    [
        (np.ones((1, 4)), "n >= 2"),
        (np.ones(4), "shape (4,)"),
        (np.array([[1.0, np.nan], [1.0, 0.0]]), "not finite"),
        (np.array([[0.0, 0.0], [1.0, 0.0]]), "all zero"),
    ],
)
def test_features_without_a_diversity_are_refused(features: np.ndarray, says: str) -> None:
    with pytest.raises(InputError, match=says.replace("(", r"\(").replace(")", r"\)")):
        diversity(features)


def test_frechet_refuses_features_of_two_widths_and_prompts_need_two() -> None:
    with pytest.raises(InputError, match="one width, got 3 and 4"):
        frechet(gaussian(5, 3), gaussian(5, 4))
    with pytest.raises(InputError, match="at least 2"):
        bootstrap_prompts([gaussian(5, 3)])
