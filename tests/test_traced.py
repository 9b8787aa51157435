"""`torch.jit.trace`, and so exporters to ONNX and OpenVINO: what C computes, no tracer sees."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from networks import PARAMS, VAE, random_unet
from torch import Tensor, nn

from headstart.interfaces import Conditioning
from headstart.networks.attention import attend
from headstart.networks.packed import pack, unpackable
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae


class Flat(nn.Module):
    """A UNet called with tensors alone, as exporters want it."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.network(x, timestep, Conditioning(context))


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


def unet_inputs() -> tuple[Tensor, ...]:
    return torch.randn(1, 4, 8, 8), torch.rand(1) * 999, torch.randn(1, 9, PARAMS.context_dim)


def decoder() -> nn.Module:
    return Vae(VAE).requires_grad_(False).eval().decoder


def packed(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: pack(make())


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "unet": (lambda: Flat(random_unet()), unet_inputs),
    "packed unet": (packed(lambda: Flat(random_unet())), unet_inputs),
    "decoder": (decoder, lambda: (torch.randn(1, 4, 16, 16),)),
    "packed decoder": (packed(decoder), lambda: (torch.randn(1, 4, 16, 16),)),
    "attention": (Attend, lambda: tuple(torch.randn(3, 1, 2, 1024, 8))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_trace_computes_what_the_network_does_of_other_numbers(name: str) -> None:
    if "packed" in name and unpackable(torch.float32):
        pytest.skip("this torch has no oneDNN")
    make, inputs = CASES[name]
    network: Any = make().eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are built into a trace
        network(*inputs())  # what is kept from a call before is no part of a trace either
        traced: Any = torch.jit.trace(network, inputs())
        values = inputs()
        got, want = traced(*values), network(*values)
        exact = deepcopy(network).double()(*(tensor.double() for tensor in values))
    error = (want.double() - exact).norm() / exact.norm()  # of what torch's own and C give
    assert (got.double() - exact).norm() / exact.norm() <= 4 * error + 1e-6
