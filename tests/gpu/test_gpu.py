"""The claims of tests/graph once more, on real torch.cuda."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headstart.interfaces import Conditioning
from headstart.networks.unet import Mid, Stage, UNet, UNetParams
from headstart.networks.vae import Vae, VaeParams
from headstart.noise import Philox
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.table import StepTable
from headstart.plan.update import Update
from headstart.runner.capture import Site
from headstart.runner.cuda import Cuda
from headstart.runner.graph import GraphRunner
from headstart.runner.runner import EagerRunner
from headstart.runner.trajectory_graph import TrajectoryGraph
from headstart.sampler import sample
from headstart_kernels import decode_u8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = (4, 32, 32)
PARAMS = UNetParams(
    down=(Stage(64, (0,), True), Stage(128, (1,), False)),
    mid=Mid(2, 1),
    up=(Stage(128, (1, 1), True), Stage(64, (0, 0), False)),
    context_dim=64,
    head_dim=32,
    added_dim=64 + 6 * 32,
)


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        made = {name: UNet(PARAMS).eval() for name in ("base", "distilled")}
        made["vae"] = Vae(VaeParams(channels=(32, 64), layers=1)).eval()
    return made


@pytest.fixture
def site() -> Site:
    return Site(torch.device("cuda", torch.cuda.current_device()), Cuda())


def words(batch: int, seed: int = 0) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator).cuda()

    return Conditioning(draw(7, 64), draw(64), draw(6) * 100)


def table(guidance: float = 3.0, base: float = 999) -> StepTable:
    legs = (
        Leg(model="base", timesteps=[base], guidance=guidance),
        Leg(model="distilled", timesteps=[499, 249], update=Update.RENOISE),
    )
    return Plan(legs).compile(NoiseSchedule.scaled_linear())


def test_a_network_as_a_graph_has_its_bits(networks: dict[str, Any], site: Site) -> None:
    network = networks["base"]
    graph, eager = GraphRunner(network, site), EagerRunner(network)
    for batch in (4, 1):
        for seed in range(2):
            x = Philox(range(batch)).step(seed, SHAPE, site.device)
            t = torch.full((batch,), 999 - seed, device="cuda")
            assert torch.equal(graph(x, t, words(batch, seed)), eager(x, t, words(batch, seed)))
    assert site.captures == 2


def test_a_whole_run_as_one_graph_has_the_bits_of_the_sampler(
    networks: dict[str, Any], site: Site
) -> None:
    """Also with another schedule, guidance, seed and prompt, for which nothing is captured anew."""
    models = {name: networks[name] for name in ("base", "distilled")}
    graph = TrajectoryGraph(models, networks["vae"], site=site)
    runners = {name: EagerRunner(network) for name, network in models.items()}
    for seed, plan in enumerate((table(), table(7.5, 901), table())):
        options = {"shape": SHAPE, "uncond": words(2, seed + 9)}
        got = graph(plan, words(2, seed), Philox([seed, 5]), **options)
        states = list(sample(plan, runners, words(2, seed), Philox([seed, 5]), **options))
        with torch.inference_mode():
            rgb = decode_u8(networks["vae"].decode(states[-1].x))
        assert torch.equal(got.latents, states[-1].x) and torch.equal(got.rgb, rgb)
    assert site.captures == 1


def test_weights_in_place_are_seen_and_bound_anew_are_captured(site: Site) -> None:
    with torch.device("cuda"):
        network = UNet(PARAMS).eval()
    graph, eager = GraphRunner(network, site), EagerRunner(network)
    x, t = torch.ones(1, *SHAPE, device="cuda"), torch.full((1,), 7, device="cuda")
    graph(x, t, words(1))
    with torch.no_grad():
        network.conv_out.weight.mul_(1.5)
    assert torch.equal(graph(x, t, words(1)), eager(x, t, words(1))) and site.captures == 1
    network.conv_out.weight = nn.Parameter(network.conv_out.weight.detach() * 2)
    assert torch.equal(graph(x, t, words(1)), eager(x, t, words(1))) and site.captures == 2


def test_results_on_a_stream_of_the_callers(networks: dict[str, Any], site: Site) -> None:
    graph, eager = GraphRunner(networks["base"], site), EagerRunner(networks["base"])
    cond, t, side = words(1), torch.full((1,), 7, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for scale in range(1, 20):
            x = torch.full((1, *SHAPE), float(scale), device="cuda")
            assert torch.equal(graph(x, t, cond), eager(x, t, cond))


def test_nothing_waits_between_the_launch_and_the_result(
    networks: dict[str, Any], site: Site
) -> None:
    """torch's own guard: an operation that waits raises."""
    models = {name: networks[name] for name in ("base", "distilled")}
    graph = TrajectoryGraph(models, networks["vae"], site=site)
    options = {"shape": SHAPE, "uncond": words(2, 1)}
    program, inputs = graph.request(table(), words(2), Philox([3, 4]), **options)
    site.run(program, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        site.run(program, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


FAILURE = Path(__file__).parent / "failed_capture.py"


@pytest.mark.parametrize("how", ["waits", "raises", "falls back"])
def test_a_failed_capture_leaves_what_it_found(how: str) -> None:
    """In a process of its own: one that it poisoned would fail the tests behind it."""
    done = subprocess.run(
        [sys.executable, str(FAILURE), how], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_fused_step_is_in_the_graph_once_a_row(networks: dict[str, Any]) -> None:
    """By the names of the kernels in it: Triton's are named after our functions."""
    results: list[Any] = []

    class KeptGraphs(Cuda):
        def CUDAGraph(self) -> Any:  # noqa: N802
            results.append(torch.cuda.CUDAGraph(keep_graph=True))
            return results[-1]

    if not hasattr(torch.cuda.CUDAGraph, "get_graph_data"):
        pytest.skip("this torch does not tell which kernels a graph holds")
    site = Site(torch.device("cuda", torch.cuda.current_device()), KeptGraphs())
    models = {name: networks[name] for name in ("base", "distilled")}
    graph = TrajectoryGraph(models, networks["vae"], site=site)
    graph(table(), words(1), Philox([3]), shape=SHAPE, uncond=words(1, 1))
    try:
        nodes = results[0].get_graph_data()["nodes"]
    except (ImportError, RuntimeError) as error:  # cuda-bindings, and a driver of CUDA 13.1
        pytest.skip(f"torch does not tell which kernels a graph holds: {error}")
    names = [node["kernel_name"] or node["node_type"] for node in nodes]
    copies = [name for name in names if "memcpy" in name.lower() and "host" in name.lower()]
    assert len(names) > 100 and copies == []
    steps = [name for name in names if "fused_step" in name]
    assert len(steps) in (0, 3), "3 with Triton's kernels, none by that name with the reference"
