"""Pictures of every step, a few at a time, and intervals over prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bundled import needs_pair

import headstart as hs
from headstart.errors import InputError
from headstart.metrics.features import open_features
from headstart.spaces.extractor import Judge
from headstart.study import steps

pytestmark = needs_pair
PIXELS = 64 * 64
JUDGE = Judge(())


def test_parts_are_the_runs_x0_and_no_larger_than_asked(
    engine: hs.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of 3 seeds, parts of 2: networks see no more than 3, decoders no more than 2."""
    table = engine.compile("hybrid")
    whole = engine.sample("a fox", plan=table, seeds=range(5), keep_x0=True).x0
    assert whole is not None
    monkeypatch.setattr(steps, "GROUP", 3 * PIXELS)
    monkeypatch.setattr(steps, "PART", 2 * PIXELS + 1)
    parts = [*steps.Setting(engine, range(5), {}, JUDGE).x0_parts("a fox", table)]
    assert [part.shape[1] for part in parts] == [2, 1, 2]
    # a batch of another size rounds differently: 3e-6 of latents of about 1 were seen
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-4)


def test_a_picture_larger_than_the_bound_is_taken_alone(
    engine: hs.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "GROUP", 1)
    assert [*steps.Setting(engine, range(7, 10), {}, JUDGE).seed_groups()] == [
        range(7, 8),
        range(8, 9),
        range(9, 10),
    ]


def test_no_seeds_are_refused(engine: hs.Engine) -> None:
    with pytest.raises(InputError, match="seed"):
        next(steps.Setting(engine, [], {}, JUDGE).x0_parts("a fox", engine.compile("hybrid")))


def test_a_score_is_the_same_one_phrase_at_a_time_and_all_at_once() -> None:
    judge = open_features("scorer")
    rgb = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    phrases = ("a fox", "an owl")
    together = steps.text_scorer(judge, phrases)(rgb)
    apart = steps.text_scorer(judge._replace(scores=None), phrases)(rgb)
    assert together.shape == (3, 2)
    np.testing.assert_allclose(together, apart, atol=1e-6)


def test_a_judge_without_text_and_one_that_gives_nan_are_refused() -> None:
    with pytest.raises(
        InputError, match="structure-16x16, colours-8x8: nothing scores pictures with text"
    ):
        steps.text_scorer(open_features("structure"), ("a fox",))
    broken = Judge((), lambda rgb, prompts: np.full(len(rgb), np.nan), "blind")
    with pytest.raises(InputError, match="blind gave scores that are not finite"):
        steps.text_scorer(broken, ("a fox",))(np.zeros((2, 8, 8, 3), np.uint8))


def test_an_interval_is_over_prompts_and_has_no_ends_for_one() -> None:
    interval_ = steps.interval(np.array([1.0, 2.0, 3.0, 4.0]))
    assert interval_["value"] == 2.5
    # the mean of four draws: a standard error of 0.56, so 2.5 -+ 1.1
    assert interval_["low"] == pytest.approx(1.4, abs=0.15)
    assert interval_["high"] == pytest.approx(3.6, abs=0.15)
    assert steps.interval(np.array([0.25])) == {"value": 0.25, "low": None, "high": None}


def test_cells_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InputError, match="no cells"):
        steps.plans_of([], "share")
    with pytest.raises(InputError, match="another experiment"):
        steps.plans_of([{"base/excess": np.zeros(1)}], "share")
    cells = [{"base/share": np.zeros((4, 3))}, {"base/share": np.zeros((4, 2))}]
    with pytest.raises(InputError, match="other plans, steps or seeds"):
        steps.stacked(cells, "base/share")
    with pytest.raises(InputError, match="measure all prompts alike"):
        steps.stacked([cells[0], {}], "base/share")
