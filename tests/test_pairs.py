"""The table of pairs: every row runs, hands over at its level, and follows its card."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import SD, models, patient, times

import headstart as hs
from headstart.errors import PlanError
from headstart.plan.by_name import named_plan
from headstart.plan.leg import PRINTED
from headstart.plan.pair import Pair
from headstart.plan.pairs import PAIRS
from headstart.plan.plan import Leg, Plan, Update
from headstart.plan.prediction import Prediction
from headstart.plan.preset import Mode, preset
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.table import StepTable

FLOATS = st.floats(0.5, 200.0)
NO_HYBRID = ("lightning-1step",)
"""Students whose only step starts at pure noise."""


def table_of(pair: Pair, **settings: Any) -> StepTable:
    plan = preset(pair.name, **settings)
    return plan.compile(pair.schedules, prediction=pair.predictions)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=lambda pair: pair.name)
def test_every_pair_runs_in_every_mode_it_has(pair: Pair) -> None:
    for mode in get_args(Mode):
        for steps in pair.steps:
            one = steps == 1 and mode in ("hybrid", "skip-first")
            top = pair.grid(steps).sigmas[0] == pair.schedule.highest[1]
            if one and (mode == "skip-first" or top):
                with pytest.raises(PlanError, match="only step"):
                    table_of(pair, mode=mode, steps=steps)
                continue
            options = {} if mode == "base" else {"steps": steps}
            table = table_of(pair, mode=mode, **options)
            assert all(here.sigma_next == after.sigma for here, after in pairwise(table))
            if mode == "hybrid":
                assert table.models == ("base", "distilled")


@pytest.mark.parametrize(
    "pair",
    [pair for pair in PAIRS.values() if pair.handoff and pair.name not in NO_HYBRID],
    ids=lambda pair: pair.name,
)
def test_a_hybrid_hands_over_at_the_students_first_level_at_or_below_the_pairs(pair: Pair) -> None:
    table = table_of(pair)
    level = table[table.handoffs[0]].sigma
    grid = pair.grid(pair.steps[0]).sigmas
    assert level == max(sigma for sigma in grid if sigma <= pair.handoff * (1 + 1e-6))
    replaced = sum(sigma > level for sigma in grid)
    assert models(table).count("base") == max(1, replaced)
    assert table[0].sigma == pair.schedules["base"].highest[1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # timesteps, rule, guidance: from the card that each row names
        ("lightning", ([999, 749, 499, 249], Update.EULER, 1.0)),
        ("turbo", ([999, 749, 499, 249], Update.ANCESTRAL, 1.0)),
        ("sd-turbo", ([999, 749, 499, 249], Update.EULER, 1.0)),
        ("lcm", ([999, 759, 499, 259], Update.RENOISE, 1.0)),
        ("dmd2", ([999, 749, 499, 249], Update.RENOISE, 1.0)),
        ("dmd2-1step", ([399], Update.RENOISE, 1.0)),
        ("hyper-sd", ([999, 749, 499, 249], Update.DDIM, 1.0)),
        ("hyper-sd-1step", ([800], Update.RENOISE, 1.0)),
        ("hyper-sd-cfg", ([999, 874, 749, 624, 499, 374, 249, 124], Update.DDIM, 5.0)),
        ("hyper-sd-unified", ([999, 759, 499, 259], Update.TCD, 1.0)),
        ("tcd", ([999, 759, 499, 259], Update.TCD, 1.0)),
        ("pcm", ([999, 759, 499, 259], Update.TCD, 1.0)),
        ("pcm-cfg", ([999, 759, 499, 259], Update.TCD, 7.5)),
        ("nitrofusion", ([249, 187, 124, 62], Update.RENOISE, 1.0)),
        ("nitrofusion-vibrant", ([499, 374, 249, 124], Update.RENOISE, 1.0)),
        ("sdxl-flash", ([999, 856, 713, 570, 428, 285, 142], Update.DPMPP_2S, 3.0)),
        ("paper-dmd2", ([999, 759, 499, 259], Update.RENOISE, 1.0)),
        ("paper-turbo", ([999, 749, 499, 249], Update.ANCESTRAL, 1.0)),
    ],
)
def test_the_distilled_model_runs_as_its_card_says(
    name: str, expected: tuple[list[int], Update, float]
) -> None:
    plan = preset(name, mode="distilled")
    table = plan.compile(PAIRS[name].schedules, prediction=PAIRS[name].predictions)
    assert (times(table), plan.legs[0].update, plan.legs[0].guidance) == expected


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        # sigma after k = 1, 2, 3, 4 steps: levels.md of the research, from each model's own code
        ("z-image", [21, 9, 5, 3]),
        ("qwen-lightning", [21, 9, 5, 3]),
        ("krea2", [22.1, 9.47, 5.26, 3.16]),
        ("wan22", [15, 5, 1.667]),
        ("klein", [29.66, 9.887, 3.296]),
    ],
)
def test_flows_have_the_levels_of_their_own_grids(name: str, levels: list[float]) -> None:
    grid = PAIRS[name].grid(PAIRS[name].steps[0])
    assert grid.sigmas[1 : 1 + len(levels)] == pytest.approx(levels, rel=2e-3)
    assert all(kind is Prediction.FLOW for kind in PAIRS[name].predictions.values())


def test_papers_and_scripts_pairs_are_what_its_code_ran() -> None:
    """One scheduler for both models in the notebooks; the script gives Turbo's base Euler."""
    for name in ("paper-dmd2", "paper-lcm", "paper-turbo", "paper-lightning"):
        base, distilled = preset(name).legs
        assert replace(base, model="distilled", skip=1) == distilled
    assert [leg.update for leg in preset("script-turbo").legs] == [Update.EULER, Update.ANCESTRAL]
    assert preset("turbo", k=1).compile(SD).steps == preset("script-turbo").compile(SD).steps


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("paper-dmd2", "3b9f1deabd086de6"),
        ("paper-lcm", "3b9f1deabd086de6"),
        ("paper-lightning", "93237352dd799a71"),
        ("script-turbo", "851dd7e9942d19e6"),
        ("demo", "5ab9491a0cde885e"),
    ],
)
def test_tables_of_before_the_pairs_were_data_keep_their_bits(name: str, digest: str) -> None:
    """Of the presets dmd2, lcm, lightning, turbo and demo, as they were called before; every mode,
    k of 1 to 3, and n of 8 and 20 where one grid has them."""
    pair, found = PAIRS[name], hashlib.sha256()
    for mode in ("hybrid", "distilled", "skip-first", "replace-final"):
        for k in (1, 2, 3):
            grids = (None, 8, 20) if (mode, k, pair.boundary) == ("hybrid", 1, False) else (None,)
            for n in grids:
                table = table_of(pair, mode=mode, k=k, n=n, steps=4)
                found.update(table.coefficients().tobytes())
                found.update(repr([tuple(step) for step in table]).encode())
    assert found.hexdigest()[:16] == digest


def test_what_is_named_is_listed() -> None:
    assert hs.presets() is PAIRS
    assert {"lightning", "z-image", "paper-dmd2", "demo"} < set(hs.presets())
    with pytest.raises(TypeError):
        hs.presets()["mine"] = PAIRS["demo"]  # type: ignore[index]
    assert all(pair.card and pair.name == name for name, pair in PAIRS.items())


# ----------------------------------------------------------------- by level


@given(level=st.floats(1.7, 14.0), k=st.integers(1, 12), steps=st.integers(2, 12))
@patient
def test_any_level_is_a_hand_off_of_the_base_alone_above_it(
    level: float, k: int, steps: int
) -> None:
    table = preset("lightning", steps=steps, k=k, handoff=level)
    compiled = table.compile(SD)
    base = [step for step in compiled if step.model == "base"]
    distilled = [step for step in compiled if step.model == "distilled"]
    assert len(base) == k
    assert base[0].timestep == 999
    rows = preset("lightning", steps=steps, mode="distilled").compile(SD)
    assert distilled == [step for step in rows if step.sigma <= level * (1 + PRINTED)]
    assert base[-1].sigma_next == distilled[0].sigma
    lengths = [a.timestep - b.timestep for a, b in pairwise(compiled.steps[: k + 1])]
    assert max(lengths) - min(lengths) <= 1  # whole timesteps


def test_the_base_may_cover_its_part_on_a_grid_of_its_own() -> None:
    table = preset("lightning", handoff=4.1, n=30).compile(SD)
    base = [step.timestep for step in table if step.model == "base"]
    assert base == [t for t in SD.timesteps(30, hs.Spacing.TRAILING) if t > 749]
    assert table[len(base)].timestep == 749


def test_two_models_meet_at_a_level_of_two_processes() -> None:
    """A flow's base and an eps student, and the other way round."""
    flow = NoiseSchedule.flow(3.0)
    for base, distilled, kinds in (
        (flow, SD, {"base": Prediction.FLOW, "distilled": Prediction.EPS}),
        (SD, flow, {"base": Prediction.EPS, "distilled": Prediction.FLOW}),
        (NoiseSchedule.edm(), SD, {"base": Prediction.EDM, "distilled": Prediction.EPS}),
    ):
        plan = Plan(
            (
                Leg(model="base", steps=3, spacing=hs.Spacing.EVEN, until="next"),
                Leg(model="distilled", steps=4, below=4.5),
            )
        )
        table = plan.compile({"base": base, "distilled": distilled}, prediction=kinds)
        assert [step.model for step in table[:3]] == ["base"] * 3
        assert table[2].sigma_next == table[3].sigma <= 4.5
        for step in table:
            schedule = base if step.model == "base" else distilled
            assert step.timestep == pytest.approx(schedule.timestep(step.sigma), rel=1e-9)
            assert (step.c_in, step.c_skip, step.c_out) == pytest.approx(
                kinds[step.model].scalings(step.sigma, 0.5)
            )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            lambda: preset("lightning", handoff=0.5),
            "no step at or below level 0.5: hand over at one of",
        ),
        (lambda: preset("lightning", handoff=20.0), "would run zero steps"),
        (lambda: preset("lightning", handoff=-1.0), "handoff must be a noise level above 0"),
        (lambda: preset("lightning", handoff=math.nan), "handoff must be a finite number"),
        (lambda: preset("lightning", handoff=4.1, k=400), "400 even steps do not fit between"),
        (
            lambda: Plan((Leg(model="base", steps=4, until=3.0), Leg(model="s", timesteps=(499,)))),
            r"'base' goes until level 3, but 's' starts at timestep 499 \(sigma 1.6129\)",
        ),
        (lambda: Plan((Leg(model="base", steps=4, until="next"),)), "no leg is next"),
        (
            lambda: Plan((Leg(model="base", sigmas=(20.0, 1.0)),)),
            r"sigmas must lie in 0.0291672 .. 14.6146",
        ),
        (
            lambda: Plan((Leg(model="base", timesteps=(999,), sigmas=(20.0,)),)),
            "its model knows 0.0291672 .. 14.6146",
        ),
        (lambda: Plan((Leg(model="base", steps=4),), end=1.0), "starts a step at or below it"),
        (lambda: Plan((Leg(model="base", steps=4),), end=-1.0), "end must be a noise level"),
        (lambda: Plan((Leg(model="base", steps=4, until=1.0),), end=1.0), "say the same"),
        (lambda: Leg(model="base", steps=4, guidance=0.0), "model cards and diffusers call 0"),
        (lambda: preset("demo", base_guidance=0.5), "at least 1, not 0.5"),
    ],
)
def test_hand_offs_that_cannot_be_are_refused(plan: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        plan().compile(SD)
    assert len(str(caught.value).splitlines()) <= 10


def test_a_leg_ends_at_a_level_and_another_plan_goes_on_there() -> None:
    """A split schedule: the same rows as the whole, in two tables."""
    whole = Plan((Leg(model="m", sigmas=(14.0, 5.0, 2.0, 0.5)),)).compile(SD)
    first = Plan((Leg(model="m", sigmas=(14.0, 5.0)),), end=2.0).compile(SD)
    same = Plan((Leg(model="m", sigmas=(14.0, 5.0), until=2.0),)).compile(SD)
    rest = Plan((Leg(model="m", sigmas=(2.0, 0.5)),)).compile(SD)
    assert first.steps == same.steps == whole.steps[:2]
    assert rest.steps == whole.steps[2:]
    assert first[-1].sigma_next == 2.0


@pytest.mark.parametrize("printed", [4.08, 4.0817, 1.61, 1.613, 0.693, 0.6932])
def test_a_level_copied_from_a_printed_table_is_that_level(printed: float) -> None:
    table = preset("lightning", handoff=printed).compile(SD)
    assert table[table.handoffs[0]].sigma == pytest.approx(printed, rel=3e-3)


def test_levels_are_sdxls_times_the_pairs_ratio() -> None:
    """Turbo's latent is half as wide as SDXL's, so it hands over at half the level."""
    for name in ("turbo", "sd-turbo"):
        table = preset(name).compile(SD)
        assert table[table.handoffs[0]].timestep == 499
        assert models(table).count("base") == 2


@pytest.mark.parametrize("name", ["z-image", "qwen-lightning", "krea2", "wan22", "klein"])
def test_a_flows_base_may_cover_its_part_on_a_grid_of_its_own(name: str) -> None:
    pair = PAIRS[name]
    for n in (7, 8, 20, 30):
        table = table_of(pair, n=n)
        sigmas = pair.schedules["base"].points(n, pair.spacing).sigmas
        base = [step.sigma for step in table if step.model == "base"]
        level = table[len(base)].sigma
        assert base == [sigma for sigma in sigmas if sigma > level * (1 + 1e-6)]
    with pytest.raises(PlanError, match="grids of flows do not meet"):
        preset(name, n=8, mode="replace-final")


def test_a_leg_of_named_points_ends_at_a_level_too() -> None:
    points = (999, 749, 499, 249)
    whole = Plan((Leg(model="m", timesteps=points, until=1.0),)).compile(SD)
    assert times(whole) == [999, 749, 499] and whole[-1].sigma_next == 1.0
    legs = (Leg(model="b", timesteps=points, until="next"), Leg(model="d", timesteps=(600,)))
    assert times(Plan(legs).compile(SD)) == [999, 749, 600]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: preset("lightning", handoff=4.0, k=2, n=8), "k=2 and n=8 both say"),
        (lambda: preset("dmd2-1step", k=2, n=8), "k=2 and n=8 both say"),
        (lambda: preset("lightning", handoff=4.0, k=2, mode="skip-first"), "both say where"),
        (lambda: preset("lightning", handoff="4"), "handoff must be a finite number"),
        (lambda: preset("lightning", handoff=True), "handoff must be a finite number"),
        (lambda: preset([]), "unknown preset"),
        (lambda: Leg(model="m", timesteps="97531"), "must be a list of numbers"),
        (lambda: Leg(model="m", steps=3, spacing="even", skip=1), "leave skip out"),
        (lambda: Leg(model="m", steps=3, until=True), "must be a noise level"),
        (lambda: Leg(model="m", steps=3, guidance="4"), "guidance of leg 'm' must be a finite"),
        (lambda: Leg(model="m", steps=3, eta=None), "eta of leg 'm' must be a finite"),
        (lambda: Leg(model="m", steps=3, update="renoise", boundary=0.5), "True or False"),
        (lambda: Leg(model="m", steps=3, adapters=("ink",)), "name, strength"),
        (lambda: Leg(model=3, steps=3), "needs the name of its model"),
        (lambda: Plan((Leg(model="m", steps=3),), end=True), "end must be a finite number"),
        (lambda: NoiseSchedule.flow(mu=1000.0), r"inside \(-10, 10\)"),
        (lambda: NoiseSchedule.flow("3"), "shift of a flow must be a finite number"),
        (lambda: NoiseSchedule.flow(1e300), "0.0001 .. 10000"),
        (lambda: NoiseSchedule.edm(rho=1e-3), "rho of an EDM schedule must lie in 1 .. 100"),
        (lambda: NoiseSchedule.edm(sigma_max=None), "sigma_max of an EDM schedule must be a"),
        (lambda: NoiseSchedule.from_sigmas([1.0, 1e200]), "inside"),
        (lambda: NoiseSchedule.from_sigmas([2.0, 1.0]), "strictly rising"),
        (lambda: named_plan("base", {"timesteps": [999]}, "demo"), "'base' does not run it"),
        (
            lambda: Plan((Leg(model="m", steps=9, spacing="ays-sdxl"),)).compile(SD.matched(0.4)),
            "made for levels up to 14.6",
        ),
    ],
)
def test_nonsense_is_a_plan_error(made: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        made()


def test_numbers_of_numpy_and_whole_numbers_are_numbers() -> None:
    assert NoiseSchedule.flow(3).fingerprint() == NoiseSchedule.flow(3.0).fingerprint()
    assert NoiseSchedule.edm(sigma_max=80) == NoiseSchedule.edm()
    table = preset("lightning", handoff=np.float32(4.2)).compile(SD)  # type: ignore[arg-type]
    assert table.steps == preset("lightning", handoff=4.2).compile(SD).steps
    leg = Leg(model="m", steps=3, until=np.float64(2.0), adapters={"ink": 1})  # type: ignore
    assert (leg.until, leg.adapters) == (2.0, (("ink", 1.0),))


@pytest.mark.parametrize(
    ("field", "value"),
    [("end_scale", float("nan")), ("end_scale", 0), ("end_scale", -5), ("cut", "false"),
     ("first", -3), ("cut", 1), ("end_scale", "x")],
)  # fmt: skip
def test_a_table_of_nonsense_is_not_read(field: str, value: object) -> None:
    document = json.loads(preset("tcd").compile(SD).to_json())
    assert StepTable.from_json(json.dumps(document)).steps == preset("tcd").compile(SD).steps
    for name in ("end_scale", "cut"):  # tables of before have neither
        old = {key: kept for key, kept in document.items() if key != name}
        assert len(StepTable.from_json(json.dumps(old))) == 4
    with pytest.raises(PlanError):
        StepTable.from_json(json.dumps(document | {field: value}))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"first": Infinity, "format": 1}', "null", "[]"])
def test_damaged_text_is_no_table(text: str) -> None:
    with pytest.raises(PlanError, match="not a"):
        StepTable.from_json(text)
    document = json.loads(preset("tcd").compile(SD).to_json())
    with pytest.raises(PlanError, match="not a step table in JSON"):
        StepTable.from_json(json.dumps(document | {"first": math.inf}))
