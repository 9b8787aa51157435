"""What a compiled block launches on a GPU, and how often SDXL compiles: a budget.

Inductor's code for an H100, generated without one (`tests/generated.py`) and counted. A change that
breaks sharing, or puts a call into a block that inductor cannot look into, goes past these numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generated import Generating, Launches, flash_attention
from torch import Tensor, nn

from evidence.fake_tensors import DEVICE, fake_tensors
from headstart.adapters.delta import LowRank
from headstart.adapters.snapshot import from_deltas
from headstart.cost.sizes import sizes_of_family
from headstart.interfaces import Conditioning
from headstart.networks.regions import region
from headstart.networks.unet import TransformerBlock, UNet
from headstart.runner.compiled import CompiledNetwork

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
SDXL = sizes_of_family("sdxl").unet


@pytest.fixture(autouse=True)
def on_an_h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """bfloat16 tensors on a CUDA device, without memory; inductor writes where tests do."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with fake_tensors(), flash_attention(), torch.no_grad(), torch.device(DEVICE):
            yield
    finally:
        torch.set_default_dtype(before)


def test_sdxl_compiles_two_blocks_of_13_launches_for_its_70() -> None:
    """Of 1437 operators of a pass: three norms with the sums before them, GEGLU, the last sum; six
    products with their biases, since queries, keys and values of the image are one and those of the
    prompt's text are read outside; two attentions. Ten products before weights were laid out."""
    network, generated = UNet(SDXL).eval(), Generating()
    network.lay_out()
    assert sum(isinstance(module, TransformerBlock) for module in network.modules()) == 70
    cond = Conditioning(torch.empty(2, 77, 2048), torch.empty(2, 1280), torch.empty(2, 6))
    call = torch.empty(2, 4, 128, 128), torch.empty(2), cond
    assert CompiledNetwork(network, generated).compiled(*call).shape == (2, 4, 128, 128)
    assert len(generated.launches) == 2, "one for each width"
    for launches in generated.launches:
        assert launches.kernels <= 5 and launches.products <= 6 and launches.attentions <= 2
        assert not launches.others, "no copies, and no calls that a compiler does not fuse"


class Block(nn.Module):
    """Two layers and what is between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.wide, self.narrow = nn.Linear(64, 512), nn.Linear(256, 64)
        self.between = between

    @region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.between(self.wide(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block = Block(between)

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return self.block(x_in)


def half(x: Tensor) -> Tensor:
    return x[..., :256].tanh()


def opaque(x: Tensor) -> Tensor:
    """The registered operator, which a compiler calls and does not look into."""
    import headstart_kernels.ops  # noqa: F401

    return torch.ops.headstart_kernels.geglu(x)


def launches(network: nn.Module, cond: Conditioning) -> Launches:
    generated: Any = Generating()
    CompiledNetwork(network, generated).compiled(torch.empty(2, 48, 64), torch.empty(2), cond)  # pyright: ignore
    return generated.launches[0]


def test_a_low_rank_adapter_costs_two_products_and_one_kernel_a_layer() -> None:
    network, cond = Blocks(half).eval(), Conditioning(torch.empty(2, 5, 8))
    plain = launches(network, cond)
    assert plain == Launches(kernels=3, products=2, attentions=0, others=())
    deltas = {
        path: LowRank(torch.empty(8, layer.in_features), torch.empty(layer.out_features, 8), 1.0)
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
    }
    strengths = torch.empty(2, 1, dtype=torch.float32)
    steered = replace(cond, adapters=from_deltas(network, "age", deltas), strengths=strengths)
    assert launches(network, steered) == Launches(3 + 2, 2 + 4, 0, ())


def test_a_call_that_a_compiler_does_not_fuse_shows() -> None:
    counts = launches(Blocks(opaque).eval(), Conditioning(torch.empty(2, 5, 8)))
    assert counts.others == ("torch.ops.headstart_kernels.geglu.default",)
