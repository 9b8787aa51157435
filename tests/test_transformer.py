"""Transformer blocks with joined layers and a prompt read ahead, compiled and under adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import random_unet
from torch import Tensor

from headstart.adapters.delta import LowRank
from headstart.adapters.snapshot import Snapshot, from_deltas
from headstart.interfaces import Conditioning
from headstart.networks.joint_linear import joint_weights
from headstart.networks.unet import UNet
from headstart.prompt_cache import PromptCache
from headstart.runner.runner import CompiledRunner

GPU = torch.device("cuda")
BLOCK = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture
def unet() -> UNet:
    return random_unet().eval()


@pytest.fixture
def call() -> tuple[Tensor, Tensor, Conditioning]:
    draw = torch.Generator().manual_seed(3)
    x, context = (torch.randn(*shape, generator=draw) for shape in ((2, 4, 8, 8), (2, 5, 24)))
    return x, torch.tensor([900, 20]), Conditioning(context)


class Traced:
    """A backend of torch.compile that runs what dynamo traced, and counts its matrix products."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        self.graphs.append(sum("linear" in name for name in names))
        return graph.forward


@pytest.mark.parametrize("times", [1, 2])
def test_compiled_blocks_have_one_product_of_queries_keys_and_values(
    unet: UNet, call: tuple[Tensor, Tensor, Conditioning], times: int
) -> None:
    """A block had 10 products and has 6: one for three, and the text's two are not its own. The
    blocks of one width share what is compiled, wherever in the joint tensors their parts lie."""
    expected = unet(*call)
    backend: Any = Traced()
    runner = CompiledRunner(unet, backend=backend)
    runner(*call)
    assert set(backend.graphs) == {10}
    unet.lay_out(GPU)
    backend.graphs.clear()
    for _ in range(times):
        got = runner(*call[:2], PromptCache().of(runner, call[2]))
    assert set(backend.graphs) == {6} and len(backend.graphs) == 1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def _adapter(unet: UNet, *layers: str) -> Snapshot:
    torch.manual_seed(5)
    deltas: dict[str, LowRank] = {}
    for layer in layers:
        out, inner = unet.get_submodule(f"{BLOCK}.{layer}").weight.shape  # pyright: ignore
        deltas[f"{BLOCK}.{layer}"] = LowRank(torch.randn(2, inner), torch.randn(out, 2), 0.5)
    return from_deltas(unet, "age", deltas)


@pytest.mark.parametrize(
    "layers", [("attn1.to_k",), ("attn2.to_v",), ("attn1.to_q", "attn1.to_v", "attn2.to_k")]
)
def test_adapters_on_joined_layers_act_as_on_layers_by_themselves(
    unet: UNet, call: tuple[Tensor, Tensor, Conditioning], layers: tuple[str, ...]
) -> None:
    x, time, cond = (call[0].double(), call[1], call[2].to("cpu", torch.float64))
    unet.double()
    adapters = _adapter(unet, *layers)
    cond = replace(cond, adapters=adapters, strengths=torch.tensor([[0.0], [1.0]]))
    expected, without = (
        unet(x, time, cond),
        unet(x, time, replace(cond, strengths=torch.zeros(2, 1))),
    )
    assert torch.equal(expected[0], without[0]) and not torch.allclose(expected[1], without[1])
    unet.lay_out(GPU)
    got = unet(x, time, PromptCache().of(unet, cond))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_an_adapter_keeps_apart_the_layers_that_it_acts_on_and_no_others(unet: UNet) -> None:
    unet.lay_out(GPU)
    joined = [joint_weights(block.attn1.layers) is not None for block in unet._transformers()]
    assert joined == [True] * 4
    _adapter(unet, "attn1.to_k")
    joined = [joint_weights(block.attn1.layers) is not None for block in unet._transformers()]
    assert joined.count(False) == 1 and joint_weights(unet._text_layers()) is not None
