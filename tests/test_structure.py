"""The numbers behind a trace: against hand-made pictures whose distances are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headstart import NoiseSchedule, Prediction, preset
from headstart.errors import InputError
from headstart.metrics.metrics import Extractor, diversity
from headstart.metrics.resample import bootstrap_seeds
from headstart.traces.structure import Measurements, Space, feature_space, measure, pixel_space


def first_pixel(rgb: np.ndarray) -> np.ndarray:
    """Three features a picture: its first pixel's colour."""
    return rgb[:, 0, 0].astype(np.float64)


SPACE = feature_space(Extractor("corner", first_pixel))


def measured(colours: list[list[tuple[int, int, int]]], space: Space = SPACE) -> Measurements:
    """[steps][seeds] of one-colour pictures, after a black-and-blue blank."""
    frames = np.array(colours, np.uint8)[:, :, None, None].repeat(2, 2).repeat(2, 3)
    table = preset("turbo").compile(NoiseSchedule.scaled_linear())
    steps = [(index, table[index]) for index in range(len(colours))]
    good = np.ones(frames.shape[:2], np.bool_)
    blank = np.full((2, 2, 3), (0, 0, 255), np.uint8)
    return measure(steps, frames, good, blank, space)


def test_share_is_the_part_of_the_way_that_is_covered() -> None:
    """Cosines to (1,0,0): 0.8 at the first step, 1 at the last; the blank's is 0."""
    measures = measured([[(200, 150, 0)], [(255, 0, 0)]])
    assert measures.distance[:, 0] == pytest.approx([0.2, 0.0])
    assert measures.share[:, 0] == pytest.approx([1 - math.sqrt(0.2), 1.0])


def test_what_is_farther_than_the_blank_has_a_negative_share() -> None:
    space = Space(Extractor("corner", first_pixel), "squares", lambda a, b: ((a - b) ** 2).sum(-1))
    measures = measured([[(0, 0, 255)], [(0, 0, 200)], [(0, 0, 0)]], space)
    assert measures.share[0, 0] == 0.0
    assert measured([[(255, 255, 255)], [(0, 0, 0)]], space).share[0, 0] < 0.0


def test_amplification_is_the_papers_factor() -> None:
    """213.6 for SDXL's schedule at timestep 999, 16.7 at 749 (arXiv:2503.10637, appendix A)."""
    measures = measured([[(200, 150, 0)], [(255, 0, 0)]])
    assert [f.amplification for f in measures.figures] == pytest.approx([213.6, 16.66], rel=1e-3)


def test_spread_is_the_diversity_that_metrics_reports() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (200, 150, 20), (9, 80, 100)]
    measures = measured([colours, colours])
    features = np.array(colours, np.float64)
    spread = measures.figures[0].spread
    assert spread.value == pytest.approx(diversity(features))
    same = bootstrap_seeds(features)
    assert (spread.low, spread.high) == pytest.approx((same.low, same.high))


def test_one_seed_has_no_interval_and_no_spread() -> None:
    measures = measured([[(200, 150, 0)], [(255, 0, 0)]]).figures[0]
    assert measures.share.value > 0 and math.isnan(measures.share.low)
    assert math.isnan(measures.spread.value)
    assert measures.to_json()["spread"] == [None, None, None]
    assert measures.to_json()["share"][1] is None


def test_intervals_hold_the_mean_and_shrink_with_agreement() -> None:
    mixed = measured([[(200, 150, 0), (250, 20, 0), (90, 200, 0)], [(255, 0, 0)] * 3]).figures[0]
    alike = measured([[(200, 150, 0)] * 3, [(255, 0, 0)] * 3]).figures[0]
    assert mixed.share.low < mixed.share.value < mixed.share.high
    assert alike.share.low == pytest.approx(alike.share.high)


def test_a_missing_picture_leaves_only_its_own_numbers_out() -> None:
    frames = np.zeros((2, 3, 2, 2, 3), np.uint8)
    frames[0], frames[1] = (200, 150, 0), (255, 0, 0)
    good = np.array([[True, False, True], [True, True, True]])
    table = preset("turbo").compile(NoiseSchedule.scaled_linear())
    blank = np.full((2, 2, 3), (0, 0, 255), np.uint8)
    measures = measure([(0, table[0]), (3, table[3])], frames, good, blank, SPACE)
    assert np.isnan(measures.share[0]).tolist() == [False, True, False]
    assert measures.figures[0].distance.value == pytest.approx(0.2)


def test_pixels_are_compared_on_a_grid_that_a_small_picture_still_has() -> None:
    space = pixel_space(8, 8)
    black, white = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 255, np.uint8)
    features = [space.extractor.features(picture) for picture in (black, white)]
    assert space.pair(*features)[0] == pytest.approx(4.0)
    assert "colours-8x8" in space.name and "colours-16x16" in pixel_space(1024, 512).name


def test_a_result_that_is_the_blank_has_distances_and_no_shares() -> None:
    measures = measured([[(200, 150, 0)], [(0, 0, 255)]])
    assert measures.distance[:, 0].tolist() == pytest.approx([1.0, 0.0])
    assert np.isnan(measures.share).all()
    assert measures.figures[0].to_json()["share"] == [None, None, None]


def test_features_that_are_not_finite_are_refused() -> None:
    broken = feature_space(Extractor("broken", lambda rgb: np.full((len(rgb), 2), np.nan)))
    with pytest.raises(InputError, match="not finite"):
        measured([[(1, 2, 3)]], broken)


def test_the_schedule_of_another_prediction_has_the_same_amplification() -> None:
    table = preset("turbo").compile(NoiseSchedule.scaled_linear(), prediction=Prediction.V)
    abar = 1.0 / (1.0 + table[0].sigma ** 2)
    assert table[0].sigma ** 2 == pytest.approx((1 - abar) / abar)
