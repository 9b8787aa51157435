"""Two models with noise schedules of their own: every row is one that its model was trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Model as Made
from hypothesis import assume, given
from hypothesis import strategies as st
from plans import SD, UPDATES, leg_for, patient
from test_pair import METADATA, tiny_unet
from test_pair import folder as folder  # the pair's files, as a fixture

import headstart as hs
from headstart.cli import main
from headstart.engine.models import Model, schedules
from headstart.errors import PlanError
from headstart.plan.plan import Leg, Plan, StepTable, Update
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule, Spacing, fingerprint_of
from headstart_weights.recipe.export import half, serialise

ZERO_SNR = SD.zero_terminal_snr()
SCHEDULES = st.sampled_from(
    (SD, ZERO_SNR, NoiseSchedule.linear(), NoiseSchedule.cosine(), SD.matched(0.4), SD.matched(2.0))
)
NOOBAI = {"base": ZERO_SNR, "distilled": SD}
PREDICTIONS = {"base": Prediction.V, "distilled": Prediction.EPS}


def assert_levels(table: StepTable, schedules: dict[str, NoiseSchedule]) -> None:
    for step in table:
        assert step.sigma == schedules[step.model].sigma(step.timestep)
    for here, after in pairwise(table):
        assert here.sigma_next == after.sigma


@pytest.mark.parametrize("name", ["paper-dmd2", "lcm", "lightning", "turbo"])
@pytest.mark.parametrize("settings", [{}, {"k": 2}, {"n": 8}, {"mode": "replace-final"}], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_each_model_of_a_preset_is_called_at_its_own_levels(
    name: str, settings: dict[str, Any], swapped: bool
) -> None:
    """A zero-terminal-SNR base with an ordinary student, and the other way round."""
    schedules = dict(zip(NOOBAI, reversed(NOOBAI.values()), strict=True)) if swapped else NOOBAI
    kinds = (
        dict(zip(NOOBAI, reversed(PREDICTIONS.values()), strict=True)) if swapped else PREDICTIONS
    )
    table = hs.preset(name, **settings).compile(schedules, prediction=kinds)
    assert_levels(table, schedules)
    for step in table:
        assert (step.c_in, step.c_skip, step.c_out) == pytest.approx(
            kinds[step.model].scalings(step.sigma), rel=1e-6
        )
    # The same rows of each model as on one schedule: no needless step where the levels differ.
    plain = hs.preset(name, **settings).compile(SD)
    assert [(s.model, s.timestep) for s in table] == [(s.model, s.timestep) for s in plain]


def test_the_student_of_a_zero_snr_base_starts_where_it_was_trained() -> None:
    """LCM grid: 759 is sigma 4.2613 for the student, 5.728 for the base."""
    table = hs.preset("paper-dmd2").compile(NOOBAI, prediction=PREDICTIONS)
    assert [round(step.sigma, 3) for step in table] == [4096.0, 4.261, 1.613, 0.719]
    assert table[0].sigma_next == SD.sigma(759)
    assert table.schedule == fingerprint_of(NOOBAI) != SD.fingerprint()
    assert StepTable.from_json(table.to_json()) == table


@given(base=SCHEDULES, distilled=SCHEDULES, update=UPDATES, data=st.data())
@patient
def test_rows_chain_and_no_row_leaves_its_models_range(
    base: NoiseSchedule, distilled: NoiseSchedule, update: Update, data: st.DataObject
) -> None:
    schedules = {"base": base, "distilled": distilled}
    steps = data.draw(st.integers(2, 12))
    cut = data.draw(st.integers(1, steps - 1))
    head = leg_for(update, 0.5, 0.4, steps=steps, spacing=Spacing.TRAILING)
    tail = replace(head, model="distilled", skip=cut)
    try:
        table = Plan((head, tail)).compile(schedules, prediction=Prediction.V)
    except PlanError as error:
        assert "the noise level would not fall" in str(error) or "zero steps" in str(error)
        return
    assert_levels(table, schedules)
    assert table[0].model == "base" and table[-1].sigma_next == 0.0
    assert all(np.isfinite(table.coefficients()).ravel())


@given(base=SCHEDULES, distilled=SCHEDULES, update=UPDATES, cut=st.integers(1, 5))
@patient
def test_cutting_a_leg_changes_no_bit_on_two_schedules_either(
    base: NoiseSchedule, distilled: NoiseSchedule, update: Update, cut: int
) -> None:
    schedules = {"base": base, "distilled": distilled}
    points = tuple(SD.timesteps(8, Spacing.TRAILING).tolist())
    head = leg_for(update, 0.5, 0.4, timesteps=points[:6])
    tail = replace(leg_for(update, 0.5, 0.4, timesteps=points[6:]), model="distilled")
    assume(base.sigma(points[5]) > distilled.sigma(points[6]))
    whole = Plan((head, tail)).compile(schedules, prediction=Prediction.V)
    parts = replace(head, timesteps=points[:cut]), replace(head, timesteps=points[cut:6])
    split = Plan((*parts, tail)).compile(schedules, prediction=Prediction.V)
    assert split.coefficients().tobytes() == whole.coefficients().tobytes()
    assert split.steps == whole.steps


def test_one_schedule_given_to_each_model_is_one_schedule() -> None:
    plan = hs.preset("lightning", k=2)
    assert plan.compile({"base": SD, "distilled": SD}) == plan.compile(SD)


def test_a_gap_between_two_grids_of_one_schedule_is_refused_still() -> None:
    legs = (Leg(model="base", steps=5), Leg(model="distilled", steps=4, skip=1))
    with pytest.raises(PlanError, match="a gap in noise level"):
        Plan(legs).compile({"base": SD, "distilled": SD})


def test_levels_that_would_rise_at_the_hand_off_are_refused_with_both_grids() -> None:
    legs = (Leg(model="base", timesteps=(999, 759)), Leg(model="distilled", timesteps=(749, 499)))
    with pytest.raises(PlanError, match="on a schedule of its own") as error:
        Plan(legs).compile({"base": SD, "distilled": ZERO_SNR}, prediction=Prediction.V)
    assert "sigmas 14.6146 4.2606" in str(error.value) and "sigma 5.39" in str(error.value)


def test_a_mapping_without_a_model_says_so() -> None:
    with pytest.raises(PlanError, match="no noise schedule for model 'distilled'"):
        hs.preset("dmd2").compile({"base": SD})


def test_the_next_rows_input_is_scaled_for_the_model_that_runs_it() -> None:
    table = hs.preset("paper-dmd2").compile(NOOBAI, prediction=PREDICTIONS)
    assert table.c_in_next[:-1].tolist() == [np.float32(step.c_in) for step in table[1:]]


def test_tcd_counts_its_timesteps_on_the_schedule_of_the_row_that_runs() -> None:
    """The row of the base lands at a level that is another timestep for it."""
    legs = (
        Leg(model="base", timesteps=(999,), update=Update.TCD, gamma=0.3),
        Leg(model="distilled", timesteps=(759, 499), update=Update.TCD, gamma=0.3),
    )
    row = Plan(legs).compile(NOOBAI, prediction=PREDICTIONS)[0]
    landing = ZERO_SNR.timestep(SD.sigma(759))
    reached = ZERO_SNR.sigma(np.floor(0.7 * landing + 1e-6))
    assert row.keep == pytest.approx(reached / row.sigma, rel=1e-12)


# ------------------------------------------------------------------ engines


def write(path: Path, seed: int, schedule: NoiseSchedule | None, prediction: str) -> Path:
    tensors = half(tiny_unet(seed))
    if schedule is not None:
        alphas = schedule.alphas_cumprod.astype("float32")
        tensors |= {"alphas_cumprod": torch.from_numpy(alphas)}
    path.write_bytes(serialise(tensors, METADATA | {"headstart.prediction": prediction}))
    return path


def heard(engine: hs.Engine, table: StepTable) -> list[tuple[str, float]]:
    """What networks are given: model and timestep of every call."""
    calls: list[tuple[str, float]] = []

    def listening(model: str) -> Any:
        def network(x_in: Any, timestep: Any, cond: Any) -> Any:
            calls.append((model, float(timestep[0])))
            return engine.denoisers[model](x_in, timestep, cond)

        return network

    denoisers = {model: listening(model) for model in engine.denoisers}
    other = hs.Engine(replace(engine.weights, denoisers=denoisers))
    other.sample("a fox", plan=table, seeds=0)
    return calls


def test_two_models_that_state_two_schedules_run_each_at_its_own(
    folder: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "other.safetensors", 2, NoiseSchedule.cosine(), "v")
    engine = hs.Engine.load(folder / "base.safetensors", path, preset="demo")
    table = engine.compile("hybrid")
    schedules = dict(engine.weights.schedules)
    assert_levels(table, schedules)
    assert schedules["base"] != schedules["distilled"]
    assert any("two noise schedules" in note for note in engine.weights.notes)
    assert heard(engine, table) == [(step.model, step.timestep) for step in table]
    again = hs.Engine.load(folder / "base.safetensors", path, preset="demo")
    done = engine.sample("a fox", seeds=3)
    assert torch.equal(hs.replay(done.record(), again).rgb, done.rgb)


def test_a_silent_student_has_the_schedule_of_a_base_that_it_may_be_made_from(
    folder: Path, tmp_path: Path
) -> None:
    """It predicts the same: then it was distilled from this base; if not, it cannot have been."""
    same = write(tmp_path / "same.safetensors", 2, None, "v")
    other = write(tmp_path / "other.safetensors", 2, None, "eps")
    base = folder / "base.safetensors"
    schedules = hs.Engine.load(base, same).weights.schedules
    assert schedules["distilled"] == schedules["base"] != SD
    assert isinstance(schedules["base"], NoiseSchedule)
    assert schedules["base"].sigmas == pytest.approx(SD.matched(0.4).sigmas, rel=1e-3)
    schedules = hs.Engine.load(base, other).weights.schedules
    assert schedules["distilled"] == SD != schedules["base"]


def test_a_switch_of_models_is_told_the_timestep_of_its_own_schedule(
    folder: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "other.safetensors", 2, SD.matched(0.5), "v")
    engine = hs.Engine.load(folder / "base.safetensors", path, preset="demo")
    states: list[hs.State] = []
    run = engine.sample("a fox", plan="distilled", seeds=0, keep_x0=True, on_step=states.append)
    switched = hs.branch(engine, run, states[0], model="base").table
    for before, after in zip(run.table, switched, strict=True):
        assert after.sigma == before.sigma
    schedule = engine.weights.schedules["base"]
    for step in switched[1:]:
        assert step.sigma == pytest.approx(schedule.sigma(step.timestep), rel=1e-3)
    assert switched[1].timestep > run.table[1].timestep


# ------------------------------------------------------------------ flows and other kinds of models


def with_scheduler(folder: Path, **config: Any) -> Path:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(config))
    return folder


def test_a_flow_trained_unet_in_a_folder_is_run_as_a_flow(tmp_path: Path) -> None:
    """An SDXL UNet with diffusers' flow scheduler: bigASP 2.5, nyaflow-xl."""
    folder = Made.of("sdxl", 0, vocabulary=49408).write("folder", tmp_path / "flow")
    with_scheduler(folder, _class_name="FlowMatchEulerDiscreteScheduler", shift=3.0)
    engine = hs.Engine.load(folder, head_dim=16)
    assert engine.weights.predictions == {"base": Prediction.FLOW}
    table = engine.compile("base", preset="lightning", steps=4, base_guidance=1.0)
    flow = NoiseSchedule.flow(3.0)
    assert [step.timestep for step in table] == flow.timesteps(4, Spacing.TRAILING).tolist()
    assert heard(engine, table) == [("base", step.timestep) for step in table]
    out = tmp_path / "out"
    command = ["sample", "a fox", "--base", str(folder), "--preset", "lightning", "--plan", "base"]
    settings = ["--steps", "2", "--size", "64", "--head-dim", "16", "--seeds", "0"]
    assert main([*command, *settings, "--out", str(out)]) == 0
    assert (out / "record.json").is_file()


def test_a_single_file_is_a_flow_where_its_user_says_so(folder: Path, tmp_path: Path) -> None:
    """But a file that states a table of alphas_cumprod is none."""
    path = Made.of("sdxl", 0).write("bare", tmp_path / "unet")
    models = {"base": Model.of(path)}
    assert schedules(models, {"base": Prediction.FLOW}) == {"base": NoiseSchedule.flow()}
    stated = hs.Engine.load(folder / "base.safetensors", prediction="flow", preset="demo")
    with pytest.raises(PlanError, match="its schedule is a NoiseSchedule, on which"):
        stated.compile("base", steps=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_data": -0.5}, "sigma_data"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 90.0}, "below sigma_max"),
        ({"_class_name": "SomethingNewScheduler"}, "SomethingNewScheduler"),
        ({"_class_name": ["DDIMScheduler"]}, "DDIMScheduler"),
        ({"_class_name": "DDIMScheduler", "trained_betas": ["a"]}, "trained_betas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": 1}, "size"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500}, "500"),
        ({"_class_name": "EDMEulerScheduler", "rho": 1e-3}, "rho of an EDM schedule"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "size"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "high"}, "shift"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_scheduler_that_is_not_known_is_refused_by_name(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Run as eps, such a model draws noise without a word."""
    folder = with_scheduler(Made.of("sdxl", 0).write("folder", tmp_path / "made"), **config)
    with pytest.raises(hs.CheckpointError, match=message):
        hs.Engine.load(folder, head_dim=16)
