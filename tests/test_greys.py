"""Structure features: what they do not see, and what they do."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from headstart.metrics.greys import structure_extractor
from headstart.metrics.metrics import diversity, vendi

structure = structure_extractor()


def picture(side: int = 64, *, left: float = 0.25, seed: int = 0) -> np.ndarray:
    """A lit ellipse and a bar on a soft slope, at any resolution; values 40 to 180."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    shade = 60.0 + 20.0 * np.sin(5.0 * y + seed)
    shade = shade + 60.0 * (np.hypot(x - left - 0.15, y - 0.5) < 0.22)
    shade = shade + 40.0 * ((abs(y - 0.8) < 0.06) & (x > 0.4))
    return np.repeat(shade.round().astype(np.uint8)[..., None], 3, axis=2)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine distance of two pictures, of one size or two."""
    x, y = structure.features(a[None])[0], structure.features(b[None])[0]
    return float(1.0 - x @ y)


def test_features_are_unit_vectors_of_482_numbers_and_named() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), np.uint8)
    features = structure.features(rgb)
    assert structure.name == "structure-16x16"
    assert features.shape == (3, 482) and features.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-12)


def test_a_picture_is_at_distance_0_from_itself_in_any_batch() -> None:
    rgb = np.stack([picture(), picture(left=0.4), picture()])
    features = structure.features(rgb)
    assert np.array_equal(features[0], features[2])
    assert diversity(features[::2]) == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(structure.features(rgb[1:2])[0], features[1], atol=1e-12)


@pytest.mark.parametrize("shift", [-40, 7, 70])
def test_a_uniform_shift_of_brightness_changes_nothing(shift: int) -> None:
    brighter = (picture().astype(int) + shift).astype(np.uint8)
    assert apart(picture(), brighter) == pytest.approx(0.0, abs=1e-12)


def test_hues_of_one_luma_are_the_same_picture() -> None:
    """0.299*8 - 0.587*20 + 0.114*82 = 0; half of the picture takes that step."""
    step = np.array([8, -20, 82])
    assert step @ [299, 587, 114] == 0
    coloured = picture().astype(int)
    coloured[:, 20:] += np.where(coloured[:, 20:] < 170, step, -step)
    coloured = coloured.clip(0, 255).astype(np.uint8)
    difference = abs(coloured.astype(int) - picture()).max(axis=2)
    assert (difference > 50).mean() > 0.5
    assert apart(picture(), coloured) == pytest.approx(0.0, abs=1e-12)


def test_a_shape_that_moves_is_far_from_where_it_was() -> None:
    distances = [apart(picture(), picture(left=0.25 + step)) for step in (1 / 64, 4 / 64, 16 / 64)]
    assert 0.0 < distances[0] < distances[1] < distances[2]
    assert distances[1] > 0.1  # one cell
    assert distances[2] > 0.5


def test_light_on_dark_is_not_dark_on_light() -> None:
    assert apart(picture(), 255 - picture()) > 0.5


@pytest.mark.parametrize("times", [2, 5, 16])
def test_a_picture_enlarged_by_a_whole_number_has_the_same_features(times: int) -> None:
    large = picture().repeat(times, axis=0).repeat(times, axis=1)
    assert apart(picture(), large) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("side", [100, 256, 1000])
def test_other_resolutions_are_within_a_hundredth(side: int) -> None:
    """Drawn anew, an edge falls into another share of a cell; resized, it is blurred."""
    assert apart(picture(), picture(side)) < 0.01
    resized = Image.fromarray(picture(side)).resize((64, 64), Image.Resampling.LANCZOS)
    assert apart(np.asarray(resized), picture(side)) < 0.01
    assert apart(picture(), picture(left=0.25 + 2 / 64)) > 0.01, "two pixels of 64"


def test_flat_pictures_are_alike_and_far_from_any_other() -> None:
    flat = np.full((2, 24, 8, 3), 9, np.uint8)
    flat[1] = (200, 30, 90)
    assert diversity(structure.features(flat)) == pytest.approx(0.0, abs=1e-12)
    assert apart(flat[0], picture()) > 0.8
    small = structure.features(picture()[None, :3, :5])  # fewer pixels than cells
    assert small.shape == (1, 482) and np.isfinite(small).all()


def test_noise_below_a_grey_level_does_not_pass_for_structure() -> None:
    dither = np.random.default_rng(1).integers(100, 102, (64, 64, 1)).repeat(3, axis=2)
    assert apart(dither.astype(np.uint8), np.full((64, 64, 3), 100, np.uint8)) < 0.6
    noisy = picture() + np.random.default_rng(2).integers(0, 2, (64, 64, 1)).astype(np.uint8)
    assert apart(picture(), noisy) < 0.01


def test_sixteen_shapes_in_sixteen_places_are_more_varied_than_in_sixteen_colours() -> None:
    rng = np.random.default_rng(3)
    moved = np.stack([picture(left=left) for left in np.linspace(0.0, 0.6, 16)])
    tints = rng.uniform(0.6, 1.0, (16, 1, 1, 3))
    tinted = (picture() * tints).astype(np.uint8)
    assert diversity(structure.features(moved)) > 20 * diversity(structure.features(tinted))
    assert vendi(structure.features(moved)) > 3
