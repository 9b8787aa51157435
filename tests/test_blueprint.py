"""The names and shapes written as data are those of the modules that are built from the params."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import LINEAGES, Model
from networks import PARAMS, VAE
from torch import nn

from headstart.checkpoint import blueprint
from headstart.checkpoint.families import FAMILIES
from headstart.checkpoint.params import ClipParams, Mid, Stage, TinyParams, UNetParams, VaeParams
from headstart.checkpoint.sizing import unet_params
from headstart.errors import CheckpointError
from headstart.networks.tiny import TinyDecoder, TinyEncoder
from headstart.networks.tower import Tower
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae

Shapes = dict[str, tuple[int, ...]]
UNETS = {
    "tiny": PARAMS,
    "no mid": replace(PARAMS, mid=None),
    "mid of one resnet": replace(PARAMS, mid=Mid(1, 0)),
    "lcm": replace(PARAMS, guidance_dim=16),
    "sdxl": replace(PARAMS, added_dim=40),
    "convolutions around attention": replace(PARAMS, linear_projection=False),
    "uneven depths": replace(
        PARAMS,
        down=(Stage(16, (0, 0), True), Stage(32, (2, 1), True), Stage(32, (0,), False)),
        up=(Stage(32, (1, 0), True), Stage(32, (0, 2, 1), True), Stage(16, (0, 0, 0), False)),
    ),
}
VAES = {
    "full size": VaeParams(),
    "tiny": VAE,
    "decoder": replace(VAE, encodes=False),
    "flux": replace(VAE, latent_channels=16, quant=False),
    "flux decoder": replace(VAE, latent_channels=16, quant=False, encodes=False),
}
TINY = (TinyParams(), TinyParams(width=8, blocks=(3, 3, 1)), TinyParams(width=8, blocks=(1, 0, 2)))


def shapes(module: nn.Module, prefix: str = "") -> Shapes:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("params", UNETS.values(), ids=UNETS)
def test_a_unet_has_the_tensors_of_its_blueprint(params: UNetParams) -> None:
    with torch.device("meta"):
        assert blueprint.unet(params) == shapes(UNet(params))


@pytest.mark.parametrize("params", VAES.values(), ids=VAES)
def test_a_vae_has_the_tensors_of_its_blueprint(params: VaeParams) -> None:
    with torch.device("meta"):
        assert blueprint.vae(params) == shapes(Vae(params))


@pytest.mark.parametrize(("levels", "layers"), [(0, 1), (4, 0), (1000, 1000)])
def test_a_vae_of_absurd_size_is_refused_before_it_is_written_out(levels: int, layers: int) -> None:
    with pytest.raises(CheckpointError, match=f"{levels} levels of {layers} resnets"):
        blueprint.vae(replace(VAE, channels=(8,) * levels, layers=layers))


@pytest.mark.parametrize("params", TINY, ids=str)
def test_a_tiny_autoencoder_has_the_tensors_of_its_blueprint(params: TinyParams) -> None:
    with torch.device("meta"):
        decoder, encoder = TinyDecoder(params), TinyEncoder(params)
    assert blueprint.tiny(params, "decoder") == shapes(decoder, "decoder.")
    assert blueprint.tiny(params, "encoder") == shapes(encoder, "encoder.")


@pytest.mark.parametrize("projection", [None, 48])
def test_a_text_encoder_has_the_tensors_of_its_blueprint(projection: int | None) -> None:
    params = ClipParams(
        width=32, layers=2, heads=1, mlp_width=64, act="gelu", positions=16, vocabulary=55,
        projection=projection,
    )  # fmt: skip
    with torch.device("meta"):
        assert blueprint.clip(params) == shapes(Tower(params, FAMILIES["sd21"].text[0]))


@pytest.mark.parametrize("lineage", LINEAGES)
def test_the_networks_of_a_model_have_theirs(lineage: str) -> None:
    model = Model.of(lineage, 0)
    assert blueprint.unet(model.unet.params) == shapes(model.unet)
    assert blueprint.vae(model.vae.params) == shapes(model.vae)
    for tower in model.towers:
        assert blueprint.clip(tower.params) == shapes(tower)


@pytest.mark.parametrize("arch", [name for name in FAMILIES if name != "demo"])
def test_every_full_size_unet_is_its_blueprint(shared: Path, arch: str) -> None:
    path = shared / "manifests" / f"unet_{arch}.json"
    table = json.loads(path.read_text())["diffusers"]
    shapes: Shapes = {name: tuple(shape) for name, (_, shape) in table.items()}
    assert blueprint.unet(unet_params(shapes, FAMILIES[arch])) == shapes
