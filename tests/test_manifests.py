"""Files of every full-size architecture, as the manifests list them, through the whole loader.

A file here is its header and a hole: names, shapes and offsets of gigabytes, without their bytes.
Loaded onto the meta device, every tensor finds its place and nothing is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from headstart.checkpoint.checkpoint import read_family
from headstart.checkpoint.families import FAMILIES
from headstart.networks.load import load_text, load_tiny, load_unet, load_vae

Hollow = Callable[..., Path]
UNETS = {
    **{name: name for name in FAMILIES if name != "demo"},
    "lcm-sdxl": "sdxl",
    "lcm-sd15": "sd15",
}
TEXTS = {
    "sd15": ("text_clip_l_sd15",),
    "sd21": ("text_openclip_h_sd21",),
    "sdxl": ("text_clip_l_sdxl", "text_openclip_bigg_sdxl"),
}


def manifest(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "manifests" / f"{name}.json").read_text())


def halved(table: Mapping[str, Any]) -> dict[str, Any]:
    return {n: ("F16" if dtype == "F32" else dtype, shape) for n, (dtype, shape) in table.items()}


def tensors(*modules: nn.Module) -> dict[str, list[int]]:
    return {n: list(t.shape) for module in modules for n, t in module.state_dict().items()}


def shapes(table: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: shape for name, (_, shape) in table.items()}


def test_every_manifest_is_loaded_here(shared: Path) -> None:
    there = {path.stem for path in (shared / "manifests").glob("*.json")} - {"lora_formats"}
    texts = {name for names in TEXTS.values() for name in names}
    vaes = {f"vae_{name}" for name in TEXTS}
    assert there == {f"unet_{name}" for name in UNETS} | vaes | texts | {"taesd"}


@pytest.mark.parametrize("arch", UNETS)
def test_a_full_size_unet_loads_from_a_single_file(shared: Path, hollow: Hollow, arch: str) -> None:
    layouts = manifest(shared, f"unet_{arch}")
    path = hollow("model.safetensors", halved(layouts["ldm"]))
    family = read_family(path)
    assert family.name == UNETS[arch] and family.exact
    unet = load_unet(path, device="meta")
    assert tensors(unet) == shapes(layouts["diffusers"])
    assert sum(parameter.numel() for parameter in unet.parameters()) == layouts["n_params"]


@pytest.mark.parametrize("naming", ["diffusers", "diffusers_old_attn_names", "ldm"])
@pytest.mark.parametrize("arch", TEXTS)
def test_a_full_size_vae_loads_in_every_naming(
    shared: Path, hollow: Hollow, arch: str, naming: str
) -> None:
    layouts = manifest(shared, f"vae_{arch}")
    path = hollow("vae.safetensors", layouts[naming])
    vae = load_vae(path, device="meta", like=FAMILIES[arch])
    assert tensors(vae) == shapes(layouts["diffusers"])
    assert vae.scale_factor == FAMILIES[arch].scale_factor and vae.params.downscale == 8


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("arch", TEXTS)
def test_full_size_text_encoders_load_from_either_layout(
    shared: Path, hollow: Hollow, small_tokenizer: Path, arch: str, layout: str
) -> None:
    layouts = [manifest(shared, name) for name in TEXTS[arch]]
    if layout == "ldm":
        path = hollow("model.safetensors", *(halved(one["ldm"]) for one in layouts))
    else:
        for folder, one in zip(("text_encoder", "text_encoder_2"), layouts, strict=False):
            file = hollow(f"model/{folder}/model.safetensors", one["diffusers"])
        path = file.parents[1]
    text = load_text(path, device="meta", tokenizer=small_tokenizer)
    assert text.length == 77
    for tower, one in zip(text.towers, layouts, strict=True):
        assert tensors(tower) == shapes(one["diffusers"])


def test_the_tiny_autoencoder_loads_in_both_namings(shared: Path, hollow: Hollow) -> None:
    layouts = manifest(shared, "taesd")
    whole = load_tiny(hollow("both.safetensors", layouts["diffusers"]), device="meta")
    assert tensors(whole) == shapes(layouts["diffusers"])
    for half in ("encoder", "decoder"):
        path = hollow(f"{half}.safetensors", layouts[f"pth_{half}"])
        expected = {n: s for n, s in shapes(layouts["diffusers"]).items() if n.startswith(half)}
        assert tensors(load_tiny(path, device="meta")) == expected
