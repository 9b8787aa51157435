"""A distilled model from its file: recognised as UNet or LoRA, swapped files, EDM folders."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from checkpoints import Model as Made
from safetensors.torch import save_file
from test_adapters import random_lora
from test_processes import heard, with_scheduler

import headstart as hs
import headstart_weights
from headstart.cli import main
from headstart.engine.models import Model, distilled_by, swap_note
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Made.of("sdxl", 0, vocabulary=49408)
    return model.write("folder", tmp_path_factory.mktemp("made") / "sdxl")


@pytest.fixture
def lora(sdxl: Path, tmp_path: Path) -> Path:
    """An 8-step Lightning LoRA under its published name."""
    network = hs.load_unet(sdxl, head_dim=16)
    path = tmp_path / "sdxl_lightning_8step_lora.safetensors"
    save_file(random_lora(network, size=0.02), path)  # type: ignore[arg-type]
    return path


def test_a_distilled_lora_is_recognised_as_a_unet_file_is(sdxl: Path, lora: Path) -> None:
    engine = hs.Engine.load(sdxl, distilled_lora=lora, head_dim=16)
    assert engine.weights.preset == "lightning"
    note = (
        "distilled: taken for Lightning, 8 steps: preset lightning (set with --preset or preset=)"
    )
    assert f"{note}, by its name" in engine.weights.notes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = engine.compile("hybrid")
    assert [step.timestep for step in table] == [999, 874, 749, 624, 499, 374, 249, 124]
    assert table.models == ("base", "distilled")
    for wrong in ({"steps": 4}, {"preset": "dmd2"}):
        with pytest.warns(UserWarning, match="use preset='lightning', steps=8"):
            engine.compile("hybrid", **wrong)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="another update"):
        engine.compile("hybrid", update="renoise")


def test_the_command_line_asks_no_preset_of_a_named_lora(
    sdxl: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--base", str(sdxl), "--distilled-lora", str(lora), "--head-dim", "16"]
    out = ["--size", "64", "--seeds", "0", "--out", str(tmp_path / "out")]
    assert main(["sample", "a fox", *words, *out]) == 0
    assert "taken for Lightning, 8 steps" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert "lightning-hybrid" in json.dumps(record)


def test_what_cannot_be_a_distilled_lora_is_refused_before_weights_are_read(
    sdxl: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    for name in ("pair.load_text", "parts.load_vae", "pair.load_unet"):
        monkeypatch.setattr(f"headstart.engine.{name}", read)
    unet = Made.of("sdxl", 1).write("bare", tmp_path / "sdxl_lightning_4step_unet")
    with pytest.raises(hs.CheckpointError, match="this file is none; a whole UNet goes in"):
        hs.Engine.load(sdxl, distilled_lora=unet)
    with pytest.raises(hs.InputError, match="takes the place of the distilled model"):
        hs.Engine.load(sdxl, unet, distilled_lora=lora)
    with pytest.raises(hs.InputError, match="needs the base it was made for"):
        hs.Engine.load(None, unet, distilled_lora=lora)
    with pytest.raises(hs.CheckpointError):
        hs.Engine.load(sdxl, distilled_lora=tmp_path / "none.safetensors")


def test_swapped_files_are_named_as_swapped(sdxl: Path, tmp_path: Path) -> None:
    student = Made.of("sdxl", 1).write("bare", tmp_path / "dmd2_sdxl_4step_unet")
    plain = Made.of("sdxl", 2).write("bare", tmp_path / "my_own_model")
    right = {"base": Model.of(plain), "distilled": Model.of(student)}
    wrong = {"base": Model.of(student), "distilled": Model.of(plain)}
    line = swap_note(wrong, None)
    assert line is not None and "the base is taken for DMD2" in line and "swapped?" in line
    assert swap_note(right, None) is None
    assert swap_note({"base": Model.of(student)}, None) is None
    both = {"base": Model.of(student), "distilled": Model.of(student)}
    assert swap_note(both, None) is None  # a student of a student says what it is


def test_a_lora_named_for_nothing_is_swapped_too_where_its_base_is_a_student(
    lora: Path, tmp_path: Path
) -> None:
    student = Made.of("sdxl", 1).write("bare", tmp_path / "dmd2_sdxl_4step_unet")
    models = {"base": Model.of(student)}
    assert swap_note(models, distilled_by(lora, models)) is None
    unnamed = lora.rename(tmp_path / "style.safetensors")
    assert swap_note(models, distilled_by(unnamed, models)) is not None


def test_a_one_step_student_is_run_by_its_hybrid(sdxl: Path, tmp_path: Path) -> None:
    """The case of the one_step_hybrid report: before, its hybrid was one base step alone."""
    student = Made.of("sdxl", 1).write("bare", tmp_path / "Hyper-SDXL-1step-Unet")
    engine = hs.Engine.load(sdxl, student, head_dim=16)
    table = engine.compile("hybrid", k=2)
    assert [(step.model, step.timestep) for step in table] == [
        ("base", 999),
        ("base", 900),
        ("distilled", 800),
    ]
    assert heard(engine, table) == [(step.model, step.timestep) for step in table]
    top = Made.of("sdxl", 1).write("bare", tmp_path / "sdxl_lightning_1step_unet_x0")
    engine = hs.Engine.load(sdxl, top, head_dim=16)
    assert engine.weights.predictions["distilled"] is Prediction.X0
    with pytest.raises(hs.PlanError, match="only step starts at timestep 999, pure noise"):
        engine.compile("hybrid")
    assert [step.timestep for step in engine.compile("distilled")] == [999]


@pytest.mark.parametrize(
    ("config", "prediction", "schedule"),
    [
        (
            {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "sigma_max": 80.0},
            Prediction.EDM,
            NoiseSchedule.edm(),
        ),
        (
            {
                "_class_name": "EDMDPMSolverMultistepScheduler",
                "sigma_data": 1.0,
                "sigma_max": 120.0,
                "prediction_type": "v_prediction",
            },
            Prediction.EDM_V,
            NoiseSchedule.edm(sigma_max=120.0, sigma_data=1.0),
        ),
    ],
    ids=["playground", "cosxl"],
)
def test_an_edm_folder_runs_as_edm(
    config: dict[str, object], prediction: Prediction, schedule: object, tmp_path: Path
) -> None:
    folder = Made.of("sdxl", 0, vocabulary=49408).write("folder", tmp_path / "edm")
    with_scheduler(folder, **config)
    engine = hs.Engine.load(folder, head_dim=16)
    assert engine.weights.predictions == {"base": prediction}
    assert engine.schedule == schedule
    table = engine.compile("base", preset="lightning", steps=3, base_guidance=1.0)
    assert table[0].sigma == pytest.approx(config["sigma_max"])
    scalings = prediction.scalings(table[1].sigma, float(str(config["sigma_data"])))
    assert (table[1].c_in, table[1].c_skip, table[1].c_out) == tuple(scalings)
    called = [timestep for _, timestep in heard(engine, table)]
    assert called == pytest.approx([step.timestep for step in table], rel=1e-6)


def test_a_plan_that_ends_above_0_is_decoded_as_its_original_keeps_it() -> None:
    """DDIM keeps sqrt(a)*x0 + sqrt(1 - a)*eps, which is x/sqrt(1 + sigma^2) of the last x."""
    engine = hs.Engine.load(headstart_weights.path("base"), preset="demo", device="cpu")
    leg = hs.Leg(model="base", steps=4, update=hs.Update.DDIM)
    states: list[hs.State] = []
    done = engine.sample(
        "a fox",
        plan=hs.Plan((leg,), start="unit", end="first"),
        on_step=states.append,
    )
    end = done.table[-1].sigma_next
    assert end == engine.schedule.lowest[1] > 0
    assert done.table.end_scale == pytest.approx((1 + end**2) ** -0.5)
    assert (done.latents == states[-1].x * done.table.end_scale).all()
    euler = engine.sample("a fox", plan=hs.Plan((leg,), end=end), on_step=states.append)
    assert euler.table.end_scale == 1.0 and (euler.latents == states[-1].x).all()
    part = done.table[:2]
    assert (part.cut, part.end_scale) == (True, 1.0)
    with pytest.raises(hs.PlanError, match="whole tables"):
        engine.sample("a fox", plan=part)


def test_a_single_file_is_sampled_as_the_flow_that_its_user_says(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bare UNet of a flow-trained SDXL (Mugen, nyaflow-xl); text and VAE are the folder's."""
    unet = Made.of("sdxl", 3).write("bare", tmp_path / "nyaflow")
    words = ["--base", str(unet), "--text", str(sdxl), "--vae", str(sdxl), "--head-dim", "16"]
    words += ["--prediction", "flow", "--preset", "lightning", "--plan", "base", "--steps", "2"]
    out = tmp_path / "out"
    assert main(["sample", "a fox", *words, "--size", "64", "--out", str(out)]) == 0
    record = json.loads((out / "record.json").read_text())
    assert "flow shift 1.0" in json.dumps(record)
    capsys.readouterr()


def test_a_multistep_scheduler_that_is_set_to_a_flow_is_one(tmp_path: Path) -> None:
    folder = Made.of("sdxl", 0, vocabulary=49408).write("folder", tmp_path / "flow")
    config = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    model = Model.of(with_scheduler(folder, _class_name="UniPCMultistepScheduler", **config))
    assert model.prediction is Prediction.FLOW
    assert model.family.schedule == NoiseSchedule.flow(3.0)
