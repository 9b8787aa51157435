"""Inspect and the loaders decide alike on files of other kinds; each is named, with what to do."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import Tensors, ldm_vae, prefixed
from networks import METADATA, VAE, random_unet, random_vae, single_file, weights
from safetensors.torch import load_file, save_file
from verdicts import ONE, UNET, VAE_METADATA, Maker, agreed, named

from headstart.adapters.file import read_adapter
from headstart.adapters.textual_inversion import read_embeddings
from headstart.checkpoint import blueprint
from headstart.checkpoint.checkpoint import inspect_checkpoint
from headstart.checkpoint.params import Mid, Stage, UNetParams
from headstart.cli import main
from headstart.errors import CheckpointError, HeadstartError
from headstart.networks.load import load_unet, load_vae
from headstart.networks.tiny import TinyDecoder, TinyEncoder, TinyParams
from headstart.networks.vae import Vae

# --------------------------------------------------------------------- what each kind is called


def tiny(count: int, *halves: str) -> Tensors:
    params = TinyParams(width=8, blocks=(1, 1, 1, 1), latent_channels=count)
    tensors: Tensors = {}
    for half in halves:
        module = TinyDecoder(params) if half == "decoder" else TinyEncoder(params)
        tensors |= prefixed(weights(module), f"{half}.")
    return tensors


def flux_vae() -> Tensors:
    torch.manual_seed(0)
    wide = replace(VAE, channels=(32, 64), latent_channels=16, quant=False)
    return ldm_vae(weights(Vae(wide).requires_grad_(False)))


def refiner() -> dict[str, tuple[int, ...]]:
    stages = (Stage(384, (0,), True), Stage(768, (1,), False))
    up = (Stage(768, (1, 1), True), Stage(384, (0, 0), False))
    return blueprint.unet(
        UNetParams(down=stages, mid=Mid(2, 1), up=up, context_dim=1280, added_dim=2560)
    )


FLUX_LORA = "transformer.single_transformer_blocks.0.attn.to_k.lora_{}.weight"
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "ControlNet of diffusers": (
        ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "controlnet_cond_embedding.x"),
        "a ControlNet: it steers a UNet by a picture",
    ),
    "ControlNet": (
        ("control_model.zero_convs.0.0.weight", "control_model.input_blocks.0.0.weight"),
        "a ControlNet",
    ),
    "ControlNet bare": (("zero_convs.0.0.weight", "input_blocks.0.0.weight"), "a ControlNet"),
    "IP-Adapter with LoRA": (
        ("image_proj.proj.weight", "ip_adapter.0.to_q_lora.down.weight"),
        "an IP-Adapter",
    ),
    "T2I-Adapter": (("adapter.body.0.resnets.0.block1.weight",), "a T2I-Adapter"),
    "IP-Adapter": (("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "an IP-Adapter"),
    "Flux": (
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "vae.encoder.conv_in.weight"),
        "a Flux transformer: not of the UNet family",
    ),
    "Flux of diffusers": (
        ("single_transformer_blocks.0.attn.to_k.weight", "transformer_blocks.0.attn.to_k.weight"),
        "a Flux transformer",
    ),
    "SD3": (("joint_blocks.0.x_block.attn.qkv.weight",), "an SD3 transformer"),
    "PixArt": (("adaln_single.linear.weight",), "a PixArt, Sana or LTX transformer"),
    "Z-Image": (("cap_embedder.1.weight", "noise_refiner.0.x.weight"), "a Lumina or Z-Image"),
    "Wan": (("blocks.0.cross_attn.norm_k.weight", "head.modulation"), "a Wan transformer"),
    "motion": (("down_blocks.0.motion_modules.0.x.weight",), "an AnimateDiff motion module"),
    "films": (("input_blocks.1.1.time_stack.0.x.weight",), "a Stable Video Diffusion UNet"),
    "T5": (("encoder.block.0.layer.0.SelfAttention.k.weight",), "a T5 text encoder"),
    "upscaler": (("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"), "an upscaler (ESRGAN)"),
    "image encoder": (("vision_model.embeddings.class_embedding",), "an image encoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_kind_of_file_is_called_by_its_name(
    tmp_path: Path, small_tokenizer: Path, name: str
) -> None:
    names, message = REFUSED[name]
    save_file(dict(named(*names)), tmp_path / "x.safetensors")
    info = agreed(tmp_path / "x.safetensors", small_tokenizer)
    assert info is not None and len(info.problems) == 1
    assert info.problems[0].startswith(message)


def test_a_refiner_is_refused_by_name(tmp_path: Path, hollow: Maker, small_tokenizer: Path) -> None:
    path = hollow("x.safetensors", {n: ("F16", list(s)) for n, s in refiner().items()})
    info = agreed(path, small_tokenizer)
    assert info is not None and info.problems[0].startswith("an SDXL refiner's UNet (width 384")


USABLE: dict[str, tuple[Callable[[], Tensors], str, str]] = {
    "TAESD": (lambda: tiny(4, "encoder", "decoder"), "--preview ", ""),
    "TAESD decoder": (lambda: tiny(4, "decoder"), "--preview ", "the decoder alone"),
    "TAESD encoder": (lambda: tiny(4, "encoder"), "load_tiny(FILE).encode", "the encoder alone"),
    "Flux VAE": (flux_vae, "load_vae(FILE)", "16-channel latents, as SD3 and Flux have"),
    "SDXL embedding": (
        lambda: {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)},
        "--embedding ",
        "a textual inversion",
    ),
    "embedding": (lambda: {"emb_params": torch.zeros(8, 768)}, "--embedding ", ""),
    "embedding of diffusers": (lambda: {"<cat>": torch.zeros(768)}, "--embedding ", ""),
    "embedding by a word": (lambda: {"my-style": torch.zeros(1, 1024)}, "--embedding ", ""),
    "LoRA of Flux": (
        lambda: {FLUX_LORA.format(side): torch.ones(4, 4) for side in "AB"},
        "--lora ",
        "an adapter (LoRA)",
    ),
    "LoRA under a UNet's prefix": (
        lambda: {
            f"model.diffusion_model.input_blocks.1.1.proj_in.lora_{side}.weight": torch.ones(4, 4)
            for side in ("up", "down")
        },
        "--lora ",
        "an adapter (LoRA)",
    ),
}


@pytest.mark.parametrize("name", USABLE)
def test_what_can_be_done_with_a_file_is_said(
    tmp_path: Path, small_tokenizer: Path, name: str
) -> None:
    make, message, note = USABLE[name]
    path = tmp_path / "x.safetensors"
    save_file({n: t.clone() for n, t in make().items()}, path)
    info = inspect_checkpoint(path) if "LoRA" in name else agreed(path, small_tokenizer)
    assert info is not None and info.ok and message in str(info.next)
    assert any(note in line for line in info.notes) or not note


def test_a_tiny_autoencoder_of_other_latents_is_refused(
    tmp_path: Path, small_tokenizer: Path
) -> None:
    save_file(tiny(16, "decoder"), tmp_path / "x.safetensors")
    info = agreed(tmp_path / "x.safetensors", small_tokenizer)
    assert info is not None
    assert "16-channel latents, as SD3 and Flux have (TAESD3, TAEF1)" in info.problems[0]


def test_leftovers_that_are_allowed_are_let_be(tmp_path: Path) -> None:
    path = single_file(random_unet(), random_vae(), tmp_path / "x.safetensors", **VAE_METADATA)
    tensors = load_file(path) | {"control_model.out.weight": ONE, UNET + "odd.weight": ONE.clone()}
    path = tmp_path / "more.safetensors"
    save_file(tensors, path, METADATA | VAE_METADATA)
    with pytest.raises(CheckpointError, match=r"--allow 'control_model\.\*'"):
        load_unet(path)
    allow = ["control_model.*", "*.odd.weight"]
    assert load_unet(path, allow=allow).params.channels == 16
    assert load_vae(path, allow=allow[:1]).params.channels == (8, 16)
    assert load_unet(path, allow=["*"]).params.channels == 16
    assert main(["inspect", str(path)]) == 1
    assert main(["inspect", str(path), "--allow", allow[0], "--allow", allow[1]]) == 0


# --------------------------------------------------------------------- files of the ground truth


FILES = (
    *(("sdxl", form) for form in ("ldm", "diffusers", "vae", "vae-old", "vae-ldm", "te1", "te2")),
    *((arch, "unet") for arch in ("lcm-sd15", "ssd-1b", "koala-700m")),
    ("sd15", "taesd-diffusers"),
)


@pytest.mark.parametrize(("arch", "form"), FILES)
def test_every_made_file_is_decided_alike(
    make_ckpt: Maker, small_tokenizer: Path, arch: str, form: str
) -> None:
    name = "model" if form == "diffusers" else "model.safetensors"
    info = agreed(make_ckpt(name, arch, form, "--scale", "tiny"), small_tokenizer)
    # One of SDXL's two encoders reads no prompt for it; the first of them looks like SD1.5's.
    assert info is not None
    assert info.ok == (form != "te2"), info.problems


CASES: dict[str, tuple[list[str], bool | None]] = {
    "inpainting_unet": (["9"], False),
    "leftover_tensors:edm": (["edm"], True),
    "leftover_tensors:loss": (["loss"], True),
    "leftover_tensors:decoder": (["decoder"], True),
    "leftover_tensors:orig_mod": (["orig_mod"], True),
    "fp8_scaled:scale_weight": (["scale_weight"], None),
}
"""Case -> arguments of its script, and whether such a file is usable; None: either, but alike."""


@pytest.mark.parametrize("case", CASES)
def test_every_case_that_people_met_is_decided_alike(
    shared: Path, make_ckpt: Maker, tmp_path: Path, small_tokenizer: Path, case: str
) -> None:
    options, ok = CASES[case]
    source = make_ckpt(
        "model.safetensors", "bk-sdm-tiny", "ldm", "--scale", "tiny", "--dtype", "F16"
    )
    script, path = shared / "cases" / case.partition(":")[0] / "make.py", tmp_path / "x.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), str(source), str(path), *options])
        runpy.run_path(str(script))
    info = agreed(path, small_tokenizer)
    assert info is not None
    assert ok in (None, info.ok), info.problems


def test_learned_tokens_that_people_met_are_named(shared: Path, tmp_path: Path) -> None:
    script = shared / "cases" / "embedding_pairs" / "make.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), str(tmp_path)])
        runpy.run_path(str(script))
    layouts = {path.stem: inspect_checkpoint(path).layout for path in tmp_path.iterdir()}
    assert layouts == {"pti": "embedding", "xlti": "embedding", "bundle": "adapter"}


def test_vectors_that_do_not_belong_together_are_no_embedding(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(3, 1280)}, path)
    assert not inspect_checkpoint(path).ok
    with pytest.raises(HeadstartError):
        read_embeddings(path)


def test_an_adapter_that_attach_would_refuse_is_refused_with_that_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": ONE}, path)
    with pytest.raises(HeadstartError) as caught:
        read_adapter(path)
    assert main(["inspect", str(path)]) == 1
    assert str(caught.value).removeprefix(f"{path}: ") in capsys.readouterr().out
