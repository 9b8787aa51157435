"""A small SDXL-like pair, and the production runner on a fake GPU whose every access is checked."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from evidence.fake_cuda import FakeCuda
from evidence.ptx import Emulator, emulated
from headstart.interfaces import Conditioning
from headstart.networks.fusion import fusion
from headstart.networks.unet import Mid, Stage, UNet, UNetParams
from headstart.networks.vae import Vae, VaeParams
from headstart.noise import Philox
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.table import StepTable
from headstart.plan.update import Update
from headstart.runner.capture import Site
from headstart.runner.graph import GraphRunner
from headstart.runner.runner import EagerRunner
from headstart.runner.trajectory_graph import Outcome, TrajectoryGraph
from headstart.sampler import sample
from headstart_kernels import decode_u8, philox_normal, preview_rgb

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (4, 8, 8)
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
MAP = philox_normal([5], [0], 0, (4, 3))[0] * 0.2, philox_normal([6], [0], 0, (3,))[0] * 0.1
"""A linear map from latents to colours."""


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
        self.gpu: Emulator | None = None

    @property
    def calls(self) -> int:
        """Times that Python ran a network."""
        return sum(network.calls for network in self.denoisers.values())

    def network(self, seed: int) -> Counted:
        return filled(Counted(PARAMS), seed)

    def runner(self, model: str = "base", **options: Any) -> GraphRunner:
        return GraphRunner(self.denoisers[model], self.site, **options)

    def trajectory(self) -> TrajectoryGraph:
        return TrajectoryGraph(self.denoisers, self.vae, site=self.site, preview=MAP)

    @contextmanager
    def launching(self) -> Generator[None]:
        """Calls inside reach the device: here, operators of torch that stand for its kernels."""
        yield

    @staticmethod
    def words(batch: int, seed: int = 0) -> Conditioning:
        """SDXL-like conditioning: 5 tokens of 8, pooled text of 8, six sizes."""

        def draw(*shape: int) -> Tensor:
            return philox_normal(range(batch), [seed] * batch, 0, shape)

        return Conditioning(draw(5, 8), draw(8), (draw(6) * 100).round())

    @staticmethod
    def latent(batch: int, size: tuple[int, int] = (8, 8), seed: int = 7) -> Tensor:
        return philox_normal(range(batch), [seed] * batch, 0, (4, *size))

    def eagerly(self, table: StepTable, cond: Any, noise: Any, **options: Any) -> Outcome:
        """What a launch should leave, by the sampler, one operation at a time."""
        runners = {name: EagerRunner(network) for name, network in self.denoisers.items()}
        states = list(sample(table, runners, cond, noise, **options))
        with torch.inference_mode():
            pixels = self.vae.decode(states[-1].x)
            x0 = torch.stack([state.x0 for state in states])
            return Outcome(
                rgb=decode_u8(pixels, check=False),
                latents=states[-1].x,
                x0=x0,
                previews=torch.stack([preview_rgb(state.x0, *MAP) for state in states]),
                finite_rows=x0.isfinite().flatten(2).all(2),
                finite_pixels=pixels.isfinite().flatten(1).all(1),
            )

    def check(
        self, table: StepTable, *, batch: int = 2, seed: int = 3, size: Any = SHAPE
    ) -> Outcome:
        """Run both ways and compare every bit; the poisoned pool makes stale memory show."""
        cond, uncond = self.words(batch, seed), self.words(batch, seed + 1)
        noise, options = Philox(range(seed, seed + batch)), {"shape": size, "uncond": uncond}
        with self.launching():
            got = self.trajectory()(table, cond, noise, keep_x0=True, **options)
        expected = self.eagerly(table, cond, noise, **options)
        for name, a, b in zip(Outcome._fields, got, expected, strict=True):
            assert torch.equal(a, b), name
        assert got.finite_pixels.all()
        return got


@dataclass
class Emulated(Stand):
    """The same, but kernels are compiled for a GPU and their PTX is executed.

    A capture records launches, and a replay runs them. Eager runs are torch's operators.
    """

    arch: int = 90

    @contextmanager
    def launching(self) -> Generator[None]:
        with emulated(self.arch, by_default=True) as self.gpu:
            self.gpu.queue = self.cuda
            try:
                yield
            finally:
                self.gpu.queue = None


def filled(module: nn.Module, seed: int) -> Any:
    """Weights small enough that ten rows stay finite."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


def hybrid(
    base: int = 1,
    distilled: int = 2,
    *,
    guidance: float = 1.0,
    prediction: Prediction = Prediction.EPS,
    update: Update = Update.EULER,
) -> StepTable:
    """`base` rows of one network, then `distilled` rows of the other."""
    grid = [999, 749, 499, 249, 99][: base + distilled]
    legs: list[Leg] = []
    if base:
        legs += [Leg(model="base", timesteps=grid[:base], prediction=prediction, guidance=guidance)]
    if distilled:
        legs += [
            Leg(model="distilled", timesteps=grid[base:], prediction=prediction, update=update)
        ]
    return Plan(tuple(legs)).compile(SCHEDULE)


def standing(kind: Callable[[], Stand]) -> Generator[Stand]:
    """A stand whose every access to memory is checked. Layers are torch's own on both sides, but
    where a test asks for kernels: their bits differ."""
    stand = kind()
    with stand.cuda.running(), fusion(False):
        yield stand
