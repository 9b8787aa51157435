"""Fused layers are kernels on a GPU, and plain torch to a compiler, which fuses them itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headstart.adapters.slots import Slot
from headstart.networks.fusion import NormSilu, fused, fusion
from headstart.networks.transformer import GEGLU
from headstart_kernels import geglu, layers


class Graphs:
    """A backend of torch.compile that keeps what dynamo traced, and runs it as it is."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.called += [str(node.target) for node in graph.graph.nodes if "call" in node.op]
        return graph.forward


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a compiler's CUDA tensor switches on, for tensors of the host."""
    torch._dynamo.reset()
    monkeypatch.setattr(layers, "stands_in", lambda _: torch.compiler.is_compiling())
    with fusion(True), torch.no_grad():
        yield


def compiled(function: Callable[..., Any], *args: object) -> tuple[Any, list[str]]:
    """What the compiled function gives, and the names of what its one graph calls."""
    graphs = Graphs()
    return torch.compile(function, backend=graphs, fullgraph=True)(*args), graphs.called


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("layer", [NormSilu(4, 8), GEGLU(8, 8)])
def test_a_fused_layer_compiles_whole_into_operators_of_torch(layer: nn.Module) -> None:
    x = torch.linspace(-2, 2, 2 * 8 * 3 * 8).view(2, 8, 3, 8)
    assert fused(x), "the kernel runs outside of a compiler"
    got, called = compiled(layer, x)
    assert called and not [name for name in called if "headstart" in name]
    with fusion(False):
        assert torch.equal(got, layer(x))


@pytest.mark.usefixtures("on_a_gpu")
def test_a_low_rank_change_compiles_whole_into_operators_of_torch() -> None:
    layer, x = nn.Linear(6, 8), torch.linspace(-1, 1, 2 * 3 * 6).view(2, 3, 6)
    slot, strength = Slot(layer.weight, 2, torch.float32), torch.tensor([0.5, -1.0])
    slot.down.copy_(torch.linspace(-1, 1, 12).view(2, 6))
    slot.up.copy_(torch.linspace(1, -2, 16).view(8, 2))
    slot.scale.fill_(0.25)

    def change(x: Tensor) -> Tensor:
        y = layer(x)
        slot.add_to(y, x, layer, strength)
        return y

    got, called = compiled(change, x)
    assert called and not [name for name in called if "headstart" in name]
    with fusion(False):
        assert torch.equal(got, change(x))


@pytest.mark.usefixtures("on_a_gpu")
def test_a_kernel_that_is_called_by_its_name_compiles_into_its_operator() -> None:
    x = torch.linspace(-2, 2, 24).view(2, 12)
    got, called = compiled(geglu, x)
    assert [name.partition(".default")[0] for name in called] == ["headstart_kernels.geglu"]
    assert torch.equal(got, geglu(x))
