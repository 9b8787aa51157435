"""The contact sheet: every image is there, unblurred, and odd labels do not break it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from headstart.errors import InputError
from headstart.pictures.png import encode_png
from headstart.pictures.sheet import Row, draw_sheet


def pictures(count: int, size: int = 64, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def sheet(rows: list[Row], count: int, **options: str) -> np.ndarray:
    words = {"title": "a fox", "subtitle": "", "footer": "one · two"} | options
    return np.asarray(draw_sheet(rows, columns=[str(i) for i in range(count)], **words))


def places(image: np.ndarray, picture: np.ndarray) -> int:
    """How often `picture` lies in `image`, pixel for pixel."""
    height, width = picture.shape[:2]
    corner = (image == picture[0, 0]).all(-1)
    matches = 0
    for y, x in zip(*np.nonzero(corner), strict=True):
        matches += np.array_equal(image[y : y + height, x : x + width], picture)
    return matches


@pytest.mark.parametrize("count", [1, 8, 11])
def test_every_image_is_drawn_once_in_whole_pixels(count: int) -> None:
    first, second = pictures(count), pictures(count, seed=1)
    image = sheet([Row(name="base", images=first), Row(name="hybrid", images=second)], count)
    for picture in (*first, *second):
        assert places(image, picture.repeat(2, axis=0).repeat(2, axis=1)) == 1


def test_large_images_are_reduced_and_the_sheet_stays_small() -> None:
    image = sheet([Row(name="base", images=pictures(8, 1024))], 8)
    assert image.shape[1] < 2200


def test_a_longer_bar_has_more_ink_and_an_accent_has_its_colour() -> None:
    images = pictures(1)
    none, half, full = (
        sheet([Row(name="a", images=images, bar=bar)], 1).astype(int).sum()
        for bar in (0.0, 0.5, 1.0)
    )
    assert none > half > full
    plain = sheet([Row(name="hybrid", images=images)], 1)
    accented = sheet([Row(name="hybrid", images=images, accent=True)], 1)
    assert not np.array_equal(plain, accented)


def test_labels_of_any_length_and_script_are_drawn_inside_the_sheet() -> None:
    rows = [Row(name="base", images=pictures(2), notes=("60 passes", "é 日本 🦊"))]
    image = sheet(rows, 2, title="fox " * 1000 + "\n日本", footer="words " * 300)
    margin = image[:, -40:]
    assert (margin == margin[0, 0]).all()


def test_rows_of_different_size_or_number_are_refused() -> None:
    with pytest.raises(InputError, match="one size"):
        sheet([Row(name="a", images=pictures(2)), Row(name="b", images=pictures(2, 32))], 2)
    with pytest.raises(InputError, match="holds 3 images"):
        sheet([Row(name="a", images=pictures(2))], 3)
    with pytest.raises(InputError, match="at least one row"):
        sheet([], 1)


def test_png_bytes_hold_every_pixel() -> None:
    (picture,) = pictures(1)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(picture)))), picture)
