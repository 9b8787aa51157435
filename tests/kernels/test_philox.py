"""Philox normals: the published words, the same bits everywhere, and the statistics of a normal."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from evidence.oracle import exact_normal, numpy_normal, philox_words
from headstart_kernels import INITIAL, host_noise, philox, philox_normal
from headstart_kernels.impl import reference_noise as reference

# Random123's kat_vectors for philox 4x32, 10 rounds: counter, key, words.
PUBLISHED = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
SEEDS = st.integers(0, 2**64 - 1)
WORDS = st.integers(0, 2**32 - 1)
COUNT = 1 << 21
SIGMAS = 5.0
"""How far a statistic may lie from its expectation; the draws are fixed, so this never flakes."""


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def hexes(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.fixture(scope="module")
def normals() -> Tensor:
    return philox_normal([2503_10637], [0], INITIAL, (COUNT,))[0]


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_words_are_the_published_known_answers(counter: str, key: str, words: str) -> None:
    in_torch = reference.philox4x32_10(
        [torch.tensor(word) for word in hexes(counter)], [torch.tensor(word) for word in hexes(key)]
    )
    assert [int(word) for word in in_torch] == hexes(words)
    assert [int(word) for word in philox_words(hexes(counter), hexes(key))] == hexes(words)


@settings(max_examples=100, deadline=None)
@given(counter=st.lists(WORDS, min_size=4, max_size=4), key=st.lists(WORDS, min_size=2, max_size=2))
def test_torch_and_numpy_give_the_same_words(counter: list[int], key: list[int]) -> None:
    in_torch = reference.philox4x32_10([torch.tensor(c) for c in counter], torch.tensor(key))
    assert [int(word) for word in in_torch] == [int(word) for word in philox_words(counter, key)]


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    sample=WORDS,
    step=st.integers(INITIAL, 2**32 - 2),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
)
def test_torch_and_numpy_give_the_same_bits(
    seed: int, sample: int, step: int, shape: tuple[int, int, int]
) -> None:
    got = philox_normal([seed], [sample], step, shape)[0]
    assert torch.equal(bits(got), bits(torch.from_numpy(numpy_normal(seed, sample, step, shape))))


def test_torch_and_numpy_give_the_same_bits_over_a_large_draw(normals: Tensor) -> None:
    expected = numpy_normal(2503_10637, 0, INITIAL, (COUNT,))
    assert torch.equal(bits(normals), bits(torch.from_numpy(expected)))


def test_normals_are_box_muller_to_5_ulp(normals: Tensor) -> None:
    exact = exact_normal(2503_10637, 0, INITIAL, (COUNT,))
    error = np.abs(normals.double().numpy() - exact) / np.abs(exact)
    assert error.max() < 5 * 2.0**-23


def test_square_root_is_correctly_rounded() -> None:
    significands = torch.arange(1 << 23, 1 << 25, 7, dtype=torch.float64).float()
    # numpy uses the processor's square root, which IEEE 754 defines exactly.
    expected = torch.from_numpy(np.sqrt(significands.numpy()))
    assert torch.equal(reference._sqrt(significands), expected)


def fitted(function: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> np.ndarray:
    """Coefficients of the polynomial through a function's values at Chebyshev points."""
    degree = {1 / 3: 7, 0.25: 3}[high]
    series = Chebyshev.interpolate(function, degree, domain=(low, high))
    return series.convert(kind=Polynomial).coef


FITS = {
    "LOG": fitted(lambda f: (-2 * np.log1p(f) + 2 * f - f * f) / f**3, -1 / 3, 1 / 3),
    "SIN": fitted(lambda z: np.sin(np.pi / 2 * np.sqrt(z)) / np.sqrt(z), 0.0, 0.25),
    "COS": fitted(lambda z: (np.cos(np.pi / 2 * np.sqrt(z)) - 1) / z, 0.0, 0.25),
}


@pytest.mark.parametrize("name", FITS)
def test_coefficients_are_the_rounded_fit(name: str) -> None:
    written = np.array(getattr(philox, name))
    assert np.array_equal(written, written.astype(np.float32))
    # Half a float32 ulp of rounding, and a little for the fit's own rounding in float64.
    assert np.all(np.abs(written - FITS[name]) <= 0.51 * np.spacing(np.abs(written, dtype="f4")))
    assert float(np.float32(-2 * math.log(2))) == philox.MINUS_2_LN_2


def test_approximation_errors_are_the_stated_ones() -> None:
    f = np.linspace(-1 / 3, 1 / 3, 200_000)  # an even count: 0 is not among them
    t = np.linspace(-0.5, 0.5, 200_001)
    log, sine, cosine = (Polynomial(getattr(philox, name)) for name in FITS)
    errors = (
        (f * (-2 + f * (1 + f * log(f))) + 2 * np.log1p(f), 1.5e-8),
        (t * sine(t * t) - np.sin(np.pi / 2 * t), 2.4e-8),
        (1 + t * t * cosine(t * t) - np.cos(np.pi / 2 * t), 9.2e-9),
    )
    for error, stated in errors:
        assert 0.9 * stated < np.abs(error).max() <= stated


def test_the_constants_name_two_thirds() -> None:
    assert np.uint32(philox.TWO_THIRDS_BITS).view(np.float32) == np.float32(2 / 3)
    assert math.ceil(2 / 3 * 2**32) == philox.UPPER


def test_the_radius_is_positive_and_accurate_over_all_of_its_range() -> None:
    # Every exponent, both sides of the branch at 2/3, and both ends.
    edges = [(1 << k) + d for k in range(32) for d in (-1, 0, 1)]
    edges += [philox.UPPER + d for d in range(-300, 300)] + [2**32 - 1 - d for d in range(3000)]
    word = torch.tensor(sorted(set(edges)))
    squared = reference._minus_two_log(word)
    exact = -2 * torch.log1p((word.double() + 0.5) * 2.0**-32 - 1)
    assert bool((squared > 0).all())
    assert bool(((squared.double() - exact).abs() <= 4 * 2.0**-24 * exact).all())


def test_the_largest_and_the_smallest_normal_are_the_stated_ones() -> None:
    ends = torch.tensor([0, 2**32 - 1])
    largest, smallest = (float(r) for r in reference._sqrt(reference._minus_two_log(ends)))
    assert largest == pytest.approx(math.sqrt(66 * math.log(2)), rel=2.0**-22)
    assert largest < philox.LARGEST_NORMAL < largest + 1e-4
    assert smallest == pytest.approx(2.0**-16, rel=1e-6)


def test_the_angle_visits_the_circle_symmetrically() -> None:
    turns = torch.arange(0, 2**32, 2**29)
    real, imaginary = reference._cos_sin(turns)
    half = math.sqrt(0.5)
    expected = [1.0, half, 0.0, -half, -1.0, -half, 0.0, half]
    assert real.tolist() == pytest.approx(expected, abs=2.0**-24)
    assert imaginary.tolist() == pytest.approx([*expected[-2:], *expected[:-2]], abs=2.0**-24)
    word = torch.randint(2**32, (10_000,), generator=torch.Generator().manual_seed(0))
    for shift, sign in ((2**31, -1.0), (2**32, 1.0)):
        opposite = reference._cos_sin((word + shift) % 2**32)
        assert torch.equal(opposite[0], sign * reference._cos_sin(word)[0])


def test_moments_are_those_of_a_normal(normals: Tensor) -> None:
    n = normals.double()
    # Standard errors of mean, variance, skewness and kurtosis of COUNT independent unit normals.
    expected = ((n, 0.0, 1.0), (n**2, 1.0, 2.0), (n**3, 0.0, 15.0), (n**4, 3.0, 96.0))
    for power, mean, variance in expected:
        assert abs(power.mean().item() - mean) < SIGMAS * math.sqrt(variance / COUNT)


def test_the_distribution_passes_kolmogorov_and_smirnov(normals: Tensor) -> None:
    cumulative = torch.special.ndtr(normals.double().sort().values)
    rank = torch.arange(COUNT, dtype=torch.float64) / COUNT
    distance = torch.maximum((cumulative - rank).abs(), (cumulative - rank - 1 / COUNT).abs()).max()
    # P(sqrt(N) D > 1.95) = 2 exp(-2 * 1.95^2) = 1.0e-3
    assert math.sqrt(COUNT) * distance.item() < 1.95


def test_tails_have_the_weight_of_a_normals_tails(normals: Tensor) -> None:
    for limit in (3.0, 4.0, 4.5):
        expected = COUNT * math.erfc(limit / math.sqrt(2))
        count = (normals.abs() > limit).sum().item()
        assert abs(count - expected) < SIGMAS * math.sqrt(expected)
    # The largest of 2^21: below 4.4 with P = 1e-10, above 6.4 with P = 3e-4.
    assert 4.4 < normals.abs().max().item() < 6.4


def test_draws_are_uncorrelated_across_everything_that_names_them(normals: Tensor) -> None:
    count = 1 << 17
    seeds, samples = [7, 8, 7, 7 << 32, 7], [0, 0, 1, 0, 0]
    first, *others = philox_normal(seeds, samples, 0, (count,)).double()
    others[-1] = philox_normal([7], [0], 1, (count,))[0].double()
    n = normals[:count].double()
    pairs = [(first, other) for other in others]
    pairs += [(n[lag:], n[:-lag]) for lag in (1, 2, 3, 4, 128)]
    for a, b in pairs:
        for f in (torch.Tensor.clone, torch.square):
            x, y = f(a) - f(a).mean(), f(b) - f(b).mean()
            correlation = (x * y).mean() / (x.square().mean() * y.square().mean()).sqrt()
            assert abs(correlation.item()) < SIGMAS / math.sqrt(len(a))


@settings(max_examples=30, deadline=None)
@given(
    images=st.lists(st.tuples(SEEDS, WORDS), min_size=1, max_size=6, unique=True),
    step=st.integers(INITIAL, 50),
    data=st.data(),
)
def test_an_image_has_the_same_bits_alone_and_in_any_batch(
    images: list[tuple[int, int]], step: int, data: st.DataObject
) -> None:
    shape = (4, 5, 3)
    order = data.draw(st.permutations(images))
    batch = philox_normal([i[0] for i in order], [i[1] for i in order], step, shape)
    for image, noise in zip(order, batch, strict=True):
        alone = philox_normal([image[0]], [image[1]], step, shape)[0]
        assert torch.equal(bits(noise), bits(alone))


@pytest.mark.parametrize("blocks", [1, 7, 64, 150, 1000])
def test_a_draw_in_parts_of_images_or_of_an_image_has_the_bits_of_the_whole(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (list(range(5)), [0] * 5, 3, (4, 8, 8))  # 64 blocks an image
    whole = philox_normal(*arguments)
    monkeypatch.setattr(host_noise, "BLOCKS", blocks)
    assert torch.equal(bits(philox_normal(*arguments)), bits(whole))


@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(st.tuples(SEEDS, WORDS), min_size=1, max_size=4),
    step=st.integers(INITIAL, 2**32 - 2),
    count=st.integers(1, 70),
)
def test_on_a_cpu_numpy_gives_the_bits_of_the_definition(
    images: list[tuple[int, int]], step: int, count: int
) -> None:
    seeds = torch.tensor([seed - (seed >> 63 << 64) for seed, _ in images])
    samples = torch.tensor([sample for _, sample in images])
    defined = reference.by_definition(seeds, samples, step, count)
    got = host_noise.normals(seeds, samples, step, count)
    assert got.is_contiguous() and torch.equal(bits(got), bits(defined))


def test_every_edge_of_a_word_has_the_bits_of_the_definition() -> None:
    """Words that no draw is sure to meet: each power of 2, both sides of UPPER, both ends."""
    edges = [(1 << k) + d for k in range(32) for d in (-1, 0, 1)]
    edges += [philox.UPPER + d for d in range(-300, 300)] + [2**32 - 1 - d for d in range(300)]
    word = torch.tensor(sorted(set(edges)))
    words = word.numpy().astype(np.uint32)
    squared = torch.from_numpy(host_noise._minus_two_log(words.copy()))
    assert torch.equal(bits(squared), bits(reference._minus_two_log(word)))
    for got, defined in zip(
        host_noise._cos_sin(words.view(np.int32).copy()), reference._cos_sin(word), strict=True
    ):
        assert torch.equal(bits(torch.from_numpy(got)), bits(defined))


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    long = philox_normal([1], [2], 3, (4, 4, 4))
    for count in range(1, 12):
        assert torch.equal(philox_normal([1], [2], 3, (count,))[0], long.flatten()[:count])


def test_tensors_of_seeds_samples_and_step_mean_what_numbers_mean() -> None:
    seeds, samples = [0, 5, 2**63, 2**64 - 1], [0, 1, 2**31, 2**32 - 1]
    signed = torch.tensor([*seeds[:2], -(2**63), -1])
    for step in (INITIAL, 7):
        numbers = philox_normal(seeds, samples, step, (4, 2, 2))
        tensors = philox_normal(signed, torch.tensor(samples), torch.tensor(step), (4, 2, 2))
        assert torch.equal(bits(numbers), bits(tensors))


def test_drawing_leaves_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    philox_normal([1], [0], 0, (4, 2, 2))
    assert torch.equal(torch.get_rng_state(), before)


BAD = [
    (([-1], [0], 0, (4,)), ValueError, r"seeds: expected integers in \[0, 2\^64\), got -1"),
    (([2**64], [0], 0, (4,)), ValueError, r"seeds: expected integers in \[0, 2\^64\)"),
    (([0], [2**32], 0, (4,)), ValueError, r"samples: expected integers in \[0, 2\^32\)"),
    (([0, 1], [0], 0, (4,)), ValueError, "2 seeds and 1 samples"),
    (([], [], 0, (4,)), ValueError, "at least one image"),
    (([0], [0], -2, (4,)), ValueError, "step: expected -1"),
    (([0], [0], torch.tensor([0, 0]), (4,)), TypeError, r"0-d int64, or int64 \[1\]"),
    (([0], [0], 0, (4, 0)), ValueError, "shape: expected positive sizes"),
    (([0], [0], 0, ()), ValueError, "shape: expected positive sizes"),
    ((torch.zeros(1), [0], 0, (4,)), TypeError, r"seeds: expected integers or int64 \[B\]"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD, ids=[case[2] for case in BAD])
def test_a_wrong_input_is_explained(
    arguments: tuple[object, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        philox_normal(*arguments)  # pyright: ignore[reportArgumentType]
