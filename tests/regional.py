"""A small network of blocks that are compiled one at a time, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from headstart.interfaces import Conditioning
from headstart.networks.regions import region
from headstart.runner.runner import CompiledRunner, EagerRunner

Call = tuple[Tensor, Tensor, Conditioning]


class Block(nn.Module):
    """x + scale * gelu(W norm(x)) * mean(context)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.layer = nn.Linear(8, 8)
        self.scale = 0.5

    @region
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        gate = context.mean((1, 2))[:, None, None]
        return x + self.scale * gate * nn.functional.gelu(self.layer(self.norm(x)))


class Tokens(nn.Module):
    """Three blocks on the 8 channels of an image; counts the times Python ran through it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.blocks, self.calls = nn.ModuleList(Block() for _ in range(3)), 0
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.calls += 1
        x = x_in.flatten(2).transpose(1, 2) + timestep[:, None, None]
        for block in self.blocks:
            x = block(x, cond.context)
        return x.transpose(1, 2).view(x_in.shape)

    def block(self, index: int) -> Any:
        return self.blocks[index]


class Counting:
    """A backend of torch.compile that runs what dynamo traced, and counts what it was given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def call_of(batch: int = 2, size: int = 3, *, strengths: Any = None, seed: int = 0) -> Call:
    draw = torch.Generator().manual_seed(seed)
    x, context = (torch.randn(batch, 8, n, generator=draw) for n in (size * size, 5))
    cond = Conditioning(context, strengths=None if strengths is None else torch.tensor(strengths))
    return x.view(batch, 8, size, size), torch.full((batch,), 7.0), cond


def agree(network: nn.Module, backend: Any, call: Call | None = None) -> Tensor:
    """F, which has every bit of eager's, because the backend keeps every operation."""
    call = call or call_of()
    got = CompiledRunner(cast("Any", network), backend=backend)(*call)
    assert torch.equal(got, EagerRunner(cast("Any", network))(*call))
    return got
