"""Going on from a kept state: to the bit where nothing changes, and otherwise as asked."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from bundled import needs_pair

import headstart as hs
import headstart_weights
from headstart.plan.pairs import DEMO_SCHEDULE
from headstart.traces.branches import changed

pytestmark = needs_pair


class Origin(NamedTuple):
    engine: hs.Engine
    run: hs.Trajectory
    states: list[hs.State]


@pytest.fixture(scope="module")
def origin() -> Origin:
    engine = hs.Engine.demo(device="cpu")
    states: list[hs.State] = []
    run = engine.sample("a fox", seeds=[1, 2], keep_x0=True, on_step=states.append)
    return Origin(engine, run, states)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_going_on_with_nothing_changed_is_bit_identical(origin: Origin, step: int) -> None:
    again = hs.branch(origin.engine, origin.run, origin.states[step])
    assert torch.equal(again.latents, origin.run.latents)
    assert torch.equal(again.rgb, origin.run.rgb)
    assert again.x0 is not None and origin.run.x0 is not None
    assert torch.equal(again.x0, origin.run.x0)


@pytest.mark.parametrize("preset", ["demo", "turbo", "dmd2"])
def test_iterating_on_from_any_state_is_bit_identical(origin: Origin, preset: str) -> None:
    """Also where rows add noise: it is keyed by the row's number in the whole plan."""
    options = {"plan": "hybrid", "seeds": [3, 4], "preset": preset}
    whole = list(origin.engine.iterate("an owl", **options))
    for state in whole[:-1]:
        rest = list(origin.engine.iterate("an owl", **options, resume=state))
        assert [s.step for s in rest] == [s.step for s in whole[state.step + 1 :]]
        assert torch.equal(rest[-1].x, whole[-1].x)


def test_a_guided_multistep_run_goes_on_to_the_bit(origin: Origin) -> None:
    """A second-order row looks back on the x0 before it, which a State holds."""
    leg = hs.Leg(model="base", steps=6, update="dpmpp_2m", guidance=2.0)
    plan = hs.Plan((leg,), start="unit")
    whole = list(origin.engine.iterate("an owl", plan=plan, seeds=5))
    assert any(step.carry for step in origin.engine.compile(plan))
    rest = list(origin.engine.iterate("an owl", plan=plan, seeds=5, resume=whole[2]))
    assert torch.equal(rest[-1].x, whole[-1].x)


@pytest.mark.parametrize("inputs", [{"yellow": 2.0}, {"yellow": [0.5, -1.0]}, ["yellow"], []])
def test_going_on_keeps_the_strengths_that_the_run_was_sampled_with(inputs: object) -> None:
    engine = hs.Engine.demo(device="cpu")
    engine.attach(headstart_weights.path("yellow"), 0.3)
    states: list[hs.State] = []
    run = engine.sample("a fox", seeds=[1, 2], on_step=states.append, adapters=inputs)
    assert torch.equal(hs.branch(engine, run, states[0]).latents, run.latents)


@pytest.mark.parametrize("inputs", [[2.0], [[2.0]] * 4])
def test_several_seeds_go_on_with_the_strength_of_the_one_image(inputs: list) -> None:
    engine = hs.Engine.demo(device="cpu")
    engine.attach(headstart_weights.path("yellow"))
    states: list[hs.State] = []
    branch = engine.sample("a fox", seeds=[1], on_step=states.append, adapters={"yellow": inputs})
    all_alike = engine.sample("a fox", seeds=[1], adapters={"yellow": 2.0})
    several = hs.branch(engine, branch, states[0], reseed=[7, 8])
    as_number = hs.branch(engine, all_alike, states[0], reseed=[7, 8])
    assert torch.equal(several.latents, as_number.latents)


def test_a_negative_prompt_of_the_rows_left_is_that_of_a_run_with_it(origin: Origin) -> None:
    engine, (state, *_) = origin.engine, origin.states
    other = hs.branch(engine, origin.run, state, guidance=2.0, negative="a frog")
    options = {"plan": replace(other.table, name="x"), "negative": "a frog"}
    *_, last = engine.iterate("a fox", seeds=[1, 2], resume=state, **options)
    assert torch.equal(other.latents, last.x)
    assert other.change == "guidance 2, away from “a frog”"
    assert torch.equal(other.original, origin.run.rgb)


def test_an_engine_of_another_family_does_not_go_on_with_a_run(origin: Origin) -> None:
    other = replace(origin.engine, weights=replace(origin.engine.weights, lineage="sdxl"))
    with pytest.raises(hs.InputError, match="of demo latents, this engine's are sdxl"):
        hs.branch(other, origin.run, origin.states[0])


def test_switching_to_the_model_that_runs_anyway_changes_nothing(origin: Origin) -> None:
    again = hs.branch(origin.engine, origin.run, origin.states[0], model="distilled")
    assert torch.equal(again.latents, origin.run.latents)


def test_every_change_changes_the_rows_after_it_and_none_before(origin: Origin) -> None:
    assert origin.run.x0 is not None
    for change in (
        {"model": "base"}, {"reseed": [8, 9]}, {"guidance": 3.0}, {"prompt": "a frog"},
    ):  # fmt: skip
        other = hs.branch(origin.engine, origin.run, origin.states[1], **change)
        assert other.x0 is not None
        assert torch.equal(other.x0[:2], origin.run.x0[:2]), change
        assert not torch.equal(other.x0[2], origin.run.x0[2]), change
        assert other.from_step == 2
        assert torch.equal(other.x0[-1], other.latents)


def test_a_switched_plan_is_the_plan_with_those_legs(origin: Origin) -> None:
    legs = (
        hs.Leg(model="base", timesteps=(999.0,)),
        hs.Leg(model="distilled", timesteps=(749.0,)),
        hs.Leg(model="base", timesteps=(499.0, 249.0)),
    )
    plan = hs.Plan(legs, start="unit")
    whole = origin.engine.sample("a fox", plan=plan, seeds=[1, 2])
    other = hs.branch(origin.engine, origin.run, origin.states[1], model="base")
    assert torch.equal(other.latents, whole.latents)


def test_reseeding_keeps_what_is_predicted_under_fresh_noise(origin: Origin) -> None:
    state = origin.states[0]
    other = hs.branch(origin.engine, origin.run, state, reseed=[8, 9])
    sigma = origin.run.table[1].sigma
    x = state.x0 + sigma * hs.Philox([8, 9]).step(0, state.x.shape[1:], state.x.device)
    by_hand = list(
        origin.engine.iterate(
            "a fox", plan=origin.run.table, seeds=[8, 9], resume=hs.State(0, x, state.x0)
        )
    )
    assert torch.equal(other.latents, by_hand[-1].x)
    assert other.seeds == (8, 9)


def test_one_image_goes_on_under_several_seeds(origin: Origin) -> None:
    states: list[hs.State] = []
    run = origin.engine.sample("a fox", seeds=1, keep_x0=True, on_step=states.append)
    other = hs.branch(origin.engine, run, states[0], reseed=range(3))
    assert other.rgb.shape[0] == 3 and other.seeds == (0, 1, 2)
    assert other.x0 is not None and other.x0.shape[:2] == (4, 3)
    assert len({tuple(latent.flatten().tolist()) for latent in other.latents}) == 3
    with pytest.raises(hs.InputError, match="3 new seeds for 2 images"):
        hs.branch(origin.engine, origin.run, origin.states[0], reseed=range(3))


def test_a_switch_to_a_model_of_another_prediction_keeps_the_boundary_and_levels() -> None:
    table = hs.preset("paper-lcm").compile(hs.NoiseSchedule.scaled_linear())
    kinds = {"base": hs.Prediction.V, "distilled": hs.Prediction.EPS}
    engine_like = SimpleNamespace(
        predictions=kinds, schedules=dict.fromkeys(kinds, hs.NoiseSchedule.scaled_linear())
    )
    other = changed(table, 2, engine_like, model="base")
    legs = (
        hs.Leg(model="base", timesteps=(999.0,), update="renoise", boundary=True,
               prediction="eps"),
        hs.Leg(model="distilled", timesteps=(759.0,), update="renoise", boundary=True),
        hs.Leg(model="base", timesteps=(499.0, 259.0), update="renoise", boundary=True,
               prediction="v"),
    )  # fmt: skip
    whole = hs.Plan(legs, start="unit").compile(hs.NoiseSchedule.scaled_linear())
    assert other.steps == whole.steps


def test_a_switch_to_an_edm_model_and_back_has_the_scalings_of_each() -> None:
    """On Playground's schedule the latents have a standard deviation of 0.5."""
    weights = SimpleNamespace(
        predictions={"base": hs.Prediction.EDM, "distilled": hs.Prediction.EPS},
        schedules={
            "base": hs.NoiseSchedule.edm(0.1, 14.0, 0.5),
            "distilled": hs.NoiseSchedule.scaled_linear(),
        },
    )
    plan = hs.Plan((hs.Leg(model="distilled", sigmas=(10.0, 5.0, 1.0)),))
    table = plan.compile(weights.schedules, prediction=weights.predictions)
    other = changed(table, 1, weights, model="base")
    expected = replace(plan.legs[0], model="base")
    base = hs.Plan((expected,)).compile(weights.schedules, prediction=weights.predictions)
    assert other.steps[1:] == base.steps[1:]
    assert changed(other, 1, weights, model="distilled").steps == table.steps


def test_a_row_that_looked_back_on_another_model_becomes_first_order() -> None:
    leg = hs.Leg(model="base", steps=6, update="dpmpp_2m")
    table = hs.Plan((leg,)).compile(DEMO_SCHEDULE, prediction=hs.Prediction.V)
    kinds = {"base": hs.Prediction.V, "distilled": hs.Prediction.V}
    engine_like = SimpleNamespace(predictions=kinds, schedules=dict.fromkeys(kinds, DEMO_SCHEDULE))
    other = changed(table, 3, engine_like, model="distilled")
    assert table[3].carry and table[4].carry
    assert other[3].carry == 0.0 and other[4].carry == table[4].carry


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (3, {"model": "base"}, "no row after the last"),
        (1, {"model": "turbo"}, "no model 'turbo'"),
        (1, {"guidance": -1.0}, "guidance"),
        (1, {"guidance": float("nan")}, "guidance"),
        (1, {"reseed": [1, 1]}, "twice"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(
    origin: Origin, row: int, change: dict, message: str
) -> None:
    with pytest.raises(hs.HeadstartError, match=message):
        hs.branch(origin.engine, origin.run, origin.states[row], **change)


def test_a_state_of_another_batch_or_row_is_refused(origin: Origin) -> None:
    state = origin.states[1]
    cases = {
        "row 3": origin.states[3],
        "row -1": hs.State(-1, state.x, state.x0),
        "its own batch": hs.State(1, state.x[:1], state.x0[:1]),
    }
    for message, wrong in cases.items():
        with pytest.raises(hs.InputError, match=message):
            origin.engine.iterate("a fox", seeds=[1, 2], resume=wrong)
