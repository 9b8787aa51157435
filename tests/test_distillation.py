"""What a distilled file is taken for, and the plans it should not be run with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headstart.checkpoint import distillation
from headstart.checkpoint.distillation import Guess
from headstart.checkpoint.distillations import DISTILLATIONS, Distillation
from headstart.checkpoint.tensors import Checkpoint
from headstart.plan.by_name import PRESETS
from headstart.plan.pairs import PAIRS
from headstart.plan.prediction import Prediction
from headstart.plan.preset import preset
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.table import StepTable

NAMES = {
    # the names their makers publish them under, UNets and LoRAs
    "sdxl_lightning_4step_unet": ("Lightning", 4, "lightning"),
    "sdxl_lightning_8step_unet": ("Lightning", 8, "lightning"),
    "sdxl_lightning_8step_lora": ("Lightning", 8, "lightning"),
    "sdxl_lightning_1step_unet_x0": ("Lightning", 1, "lightning-1step"),
    "dmd2_sdxl_4step_unet_fp16": ("DMD2", 4, "dmd2"),
    "dmd2_sdxl_4step_lora_fp16": ("DMD2", 4, "dmd2"),
    "dmd2_sdxl_1step_unet_fp16": ("DMD2", 1, "dmd2-1step"),
    "Hyper-SDXL-1step-Unet": ("Hyper-SD", 1, "hyper-sd-1step"),
    "Hyper-SDXL-4steps-lora": ("Hyper-SD", 4, "hyper-sd"),
    "Hyper-SD15-8steps-lora": ("Hyper-SD", 8, "hyper-sd"),
    "Hyper-SDXL-1step-lora": ("Hyper-SD unified", None, "hyper-sd-unified"),
    "Hyper-SDXL-12steps-CFG-lora": ("Hyper-SD CFG", 12, "hyper-sd-cfg"),
    "sd_xl_turbo_1.0_fp16": ("Turbo", None, "turbo"),
    "sd_turbo": ("SD-Turbo", None, "sd-turbo"),
    "LCM_Dreamshaper_v7_4k": ("LCM", None, "lcm"),
    "lcm-lora-sdxl": ("LCM-LoRA", None, "lcm-lora"),
    "Segmind-VegaRT": ("LCM-LoRA", None, "lcm-lora"),
    "TCD-SDXL-LoRA": ("TCD", None, "tcd"),
    "pcm_sdxl_smallcfg_4step_converted": ("PCM", 4, "pcm"),
    "pcm_sdxl_normalcfg_8step_converted": ("PCM CFG", 8, "pcm-cfg"),
    "nitrosd-realism_f16": ("NitroFusion", None, "nitrofusion"),
    "nitrosd-vibrant_f16": ("NitroFusion Vibrant", None, "nitrofusion-vibrant"),
    "SDXL-Flash": ("SDXL-Flash", None, "sdxl-flash"),
    "juggernautXL_v9Rdphoto2Lightning": ("Lightning", None, "lightning"),
    # and names of what is no distillation
    "sd_xl_base_1.0": (None, None, None),
    "hyperrealism_v3": (None, None, None),
    "calcmix_dmdx": (None, None, None),
}


def guessed(path: Path, lineage: str = "sdxl", **metadata: str) -> Guess:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"conv_in.weight": torch.zeros(1)}, path, metadata or None)
    return distillation.guess(path, Checkpoint([path]), lineage)


def table(name: str, **settings: object) -> StepTable:
    return preset(name, **settings).compile(NoiseSchedule.scaled_linear())  # type: ignore[arg-type]


def guess(name: str, steps: int | None = None) -> Guess:
    row = next(row for row in DISTILLATIONS if row.name == name)
    return Guess(distillation=row, steps=steps, why="name")


ADD = next(row.timesteps for row in DISTILLATIONS if row.name == "Turbo")


def complaint(guess: Guess, run: StepTable) -> str | None:
    return guess.complaint("distilled", [s for s in run if s.model == "distilled"], run.name)


@pytest.mark.parametrize("name", NAMES)
def test_a_published_name_tells_distillation_steps_and_preset(tmp_path: Path, name: str) -> None:
    guess = guessed(tmp_path / f"{name}.safetensors")
    kind = guess.distillation.name if guess.distillation else None
    metadata = NAMES[name]
    assert (kind, guess.steps, guess.preset) == metadata
    assert (guess.note() is None) == (metadata[0] is None)


def test_every_preset_named_here_exists() -> None:
    named = [name for row in DISTILLATIONS for name in (row.pair, *row.by_steps.values())]
    assert set(named) < set(PRESETS)


@pytest.mark.parametrize("row", DISTILLATIONS, ids=lambda row: row.name)
def test_a_pair_run_as_its_card_says_is_no_complaint(row: Distillation) -> None:
    for steps in (None, *row.by_steps):
        name = row.preset(steps)
        pair = PAIRS[name]
        for count in pair.steps:
            if row.timesteps == ADD and count == 3:  # its card's third step is off its four
                continue
            plan = preset(name, steps=count, mode="distilled")
            run = plan.compile(pair.schedules, prediction=pair.predictions)
            guess = Guess(distillation=row, steps=count if steps or row.jumps else None, why="name")
            assert complaint(guess, run) is None, (name, count)


def test_a_folders_name_and_the_hubs_cache_tell_too(tmp_path: Path) -> None:
    inside = tmp_path / "sdxl-turbo" / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "sdxl-turbo" / "scheduler").mkdir(parents=True)
    (tmp_path / "sdxl-turbo" / "scheduler" / "scheduler_config.json").write_text("{}")
    assert guessed(inside).preset == "turbo"
    cached = tmp_path / "hub" / "models--latent-consistency--lcm-sdxl" / "snapshots" / "0a1b"
    assert guessed(cached / "diffusion_pytorch_model.fp16.safetensors").preset == "lcm"
    assert guessed(tmp_path / "turbo" / "models" / "mine.safetensors") == Guess()


def test_the_surest_source_wins(tmp_path: Path) -> None:
    """Tensors, then metadata, then the scheduler of the folder, then the name."""
    metadata = {"headstart.preset": "dmd2"}
    assert guessed(tmp_path / "sdxl_turbo.safetensors", **metadata).preset == "dmd2"
    metadata = {"modelspec.title": "SDXL Lightning"}
    titled = guessed(tmp_path / "x_turbo.safetensors", **metadata)
    assert (titled.preset, titled.why) == ("lightning", "metadata")
    folder = tmp_path / "some-turbo"
    (folder / "scheduler").mkdir(parents=True)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "LCMScheduler"}))
    scheduled = guessed(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert (scheduled.preset, scheduled.why) == ("lcm", "scheduler")
    path = tmp_path / "sdxl_lightning_4step.safetensors"
    save_file({"time_embedding.cond_proj.weight": torch.zeros(1)}, path)
    result = distillation.guess(path, Checkpoint([path]), "sdxl")
    assert (result.preset, result.why) == ("lcm", "tensors")


@pytest.mark.parametrize(
    ("name", "lineage", "prediction", "size"),
    [
        ("v2-1_512-ema-pruned", "sd21", Prediction.EPS, 512),
        ("v2-1_768-ema-pruned", "sd21", Prediction.V, 768),
        ("stable-diffusion-2-1-base", "sd21", Prediction.EPS, 512),
        ("stable-diffusion-2-base", "sd21", Prediction.EPS, 512),
        ("sd_turbo", "sd21", Prediction.EPS, 512),
        ("model", "sd21", None, None),
        ("sd_turbo_768", "sd15", None, None),
        ("sdxl_lightning_1step_unet_x0", "sdxl", Prediction.X0, None),
        ("sdxl_lightning_4step_unet", "sdxl", None, None),
    ],
)
def test_what_a_name_tells_about_the_prediction(
    tmp_path: Path, name: str, lineage: str, prediction: Prediction | None, size: int | None
) -> None:
    guess = guessed(tmp_path / f"{name}.safetensors", lineage)
    assert (guess.prediction, guess.image_size) == (prediction, size)


@pytest.mark.parametrize(
    ("guess", "run"),
    [
        (guess("Lightning", 4), table("lightning")),
        (guess("Lightning", 8), table("lightning", steps=8)),
        (guess("Lightning", 8), table("lightning", steps=8, mode="skip-first", k=3)),
        (guess("Lightning"), table("lightning", steps=2)),
        (guess("Turbo"), table("turbo")),
        (guess("Turbo"), table("turbo", steps=2)),
        (guess("Turbo"), table("lightning")),
        (guess("LCM"), table("lcm")),
        (guess("LCM"), table("lcm", steps=8)),
        (guess("LCM"), table("paper-dmd2")),
        (guess("DMD2", 4), table("paper-dmd2")),
        (guess("DMD2", 4), table("dmd2")),
        (Guess(), table("lcm")),
        (guess("LCM"), table("turbo", mode="base")),
    ],
)
def test_a_plan_on_the_trained_grid_is_no_complaint(guess: Guess, run: StepTable) -> None:
    assert complaint(guess, run) is None


@pytest.mark.parametrize(
    ("guess", "run", "expected"),
    [
        (guess("Turbo"), table("lcm"), r"runs it at 759, 499, 259: use preset='turbo'"),
        (guess("LCM"), table("lightning"), r"19 with fresh noise .* at 749, 499, 249: use preset"),
        (guess("Lightning", 4), table("lightning", steps=8), r"use preset='lightning', steps=4"),
        (guess("Lightning", 8), table("lightning", steps=4), r"use preset='lightning', steps=8"),
        (guess("Lightning", 4), table("dmd2"), r"with Euler steps; plan 'dmd2-hybrid' runs it at"),
        (guess("DMD2", 4), table("turbo"), r"with another update: use preset='dmd2', steps=4"),
        (guess("DMD2", 1), table("dmd2"), r"trained at timesteps 399 .* use preset='dmd2-1step'$"),
        (guess("LCM"), table("tcd", steps=4), r"with another update: use preset='lcm'"),
        (
            guess("Hyper-SD", 8),
            table("hyper-sd-unified", steps=8),
            r"use preset='hyper-sd', steps=8",
        ),
    ],
)
def test_a_plan_off_the_trained_grid_names_the_right_one(
    guess: Guess, run: StepTable, expected: str
) -> None:
    message = complaint(guess, run)
    assert message is not None and re.search(expected, message), message


def test_the_note_says_how_to_set_it_by_hand(tmp_path: Path) -> None:
    guess = guessed(tmp_path / "sdxl_lightning_4step_unet.safetensors")
    assert guess.note() == (
        "taken for Lightning, 4 steps: preset lightning (set with --preset or preset=), by its name"
    )
    single = guessed(tmp_path / "Hyper-SDXL-1step-Unet.safetensors")
    assert "Hyper-SD, 1 step: preset hyper-sd-1step (set with" in str(single.note())
    base = guessed(tmp_path / "v2-1_512-ema-pruned.safetensors", "sd21")
    assert base.note() == "predicts eps (set with --prediction or prediction=), by its name"
    assert base.note(without_prediction=True) is None
