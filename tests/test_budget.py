"""The memory estimate: made before anything is allocated, and kept to by the batch."""

from __future__ import annotations

import numpy as np
import pytest

from headstart.checkpoint.params import VaeParams
from headstart.errors import InputError
from headstart.memory.budget import (
    SAFE_SHARE,
    BatchSizes,
    Chunks,
    Footprint,
    Free,
    Shape,
    check_texts_fit,
    chunks,
    spare_bytes,
)

VALUES = Footprint(latent_values=1000.0, vae=VaeParams(channels=(8, 16)), text_values=5e4)
SHAPE = Shape(batch=16, channels=4, latent=(16, 16), pixels=(32, 32))
ROW = 256_000 * 4
STATES = 16 * (4 * 256 * 8 * 4 + 32 * 32 * 15)


def free(rows: float, decodes: float) -> Free:
    """Memory for so many rows of a UNet, and so many whole decodes, besides the states."""
    each = VALUES.decode_bytes(SHAPE)
    return Free(*(int((STATES + n) / SAFE_SHARE) + 8 for n in (rows * ROW, decodes * each)))


def test_the_states_are_of_the_batch_and_of_each_x0_that_stays() -> None:
    assert SHAPE.state_bytes == STATES
    assert SHAPE._replace(x0_rows=30).state_bytes - STATES == 16 * 30 * 4 * 256 * 4


def test_everything_runs_at_once_where_it_fits_or_nobody_knows() -> None:
    assert chunks(SHAPE, VALUES, 2, free(32, 16)) == Chunks(16, 16)
    assert chunks(SHAPE, VALUES, 2, Free(None, None)) == Chunks(16, 16)


def test_guidance_doubles_the_rows_of_a_unet_and_nothing_of_the_decoder() -> None:
    assert chunks(SHAPE, VALUES, 1, free(16, 16)) == Chunks(16, 16)
    assert chunks(SHAPE, VALUES, 2, free(16, 16)) == Chunks(8, 8)
    assert chunks(SHAPE, VALUES, 2, free(32, 16)) == Chunks(16, 16)


def test_a_batch_that_does_not_fit_is_cut_in_halves_for_each_network_alone() -> None:
    assert chunks(SHAPE, VALUES, 2, free(32, 3)) == Chunks(16, 2)
    assert chunks(SHAPE, VALUES, 2, free(5, 16)) == Chunks(2, 2)


def test_a_decode_that_does_not_fit_whole_is_cut_into_bands() -> None:
    sizes = chunks(SHAPE, VALUES, 1, free(16, 0.9))
    assert sizes.networks == 16 and sizes.bands > 1
    memory = free(16, 0.9)
    assert memory.decode is not None
    assert VALUES.decode_bytes(SHAPE, sizes.bands) + STATES <= SAFE_SHARE * memory.decode
    assert sizes.decode_chunks == (16, sizes.bands)
    assert chunks(SHAPE, VALUES, 1, free(16, 16)).decode_chunks is None


@pytest.mark.parametrize(
    ("rows", "decodes", "where"), [(1.9, 16, "1 in the UNet"), (4, 0.001, "1 in the decoder")]
)
def test_what_never_fits_is_refused_with_need_and_supply(
    rows: float, decodes: float, where: str
) -> None:
    with pytest.raises(InputError, match=rf"16 images of 32x32 .* {where} at a time; .* GB are fr"):
        chunks(SHAPE, VALUES, 2, free(rows, decodes))


def test_a_picture_that_was_not_planned_for_is_refused_with_how_to_plan_for_it() -> None:
    """A lower limit of memory would leave no more memory for it, but less."""
    with pytest.raises(InputError, match=r"; or load with plan_size=\(32, 32\) \(--size\) and"):
        chunks(SHAPE, VALUES, 2, free(1, 16), device="cuda:0")
    with pytest.raises(InputError, match=r"or a smaller batch$"):
        chunks(SHAPE, VALUES, 2, free(1, 16), device="cpu")


def test_batch_sizes_of_the_caller_are_never_cut() -> None:
    assert chunks(SHAPE, VALUES, 1, free(2, 16), BatchSizes.of(2)) == Chunks(2, 2)
    assert chunks(SHAPE, VALUES, 1, free(2, 16), BatchSizes.of((2, 1, 4))) == Chunks(2, 1, 4)
    with pytest.raises(InputError, match="with 16 in the UNet"):
        chunks(SHAPE, VALUES, 1, free(2, 16), BatchSizes.of(16))
    with pytest.raises(InputError, match="in the decoder"):
        chunks(SHAPE, VALUES, 1, free(2, 1), BatchSizes.of((2, 2, 1)))
    with pytest.raises(InputError, match=r"batch: expected a whole number of at least 1.* got 0"):
        BatchSizes.of(0)
    for wrong in (2.5, float("nan"), True, "8,2", (8, 2, 1.5), (2, 2, 2, 2), (), (2, 0), {2}):
        with pytest.raises(InputError, match=r"batch: expected .* such as \(8, 2, 16\), got"):
            BatchSizes.of(wrong)  # type: ignore[arg-type]
    assert BatchSizes.of((np.int64(2), None, 4)) == BatchSizes(2, None, 4)


def test_texts_that_do_not_fit_at_once_are_refused_and_long_ones_count_by_the_piece() -> None:
    assert VALUES.text_bytes(3, 154) == 2 * VALUES.text_bytes(3, 77)
    need = VALUES.text_bytes(3, 154)
    check_texts_fit(VALUES, 3, 154, int(need / SAFE_SHARE) + 1, "cuda:0")
    with pytest.raises(InputError, match=r"3 texts of 154 tokens need about .* fewer prompts"):
        check_texts_fit(VALUES, 3, 154, need, "cuda:0")


def test_what_rows_leave_is_spare() -> None:
    """Of 20 rows' memory 16 take theirs; guidance doubles them; None: unknown."""
    memory = free(20, 16)
    left = spare_bytes(SHAPE, VALUES, 1, memory, chunks(SHAPE, VALUES, 1, memory))
    assert left is not None and 0 <= left - 4 * ROW <= 8
    halves = chunks(SHAPE, VALUES, 2, memory)
    left = spare_bytes(SHAPE, VALUES, 2, memory, halves)
    assert halves.networks == 8 and left is not None and 0 <= left - 4 * ROW <= 8
    assert spare_bytes(SHAPE, VALUES, 1, free(1, 16), Chunks(4, 4)) == 0, "asked for, and not cut"
    assert spare_bytes(SHAPE, VALUES, 1, Free(None, None), Chunks(16, 16)) is None
