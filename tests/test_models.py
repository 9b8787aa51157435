"""The files of a pair: a wrong one is one CheckpointError, in Python and at the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checkpoints import Model as Made
from checkpoints import halved, ldm_vae
from safetensors.torch import save_file

import headstart as hs
from headstart.cli import main
from headstart.engine.models import (
    Model,
    check_belong,
    predictions,
    preset_of,
    schedules,
    two_schedules,
)
from headstart.networks.tiny import TinyEncoder, TinyParams
from headstart.networks.vae import Vae, VaeParams
from headstart.plan.prediction import Prediction


class Files(NamedTuple):
    """sdxl and sd15: full models; unet: sdxl's alone; the others: what is no model.

    fills: a UNet for inpainting; wide: a VAE of 16 channels; encoder: TAESD's
    """

    sdxl: Path
    sd15: Path
    unet: Path
    vae: Path
    text: Path
    lora: Path
    fills: Path
    wide: Path
    encoder: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("models")
    sdxl, sd15 = Made.of("sdxl", 0), Made.of("sd15", 0)
    vae = folder / "sdxl_vae.safetensors"
    save_file(ldm_vae(halved(sdxl.vae.state_dict())), vae)
    text, lora = folder / "clip.safetensors", folder / "lora.safetensors"
    save_file(halved(sd15.towers[0].state_dict()), text)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    leaves = {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "alpha": ()}
    save_file({f"{layer}.{leaf}": torch.ones(shape) for leaf, shape in leaves.items()}, lora)
    unet = halved(sdxl.unet.state_dict())
    more = torch.zeros(32, 5, 3, 3).half()
    fills, wide, encoder = (folder / f"{name}.safetensors" for name in ("fills", "wide", "encoder"))
    save_file(unet | {"conv_in.weight": torch.cat([unet["conv_in.weight"], more], 1)}, fills)
    flux = Vae(VaeParams(channels=(32, 32, 32, 32), layers=1, latent_channels=16, quant=False))
    save_file(halved(flux.state_dict()), wide, {"headstart.scale_factor": "0.3611"})
    save_file(halved(TinyEncoder(TinyParams(width=8)).state_dict(prefix="encoder.")), encoder)
    return Files(
        sdxl.write("ldm", folder / "sdxl"),
        sd15.write("ldm", folder / "sd15"),
        sdxl.write("bare", folder / "sdxl_turbo"),
        vae,
        text,
        lora,
        fills,
        wide,
        encoder,
    )


WRONG: dict[str, tuple[Callable[[Files], dict[str, Path]], str]] = {
    "a LoRA as the distilled UNet": (
        lambda f: {"base": f.sdxl, "distilled": f.lora},
        r"lora\.safetensors: expected a UNet, found an adapter \(LoRA\), not a network: attach it "
        r"to a model with --lora, or give it as --distilled-lora",
    ),
    "a LoRA as the base": (
        lambda f: {"base": f.lora, "distilled": f.unet},
        r"lora\.safetensors: expected a UNet, found an adapter",
    ),
    "a VAE as the distilled UNet": (
        lambda f: {"base": f.sdxl, "distilled": f.vae},
        r"sdxl_vae\.safetensors: expected a UNet, found VAE: give such a file as --vae",
    ),
    "a text encoder as the base": (
        lambda f: {"base": f.text, "distilled": f.unet},
        r"clip\.safetensors: expected a UNet, found text encoder: give such a file as --text",
    ),
    "SD1.5 where the base is SDXL": (
        lambda f: {"base": f.sdxl, "distilled": f.sd15},
        r"the base \(.*sdxl\.safetensors\) is sdxl and the distilled model \(.*sd15\.safetensors\) "
        r"sd15: expected two models of one family",
    ),
    "SDXL where the base is SD1.5": (
        lambda f: {"base": f.sd15, "distilled": f.unet},
        r"is sd15 and the distilled model .* sdxl: expected two models of one family",
    ),
    "the VAE of SD1.5 for SDXL": (
        lambda f: {"base": f.sdxl, "distilled": f.unet, "vae": f.sd15},
        r"sd15\.safetensors: its VAE is for the latents of sd15, and .* is sdxl",
    ),
    "the text encoder of SD1.5 for SDXL": (
        lambda f: {"base": f.sdxl, "distilled": f.unet, "text": f.sd15},
        r"its text encoders give 32 numbers a token, and the UNet of .* reads 96",
    ),
    "a UNet as the VAE": (
        lambda f: {"base": f.sdxl, "distilled": f.unet, "vae": f.unet},
        r"expected a VAE, found UNet: give such a file as --base or --distilled",
    ),
    "a VAE as the preview": (
        lambda f: {"base": f.sdxl, "distilled": f.unet, "preview": f.vae},
        r"expected a tiny autoencoder, found VAE: give such a file as --vae",
    ),
    "a UNet for inpainting": (
        lambda f: {"base": f.sdxl, "distilled": f.fills},
        r"fills\.safetensors: an inpainting UNet \(9 input channels\): it wants a mask and a pic",
    ),
    "Flux's VAE": (
        lambda f: {"base": f.sdxl, "distilled": f.unet, "vae": f.wide},
        r"wide\.safetensors: its VAE has latents of 16 channels, and the UNet of .* reads 4",
    ),
    "TAESD's encoder as the preview": (
        lambda f: {"base": f.sdxl, "distilled": f.unet, "preview": f.encoder},
        r"encoder\.safetensors: a tiny autoencoder's encoder alone: previews want its decoder",
    ),
    "two UNets and no text encoder": (
        lambda f: {"base": f.unet, "distilled": f.unet},
        r"sdxl_turbo\.safetensors: expected a text encoder, found UNet",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_error_that_says_where_it_belongs(
    files: Files, small_tokenizer: Path, case: str
) -> None:
    choose, message = WRONG[case]
    options = {"tokenizer": small_tokenizer, "head_dim": 16, "text_head_dim": 32}
    with pytest.raises(hs.CheckpointError, match=message):
        hs.Engine.load(**choose(files), **options, device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_ends_the_command_with_1_and_one_line(
    files: Files,
    small_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    choose, _ = WRONG[case]
    command = [
        "sample",
        "a fox",
        "--out",
        str(tmp_path / "run"),
        "--tokenizer",
        str(small_tokenizer),
    ]
    command += ["--head-dim", "16", "--text-head-dim", "32"]
    for role, path in choose(files).items():
        command += [f"--{role}", str(path)]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("headstart: error: ")
    assert not (tmp_path / "run").exists()


def test_a_torn_file_is_one_line_and_its_long_list_is_behind_debug(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = Made.of("sdxl", 0)
    state = halved(torn.unet.state_dict())
    for name in [name for name in state if ".attn1." in name]:
        del state[name]
    path = tmp_path / "sdxl_turbo.safetensors"
    save_file(state, path)
    command = ["sample", "a fox", "--out", str(tmp_path / "run"), "--distilled", str(path)]
    command += ["--text", str(files.sdxl), "--vae", str(files.sdxl), "--plan", "distilled"]
    command += ["--head-dim", "16", "--text-head-dim", "32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headstart.engine.pair.load_text", lambda *_, **__: None)
        assert main(command) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "missing: " in message
    assert message.endswith("(--debug lists every one)\n")


# --------------------------------------------------------------------- what a file is taken for


def test_what_is_stated_is_before_what_is_guessed_before_the_family(tmp_path: Path) -> None:
    model = Made.of("sd21", 0)
    guessed = Model.of(model.write("bare", tmp_path / "sd_turbo"))
    assert guessed.prediction is Prediction.EPS and not guessed.states("prediction")
    stated = Model.of(model.write("folder", tmp_path / "folder_turbo"))
    assert stated.prediction is Prediction.V and stated.states("prediction")
    plain = Model.of(model.write("bare", tmp_path / "model"))
    assert plain.prediction is Prediction.V
    note = plain.note("base", prediction_given=False)
    assert note is not None and note.startswith("base: nothing says whether it predicts eps or v")
    assert plain.note("base", prediction_given=True) is None
    models = {"base": plain, "distilled": guessed}
    assert predictions(None, models) == {"base": Prediction.V, "distilled": Prediction.EPS}
    assert predictions({"base": "eps"}, models)["base"] is Prediction.EPS
    assert preset_of(models) == "sd-turbo" and preset_of({"base": plain}) is None


def test_two_stated_schedules_are_each_models_own(tmp_path: Path) -> None:
    model = Made.of("sd15", 0)
    one, other = (Model.of(model.write("folder", tmp_path / name)) for name in ("a", "b"))
    same = {"base": one, "distilled": other}
    kinds = predictions(None, same)
    assert two_schedules(schedules(same, kinds)) is None
    scheduler = tmp_path / "b" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.02"))
    models = {"base": one, "distilled": Model.of(tmp_path / "b")}
    check_belong(models)
    levels = schedules(models, kinds)
    assert levels["base"] == one.family.schedule != levels["distilled"]
    message = two_schedules(levels)
    assert message is not None and "each model is called at its own levels" in message


def test_a_published_student_of_unstated_schedule_has_its_familys(tmp_path: Path) -> None:
    """Its name says Turbo, and no Turbo was trained on this base's linear betas."""
    model = Made.of("sd15", 0)
    base = model.write("folder", tmp_path / "base")
    scheduler = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("scaled_linear", "linear"))
    models = {
        "base": Model.of(base),
        "distilled": Model.of(model.write("bare", tmp_path / "s_lcm")),
    }
    kinds = predictions(None, models)
    assert kinds["base"] is kinds["distilled"]
    assert models["distilled"].guess.preset == "lcm"
    assert schedules(models, kinds)["distilled"] == hs.NoiseSchedule.scaled_linear()
    nameless = {**models, "distilled": Model.of(model.write("bare", tmp_path / "student"))}
    levels = schedules(nameless, kinds)
    assert levels["distilled"] == levels["base"] != hs.NoiseSchedule.scaled_linear()
