"""Known answers and an independent implementation: diversity, MSS and Vendi."""

import numpy as np
import pytest

from headstart.errors import InputError
from headstart.metrics.metrics import diversity, pixel_extractor, vendi

spatial = pytest.importorskip("scipy.spatial.distance", reason="the independent implementation")
stats = pytest.importorskip("scipy.stats")

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


@pytest.mark.parametrize(("n", "d"), [(2, 3), (7, 128), (64, 16)])
def test_diversity_and_similarity_are_scipys_mean_cosine_distance(n: int, d: int) -> None:
    features = gaussian(n, d) + 0.5
    expected = spatial.pdist(features, "cosine").mean()
    assert diversity(features) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(2, 3), (7, 128), (64, 16)])
def test_vendi_is_the_exponential_of_scipys_entropy_of_squared_singular_values(
    n: int, d: int
) -> None:
    """l(K/n) are the squared singular values of the unit features over sqrt(n): no eigenvalues."""
    features = gaussian(n, d) + 0.5
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    spectrum = np.linalg.svd(unit / np.sqrt(n), compute_uv=False) ** 2
    assert vendi(features) == pytest.approx(np.exp(stats.entropy(spectrum)), rel=1e-8)


def test_pixel_features_are_cell_means_and_the_extractor_is_named() -> None:
    rgb = np.zeros((2, 10, 12, 3), np.uint8)
    rgb[1, :5] = 255
    extractor = pixel_extractor(2)
    features = extractor.features(rgb).reshape(2, 2, 2, 3)
    assert extractor.name == "colours-2x2"
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
