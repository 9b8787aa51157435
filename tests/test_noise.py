"""Noise sources: one image, one stream; given tensors checked before they are used."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evidence.oracle import numpy_normal
from headstart.errors import InputError
from headstart.interfaces import NoiseSource
from headstart.noise import Given, Philox, keys_of

CPU = torch.device("cpu")
SHAPE = (4, 3, 5)


def test_the_counter_is_the_row_plus_1_and_0_for_the_start() -> None:
    noise = Philox([7, 2**64 - 1], samples=[0, 9])
    for image, (seed, sample) in enumerate(((7, 0), (2**64 - 1, 9))):
        start = torch.from_numpy(numpy_normal(seed, sample, -1, SHAPE))
        row = torch.from_numpy(numpy_normal(seed, sample, 2, SHAPE))
        assert torch.equal(noise.initial(SHAPE, CPU)[image], start)
        assert torch.equal(noise.step(2, SHAPE, CPU)[image], row)


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5, unique=True),
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=3),
)
def test_an_image_does_not_know_its_batch_or_the_draws_before(
    seeds: list[int], rows: list[int]
) -> None:
    batch = Philox(seeds)
    for row in rows:
        for image, seed in enumerate(seeds):
            alone = Philox(seed)
            assert torch.equal(batch.step(row, SHAPE, CPU)[image], alone.step(row, SHAPE, CPU)[0])
            assert torch.equal(batch.initial(SHAPE, CPU)[image], alone.initial(SHAPE, CPU)[0])


def test_start_rows_seeds_and_samples_all_draw_differently() -> None:
    noise = Philox([1, 2, 1], samples=[0, 0, 1])
    draws = [noise.initial(SHAPE, CPU), *(noise.step(row, SHAPE, CPU) for row in range(3))]
    images = torch.cat(draws).flatten(1)
    distances = torch.cdist(images, images) + 100 * torch.eye(len(images))
    assert distances.min() > 5


def test_seeds_may_be_numpy_integers_a_range_or_one_number() -> None:
    for seeds in (range(2), (0, 1), np.arange(2), np.arange(2, dtype=np.uint64)):
        assert Philox(seeds) == Philox([0, 1])
    assert len(Philox(3)) == 1
    assert Philox(np.uint64(2**64 - 1)).seeds == (2**64 - 1,)


BAD_PHILOX = [
    (([-1],), r"seed -1 is outside \[0, 2\^64\)"),
    (([2**64],), r"seed 18446744073709551616 is outside"),
    (([0], [2**32]), r"sample 4294967296 is outside \[0, 2\^32\)"),
    (([0.5],), "seeds are whole numbers"),
    ((["7"],), "seeds are whole numbers"),
    (([],), "no seeds"),
    (([1, 2], [0]), "2 seeds but 1 samples"),
    (([5, 6, 5],), r"images 0 and 2 have the same seed 5 and sample 0.*samples=range\(3\)"),
    (([5, 5], [3, 3]), "images 0 and 1 have the same seed 5 and sample 3"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_PHILOX, ids=[m for _, m in BAD_PHILOX])
def test_wrong_seeds_are_explained(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Philox(*arguments)  # pyright: ignore[reportArgumentType]


def test_one_seed_may_have_several_samples() -> None:
    noise = Philox([5, 5], samples=range(2))
    first, second = noise.initial(SHAPE, CPU)
    assert not torch.equal(first, second)


def test_given_noise_comes_back_in_float32() -> None:
    start, row = torch.randn(2, *SHAPE).half(), torch.randn(2, *SHAPE).double()
    noise = Given(start, [None, row])
    assert len(noise) == 2 and noise.shape == SHAPE
    assert torch.equal(noise.initial(SHAPE, CPU), start.float())
    assert torch.equal(noise.step(1, SHAPE, CPU), row.float())
    assert noise.initial(SHAPE, CPU).dtype == noise.step(1, SHAPE, CPU).dtype == torch.float32


def test_given_noise_that_is_missing_is_an_error_naming_the_row() -> None:
    noise = Given(torch.zeros(2, *SHAPE), [None, torch.zeros(2, *SHAPE)])
    for row in (0, 2, 5):
        with pytest.raises(InputError, match=rf"row {row} adds noise.*only for rows \[1\]"):
            noise.step(row, SHAPE, CPU)


BAD_GIVEN = [
    ((torch.zeros(4),), r"initial: expected float noise \[B, \.\.\.\].*got torch.float32 \[4\]"),
    ((torch.zeros(2, *SHAPE).long(),), "initial: expected float noise .* torch.int64"),
    ((torch.zeros(0, *SHAPE),), "initial: expected float noise"),
    (
        (torch.zeros(2, *SHAPE), [None, torch.zeros(1, *SHAPE)]),
        r"row 1: expected the shape of the initial noise \[2, 4, 3, 5\], got \[1, 4, 3, 5\]",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_GIVEN, ids=[m for _, m in BAD_GIVEN])
def test_wrong_given_noise_is_explained(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Given(*arguments)  # pyright: ignore[reportArgumentType]


def test_given_noise_of_another_size_than_asked_for_is_an_error() -> None:
    with pytest.raises(InputError, match=r"latents \[4, 8, 8\].*\[4, 3, 5\]"):
        Given(torch.zeros(1, *SHAPE)).initial((4, 8, 8), CPU)


def test_both_are_noise_sources() -> None:
    sources: list[NoiseSource] = [Philox([0]), Given(torch.zeros(1, *SHAPE))]
    assert [len(source) for source in sources] == [1, 1]


def test_rows_share_one_copy_of_the_seeds_on_a_device() -> None:
    """Copying waits for the device."""
    noise = Philox([3, 2**64 - 1])
    first, again = noise.draw(0, CPU), noise.draw(5, CPU)
    assert first.seeds is again.seeds and first.samples is again.samples
    assert first.seeds.tolist() == [3, -1] and (first.first_row, again.first_row) == (0, 5)


def test_images_of_one_seed_share_its_noise() -> None:
    noise, plain = Philox.shared([5, 3, 5]), Philox([5, 3])
    assert torch.equal(noise.initial(SHAPE, CPU), plain.initial(SHAPE, CPU)[[0, 1, 0]])
    assert torch.equal(noise.step(2, SHAPE, CPU), plain.step(2, SHAPE, CPU)[[0, 1, 0]])
    assert Philox.shared([5, 3]) == plain
    with pytest.raises(InputError, match="no seeds"):
        Philox.shared([])


def test_rows_are_of_keys_where_their_source_draws_from_some() -> None:
    class Other(Philox):
        """Whose draws may be other numbers."""

    class OwnStart(NamedTuple):
        rows: object

    noise = Philox([3, 4])
    assert keys_of(noise) is noise and keys_of(OwnStart(OwnStart(noise))) is noise
    inputs = Given(torch.ones(2, *SHAPE))
    for source in (Other([3]), inputs, OwnStart(inputs), OwnStart(Other([3]))):
        assert keys_of(source) is None
