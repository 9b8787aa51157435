"""A small SDXL-like pair, and the production runner on a fake GPU whose every access is checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headstart.interfaces import Conditioning
from headstart.networks.unet import Mid, Stage, UNet, UNetParams
from headstart.networks.vae import Vae, VaeParams
from headstart.runner.capture import Site
from headstart.runner.graph import GraphRunner
from headstart.runner.trajectory_graph import TrajectoryGraph
from headstart_kernels import philox_normal
from headstart_kernels.emulation.fake_cuda import FakeCuda

PARAMS = UNetParams(
    down=(Stage(16, (0,), True), Stage(32, (1,), False)),
    mid=Mid(2, 1),
    up=(Stage(32, (1, 1), True), Stage(16, (0, 0), False)),
    context_dim=8,
    head_dim=8,
    norm_groups=4,
    added_dim=8 + 6 * 4,
)
VAE = VaeParams(channels=(8, 16), layers=1, norm_groups=4)


class Counted(UNet):
    """A UNet that counts the times Python ran through it."""

    calls = 0

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.calls += 1
        return super().forward(x_in, timestep, cond)


@dataclass
class Stand:
    """Two networks, a decoder, and a site on a fake GPU."""

    cuda: FakeCuda = field(default_factory=FakeCuda)

    def __post_init__(self) -> None:
        self.site = Site(torch.device("cpu"), self.cuda)
        self.denoisers = {"base": self.network(1), "distilled": self.network(2)}
        self.vae = filled(Vae(VAE), 3)

    @property
    def calls(self) -> int:
        """Times that Python ran a network."""
        return sum(network.calls for network in self.denoisers.values())

    def network(self, seed: int) -> Counted:
        return filled(Counted(PARAMS), seed)

    def runner(self, model: str = "base", **options: Any) -> GraphRunner:
        return GraphRunner(self.denoisers[model], self.site, **options)

    def trajectory(self) -> TrajectoryGraph:
        return TrajectoryGraph(self.denoisers, self.vae, site=self.site)

    @staticmethod
    def words(batch: int, seed: int = 0) -> Conditioning:
        """SDXL-like conditioning: 5 tokens of 8, pooled text of 8, six sizes."""

        def draw(*shape: int) -> Tensor:
            return philox_normal(range(batch), [seed] * batch, 0, shape)

        return Conditioning(draw(5, 8), draw(8), (draw(6) * 100).round())

    @staticmethod
    def latent(batch: int, size: tuple[int, int] = (8, 8), seed: int = 7) -> Tensor:
        return philox_normal(range(batch), [seed] * batch, 0, (4, *size))


def filled(module: nn.Module, seed: int) -> Any:
    """Weights small enough that ten rows stay finite."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


@pytest.fixture
def stand() -> Iterator[Stand]:
    found = Stand()
    with found.cuda.running():
        yield found
