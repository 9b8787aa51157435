"""A network in float8 may be captured: the runners' programs, audited at the full size of SDXL."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evidence.audit import audit
from headstart.networks import load
from headstart.networks.casting import FLOAT8, keep_float8
from headstart.networks.unet import UNet
from headstart.noise import Philox
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan
from headstart.plan.schedule import NoiseSchedule
from headstart.runner.graph import GraphRunner
from headstart.runner.trajectory_graph import TrajectoryGraph

LATENT = (4, 128, 128)
PLAN = Plan((Leg(model="base", timesteps=[999], guidance=5.0),))


@pytest.fixture(scope="module")
def few(gpu: Any, sdxl: dict[str, Any]) -> UNet:
    """SDXL's UNet as `load_unet(..., dtype="float8")` leaves it on a GPU, without the file."""
    unet: UNet = gpu.network(UNet, sdxl["base"].params)
    scales: dict[str, Tensor] = {}
    with gpu.fake:
        for name, layer in unet.named_modules():
            if type(layer) in (nn.Linear, nn.Conv2d) and not load._ENDS.fullmatch(name):
                weight = torch.empty_like(layer.weight, dtype=FLOAT8)
                layer.weight = nn.Parameter(weight, requires_grad=False)
                ones = [1] * (weight.ndim - 1)
                scales[f"{name}.weight"] = gpu.empty(len(weight), *ones, dtype=torch.float32)
        keep_float8(unet.requires_grad_(False), scales, torch.float16)
        unet.lay_out()
    return unet


def declared(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def test_a_pass_may_be_captured_and_widens_each_weight_once(gpu: Any, few: UNet) -> None:
    runner = GraphRunner(few)
    x, time = gpu.empty(2, *LATENT), gpu.empty(2, dtype=torch.int64)
    program, inputs = runner.request(x, time, gpu.words(2))
    memory = declared(few)
    report = audit(program.body, [inputs, dict(inputs)], fake=gpu.fake, declared=memory)
    assert runner.dtype == torch.float16 and report.findings == ()
    names = Counter(operator.name for operator in report.operators)
    assert names["mul_"] == sum(parameter.dtype == FLOAT8 for parameter in few.parameters()) > 700


def test_a_whole_run_may_be_captured(gpu: Any, few: UNet, sdxl: dict[str, Any]) -> None:
    graph = TrajectoryGraph({"base": few}, sdxl["vae"], torch.float16)
    table = PLAN.compile(NoiseSchedule.scaled_linear())
    with gpu.fake:
        options: Any = {"shape": LATENT, "uncond": gpu.words(1)}
        program, inputs = graph.request(table, gpu.words(1), Philox([3]), **options)
    memory = [*declared(few), *declared(sdxl["vae"])]
    report = audit(
        lambda inputs: program.body(dict(inputs)), [inputs], fake=gpu.fake, declared=memory
    )
    assert report.findings == ()
