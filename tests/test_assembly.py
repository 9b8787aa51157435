"""Every tensor of a file finds its place, or one error tells of all that do not."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import METADATA, random_unet, random_vae, same, single_file, weights
from safetensors.torch import load_file, save_file

from headstart.checkpoint.checkpoint import inspect_checkpoint
from headstart.errors import CheckpointError, HeadstartError
from headstart.networks.assembly import Dtype
from headstart.networks.load import load_tiny, load_unet, load_vae
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae


@pytest.fixture(scope="module")
def unet() -> UNet:
    return random_unet()


@pytest.fixture(scope="module")
def vae() -> Vae:
    return random_vae()


def test_all_that_does_not_fit_is_told_in_one_error(tmp_path: Path, unet: UNet) -> None:
    tensors = weights(unet)
    del tensors["mid_block.resnets.1.conv2.bias"]
    del tensors["conv_norm_out.weight"]
    tensors["conv_norm_out.gain"] = torch.zeros(16)
    tensors["time_embedding.linear_2.weight"] = torch.zeros(64, 63)
    tensors["conv_out.bias"] = torch.zeros(4, dtype=torch.int32)
    save_file(tensors, tmp_path / "x.safetensors", METADATA)
    with pytest.raises(CheckpointError) as caught:
        load_unet(tmp_path / "x.safetensors")
    message = str(caught.value)
    assert "2 missing: conv_norm_out.weight, mid_block.resnets.1.conv2.bias" in message
    assert "1 unexpected: conv_norm_out.gain" in message
    assert "time_embedding.linear_2.weight [64, 63] instead of [64, 64]" in message
    assert "1 not floating point: conv_out.bias I32" in message


def test_any_single_missing_tensor_is_named(tmp_path: Path, unet: UNet) -> None:
    path = tmp_path / "x.safetensors"
    for name in list(unet.state_dict())[::9]:  # `conv_in.weight` first
        save_file({k: v for k, v in weights(unet).items() if k != name}, path, METADATA)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            load_unet(path)


def test_a_stranger_beside_the_networks_is_the_files_and_may_be_allowed(
    tmp_path: Path, unet: UNet, vae: Vae
) -> None:
    path = single_file(unet, vae, tmp_path / "x.safetensors")
    save_file(load_file(path) | {"stranger": torch.zeros(1)}, path, METADATA)
    with pytest.raises(CheckpointError, match="1 tensors of the file belong to no network: s"):
        load_unet(path)
    assert same(load_unet(path, allow=["strang*"]), unet)


def test_a_tensor_under_both_of_its_names_is_unexpected(tmp_path: Path, unet: UNet) -> None:
    tensors = weights(unet) | {"input_blocks.0.0.bias": torch.zeros(16)}
    save_file(tensors, tmp_path / "x.safetensors", METADATA)
    with pytest.raises(CheckpointError, match=r"1 unexpected: (input_blocks\.0\.0|conv_in)\.bias"):
        load_unet(tmp_path / "x.safetensors")


def test_the_wrong_kind_of_file_says_what_it_holds(tmp_path: Path, unet: UNet, vae: Vae) -> None:
    save_file(weights(unet), tmp_path / "u.safetensors", METADATA)
    save_file(weights(vae), tmp_path / "v.safetensors")
    save_file({"x.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match="expected a VAE, found UNet"):
        load_vae(tmp_path / "u.safetensors")
    with pytest.raises(CheckpointError, match="expected a UNet, found VAE"):
        load_unet(tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match=r"found an adapter \(LoRA\), not a network"):
        load_unet(tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match="expected a tiny autoencoder, found UNet"):
        load_tiny(tmp_path / "u.safetensors")


def test_impossible_shapes_are_an_error_and_allocate_nothing(tmp_path: Path, unet: UNet) -> None:
    path = tmp_path / "x.safetensors"
    save_file(weights(unet), path, METADATA | {"headstart.norm_groups": "5"})
    with pytest.raises(CheckpointError, match="not divisible into 5 groups"):
        load_unet(path)
    wide = {name: torch.zeros(0, 2**19) for name in unet.state_dict()}
    save_file(wide, path, METADATA)
    with pytest.raises(CheckpointError):
        load_unet(path)


def inspected(path: Path) -> str:
    """The reason why inspect refuses a UNet's file, or nothing."""
    try:
        info = inspect_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return info.problems[0] if info.problems else "" if info.parts == ("unet",) else "no UNet"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_one_changed_header_byte_loads_identically_or_is_refused_as_inspect_says(
    tmp_path_factory: pytest.TempPathFactory, unet: UNet, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    good, bad = folder / "good.safetensors", folder / "bad.safetensors"
    if not good.exists():
        save_file(weights(unet), good)
    raw = bytearray(good.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    bad.write_bytes(raw)
    usable = inspected(bad)
    try:
        loaded = load_unet(bad, head_dim=8)
    except HeadstartError as error:
        assert usable != "" and str(error) in (usable, f"{bad}: {usable}")
        return
    assert usable == ""
    assert same(loaded, load_unet(good, head_dim=8))


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
@pytest.mark.parametrize("dtype", [None, "stored", torch.float16])
def test_a_file_is_unmapped_with_the_last_reference_to_its_network(
    tmp_path: Path, unet: UNet, dtype: Dtype
) -> None:
    """Not when Python's cycle collector comes by, which may be gigabytes later."""
    path = tmp_path / "x.safetensors"
    save_file({name: tensor.half() for name, tensor in weights(unet).items()}, path, METADATA)
    gc.collect()
    gc.disable()
    try:
        network = load_unet(path, dtype=dtype)
        assert not gc.isenabled()
        assert mapped(path) or dtype is None
        del network
        assert not mapped(path)
    finally:
        gc.enable()
    load_unet(path)
    assert gc.isenabled()
