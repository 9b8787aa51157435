"""Layers by number: cloneofsimo's files, in the orders that diffusers registered layers in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from adapter_samples import Layers, Tensors, write

from headstart.adapters.file import AdapterFile, read_adapter
from headstart.errors import AdapterError

WIDTHS = {
    "down_blocks": {0: (8, 2), 1: (16, 2), 2: (32, 2)},
    "up_blocks": {1: (32, 3), 2: (16, 3), 3: (8, 3)},
}
"""SD 1's blocks with attention, a fortieth as wide: level -> (width, how many)."""
SELF = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
CROSS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
ORDERS = {
    "older": (*SELF, "ff.net.0.proj", *CROSS),
    "newer": (*SELF, *CROSS, "ff.net.0.proj"),
    "attention": (*SELF, *CROSS),
}


def numbered(order: str, context: int) -> dict[str, tuple[int, int]]:
    """Layer -> shape, in the order of the numbers: down, up, mid."""
    numbers: dict[str, tuple[int, int]] = {}

    def block(stem: str, width: int) -> None:
        for leaf in ORDERS[order]:
            into = context if leaf in ("attn2.to_k", "attn2.to_v") else width
            out = 8 * width if leaf.startswith("ff") else width
            numbers[f"{stem}.transformer_blocks.0.{leaf}"] = (out, into)

    for side, levels in WIDTHS.items():
        for level, (width, count) in levels.items():
            for i in range(count):
                block(f"{side}.{level}.attentions.{i}", width)
    block("mid_block.attentions.0", 32)
    return numbers


def network(context: int = 768) -> Layers:
    """A UNet's layers in no helpful order."""
    layers: dict[str, tuple[int, ...]] = dict(sorted(numbered("older", context).items()))
    return {"unet": layers}


def tensors_of(shapes: Mapping[int, tuple[int, int]], network: str = "unet") -> Tensors:
    tensors: Tensors = {}
    for number, (out, into) in shapes.items():
        tensors[f"{network}:{number}:up"] = torch.ones(out, 1)
        tensors[f"{network}:{number}:down"] = torch.ones(1, into)
    return tensors


def file_of(path: Path, shapes: Mapping[int, tuple[int, int]]) -> AdapterFile:
    return read_adapter(write(path / "lora.safetensors", tensors_of(shapes)))


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_that_all_shapes_fit_is_taken(tmp_path: Path, order: str) -> None:
    layers = numbered(order, 768)
    assert len(layers) == (128 if order == "attention" else 144)
    file = file_of(tmp_path, dict(enumerate(layers.values())))
    match = file.match(network())
    assert not match.unmatched and not match.mismatched
    names = {layer: group.name for (_, layer), group in match.owners.items()}
    assert names == {layer: f"unet:{number}" for number, layer in enumerate(layers)}
    assert file.family == "sd15"


def test_numbers_that_fit_no_order_go_nowhere_and_may_be_let_be(tmp_path: Path) -> None:
    """Those of which the shape fits would be of wrong layers."""
    shapes = dict(enumerate(numbered("newer", 768).values()))
    shapes[8], shapes[9] = shapes[9], shapes[8]
    key = "text_model.encoder.layers.0.self_attn.k_proj"
    tensors = tensors_of({0: (4, 4)}, "text_encoder") | tensors_of(shapes)
    file = read_adapter(write(tmp_path / "lora.safetensors", tensors))
    resolution = file.resolve({**network(), "text": {key: (4, 4)}})
    assert [*resolution.deltas] == [("text", key)]
    with pytest.raises(AdapterError, match=r"288 of layers by number, which fit no order"):
        resolution.require()
    assert resolution.require(["unet:*"]) is resolution


def test_a_numbered_file_of_another_family_is_told_by_its_cross_attention(tmp_path: Path) -> None:
    file = file_of(tmp_path, dict(enumerate(numbered("attention", 1024).values())))
    with pytest.raises(AdapterError, match="expected an adapter for sd15, got one for sd21"):
        file.match(network())
    assert len(file.match(network(1024)).owners) == 128


def test_a_part_of_a_file_that_fits_two_orders_is_an_error_that_names_both(tmp_path: Path) -> None:
    whole = list(numbered("attention", 768).values())
    file = file_of(tmp_path, {number: whole[number] for number in (0, 8)})
    with pytest.raises(AdapterError, match=r"attn1, ff, attn2 has .*attn2.to_out.0 as unet:8"):
        file.match(network())
    file = file_of(tmp_path, {number: whole[number] for number in (0, 1, 2, 3)})
    assert [layer for _, layer in file.match(network()).owners] == [
        f"down_blocks.0.attentions.0.transformer_blocks.0.{leaf}" for leaf in SELF
    ]
