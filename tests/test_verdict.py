"""Inspect and the loaders decide alike of every file; each kind is named, with what can be done."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LINEAGES, Model, Tensors, ldm_vae, openclip, prefixed
from networks import METADATA, VAE, random_unet, random_vae, single_file, weights
from safetensors.torch import load_file, save_file

import headstart_weights
from headstart.adapters.file import read_adapter
from headstart.adapters.textual_inversion import read_embeddings
from headstart.checkpoint import blueprint
from headstart.checkpoint.checkpoint import CheckpointInfo, inspect_checkpoint
from headstart.checkpoint.families import FAMILIES
from headstart.checkpoint.params import Mid, Stage, UNetParams
from headstart.cli import main
from headstart.errors import CheckpointError, HeadstartError
from headstart.networks.load import load_text, load_tiny, load_unet, load_vae
from headstart.networks.tiny import TinyDecoder, TinyEncoder, TinyParams
from headstart.networks.vae import Vae

Maker = Callable[..., Path]
VAE_METADATA = {"headstart.vae_norm_groups": "4"}


def loads(part: str, path: Path, asked: str, words: Path) -> str | None:
    """Load a network onto the meta device with what `next` asks for: None, or the error."""
    head = 8 if "--head-dim" in asked else None
    try:
        if part == "unet":
            load_unet(path, device="meta", head_dim=head)
        elif part == "vae":
            load_vae(path, device="meta", like=FAMILIES["sd15"])
        elif part == "tiny":
            load_tiny(path, device="meta")
        else:
            wide = 32 if "--text-head-dim" in asked else None
            given = words if "--tokenizer" in asked else None
            load_text(path, device="meta", head_dim=wide, tokenizer=given)
    except HeadstartError as error:
        assert isinstance(error, CheckpointError), error
        return str(error)
    return None


def agreed(path: Path, words: Path) -> CheckpointInfo | None:
    """What inspect says, after every loader has said the same."""
    try:
        info = inspect_checkpoint(path)
    except CheckpointError as error:
        for part in ("unet", "vae", "text", "tiny"):
            assert loads(part, path, "", words) == str(error)
        return None
    sentences = {f"{path}: {problem}" for problem in info.problems}
    assert all(sentence.count("\n") < 10 and len(sentence) < 1500 for sentence in sentences)
    assert (info.next is None) == (not info.ok)
    if info.layout in ("adapter", "embedding"):
        assert info.next is not None
        (read_adapter if info.layout == "adapter" else read_embeddings)(path)
        return info
    # What a refused file would need is not said: as much as may be is given to its networks.
    asked = info.next or "--head-dim --text-head-dim --tokenizer"
    every = ("unet", "vae", "text") if path.is_dir() else ("unet", "vae", "text", "tiny")
    known = () if path.is_dir() and not info.ok else info.parts
    parts = dict.fromkeys(part.removesuffix("_2") for part in known) or dict.fromkeys(every)
    errors = {part: loads(part, path, asked, words) for part in parts}
    said = {error for error in errors.values() if error is not None}
    if info.ok:
        assert not said
    else:
        assert said and said <= sentences
        assert said == sentences
    return info


# --------------------------------------------------------------------- every generator


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {lineage: Model.of(lineage, 0) for lineage in LINEAGES}


@pytest.mark.parametrize(
    ("lineage", "layout"),
    [
        *(("sd15", layout) for layout in ("fp16", "sharded", "bare", "bare-ldm")),
        *(("sd21", "ldm"), ("sdxl", "folder")),
    ],
)
def test_every_layout_of_every_lineage_is_usable_and_loads(
    tmp_path: Path, models: dict[str, Model], small_tokenizer: Path, lineage: str, layout: str
) -> None:
    info = agreed(models[lineage].write(layout, tmp_path / "model"), small_tokenizer)
    assert info is not None and info.ok


@pytest.mark.parametrize("name", ["base", "distilled", "tiny_decoder", "yellow"])
def test_the_bundled_files_are_usable_and_load(name: str, small_tokenizer: Path) -> None:
    info = agreed(headstart_weights.path(name), small_tokenizer)
    assert info is not None and info.ok


Mutation = Callable[[Tensors], Tensors]
UNET, FIRST = "model.diffusion_model.", "first_stage_model."


def without(*parts: str) -> Mutation:
    return lambda held: {n: t for n, t in held.items() if not any(part in n for part in parts)}


def with_(**more: Any) -> Mutation:
    named = {name.replace("__", "."): tensor for name, tensor in more.items()}
    return lambda held: held | named


def only(prefix: str, keep: str = "") -> Mutation:
    return lambda held: {
        n.removeprefix(prefix): t for n, t in held.items() if n.startswith(prefix + keep)
    }


def renamed(old: str, new: str) -> Mutation:
    return lambda held: {n.replace(old, new, 1): t for n, t in held.items()}


def channels(count: int) -> Mutation:
    def mutate(held: Tensors) -> Tensors:
        name = UNET + "input_blocks.0.0.weight"
        more = torch.zeros(len(held[name]), count - 4, 3, 3, dtype=held[name].dtype)
        return held | {name: torch.cat([held[name], more], 1)}

    return mutate


def narrowed(held: Tensors) -> Tensors:
    name = UNET + "time_embed.0.weight"
    return held | {name: held[name].to(torch.float8_e4m3fnuz)}


def doubled(held: Tensors) -> Tensors:
    inner = {n.removeprefix(UNET): t.clone() for n, t in held.items() if n.startswith(UNET)}
    return prefixed(inner, "module.") | prefixed(inner, "ema.")


def misshapen(held: Tensors) -> Tensors:
    name = UNET + "time_embed.0.weight"
    return held | {name: held[name].T.contiguous()}


def hollowed(held: Tensors) -> Tensors:
    return {n: t[:0] if n.endswith("conv_out.weight") else t for n, t in held.items()}


ONE = torch.zeros(1)
MUTATIONS: dict[str, tuple[Mutation, str | None]] = {
    "a stranger": (with_(stranger=ONE), "1 tensors of the file belong to no network: stranger"),
    "a stranger inside": (
        with_(model__diffusion_model__stranger=ONE),
        "the UNet does not fit. 1 unexpected: stranger",
    ),
    "torn": (without("input_blocks.1.0.in_layers.2"), "2 missing: down_blocks.0.resnets.0.conv1"),
    "without its end": (without(UNET + "out."), "the UNet: missing or misshapen: conv_out.weight"),
    "without a level": (without("input_blocks.3."), "the way down leaves"),
    "without its way up": (without("output_blocks"), "does not fit"),
    "all of it, with text": (dict, None),
    "without embeddings": (without("token_embedding"), "missing"),
    "without its VAE's middle": (without("decoder.mid"), "the VAE does not fit"),
    "misshapen": (misshapen, "of another shape"),
    "empty tensors": (hollowed, "of another shape"),
    "integers": (
        with_(model__diffusion_model__out__2__bias=torch.zeros(4, dtype=torch.int32)),
        "1 not floating point: conv_out.bias I32",
    ),
    "float8": (narrowed, "1 tensors of F8_E4M3FNUZ"),
    "9 channels": (channels(9), "it wants a mask and a picture besides the latent, which no plan"),
    "8 channels": (channels(8), "an InstructPix2Pix UNet (8 input channels)"),
    "6 channels": (channels(6), "reads 6 channels and gives 4"),
    "compiled": (renamed(UNET, UNET + "_orig_mod."), None),
    "as diffusers' components": (
        lambda held: renamed(FIRST, "vae.")(renamed(UNET, "unet.")(held)),
        None,
    ),
    "a UNet of DataParallel": (lambda held: prefixed(only(UNET)(held), "module."), None),
    "twice": (doubled, "two networks could be its unet"),
    "training leftovers": (
        with_(
            logvar=ONE, global_step=ONE, first_stage_model__loss__logvar=ONE,
            model_ema__num_updates=ONE, optimizer__state=ONE,
        ),
        None,
    ),
    "a ControlNet beside": (
        with_(control_model__zero_convs__0__0__weight=ONE),
        "1 tensors of a ControlNet lie beside its networks",
    ),
    "edm": (with_(edm_mean=torch.zeros(1, 4, 1, 1), edm_std=torch.ones(1, 4, 1, 1)), None),
    "edm without deviation": (with_(edm_mean=torch.zeros(1, 4, 1, 1)), "edm_std"),
    "edm of no deviation": (with_(edm_mean=torch.zeros(4), edm_std=torch.zeros(4)), "edm_std"),
    "edm of NaN": (with_(edm_mean=torch.full((4,), torch.nan), edm_std=torch.ones(4)), "finite"),
    "edm of other channels": (
        with_(edm_mean=torch.zeros(3), edm_std=torch.ones(3)),
        "have 3 numbers, and the VAE 4 channels",
    ),
    "cosxl": (
        with_(
            edm_vpred__sigma_max=torch.tensor(120.0), edm_vpred__sigma_min=torch.tensor(0.002)
        ),
        None,
    ),
    "cosxl upside down": (with_(edm_vpred__sigma_max=torch.tensor(1e-4)), "schedule is unusable"),
    "the VAE with its loss": (
        lambda held: only(FIRST)(held) | {"loss.discriminator.main.0.weight": ONE},
        None,
    ),
    "the decoder": (only(FIRST, "decoder"), "2 missing: post_quant_conv"),
    "the decoder with its convolution": (
        lambda held: only(FIRST, "decoder")(held) | only(FIRST, "post_quant")(held),
        None,
    ),
    "the encoder": (only(FIRST, "encoder"), "a VAE's encoder alone"),
    "films": (
        lambda held: {
            n: t[:, :, None] if t.ndim == 4 else t for n, t in only(FIRST)(held).items()
        },
        "a VAE of films",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Model]) -> Tensors:
    return load_file(models["sd15"].write("ldm", tmp_path_factory.mktemp("whole") / "x"))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_file_is_named_and_both_decide_alike(
    tmp_path: Path, whole: Tensors, small_tokenizer: Path, name: str
) -> None:
    mutate, told = MUTATIONS[name]
    if "text" not in name and "embeddings" not in name:  # which cost a third of the time
        whole = without("cond_stage")(whole)
    path = tmp_path / "x.safetensors"
    save_file({n: t.clone() for n, t in mutate(whole).items()}, path)
    info = agreed(path, small_tokenizer)
    assert info is not None
    assert info.ok == (told is None), info.problems
    assert told is None or any(told in problem for problem in info.problems), info.problems


@pytest.mark.parametrize("cut", [3, 200, 5000, -1])
def test_a_cut_file_is_refused_alike(
    tmp_path: Path, whole: Tensors, small_tokenizer: Path, cut: int
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({n: t for n, t in whole.items() if n.startswith(UNET)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    assert agreed(path, small_tokenizer) is None


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_folder_with_a_bad_component_names_it(
    tmp_path: Path, models: dict[str, Model], small_tokenizer: Path, component: str
) -> None:
    root = models["sdxl"].write("folder", tmp_path / "model")
    (file,) = (root / component).glob("*.safetensors")
    held = load_file(file) | {"stranger": ONE}
    file.unlink()
    save_file(held, file)
    info = agreed(root, small_tokenizer)
    assert info is not None and any(component in problem for problem in info.problems)
    (other,) = (root / ("vae" if component != "vae" else "unet")).glob("*.safetensors")
    file.write_bytes(other.read_bytes())  # swapped
    info = agreed(root, small_tokenizer)
    assert info is not None and not info.ok


# --------------------------------------------------------------------- what each kind is called


def tiny(count: int, *halves: str) -> Tensors:
    params = TinyParams(width=8, blocks=(1, 1, 1, 1), latent_channels=count)
    made: Tensors = {}
    for half in halves:
        module = TinyDecoder(params) if half == "decoder" else TinyEncoder(params)
        made |= prefixed(weights(module), f"{half}.")
    return made


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


def named(*names: str) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, torch.zeros(2, 2)) for name in names)


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
    names, told = REFUSED[name]
    save_file(dict(named(*names)), tmp_path / "x.safetensors")
    info = agreed(tmp_path / "x.safetensors", small_tokenizer)
    assert info is not None and len(info.problems) == 1
    assert info.problems[0].startswith(told)


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
    make, told, note = USABLE[name]
    path = tmp_path / "x.safetensors"
    save_file({n: t.clone() for n, t in make().items()}, path)
    info = inspect_checkpoint(path) if "LoRA" in name else agreed(path, small_tokenizer)
    assert info is not None and info.ok and told in str(info.next)
    assert any(note in line for line in info.notes) or not note


def test_a_tiny_autoencoder_of_other_latents_is_refused(
    tmp_path: Path, small_tokenizer: Path
) -> None:
    save_file(tiny(16, "decoder"), tmp_path / "x.safetensors")
    info = agreed(tmp_path / "x.safetensors", small_tokenizer)
    assert info is not None
    assert "16-channel latents, as SD3 and Flux have (TAESD3, TAEF1)" in info.problems[0]


def test_a_lone_encoder_of_two_is_refused_as_the_loader_does(
    tmp_path: Path, models: dict[str, Model], small_tokenizer: Path
) -> None:
    first, second = (weights(tower) for tower in models["sdxl"].towers)
    for tensors in (second, prefixed(openclip(second), "clip_g.")):
        save_file(tensors, tmp_path / "x.safetensors")
        info = agreed(tmp_path / "x.safetensors", small_tokenizer)
        assert info is not None and "with 2 text encoders, found 1" in info.problems[0]
    both = prefixed(first, "clip_l.") | prefixed(openclip(second), "clip_g.")
    save_file(both, tmp_path / "x.safetensors")
    info = agreed(tmp_path / "x.safetensors", small_tokenizer)
    assert info is not None and info.parts == ("text", "text_2")
    assert "--text-head-dim N and --tokenizer PATH" in str(info.next)


def test_leftovers_that_are_allowed_are_let_be(tmp_path: Path) -> None:
    path = single_file(random_unet(), random_vae(), tmp_path / "x.safetensors", **VAE_METADATA)
    held = load_file(path) | {"control_model.out.weight": ONE, UNET + "odd.weight": ONE.clone()}
    path = tmp_path / "more.safetensors"
    save_file(held, path, METADATA | VAE_METADATA)
    with pytest.raises(CheckpointError, match=r"--allow 'control_model\.\*'"):
        load_unet(path)
    allow = ["control_model.*", "*.odd.weight"]
    assert load_unet(path, allow=allow).params.channels == 16
    assert load_vae(path, allow=allow[:1]).params.channels == (8, 16)
    assert load_unet(path, allow=["*"]).params.channels == 16
    assert main(["inspect", str(path)]) == 1
    assert main(["inspect", str(path), "--allow", allow[0], "--allow", allow[1]]) == 0


# --------------------------------------------------------------------- files of the ground truth


MADE = (
    *(("sdxl", form) for form in ("ldm", "diffusers", "vae", "vae-old", "vae-ldm", "te1", "te2")),
    *((arch, "unet") for arch in ("lcm-sd15", "ssd-1b", "koala-700m")),
    ("sd15", "taesd-diffusers"),
)


@pytest.mark.parametrize(("arch", "form"), MADE)
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
    found = {path.stem: inspect_checkpoint(path).layout for path in tmp_path.iterdir()}
    assert found == {"pti": "embedding", "xlti": "embedding", "bundle": "adapter"}


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
