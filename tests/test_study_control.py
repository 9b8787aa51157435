"""Control transfer as cells: against plain runs, known scores, merged adapters, failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundled import needs_pair
from safetensors.torch import save_file
from torch import nn

import headstart as hs
import headstart_weights
from headstart.adapters.strength import Strength
from headstart.errors import InputError
from headstart.metrics.features import open_features
from headstart.spaces.extractor import Judge
from headstart.study import control, steps
from headstart.study.control import Control, edited
from headstart.study.steps import Setting

pytestmark = needs_pair
PROMPTS, SEEDS = ("a fox", "an owl"), (5, 6, 7)
YELLOW = Control("yellow", "yellow background", (1.0, -1.0))


@pytest.fixture(scope="module")
def shared_engine() -> hs.Engine:
    return hs.Engine.demo(device="cpu")


@pytest.fixture
def engine(shared_engine: hs.Engine) -> Iterator[hs.Engine]:
    shared_engine.attach(headstart_weights.path("yellow"), 0.5, name="yellow")
    yield shared_engine
    for name in [adapter.name for adapter in shared_engine.adapters]:
        shared_engine.detach(name)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return open_features("scorer")


def test_a_cell_has_the_scores_of_the_runs_it_stands_for(engine: hs.Engine, judge: Judge) -> None:
    """Strength 0 is the engine without the adapter, the same seeds."""
    plans = {plan: engine.compile(plan) for plan in ("distilled", "hybrid")}
    cell = control.measure(Setting(engine, SEEDS, plans, judge), "a fox", YELLOW)
    assert cell["strengths"].tolist() == [-1.0, 0.0, 1.0]
    assert engine.adapters["yellow"].strength == Strength(0.5)
    assert judge.score is not None
    up = engine.sample("a fox", plan="hybrid", seeds=SEEDS, adapters={"yellow": 1.0}).rgb.numpy()
    engine.detach("yellow")
    bare = engine.sample("a fox", plan="hybrid", seeds=SEEDS).rgb.numpy()
    for row, rgb in ((1, bare), (2, up)):
        toward = judge.score(rgb, ["a fox, yellow background"] * 3)
        assert cell["hybrid/toward"][row] == pytest.approx(toward, abs=1e-6)
        assert cell["hybrid/own"][row] == pytest.approx(judge.score(rgb, ["a fox"] * 3), abs=1e-6)


def test_the_bundled_slider_moves_both_models_towards_its_words_and_back(
    engine: hs.Engine, judge: Judge
) -> None:
    """Over 14 prompts +15 and +23 % were measured at 1, -6 and -1 % at -1."""
    plans = {plan: engine.compile(plan) for plan in ("distilled", "hybrid")}
    cells = [control.measure(Setting(engine, SEEDS, plans, judge), p, YELLOW) for p in PROMPTS]
    numbers = control.numbers(cells)
    assert json.loads(json.dumps(numbers)) == numbers
    (adapter,) = numbers["adapters"]
    assert (adapter["name"], adapter["words"], numbers["seeds"]) == (
        "yellow",
        "yellow background",
        3,
    )
    for rows in adapter["plans"].values():
        assert [row["strength"] for row in rows] == [-1.0, 0.0, 1.0]
        assert rows[1]["change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert rows[2]["change"]["value"] > 5.0 > rows[0]["change"]["value"]
        assert abs(rows[2]["kept"]["value"]) < 0.05 < rows[2]["moved"]["value"]


def test_groups_of_seeds_give_the_scores_of_all_together(
    engine: hs.Engine, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = {"hybrid": engine.compile("hybrid")}
    whole = control.measure(Setting(engine, SEEDS, plans, judge), "a fox", YELLOW)
    monkeypatch.setattr(steps, "GROUP", 2 * 64 * 64)
    calls: list[int] = []
    network: Any = engine.denoisers["base"]
    spy = network.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    parts = control.measure(Setting(engine, SEEDS, plans, judge), "a fox", YELLOW)
    spy.remove()
    assert calls == [2, 1] * 3
    assert parts["hybrid/toward"] == pytest.approx(whole["hybrid/toward"], abs=1e-3)


def test_an_adapter_that_is_merged_is_measured_too_and_left_as_it_was(
    engine: hs.Engine, judge: Judge, tmp_path: Path
) -> None:
    """A LoHa has no low-rank path, so a run cannot set its strength: the set's own is set."""
    network: Any = engine.denoisers["base"]
    draw, tensors = torch.Generator().manual_seed(9), {}
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and "attn2" in path:
            name = "lora_unet_" + path.replace(".", "_")
            out, into = layer.weight.shape
            for side in ("w1", "w2"):
                tensors[f"{name}.hada_{side}_a"] = 0.4 * torch.randn(out, 2, generator=draw)
                tensors[f"{name}.hada_{side}_b"] = 0.4 * torch.randn(2, into, generator=draw)
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "hada.safetensors")
    engine.detach("yellow")
    plans = {"hybrid": engine.compile("hybrid")}
    bare = engine.sample("a fox", plan=plans["hybrid"], seeds=SEEDS).rgb.numpy()
    assert not engine.attach(tmp_path / "hada.safetensors", 0.7).live
    cell = control.measure(Setting(engine, SEEDS, plans, judge), "a fox", Control("hada", "red"))
    assert engine.adapters["hada"].strength.constant == 0.7
    assert judge.score is not None
    expected = judge.score(bare, ["a fox, red"] * 3)
    assert cell["hybrid/toward"][0] == pytest.approx(expected, abs=1e-6)
    assert (np.abs(cell["hybrid/toward"][1] - expected) > 1e-3).all()


def test_the_strength_comes_back_when_a_run_fails(engine: hs.Engine, judge: Judge) -> None:
    def fail(*_: object) -> np.ndarray:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        plans = {"hybrid": engine.compile("hybrid")}
        broken = Setting(engine, SEEDS, plans, judge._replace(scores=fail))
        control.measure(broken, "a fox", YELLOW)
    assert engine.adapters["yellow"].strength == Strength(0.5)


def test_what_cannot_be_measured_is_refused_before_anything_runs(
    engine: hs.Engine, judge: Judge
) -> None:
    never: dict[str, hs.StepTable] = {}
    with pytest.raises(InputError, match="nothing scores pictures"):
        control.measure(Setting(engine, SEEDS, never, open_features("structure")), "a fox", YELLOW)
    with pytest.raises(InputError, match="no adapter 'smile' is attached"):
        control.measure(Setting(engine, SEEDS, never, judge), "a fox", Control("smile", "smiling"))
    with pytest.raises(InputError, match="no cells"):
        control.numbers([])


def test_a_cell_costs_the_passes_that_are_told(engine: hs.Engine, judge: Judge) -> None:
    plans = {"base": engine.compile("base", steps=3, base_guidance=2.0)}
    calls: list[int] = []
    network: Any = engine.denoisers["base"]
    spy = network.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    control.measure(Setting(engine, SEEDS, plans, judge), "a fox", YELLOW)
    spy.remove()
    assert (
        sum(calls)
        == Setting(engine, SEEDS, plans, judge).passes * len(YELLOW.all_strengths)
        == 2 * 3 * 3 * 3
    )


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        ("yellow background", "a car, yellow background"),
        ("{} made of lego", "a car made of lego"),
        ("a photo of {} and {}", "a photo of a car and a car"),
    ],
)
def test_words_go_behind_the_prompt_or_around_it(words: str, prompt: str) -> None:
    assert edited("a car", words) == prompt


def cell(zero: list[float], one: list[float], name: str = "age") -> dict[str, Any]:
    return {
        "adapter": np.array(name),
        "words": np.array("old"),
        "judge": np.array("known"),
        "strengths": np.array([0.0, 1.0]),
        "hybrid/toward": np.array([zero, one]),
        "hybrid/own": np.array([[0.5, 0.5], [0.4, 0.4]]),
    }


def test_the_change_is_the_mean_over_prompts_of_each_ones_percentage() -> None:
    """0.2 -> 0.3 is +50 %, 0.4 -> 0.5 is +25 %: 37.5 %, between the two; not of the means, 33 %."""
    numbers = control.numbers([cell([0.1, 0.3], [0.2, 0.4]), cell([0.4, 0.4], [0.5, 0.5])])
    zero, one = numbers["adapters"][0]["plans"]["hybrid"]
    assert one["change"]["value"] == pytest.approx(37.5)
    assert (one["change"]["low"], one["change"]["high"]) == pytest.approx((25.0, 50.0))
    assert one["moved"]["value"] == pytest.approx(0.1)
    assert (one["score"]["value"], zero["score"]["value"]) == pytest.approx((0.4, 0.3))
    assert one["kept"]["value"] == pytest.approx(-0.1)


def test_adapters_are_told_apart_and_one_prompt_has_no_interval() -> None:
    numbers = control.numbers([cell([0.2], [0.3]), cell([0.2], [0.1], "smile")])
    names = {
        adapter["name"]: adapter["plans"]["hybrid"][1]["change"] for adapter in numbers["adapters"]
    }
    assert names["age"] == pytest.approx({"value": 50.0, "low": None, "high": None})
    assert names["smile"]["value"] == pytest.approx(-50.0)


@pytest.mark.parametrize("score", [0.0, -0.1])
def test_of_a_score_that_is_not_positive_there_is_no_percentage(score: float) -> None:
    numbers = control.numbers([cell([score, score], [0.1, 0.1])])
    one = numbers["adapters"][0]["plans"]["hybrid"][1]
    assert one["change"] is None and one["moved"]["value"] == pytest.approx(0.1 - score)


def test_of_a_reward_there_is_no_percentage() -> None:
    judge = {"judge": np.array("imagereward:ImageReward:0123")}
    one = control.numbers([cell([0.2], [0.3]) | judge])["adapters"][0]["plans"]["hybrid"][1]
    assert one["change"] is None and one["moved"]["value"] == pytest.approx(0.1)


def test_cells_of_other_strengths_are_refused() -> None:
    other = cell([0.1, 0.1], [0.2, 0.2]) | {"strengths": np.array([0.0, 2.0])}
    with pytest.raises(InputError, match="other strengths"):
        control.numbers([cell([0.1, 0.1], [0.2, 0.2]), other])
