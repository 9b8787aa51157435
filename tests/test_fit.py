"""What does not fit is an error at once, grouped, with the nearest architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import headstart as hs
from headstart.networks.load import load_unet

Maker = Callable[..., Path]


def full_size(shared: Path, arch: str) -> dict[str, Any]:
    table = json.loads((shared / "manifests" / f"unet_{arch}.json").read_text())["diffusers"]
    return {name: ("F16", shape) for name, (_, shape) in table.items()}


def refused(path: Path) -> hs.CheckpointError:
    with pytest.raises(hs.CheckpointError) as caught:
        load_unet(path, device="meta")
    return caught.value


def test_a_torn_full_size_file_is_told_by_counts_three_names_and_the_nearest_architecture(
    shared: Path, hollow: Maker
) -> None:
    shapes = full_size(shared, "sdxl")
    gone = sorted(n for n in shapes if ".attn1.to_q." in n and "mid_block" in n)
    torn = {name: shape for name, shape in shapes.items() if name not in gone}
    torn["conv_out.gain"] = ("F16", [4])
    error = refused(hollow("x.safetensors", torn))
    message = f"{len(gone)} missing: {', '.join(gone[:3])}, ...; 1 unexpected: conv_out.gain"
    assert f"the UNet does not fit. {message}" in str(error)
    assert (
        f"nearest known architecture is sdxl, which has 1680 tensors; this file has {len(torn)}"
        in str(error)
    )
    assert len(str(error)) < 800
    (note,) = error.__notes__
    assert note.splitlines() == ["missing:", *(f"  {name}" for name in gone)]


@pytest.mark.parametrize(
    ("arch", "near"), [("sd15", "sd15"), ("ssd-1b", "ssd-1b"), ("koala-1b", "koala-1b")]
)
def test_the_nearest_architecture_is_the_one_it_was_torn_from(
    shared: Path, hollow: Maker, arch: str, near: str
) -> None:
    shapes = full_size(shared, arch)
    del shapes["conv_norm_out.bias"]
    error = refused(hollow("x.safetensors", shapes))
    assert f"1 missing: conv_norm_out.bias. The nearest known architecture is {near}," in str(error)


def test_a_scaled_down_file_has_no_nearest_architecture(make_ckpt: Maker, tmp_path: Path) -> None:
    tensors = load_file(make_ckpt("sd15.safetensors", "sd15", "unet"))
    del tensors["conv_norm_out.bias"]
    save_file(tensors, tmp_path / "x.safetensors")
    message = str(refused(tmp_path / "x.safetensors"))
    assert "1 missing: conv_norm_out.bias. Fetch the file again" in message
