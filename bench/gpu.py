"""What a GPU alone can show: tests, kernels in a graph, latency, memory; one command, one JSON.

python bench/gpu.py [--rounds 21] [--out bench/results/gpu.json] [--dry-run]

Without a CUDA device it says so and exits. `--dry-run` takes every code path that a CPU can, with a
small network over the emulated torch.cuda, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
from torch import Tensor

from headstart.errors import CaptureError
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
from headstart.runner.graph import GraphRunner
from headstart.runner.runner import CompiledRunner, EagerRunner
from headstart.runner.trajectory_graph import TrajectoryGraph
from headstart.sampler import sample
from headstart_kernels import decode_u8, fused_step, preview_rgb, scale_input
from headstart_kernels.emulation.fake_cuda import FakeCuda, FakeGraph
from headstart_kernels.testing.ptx import emulated

ROOT = Path(__file__).parents[1]
SDXL = UNetParams(
    down=(Stage(320, (0, 0), True), Stage(640, (2, 2), True), Stage(1280, (10, 10), False)),
    mid=Mid(2, 10),
    up=(
        Stage(1280, (10, 10, 10), True),
        Stage(640, (2, 2, 2), True),
        Stage(320, (0, 0, 0), False),
    ),
    context_dim=2048,
    added_dim=2816,
)
SMALL = UNetParams(
    down=(Stage(16, (0,), True), Stage(32, (1,), False)),
    mid=Mid(2, 1),
    up=(Stage(32, (1, 1), True), Stage(16, (0, 0), False)),
    context_dim=8,
    head_dim=8,
    norm_groups=4,
    added_dim=8 + 6 * 4,
)


class Setup(NamedTuple):
    """What is measured, and on what."""

    device: torch.device
    dtype: torch.dtype
    unet: UNetParams
    vae: VaeParams
    latent: tuple[int, int, int]
    site: Site
    compiled: str
    """The backend of torch.compile."""


def gpu_setup() -> Setup:
    device = torch.device("cuda", torch.cuda.current_device())
    vae = VaeParams(scale_factor=0.13025)
    return Setup(device, torch.float16, SDXL, vae, (4, 128, 128), Site.of(device), "inductor")


def dry_setup() -> Setup:
    device = torch.device("cpu")
    vae = VaeParams(channels=(8, 16), layers=1, norm_groups=4)
    return Setup(device, torch.float32, SMALL, vae, (4, 8, 8), Site(device, FakeCuda()), "eager")


def main() -> int:
    options = _options()
    if not (options.dry_run or torch.cuda.is_available()):
        print(
            "bench/gpu.py: no CUDA device here, so nothing was measured; --dry-run tries the code"
        )
        return 0
    setup = dry_setup() if options.dry_run else gpu_setup()
    rounds = 2 if options.dry_run else options.rounds
    report = {
        "question": "what a GPU alone can show: tests, kernels in a graph, milliseconds, memory",
        "evidence": "none: a dry run on a CPU" if options.dry_run else "measured",
        "device": _device_name(setup.device),
        "rounds": rounds,
        "machine": harness.machine(),
        "tests": _tests(options.dry_run),
        **measure(setup, rounds),
    }
    harness.write_json(options.out, report)
    print(f"wrote {options.out}")
    fused = report["kernels_in_graph"].get("one_fused_step_a_row", True)
    if not fused:
        print("the graph of a whole run does not hold one fused step a row")
    return 0 if fused and report["tests"]["status"] in (0, "not run") else 1


def measure(setup: Setup, rounds: int) -> dict[str, Any]:
    with torch.device(setup.device):
        networks = {name: UNet(setup.unet).to(setup.dtype).eval() for name in ("base", "distilled")}
        # SDXL's decoder overflows in float16.
        vae = Vae(setup.vae).to(torch.float32).eval()
    return {
        "kernels_in_graph": kernels(setup, networks, vae),
        "pass_ms": [
            _fitting(lambda b=b: passes(setup, networks["base"], b, rounds)) for b in (1, 4)
        ],
        "step_ms": steps(setup, rounds),
        "trajectory_ms": [
            _fitting(lambda b=b: trajectories(setup, networks, vae, b, rounds)) for b in (1, 4)
        ],
    }


def _fitting(case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A small GPU still gets its report on what fits."""
    try:
        return case()
    except (torch.OutOfMemoryError, CaptureError) as error:
        return {"failed": str(error).splitlines()[0]}


def passes(setup: Setup, network: UNet, batch: int, rounds: int) -> dict[str, Any]:
    """One pass of the UNet by every runner, and how far their outputs are from eager's."""
    call = (
        _normal(setup, batch, *setup.latent),
        torch.full((batch,), 999, device=setup.device),
        _words(setup, batch),
    )
    runners: dict[str, Any] = {
        "eager": EagerRunner(network),
        "graph": GraphRunner(network, setup.site),
        "compiled": CompiledRunner(network, backend=setup.compiled),
    }
    expected = runners["eager"](*call)
    return {
        "batch": batch,
        "ms": _milliseconds(setup, {n: lambda r=r: r(*call) for n, r in runners.items()}, rounds),
        "peak_bytes": {n: _peak(setup, lambda r=r: r(*call)) for n, r in runners.items()},
        "largest_difference": {
            n: float((r(*call) - expected).abs().max()) for n, r in runners.items()
        },
    }


def steps(setup: Setup, rounds: int) -> dict[str, Any]:
    """The step without its network, the preview, and the last cast to bytes."""
    x = _normal(setup, 1, *setup.latent)
    f, noise = _normal(setup, 1, *setup.latent).to(setup.dtype), _normal(setup, 1, *setup.latent)
    table = torch.tensor(_table().coefficients(), device=setup.device)
    row = torch.zeros((), dtype=torch.int64, device=setup.device)
    factors = torch.full((4, 3), 0.1, device=setup.device)
    bias, pixels = torch.zeros(3, device=setup.device), _normal(setup, 1, 3, *setup.latent[1:])
    cases: dict[str, Callable[[], object]] = {
        "fused_step": lambda: fused_step(x, f, table, row, noise=noise, x0_prev=x),
        "scale_input": lambda: scale_input(x, table, row, setup.dtype),
        "preview_rgb": lambda: preview_rgb(x, factors, bias),
        "decode_u8": lambda: decode_u8(pixels, check=False),
    }
    return _milliseconds(setup, cases, rounds)


def trajectories(
    setup: Setup, networks: dict[str, UNet], vae: Vae, batch: int, rounds: int
) -> dict[str, Any]:
    """A whole run, from noise to bytes: eager, compiled, a graph a network, and one graph.

    Random weights may overflow in float16; that is no reason not to time them, so nobody looks.
    """
    table, words, noise = _table(), _words(setup, batch), Philox(range(batch))
    asked = {"uncond": words, "shape": setup.latent}
    one = TrajectoryGraph(networks, vae, site=setup.site)

    def rows(kind: Callable[[UNet], Any]) -> Callable[[], Tensor]:
        runners = {name: kind(network) for name, network in networks.items()}

        def run() -> Tensor:
            states = list(sample(table, runners, words, noise, check="never", **asked))
            with torch.inference_mode():
                return decode_u8(vae.decode(states[-1].x), check=False)

        return run

    cases: dict[str, Callable[[], Tensor]] = {
        "eager": rows(EagerRunner),
        "compiled": rows(lambda network: CompiledRunner(network, backend=setup.compiled)),
        "graph a network": rows(lambda network: GraphRunner(network, setup.site)),
        "one graph": lambda: one(table, words, noise, check=False, **asked).rgb,
    }
    rgb = {name: case() for name, case in cases.items()}
    return {
        "batch": batch,
        "ms": _milliseconds(setup, cases, rounds),
        "peak_bytes": {name: _peak(setup, case) for name, case in cases.items()},
        "graph_bytes": setup.site.size_bytes,
        "pixels_that_differ_from_eager": {
            name: int((image != rgb["eager"]).sum()) for name, image in rgb.items()
        },
    }


def kernels(setup: Setup, networks: dict[str, UNet], vae: Vae) -> dict[str, Any]:
    """What one graph of a whole run holds, by name, and whether each row is one fused step."""
    backend = KeptGraphs(setup.site.backend)
    graph = TrajectoryGraph(networks, vae, site=Site(setup.device, backend))
    words = _words(setup, 1)
    with _launched_into(setup.site.backend):
        graph(_table(), words, Philox([0]), check=False, uncond=words, shape=setup.latent)
    (kept,) = backend.graphs
    try:
        names = _names_in(kept)
    except (AttributeError, ImportError) as error:
        return {"unknown": f"torch {torch.__version__} does not tell: {error}"}
    counts = {name: names.count(name) for name in sorted(set(names))}
    steps = sum(count for name, count in counts.items() if "fused_step" in name)
    waits = [name for name in counts if "host" in name.lower() and "memcpy" in name.lower()]
    return {
        "one_fused_step_a_row": steps == len(_table()),
        "copies_to_or_from_the_host": waits,
        "nodes": dict(sorted(counts.items(), key=lambda item: -item[1])),
    }


def _names_in(graph: Any) -> list[str]:
    """The kernels, copies and fills of a captured graph. A tape of an emulated one names its own.

    Raises AttributeError in a torch, and ImportError without the package cuda-bindings, that do not
    tell.
    """
    if isinstance(graph, FakeGraph):
        return [call.name for call in graph.tape.calls]
    return [node["kernel_name"] or node["node_type"] for node in graph.get_graph_data()["nodes"]]


@contextmanager
def _launched_into(backend: Any) -> Generator[None]:
    """In a dry run Triton's kernels are those of an emulated sm_90, on the emulated streams."""
    if not isinstance(backend, FakeCuda):
        yield
        return
    with emulated(90, by_default=True) as gpu:
        gpu.queue = backend
        yield


class KeptGraphs:
    """torch.cuda, or what stands in for it, but for graphs that keep what they were made of."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.graphs: list[Any] = []

    def CUDAGraph(self) -> Any:  # noqa: N802
        try:
            graph = self.backend.CUDAGraph(keep_graph=True)
        except TypeError:  # torch 2.6, and the emulated one
            graph = self.backend.CUDAGraph()
        self.graphs.append(graph)
        return graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


def _table() -> StepTable:
    """A guided step of the base, then three of the distilled model."""
    legs = (
        Leg(model="base", timesteps=[999], guidance=5.0),
        Leg(model="distilled", timesteps=[749, 499, 249], update=Update.RENOISE),
    )
    return Plan(legs).compile(NoiseSchedule.scaled_linear())


def _words(setup: Setup, batch: int) -> Conditioning:
    width, added = setup.unet.context_dim, setup.unet.added_dim or 0
    pooled = 1280 if setup.unet is SDXL else added - 6 * 4
    return Conditioning(
        _normal(setup, batch, 77, width).to(setup.dtype),
        _normal(setup, batch, pooled).to(setup.dtype),
        torch.full((batch, 6), 1024.0, device=setup.device),
    )


def _normal(setup: Setup, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(setup.device)


def _milliseconds(
    setup: Setup, cases: dict[str, Callable[[], object]], rounds: int
) -> dict[str, dict[str, float]]:
    """In turns; p20, p50, p80. Each call is waited for, as whoever wants its picture does."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 3):
        for name, case in cases.items():
            _wait(setup)
            begin = time.perf_counter()
            case()
            _wait(setup)
            if number >= 3:
                taken[name].append((time.perf_counter() - begin) * 1e3)
    return {
        name: dict(zip(("p20", "p50", "p80"), np.percentile(ms, [20, 50, 80]), strict=True))
        for name, ms in taken.items()
    }


def _peak(setup: Setup, case: Callable[[], object]) -> int | None:
    if setup.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(setup.device)
    case()
    _wait(setup)
    return torch.cuda.max_memory_allocated(setup.device)


def _wait(setup: Setup) -> None:
    if setup.device.type == "cuda":
        torch.cuda.synchronize(setup.device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _tests(dry_run: bool) -> dict[str, Any]:
    """The tests that need a GPU; their last line says how many ran."""
    if dry_run:
        return {"status": "not run"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"status": done.returncode, "summary": (done.stdout.splitlines() or [""])[-1]}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.out is None:
        dry = Path(tempfile.gettempdir()) / "headstart_gpu_dry_run.json"
        options.out = dry if options.dry_run else ROOT / "bench/results/gpu.json"
    return options


if __name__ == "__main__":
    sys.exit(main())
