"""What layouts for a CPU take, told from headers: what a network then holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import METADATA, random_vae, weights
from safetensors.torch import save_file
from torch import Tensor

from headstart.checkpoint.params import Mid, Stage, UNetParams
from headstart.interfaces import Conditioning
from headstart.networks import packed
from headstart.networks.load import load_unet, load_vae
from headstart.networks.packed_size import packed_bytes
from headstart.networks.unet import UNet
from headstart_kernels.winograd import Filter

pytestmark = pytest.mark.skipif(
    packed.unpackable(torch.float32) is not None, reason="this torch has no oneDNN"
)
PARAMS = UNetParams(
    down=(Stage(32, (0, 0), True), Stage(64, (1, 1), True), Stage(64, (0, 0), False)),
    mid=Mid(2, 1),
    up=(Stage(64, (0, 0, 0), True), Stage(64, (1, 1, 1), True), Stage(32, (0, 0, 0), False)),
    context_dim=24,
    head_dim=8,
    norm_groups=8,
)


def pays(weight: Any, x: Any, gain: float = 2.0) -> bool:
    """By the image alone, so that the test asks for the side of each layer's."""
    return tuple(weight[2:]) == (3, 3) and x[2] >= 16


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "unet.safetensors"
    save_file(weights(UNet(PARAMS)), path, METADATA)
    return path


def held(network: torch.nn.Module) -> tuple[int, int]:
    """Bytes of direct layouts and of those for tiles, as the weights that have them would tell."""
    direct = tiled = 0
    for weight in network.parameters():
        for pack in packed._PACKS._layouts.get(weight, {}).values():
            layout = pack.layout
            if isinstance(layout, Filter):
                tiled += layout.inputs * layout.outputs * 36 * 4
            else:
                assert isinstance(layout, Tensor)
                direct += weight.numel() * layout.element_size()
    return direct, tiled


@pytest.mark.parametrize("dtype", packed.DTYPES)
@pytest.mark.parametrize("cells", [16, 32])
def test_tiles_are_counted_where_a_run_makes_them(
    unet: Path, cells: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed.unpackable(dtype) is not None:
        pytest.skip("this processor has no bfloat16 products")
    monkeypatch.setattr(packed, "pays_tiles", pays)
    network, x = load_unet(unet, packed=True, dtype=dtype), torch.randn(1, 4, cells, cells)
    network(x.to(dtype), torch.tensor(5.0), Conditioning(torch.randn(1, 9, 24).to(dtype)))
    direct, tiled = held(network)
    whole, none = (packed_bytes(unet, "unet", dtype, cells=side) for side in (cells, None))
    assert none == sum(dtype.itemsize * weight.numel() for weight in network.parameters())
    # A convolution in tiles has no direct layout, whose bytes are in both counts.
    replaced = tiled // (16 // dtype.itemsize)
    assert whole - none == tiled - replaced > 0
    assert direct + replaced <= none


def test_a_decoders_images_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "pays_tiles", pays)
    path = tmp_path / "vae.safetensors"
    save_file(weights(random_vae()), path, METADATA)
    network = load_vae(path, packed=True, scale_factor=0.5, norm_groups=4)
    network.decode(torch.randn(1, 4, 8, 8))
    _, tiled = held(network)
    whole, none = (packed_bytes(path, "vae", torch.float32, cells=asked) for asked in (8, None))
    assert tiled - tiled // 4 == whole - none > 0


def test_direct_layouts_alone_are_a_choice(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "pays_tiles", pays)
    monkeypatch.setattr(packed, "WIDE", 1)
    network = load_unet(unet, packed="direct")
    network(torch.randn(1, 4, 32, 32), torch.tensor(5.0), Conditioning(torch.randn(1, 9, 24)))
    assert held(network)[1] == 0 < held(network)[0]
