"""Known answers and an independent implementation: Frechet, KID, precision, recall, coverage."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from fidelity_oracle import frechet

from headstart.errors import InputError
from headstart.metrics import fidelity
from headstart.metrics.fidelity import (
    Moments,
    frechet_gaussian,
    frechet_interval,
    kid,
    neighbours,
    neighbours_interval,
)

linalg = pytest.importorskip("scipy.linalg", reason="the independent implementation")
spatial = pytest.importorskip("scipy.spatial")


def gaussian(n: int, d: int, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


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


@pytest.mark.parametrize(("n", "m", "d"), [(60, 40, 8), (12, 30, 16), (9, 9, 24)])
def test_frechet_is_that_of_scipys_matrix_root(n: int, m: int, d: int) -> None:
    """More images than features, and fewer, where covariances are singular."""
    a, b = gaussian(n, d), 1.5 * gaussian(m, d, 8) + 0.3
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    # the root of a singular product needs a nudge; it moves the trace by less than d*sqrt(1e-14)
    nudge = 1e-14 * np.eye(d)
    root = linalg.sqrtm((cov_a + nudge) @ (cov_b + nudge))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root.real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)
    # eigenvalues that are 0 come out as 1e-16 of the largest, and their roots as 1e-8
    assert frechet_interval(a, Moments.of(b), resamples=4).value == pytest.approx(
        expected, rel=1e-6
    )


def test_a_frechet_interval_holds_its_value_and_covers_the_mean_of_other_samples() -> None:
    reference = Moments(np.zeros(4), np.eye(4))
    expected = np.mean([_distance(gaussian(80, 4, 5000 + s), reference) for s in range(300)])
    covered = 0
    for trial in range(100):
        interval = frechet_interval(gaussian(80, 4, trial), reference, resamples=100)
        assert interval.low <= interval.value <= interval.high
        covered += interval.low <= expected <= interval.high
    assert 0.8 <= covered / 100 <= 1.0


def _distance(features: np.ndarray, reference: Moments) -> float:
    mean, cov = features.mean(0), np.cov(features.T)
    return frechet_gaussian(mean, cov, reference.mean, reference.covariance)


def exact_kid(a: np.ndarray, b: np.ndarray) -> Fraction:
    """Eq. 4 of arXiv:1801.01401 pair by pair in whole numbers."""

    def k(x: np.ndarray, y: np.ndarray) -> Fraction:
        return (Fraction(sum(int(i) * int(j) for i, j in zip(x, y, strict=True)), len(x)) + 1) ** 3

    def within(rows: np.ndarray) -> Fraction:
        pairs = [k(x, y) for x, y in combinations(rows, 2)]
        return sum(pairs, Fraction(0)) / len(pairs)

    across = sum((k(x, y) for x in a for y in b), Fraction(0)) / (len(a) * len(b))
    return within(a) + within(b) - 2 * across


@pytest.mark.parametrize(("n", "m", "d", "block"), [(5, 7, 3, 1024), (9, 4, 6, 2), (2, 2, 1, 1)])
def test_kid_is_the_unbiased_estimator_in_exact_arithmetic(
    n: int, m: int, d: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "BLOCK", block)
    rng = np.random.default_rng(n)
    a, b = rng.integers(-4, 5, (n, d)), rng.integers(-3, 7, (m, d))
    found = kid(a.astype(float), b.astype(float), resamples=8)
    assert found.value == pytest.approx(float(exact_kid(a, b)), rel=1e-12, abs=1e-12)


def test_kid_has_no_bias_at_few_images_where_frechet_has() -> None:
    """Two sets of one distribution: KID is 0 on average, the Frechet distance is far from it."""
    values = [kid(gaussian(8, 6, s), gaussian(8, 6, 9999 - s), resamples=1) for s in range(400)]
    found = np.array([interval.value for interval in values])
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(len(found))
    assert frechet(gaussian(8, 6), gaussian(8, 6, 8)) > 1.0


def test_kid_of_a_shifted_set_is_the_closed_form() -> None:
    """In one dimension k(x, y) = (xy + 1)^3: with constant sets of value s and t it is exact."""
    s, t = 2.0, 0.5
    expected = (s * s + 1) ** 3 + (t * t + 1) ** 3 - 2 * (s * t + 1) ** 3
    found = kid(np.full((6, 1), s), np.full((4, 1), t))
    assert found == pytest.approx((expected, expected, expected), rel=1e-12)


def test_a_kid_interval_covers_the_true_value_at_its_level() -> None:
    reference = gaussian(400, 3, 77)
    true = kid(gaussian(3000, 3, 78) + 0.4, reference, resamples=1).value
    found = [kid(gaussian(60, 3, s) + 0.4, reference, resamples=100) for s in range(60)]
    covered = [interval.low <= true <= interval.high for interval in found]
    assert 0.8 <= np.mean(covered) <= 1.0


@pytest.mark.parametrize(("n", "m", "k", "block"), [(20, 30, 3, 1024), (17, 11, 5, 4)])
def test_neighbours_are_what_the_papers_formulas_say_image_by_image(
    n: int, m: int, k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "BLOCK", block)
    a, b = gaussian(n, 4) * 1.3, gaussian(m, 4, 9)
    tree_a, tree_b = spatial.KDTree(a), spatial.KDTree(b)
    reach_a = tree_a.query(a, k=k + 1)[0][:, -1]
    reach_b = tree_b.query(b, k=k + 1)[0][:, -1]
    apart = spatial.distance.cdist(a, b)
    expected = (
        np.mean([any(apart[i, j] <= reach_b[j] for j in range(m)) for i in range(n)]),
        np.mean([any(apart[i, j] <= reach_a[i] for i in range(n)) for j in range(m)]),
        sum(apart[i, j] <= reach_b[j] for i in range(n) for j in range(m)) / (k * n),
        np.mean([apart[:, j].min() <= reach_b[j] for j in range(m)]),
    )
    assert neighbours(a, b, k=k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("by", ["seeds", "prompts"])
def test_an_interval_of_neighbours_is_of_draws_of_the_same_balls(by: fidelity.By) -> None:
    """Each draw image by image, and around its own mean; the value is that of all images."""
    a, b, k = gaussian(24, 3) * 1.2, gaussian(31, 3, 9), 3
    sizes = [6, 4, 8, 6]
    found = neighbours_interval(a, b, k=k, sizes=sizes, by=by, resamples=40)
    assert {name: one.value for name, one in found.items()} == pytest.approx(
        neighbours(a, b, k=k)._asdict()
    )
    reach_a, reach_b = fidelity._reach(a, k), fidelity._reach(b, k)
    apart = spatial.distance.cdist(a, b)
    expected: list[list[float]] = []
    for counts in fidelity._draws(24, sizes, by, 40).astype(int):
        rows = np.repeat(np.arange(24), counts)
        inside = apart[rows] <= reach_b
        near = apart[rows] <= reach_a[rows][:, None]
        expected.append([
            inside.any(1).mean(), near.any(0).mean(), inside.sum() / k / len(rows),
            inside.any(0).mean(),
        ])  # fmt: skip
    drawn = np.array(expected) - np.mean(expected, axis=0)
    for column, one in enumerate(found.values()):
        ends = np.quantile(drawn[:, column], [0.025, 0.975])
        low, high = one.value + ends
        assert (one.low, one.high) == pytest.approx((max(0.0, low), high), abs=1e-12)


@pytest.mark.parametrize("width", [5, 60], ids=["more images", "more features"])
def test_a_drawn_frechet_distance_is_that_of_the_images_repeated(width: int) -> None:
    features = gaussian(40, width)
    reference = Moments.of(gaussian(60, width, 3) * 1.4 + 0.2)
    counts = fidelity._draws(40, [10] * 4, "prompts", 6)
    for row in counts:
        repeated = features.repeat(row.astype(int), axis=0)
        expected = _distance(repeated, reference)
        root = fidelity._root(reference.covariance)
        found = fidelity._weighted_frechet(features, features @ root, row, reference)
        assert found == pytest.approx(expected, rel=1e-7)


def test_prompts_that_differ_make_an_interval_over_prompts_the_wider_one() -> None:
    centres = np.repeat(gaussian(10, 4, 5) * 4, 20, axis=0)
    features, reference = centres + gaussian(200, 4), gaussian(300, 4, 8) * 4
    for measure in (
        lambda by: frechet_interval(features, Moments.of(reference), sizes=[20] * 10, by=by),
        lambda by: kid(features, reference, sizes=[20] * 10, by=by),
    ):
        seeds, prompts = measure("seeds"), measure("prompts")
        assert seeds.value == prompts.value
        assert prompts.high - prompts.low > 2 * (seeds.high - seeds.low)


def test_a_set_covers_itself_and_a_far_one_covers_nothing() -> None:
    near = gaussian(40, 3)
    assert neighbours(near, near)[:2] == (1.0, 1.0)
    assert neighbours(near, near).coverage == 1.0
    assert neighbours(near + 100.0, near) == (0.0, 0.0, 0.0, 0.0)


def test_one_mode_of_two_is_precise_and_covers_half() -> None:
    left, right = gaussian(50, 2, 1), gaussian(50, 2, 2) + 50.0
    found = neighbours(gaussian(50, 2, 3), np.concatenate([left, right]))
    assert found.precision > 0.9
    assert found.recall == pytest.approx(0.5, abs=0.06)
    assert 0.3 < found.coverage <= 0.5


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(InputError, match="one width, got 3 and 4"):
        kid(gaussian(5, 3), gaussian(5, 4))
    with pytest.raises(InputError, match="one width, got 3 and 4"):
        frechet_interval(gaussian(5, 3), Moments.of(gaussian(5, 4)))
    with pytest.raises(InputError, match="n >= 2"):
        kid(gaussian(1, 3), gaussian(5, 3))
    with pytest.raises(InputError, match="more than 5 images in both sets, got 5 and 9"):
        neighbours(gaussian(5, 3), gaussian(9, 3))
