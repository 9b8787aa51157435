"""SDXL at full size on a CUDA device that is not there: 2.57e9 weights that take no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evidence.fake_tensors import DEVICE, UnknownBuildError, fake_tensors
from headstart.cost.sizes import sizes_of_family
from headstart.interfaces import Conditioning
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae

SDXL, SDXL_VAE = sizes_of_family("sdxl").unet, sizes_of_family("sdxl").vae


@dataclass
class FakeGpu:
    """A mode for fake tensors, and networks of full size made in it."""

    fake: Any

    def empty(self, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        with self.fake:
            return torch.empty(shape, dtype=dtype, device=DEVICE)

    def network(self, kind: type[nn.Module], params: object) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        try:
            with self.fake, torch.device(DEVICE):
                return kind(params).eval()
        finally:
            torch.set_default_dtype(before)

    def words(self, batch: int) -> Conditioning:
        context, pooled = self.empty(batch, 77, 2048), self.empty(batch, 1280)
        return Conditioning(context, pooled, self.empty(batch, 6, dtype=torch.float32))


@pytest.fixture(scope="session")
def gpu() -> FakeGpu:
    try:
        return FakeGpu(fake_tensors())
    except UnknownBuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def sdxl(gpu: FakeGpu) -> dict[str, Any]:
    """Base, distilled, decoder."""
    return {
        "base": gpu.network(UNet, SDXL),
        "distilled": gpu.network(UNet, SDXL),
        "vae": gpu.network(Vae, SDXL_VAE),
    }
