"""Averaged weights or trained ones: a choice, and never a guess."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import CONFIG, METADATA, random_unet, random_vae, same, single_file, weights
from safetensors.torch import load_file, save_file

from headstart.checkpoint.checkpoint import inspect_checkpoint
from headstart.checkpoint.tensors import Checkpoint
from headstart.engine.models import Model, choose_averages
from headstart.errors import CheckpointError
from headstart.networks.load import load_unet, widened_bytes
from headstart.networks.unet import UNet

Tensors = dict[str, torch.Tensor]
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def trained() -> UNet:
    return random_unet()


@pytest.fixture(scope="module")
def average(trained: UNet) -> UNet:
    other = random_unet()
    for tensor in other.state_dict().values():
        tensor.mul_(0.75)
    return other


def full(path: Path, trained: UNet) -> tuple[Path, Tensors]:
    """A training checkpoint: each weight has a copy, 3/4 of it, whose name has lost its dots."""
    single_file(trained, random_vae(), path)
    tensors = load_file(path)
    for name in [name for name in tensors if name.startswith(UNET)]:
        flat = name.removeprefix("model.").replace(".", "")
        tensors[f"model_ema.{flat}"] = 0.75 * tensors[name]
    save_file(tensors, path, METADATA)
    return path, tensors


def test_a_training_checkpoint_gives_either(tmp_path: Path, trained: UNet, average: UNet) -> None:
    path, tensors = full(tmp_path / "full.safetensors", trained)
    assert same(load_unet(path), trained) and same(load_unet(path, ema=False), trained)
    assert same(load_unet(path, ema=True), average)
    checkpoint = Checkpoint.open(path, ema=True)
    name = UNET + "out.0.weight"
    assert checkpoint.numbers(name).tolist() == (0.75 * tensors[name]).tolist()
    (note,) = inspect_checkpoint(path).notes[-1:]
    assert note == (
        "unet: there are trained weights and their average (EMA): those read are the trained ones; "
        "--ema (ema=True) takes the averaged ones"
    )
    save_file(
        {n: t.half() if n.startswith(UNET) else t for n, t in tensors.items()}, path, METADATA
    )
    assert widened_bytes(path, "unet") > 0 == widened_bytes(path, "unet", ema=True)


def spoiled() -> dict[str, tuple[Callable[[Tensors], object], str]]:
    name, copy = UNET + "out.0.weight", "model_ema.diffusion_modelout0weight"
    return {
        "missing": (lambda t: t.pop(copy), f"1 of .* have no averaged copy, such as '{name}'"),
        "shape": (lambda t: t.update({copy: torch.ones(3)}), "expected the shape"),
        "no owner": (lambda t: t.update({copy + "s": torch.ones(3)}), "average of no tensor"),
        "two owners": (
            lambda t: t.update({UNET + "o.ut.0.weight": torch.ones(16)}),
            "have one name without dots, so their averages cannot be told apart",
        ),
        "none": (
            lambda t: [t.pop(n) for n in [*t] if n.startswith("model_ema.d") and n[-1] != "y"],
            "no averaged weights",
        ),
    }


@pytest.mark.parametrize("what", spoiled())
def test_averages_that_do_not_match_are_refused(tmp_path: Path, trained: UNet, what: str) -> None:
    path, tensors = full(tmp_path / "full.safetensors", trained)
    spoil, message = spoiled()[what]
    spoil(tensors)
    save_file(tensors, path, METADATA)
    with pytest.raises(CheckpointError, match=message):
        load_unet(path, ema=True)


def test_diffusers_folders_give_either(tmp_path: Path, trained: UNet, average: UNet) -> None:
    import json

    def write(folder: Path, unet: UNet, infix: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        save_file(weights(unet), folder / f"diffusion_pytorch_model{infix}.safetensors")

    one, two, none = tmp_path / "training", tmp_path / "release", tmp_path / "none"
    write(one / "unet", trained)
    write(one / "unet_ema", average)
    write(two / "unet", average)
    write(two / "unet", trained, ".non_ema")
    write(none / "unet", trained)
    (none / "unet" / "diffusion_pytorch_model.non_ema.bin").touch()
    for root, main in ((one, trained), (two, average)):
        for path in (root, root / "unet"):
            assert same(load_unet(path), main)
            assert same(load_unet(path, ema=True), average)
            assert same(load_unet(path, ema=False), trained)
        content = "trained" if main is trained else "averaged"
        assert f"those read are the {content} ones" in inspect_checkpoint(root).notes[-1]
    assert same(load_unet(none, ema=False), trained)
    with pytest.raises(CheckpointError, match=r"no averaged weights .* leave out --ema"):
        load_unet(none, ema=True)


def test_of_a_pair_the_models_that_have_averages_give_them(tmp_path: Path, trained: UNet) -> None:
    path, _ = full(tmp_path / "full.safetensors", trained)
    bare = single_file(trained, random_vae(), tmp_path / "bare.safetensors")
    models = {"base": Model.of(path), "distilled": Model.of(bare)}
    assert choose_averages(models, True).of == {"base": True, "distilled": None}
    assert choose_averages(models, False).of == {"base": False, "distilled": False}
    (note,) = choose_averages(models, None).notes
    assert note.startswith("base: there are trained weights and their average")
    assert choose_averages({"base": models["distilled"]}, None) == ({"base": None}, ())
    with pytest.raises(CheckpointError, match=r"ema=True \(--ema\), and .*bare.* has no averaged"):
        choose_averages({"base": models["distilled"]}, True)
