"""Inspect and the loaders decide alike on every network file, whole or damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LINEAGES, Model, Tensors, openclip, prefixed
from networks import weights
from safetensors.torch import load_file, save_file
from verdicts import FIRST, ONE, UNET, Mutation, agreed

import headstart_weights

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


def without(*parts: str) -> Mutation:
    return lambda tensors: {
        n: t for n, t in tensors.items() if not any(part in n for part in parts)
    }


def with_(**more: Any) -> Mutation:
    named = {name.replace("__", "."): tensor for name, tensor in more.items()}
    return lambda tensors: tensors | named


def only(prefix: str, keep: str = "") -> Mutation:
    return lambda tensors: {
        n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix + keep)
    }


def renamed(old: str, new: str) -> Mutation:
    return lambda tensors: {n.replace(old, new, 1): t for n, t in tensors.items()}


def channels(count: int) -> Mutation:
    def mutate(tensors: Tensors) -> Tensors:
        name = UNET + "input_blocks.0.0.weight"
        more = torch.zeros(len(tensors[name]), count - 4, 3, 3, dtype=tensors[name].dtype)
        return tensors | {name: torch.cat([tensors[name], more], 1)}

    return mutate


def narrowed(tensors: Tensors) -> Tensors:
    name = UNET + "time_embed.0.weight"
    return tensors | {name: tensors[name].to(torch.float8_e4m3fnuz)}


def doubled(tensors: Tensors) -> Tensors:
    inner = {n.removeprefix(UNET): t.clone() for n, t in tensors.items() if n.startswith(UNET)}
    return prefixed(inner, "module.") | prefixed(inner, "ema.")


def misshapen(tensors: Tensors) -> Tensors:
    name = UNET + "time_embed.0.weight"
    return tensors | {name: tensors[name].T.contiguous()}


def hollowed(tensors: Tensors) -> Tensors:
    return {n: t[:0] if n.endswith("conv_out.weight") else t for n, t in tensors.items()}


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
    mutate, message = MUTATIONS[name]
    if "text" not in name and "embeddings" not in name:  # which cost a third of the time
        whole = without("cond_stage")(whole)
    path = tmp_path / "x.safetensors"
    save_file({n: t.clone() for n, t in mutate(whole).items()}, path)
    info = agreed(path, small_tokenizer)
    assert info is not None
    assert info.ok == (message is None), info.problems
    assert message is None or any(message in problem for problem in info.problems), info.problems


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
    tensors = load_file(file) | {"stranger": ONE}
    file.unlink()
    save_file(tensors, file)
    info = agreed(root, small_tokenizer)
    assert info is not None and any(component in problem for problem in info.problems)
    (other,) = (root / ("vae" if component != "vae" else "unet")).glob("*.safetensors")
    file.write_bytes(other.read_bytes())  # swapped
    info = agreed(root, small_tokenizer)
    assert info is not None and not info.ok


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
