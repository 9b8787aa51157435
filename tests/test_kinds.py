"""Files of the kinds that lie in public repositories: names and shapes as theirs, zeros inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headstart.adapters.file import read_adapter
from headstart.adapters.info import describe_adapter
from headstart.adapters.textual_inversion import read_embeddings
from headstart.checkpoint.checkpoint import inspect_checkpoint
from headstart.cli import main
from headstart.errors import HeadstartError
from headstart.networks.load import load_tiny, load_unet

Shapes = dict[str, tuple[int, ...]]


def both(name: str, *weight: int) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def controlnet() -> Shapes:
    """Of diffusers, SD 1, one block a level."""
    blocks = [f"down_blocks.{i}.resnets.0" for i in range(4)]
    shapes: Shapes = {f"{block}.conv1.weight": (32, 32, 3, 3) for block in blocks}
    shapes |= both("conv_in", 32, 4, 3, 3) | both("time_embedding.linear_1", 128, 32)
    shapes |= both("controlnet_cond_embedding.conv_in", 16, 3, 3, 3)
    shapes |= both("mid_block.resnets.0.conv1", 32, 32, 3, 3)
    return shapes | both("controlnet_mid_block", 32, 32, 1, 1)


def ip_adapter() -> Shapes:
    shapes: Shapes = {
        f"ip_adapter.{i}.to_{side}_ip.weight": (320, 768) for i in (1, 3, 5) for side in ("k", "v")
    }
    return shapes | both("image_proj.proj", 3072, 1024) | both("image_proj.norm", 768)


def vae_approx() -> Shapes:
    """AUTOMATIC1111, modules/sd_vae_approx.py."""
    sizes = (4, 8, 16, 32, 64, 32, 16, 8, 3)
    kernels = (7, 5, 3, 3, 3, 3, 3, 3)
    shapes: Shapes = {}
    for i, kernel in enumerate(kernels):
        shapes |= both(f"conv{i + 1}", sizes[i + 1], sizes[i], kernel, kernel)
    return shapes


def block(i: int, width: int = 64) -> Shapes:
    shapes: Shapes = {}
    for at in (0, 2, 4):
        shapes |= both(f"{i}.conv.{at}", width, width, 3, 3)
    return shapes


def taef2() -> Shapes:
    """A decoder: TAESD with 32 channels, and a pool in three blocks."""
    shapes: Shapes = {**both("1", 64, 32, 3, 3), **both("19", 3, 64, 3, 3)}
    for i in (3, 4, 5):
        shapes |= block(i) | both(f"{i}.pool.1", 64)
        shapes |= {f"{i}.pool.0.weight": (64, 64, 1, 1), f"{i}.pool.3.weight": (64, 64, 1, 1)}
    return shapes


def taesana() -> Shapes:
    """An encoder: its first convolutions are half as wide as its blocks."""
    shapes: Shapes = {
        **both("0", 32, 3, 3, 3),
        **both("2", 64, 32, 3, 3),
        **both("17", 32, 64, 3, 3),
    }
    for i in (4, 5, 6, 8, 9, 10):
        shapes |= block(i)
    return shapes


CLIP = "conditioner.embedders.1.model."
REFUSED: dict[str, tuple[Callable[[], Shapes], str]] = {
    "ControlNet": (controlnet, "a ControlNet: it steers a UNet by a picture"),
    "IP-Adapter": (ip_adapter, "an IP-Adapter: it steers"),
    "image encoder": (
        lambda: {"vision_model.embeddings.class_embedding": (1280,)},
        "an image encoder (CLIP, DINO)",
    ),
    "VAE-approx": (vae_approx, "AUTOMATIC1111's approximate decoder (VAE-approx): give TAESD's"),
    "FLUX.2's tiny autoencoder": (taef2, "a tiny autoencoder for FLUX.2 (TAEF2)"),
    "stable-diffusion.cpp's TAESD": (
        lambda: both("first_stage_model.decoder.3.conv.0", 64, 64, 3, 3),
        "a tiny autoencoder as stable-diffusion.cpp writes it: give TAESD's",
    ),
    "encoded prompt": (
        lambda: {"neutral_clip_embedding_mps": (1, 77, 768)},
        "an encoded prompt [1, 77, 768], no network: give such a tensor to Engine.sample(cond=)",
    ),
}


def written(path: Path, shapes: Shapes) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


def refusals(path: Path, *loaders: Callable[[Path], object]) -> set[str]:
    kinds: set[str] = set()
    for load in loaders:
        with pytest.raises(HeadstartError) as caught:
            load(path)
        kinds.add(str(caught.value))
    return kinds


@pytest.mark.parametrize("name", REFUSED)
def test_every_option_refuses_such_a_file_with_the_sentence_of_inspect(
    tmp_path: Path, name: str
) -> None:
    make, message = REFUSED[name]
    path = written(tmp_path / "x.safetensors", make())
    (problem,) = inspect_checkpoint(path).problems
    assert problem.startswith(message)
    loaders = (load_unet, load_tiny, read_embeddings)
    if name != "encoded prompt":  # an adapter of that name is recognised by its key
        loaders += (read_adapter,)
    assert refusals(path, *loaders) == {f"{path}: {problem}"}


def test_a_tiny_autoencoder_of_another_make_is_not_called_torn(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", taesana())
    (problem,) = inspect_checkpoint(path).problems
    assert problem.startswith("a tiny autoencoder of another make (encoder of 32 channels)")
    assert refusals(path, load_tiny) == {f"{path}: {problem}"}


def test_what_a_key_map_leaves_of_an_encoder_is_no_network(tmp_path: Path) -> None:
    shapes = {f"{CLIP}logit_scale": (), f"{CLIP}text_projection": (1280, 1280)}
    path = written(tmp_path / "x.safetensors", shapes)
    (problem,) = inspect_checkpoint(path).problems
    assert problem.startswith("no network recognised") and "projection alone" in problem
    assert refusals(path, load_unet) == {f"{path}: {problem}"}


@pytest.mark.parametrize("name", ["", "0", "cond"])
def test_a_vector_that_no_token_names_is_no_textual_inversion(tmp_path: Path, name: str) -> None:
    """As a pickle of one tensor, or of a list, came out of other converters."""
    path = written(tmp_path / "x.safetensors", {name: (768,)})
    assert not inspect_checkpoint(path).ok
    with pytest.raises(HeadstartError, match="expected a textual inversion, got no learned token"):
        read_embeddings(path, "<x>")


TOKENS: dict[str, tuple[Shapes, str, str]] = {
    "UnrealisticDream": ({"emb_params": (37, 768)}, "UnrealisticDream (37 vectors)", "sd15"),
    "flora": ({"emb_params": (4, 1024)}, "flora (4 vectors)", "sd21"),
    "my Puppet": ({"emb": (768,), "emb2": (1280,)}, "my Puppet (1 vector)", "sdxl"),
    "learned_embeds": ({"<lora-style>": (768,)}, "<lora-style> (1 vector)", "sd15"),
}


@pytest.mark.parametrize("stem", TOKENS)
def test_inspect_tells_the_tokens_of_a_textual_inversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stem: str
) -> None:
    shapes, tokens, family = TOKENS[stem]
    path = written(tmp_path / f"{stem}.safetensors", shapes)
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"tokens      {tokens}\n" in printed and f"family      {family}\n" in printed
    assert f"--embedding '{path}'" in printed
    (token,) = read_embeddings(path)
    assert f"{token.token} ({token.count} vector" in tokens


def test_inspect_tells_the_tokens_beside_the_layers_of_a_lora(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"text_encoder:0:up": (768, 1), "text_encoder:0:down": (1, 768), "<s1>": (768,)}
    path = written(tmp_path / "x.safetensors", shapes)
    assert main(["inspect", str(path)]) == 0
    assert "tokens      <s1>\n" in capsys.readouterr().out
    assert describe_adapter(path).tokens == ("<s1>",)


@pytest.mark.parametrize(
    ("key", "tuner"),
    {
        "conv2d.ia3_l": "PEFT's (IA)^3",
        "unilora_theta_d": "UniLoRA",
        "lin0.lora_E": "AdaLoRA",
    }.items(),
)
def test_inspect_refuses_a_tuner_that_is_not_computed_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, tuner: str
) -> None:
    path = written(tmp_path / "x.safetensors", {f"base_model.model.{key}": (5, 1)})
    assert main(["inspect", str(path)]) == 1
    printed = capsys.readouterr().out
    assert f"got {tuner}, which is not implemented" in printed and "--lora" not in printed


def test_an_adapter_of_another_architecture_is_not_sent_to_lora(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "transformer.single_transformer_blocks.7.proj_out.lora"
    path = written(
        tmp_path / "x.safetensors", {f"{name}_A.weight": (2, 20), f"{name}_B.weight": (8, 2)}
    )
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "Flux (single_transformer_blocks)" in printed and "--lora" not in printed
