"""Everything that is captured is fit for it, audited at the full size of SDXL.

What differs between two runs at Python level is all that a step or a plan can change: schedules,
guidance, seeds. Values of tensors cannot matter, because fake tensors have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evidence.audit import Hazard, audit
from evidence.fake_tensors import DEVICE
from headstart.interfaces import Conditioning
from headstart.noise import Philox
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.table import StepTable
from headstart.plan.update import Update
from headstart.runner.capture import Program, Site
from headstart.runner.graph import GraphRunner
from headstart.runner.trajectory_graph import TrajectoryGraph
from headstart.sampler import sample
from headstart_kernels import preview_rgb

LATENT = (4, 128, 128)


class Nothing:
    """Streams and graphs that do nothing: the fake device has no memory to compute in."""

    def wait_stream(self, stream: object) -> None: ...

    def replay(self) -> None: ...

    def reset(self) -> None: ...

    def synchronize(self, device: object) -> None: ...

    def Stream(self, device: object) -> Nothing:  # noqa: N802
        return self

    def CUDAGraph(self) -> Nothing:  # noqa: N802
        return self

    def current_stream(self, device: object) -> Nothing:
        return self

    def graph_pool_handle(self) -> int:
        return 0

    def memory_reserved(self, device: object) -> int:
        return 0

    def stream(self, stream: object) -> Any:
        return nullcontext()

    def capture_begin(self, pool: object, **options: object) -> None: ...

    def capture_end(self) -> None: ...

    def empty_cache(self) -> None: ...


def weights(networks: Iterable[Any]) -> list[Tensor]:
    modules = [network for network in networks if isinstance(network, nn.Module)]
    return [t for m in modules for t in (*m.parameters(), *m.buffers())]


def hybrid(base: float, distilled: float, guidance: float, beta_end: float = 0.012) -> StepTable:
    legs = (
        Leg(model="base", timesteps=[base], guidance=guidance),
        Leg(model="distilled", timesteps=[distilled], update=Update.RENOISE),
        Leg(model="distilled", timesteps=[99], update=Update.RENOISE),
    )
    return Plan(legs).compile(NoiseSchedule.scaled_linear(beta_end=beta_end))


def test_networks_may_be_captured(gpu: Any, sdxl: dict[str, Any]) -> None:
    """By the production runner's own program: F of 2 samples, and the decoder."""
    runner = GraphRunner(sdxl["base"], dtype=torch.float16)
    x, timestep = gpu.empty(2, *LATENT), gpu.empty(2, dtype=torch.int64)
    program, inputs = runner.request(x, timestep, gpu.words(2))
    declared = weights(program.networks)
    report = audit(program.body, [inputs, dict(inputs)], fake=gpu.fake, declared=declared)
    assert report.findings == () and len(report.operators) > 5000
    latents = gpu.empty(1, *LATENT)
    report = audit(sdxl["vae"].decode, [latents], fake=gpu.fake, declared=weights([sdxl["vae"]]))
    assert report.findings == () and len(report.operators) > 100


def test_a_preview_may_be_captured(gpu: Any) -> None:
    x0 = gpu.empty(2, *LATENT, dtype=torch.float32)
    factors, bias = gpu.empty(4, 3, dtype=torch.float32), gpu.empty(3, dtype=torch.float32)
    report = audit(
        lambda x: preview_rgb(x, factors, bias), [x0], fake=gpu.fake, declared=[factors, bias]
    )
    assert report.findings == ()


def test_a_whole_run_may_be_captured_and_no_number_of_a_plan_is_in_it(
    gpu: Any, sdxl: dict[str, Any]
) -> None:
    """Guided base, hand-off, two rows that draw noise, decode: twice, of different numbers."""
    graph = TrajectoryGraph(
        {name: sdxl[name] for name in ("base", "distilled")}, sdxl["vae"], torch.float16
    )
    runs: list[tuple[Program, Any]] = []
    for seed, table in enumerate((hybrid(999, 749, 5.0), hybrid(901, 333, 7.5, 0.02))):
        with gpu.fake:
            runs.append(
                graph.request(
                    table, gpu.words(1), Philox([seed]), shape=LATENT, uncond=gpu.words(1)
                )
            )
    (program, first), (other, second) = runs
    assert program.key == other.key, "one graph serves both plans"
    report = audit(
        lambda inputs: program.body(dict(inputs)),
        [first, second],
        fake=gpu.fake,
        declared=weights(program.networks),
    )
    assert report.findings == ()
    names = [operator.name for operator in report.operators]
    assert names.count("fused_step_into") == 3 and names.count("philox_normal") == 1
    assert names.count("scale_input") == 1 and names.count("decode_u8") == 1


class Reads(nn.Module):
    """A network of one operator, for what surrounds networks."""

    dtype = torch.float16

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return x_in * timestep.to(x_in.dtype).view(-1, 1, 1, 1)


class FirstThree:
    """A codec whose pixels are the first three channels."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3]

    def encode(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError


def test_nothing_waits_between_the_launch_and_the_result(gpu: Any) -> None:
    site = Site(DEVICE, Nothing())
    networks = {"base": Reads(), "distilled": Reads()}
    graph = TrajectoryGraph(networks, FirstThree(), torch.float16, site)
    table, options = hybrid(999, 749, 5.0), {"shape": LATENT, "uncond": gpu.words(2)}
    with gpu.fake:
        program, inputs = graph.request(table, gpu.words(2), Philox([1, 2]), **options)
        site.run(program, inputs)
        captured = next(iter(site._graphs.values()))
    buffers = [*captured.inputs.values(), *captured.outputs]
    report = audit(lambda i: site.run(program, i), [inputs], fake=gpu.fake, declared=buffers)
    assert report.findings == () and site.captures == 1
    assert {operator.name for operator in report.operators} <= {"copy_", "empty_like"}


@pytest.mark.parametrize("check", ["last", "never"])
def test_the_sampler_waits_for_nothing_until_the_last_row_is_checked(gpu: Any, check: Any) -> None:
    """Rows after the first, by graphs of the networks; guidance, noise and all."""
    site = Site(DEVICE, Nothing())
    runners = {name: GraphRunner(Reads(), site) for name in ("base", "distilled")}
    table, noise = hybrid(999, 749, 5.0), Philox([1, 2])
    with gpu.fake:
        states = sample(
            table, runners, gpu.words(2), noise, uncond=gpu.words(2), shape=LATENT, check=check
        )

    def rest(states: Any) -> None:
        for _ in states:
            pass

    before = audit(lambda _: next(states), [gpu.words(2)], fake=gpu.fake)
    assert Hazard.HOST_COPY in before.hazards, "seeds go to the device before the first row"
    findings = [
        finding
        for finding in audit(rest, [states], fake=gpu.fake).findings
        if finding.hazard is not Hazard.UNDECLARED
    ]
    assert [finding.hazard for finding in findings] == [Hazard.WAITS] * (check == "last")
    assert all(finding.where.startswith("finite.py") for finding in findings)
