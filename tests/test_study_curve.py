"""Figure 5 as cells: against `trace`, known curves, and decoders that fail."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bundled import needs_pair
from torch import Tensor

import headstart as hs
from headstart.errors import InputError
from headstart.metrics.features import open_features
from headstart.spaces.extractor import Extractor, Judge
from headstart.study import curve, steps
from headstart.study.steps import Setting
from headstart.traces.decoders import Picture
from headstart.traces.structure import feature_space

pytestmark = needs_pair
PROMPTS, SEEDS = ("a fox", "an owl"), (5, 6, 7)
Cells = list[dict[str, Any]]


@pytest.fixture(scope="module")
def plans(engine: hs.Engine) -> dict[str, hs.StepTable]:
    return {
        "base": engine.compile("base", steps=5, base_guidance=2.0),
        "hybrid": engine.compile("hybrid"),
    }


@pytest.fixture(scope="module")
def cells(engine: hs.Engine, plans: dict[str, hs.StepTable]) -> Cells:
    judge, decoder = open_features("structure"), hs.decoder(engine, "full")
    return [
        curve.measure(Setting(engine, SEEDS, plans, judge), prompt, decoder) for prompt in PROMPTS
    ]


def test_a_cell_is_what_a_trace_of_the_same_runs_measures(
    engine: hs.Engine, plans: dict[str, hs.StepTable], cells: Cells
) -> None:
    runs = {
        plan: engine.sample(PROMPTS[0], plan=table, seeds=SEEDS, keep_x0=True)
        for plan, table in plans.items()
    }
    space = feature_space(open_features("structure").extractor)
    strips = hs.trace(runs, hs.decoder(engine, "full"), space=space).strips
    for strip in strips:
        values = strip.measured
        assert cells[0][f"{strip.name}/share"] == pytest.approx(values.share)
        assert cells[0][f"{strip.name}/distance"] == pytest.approx(values.distance)
        spread = [row.spread.value for row in values.figures]
        assert cells[0][f"{strip.name}/spread"] == pytest.approx(spread)


def test_few_pictures_at_a_time_give_the_same_numbers_in_bounded_memory(
    engine: hs.Engine,
    plans: dict[str, hs.StepTable],
    cells: Cells,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts of one picture, groups of two: what is decoded or looked at is one picture at most."""
    monkeypatch.setattr(steps, "PART", 64 * 64)
    monkeypatch.setattr(steps, "GROUP", 2 * 64 * 64)
    judge, decoder = open_features("structure"), hs.decoder(engine, "full")
    shapes: list[tuple[int, ...]] = []

    def features(rgb: np.ndarray) -> np.ndarray:
        shapes.append(rgb.shape)
        return judge.extractor.features(rgb)

    def draw(x0: Tensor) -> Picture:
        shapes.append((*decoder(x0).rgb.shape,))
        return decoder(x0)

    spy = Judge((Extractor(judge.extractor.name, features),))
    cell = curve.measure(
        Setting(engine, SEEDS, plans, spy), PROMPTS[0], replace(decoder, draw=draw)
    )
    assert set(shapes) == {(1, 64, 64, 3)}
    for key in ("share", "distance", "spread"):  # rounding of a level of 255, seldom
        assert cell[f"hybrid/{key}"] == pytest.approx(cells[0][f"hybrid/{key}"], abs=2e-3)


def test_the_numbers_are_json_and_an_interval_holds_its_value(cells: Cells) -> None:
    numbers = curve.numbers(cells)
    assert json.loads(json.dumps(numbers)) == numbers
    assert (numbers["space"], numbers["seeds"]) == ("structure-16x16", 3)
    assert numbers["plans"]["base"]["passes"] == [2, 4, 6, 8, 10]
    assert numbers["plans"]["hybrid"]["passes"] == [1, 2, 3, 4]
    for plan in numbers["plans"].values():
        assert plan["missing"] == 0
        assert plan["share"][-1]["value"] == 1.0 and plan["distance"][-1]["value"] == 0.0
        for point in (*plan["share"], *plan["spread"]):
            assert point["low"] <= point["value"] <= point["high"]


def test_a_cell_costs_the_passes_that_are_told(
    engine: hs.Engine, plans: dict[str, hs.StepTable]
) -> None:
    calls: list[int] = []
    spies = [
        network.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
        for network in engine.denoisers.values()
        if isinstance(network, torch.nn.Module)
    ]
    judge, decoder = open_features("colours"), hs.decoder(engine, "linear")
    curve.measure(Setting(engine, SEEDS, plans, judge), "a fox", decoder)
    for spy in spies:
        spy.remove()
    assert sum(calls) == Setting(engine, SEEDS, plans, judge).passes


def cell(base: list[float], hybrid: list[float], seeds: int = 2) -> dict[str, Any]:
    """Every seed has the same shares."""
    arrays: dict[str, Any] = {"space": np.array("known")}
    for plan, shares in (("base", base), ("hybrid", hybrid)):
        steps_ = len(shares)
        arrays[f"{plan}/share"] = np.tile(np.array(shares)[:, None], seeds)
        arrays[f"{plan}/distance"] = 1.0 - arrays[f"{plan}/share"]
        arrays[f"{plan}/spread"] = np.full(steps_, 0.3 if seeds > 1 else np.nan)
        arrays[f"{plan}/timestep"] = np.linspace(999, 1, steps_)
        arrays[f"{plan}/passes"] = np.arange(1, steps_ + 1)
    return arrays


def test_the_base_matches_at_the_step_at_which_its_mean_share_is_that_of_the_first() -> None:
    """0.1 -> 0.5 -> 0.8 -> 1 in one prompt, 0.3 -> 0.7 -> 0.9 -> 1 in another: means .2 .6 .85.
    A plan whose first steps show 0.54 and 0.64, 0.59 on average, is met at the second step. With
    the first prompt alone 0.5 < 0.54, so that is the third step: some resamples say 3."""
    cells = [cell([0.1, 0.5, 0.8, 1.0], [0.54, 1.0]), cell([0.3, 0.7, 0.9, 1.0], [0.64, 1.0])]
    numbers = curve.numbers(cells)
    assert numbers["matches"] == {"hybrid": 2}
    assert numbers["matches_95"] == {"hybrid": [2, 3]}
    shares = [point["value"] for point in numbers["plans"]["base"]["share"]]
    assert shares == pytest.approx([0.2, 0.6, 0.85, 1.0])
    assert numbers["plans"]["base"]["share"][0] == {"value": 0.2, "low": 0.1, "high": 0.3}


def test_one_prompt_and_one_seed_have_values_and_no_intervals() -> None:
    numbers = curve.numbers([cell([0.1, 0.5, 1.0], [0.4, 1.0], seeds=1)])
    assert numbers["plans"]["hybrid"]["share"][0] == {"value": 0.4, "low": None, "high": None}
    assert numbers["plans"]["hybrid"]["spread"] == [None, None]
    assert (numbers["matches"], numbers["matches_95"]) == ({"hybrid": 2}, {"hybrid": None})


def test_a_cell_of_one_seed_has_a_curve_and_no_spread(engine: hs.Engine) -> None:
    run = (
        Setting(engine, (5,), {"hybrid": engine.compile("hybrid")}, open_features("colours")),
        "a fox",
    )
    arrays = curve.measure(*run, hs.decoder(engine, "linear"))
    assert arrays["hybrid/share"].shape == (4, 1) and np.isfinite(arrays["hybrid/share"]).all()
    assert np.isnan(arrays["hybrid/spread"]).all()


def test_without_a_base_nothing_is_matched() -> None:
    alone = {key: values for key, values in cell([1.0], [0.4, 1.0]).items() if "base" not in key}
    numbers = curve.numbers([alone])
    assert [*numbers["plans"]] == ["hybrid"] and numbers["matches"] == {}


def test_a_picture_that_is_missing_is_counted_and_leaves_the_other_seeds() -> None:
    holed = cell([0.2, 1.0], [0.4, 1.0])
    for key in ("share", "distance"):
        holed[f"hybrid/{key}"][0, 1] = np.nan
    numbers = curve.numbers([holed, cell([0.2, 1.0], [0.8, 1.0])])
    assert numbers["plans"]["hybrid"]["share"][0]["value"] == pytest.approx(0.6)
    assert (numbers["plans"]["hybrid"]["missing"], numbers["plans"]["base"]["missing"]) == (1, 0)


def broken(decoder: hs.Decoder, bad: list[bool], calls: set[int]) -> hs.Decoder:
    """NaN for the samples `bad` at the calls of these numbers; the blank is call 0."""
    count = iter(range(100))

    def draw(x0: Tensor) -> Picture:
        rgb, finite = decoder(x0)
        if next(count) in calls:
            finite = ~torch.tensor(bad[: len(x0)])
        return Picture(rgb, finite)

    return replace(decoder, draw=draw)


def test_a_decoder_that_gives_nan_is_told_from_a_picture(engine: hs.Engine) -> None:
    """Calls: the blank, the first row, the second ..."""
    table, judge = {"hybrid": engine.compile("hybrid")}, open_features("colours")
    linear = hs.decoder(engine, "linear")
    run = (Setting(engine, SEEDS, table, judge), "a fox")
    arrays = curve.measure(*run, broken(linear, [False, True, False], {2}))
    assert np.isnan(arrays["hybrid/share"]).tolist()[1] == [False, True, False]
    assert np.isnan(arrays["hybrid/share"]).sum() == 1
    assert np.isfinite(arrays["hybrid/spread"]).all()
    arrays = curve.measure(*run, broken(linear, [True, False, False], {4}))
    assert np.isnan(arrays["hybrid/share"]).tolist() == [[True, False, False]] * 4
    with pytest.raises(InputError, match=r"step 1: the linear decoder gave NaN .* every seed"):
        curve.measure(*run, broken(linear, [True] * 3, {2}))
    with pytest.raises(InputError, match="latents that are 0"):
        curve.measure(*run, broken(linear, [True], {0}))


def test_finished_pictures_that_are_blank_have_no_curve(engine: hs.Engine) -> None:
    linear = hs.decoder(engine, "linear")

    def draw(x0: Tensor) -> Picture:
        return linear(torch.zeros_like(x0))

    run = (
        Setting(engine, SEEDS, {"hybrid": engine.compile("hybrid")}, open_features("colours")),
        "a fox",
    )
    with pytest.raises(InputError, match="finished pictures are the linear decoder's blank"):
        curve.measure(*run, replace(linear, draw=draw))


def test_a_wide_space_has_the_same_curve_and_no_spread(engine: hs.Engine) -> None:
    """LPIPS has millions of features a picture: only inner products of a seed's own are taken."""
    colours = open_features("colours").extractor._replace(distance="squared")
    plans = {"hybrid": engine.compile("hybrid")}
    linear = hs.decoder(engine, "linear")
    arrays = curve.measure(Setting(engine, SEEDS, plans, Judge((colours,))), "a fox", linear)
    judge = Judge((colours._replace(wide=True),))
    wide = curve.measure(Setting(engine, SEEDS, plans, judge), "a fox", linear)
    # the square of a difference of 1e-8 of inner products of about 100
    assert wide["hybrid/share"] == pytest.approx(arrays["hybrid/share"], abs=1e-5)
    assert wide["hybrid/distance"] == pytest.approx(arrays["hybrid/distance"], abs=1e-5)
    assert np.isnan(wide["hybrid/spread"]).all() and np.isfinite(arrays["hybrid/spread"]).all()
    assert curve.numbers([wide])["plans"]["hybrid"]["spread"] == [None] * 4


@pytest.mark.parametrize(("value", "message"), [(np.nan, "not finite"), (0.0, "no direction")])
def test_features_that_say_nothing_are_refused(
    engine: hs.Engine, value: float, message: str
) -> None:
    judge = Judge((Extractor("blind", lambda rgb: np.full((len(rgb), 3), value)),))
    plans = {"hybrid": engine.compile("hybrid")}
    with pytest.raises(InputError, match=f"blind gave .*{message}"):
        curve.measure(Setting(engine, SEEDS, plans, judge), "a fox", hs.decoder(engine, "linear"))
