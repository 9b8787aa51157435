"""Runs on an emulated GPU: what a CUDA tensor switches on runs, and gives the CPU's pictures.

Emulated: torch's operators of the CPU, or Triton's PTX, under a GPU's rules; nothing of its speed.
"""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import random_lora, write
from no_triton import failing
from tiny_gpu import gpu_engine
from tiny_pair import tiny_engine
from torch import Tensor, nn

import headstart as hs
from evidence.ptx.on_gpu import launched
from evidence.torch_cuda import EmulatedCuda
from headstart.engine.trajectory import Trajectory
from headstart.errors import CaptureError
from headstart.plan.update import Update
from headstart.runner.capture import Site
from headstart.runner.graph import GraphRunner

PLAN = hs.Plan(
    (
        hs.Leg(model="base", timesteps=(999,), guidance=3.0),
        hs.Leg(model="distilled", timesteps=(499,), update=Update.RENOISE),
    )
)
BOUND = 512 * 2.0**-24
"""Float32 in another order: a value passes some 500 sums and products, none of which grows it."""


def run(engine: hs.Engine, **options: Any) -> Trajectory:
    return engine.sample(["ab", "cd"], **{"plan": PLAN, "seeds": [3, 4], **options})


@cache
def on_cpu(family: str) -> Trajectory:
    return run(tiny_engine(family))


def check(got: Trajectory, expected: Trajectory) -> None:
    for a, b in ((got.latents, expected.latents), (got.rgb.int(), expected.rgb.int())):
        assert a.is_cuda and not b.is_cuda
        scale = 1.0 if a.dtype == torch.int32 else float(b.abs().max()) * BOUND
        assert float((a.cpu() - b).abs().max()) <= scale


@pytest.mark.parametrize(
    ("runner", "family"),
    [("eager", "sd15"), ("compiled", "sdxl"), ("graph", "sdxl"), ("trajectory", "sdxl")],
)
def test_every_runner_gives_the_cpus_pictures(cuda: EmulatedCuda, family: str, runner: str) -> None:
    engine = gpu_engine(family, runner=runner)
    for _ in range(2):
        check(run(engine), on_cpu(family))
    rows = len(PLAN.compile(engine.schedule))
    launches = {"eager": 0, "compiled": rows, "graph": rows, "trajectory": 1}
    assert len(cuda.happened("replay")) == 2 * launches[runner]


def test_with_the_kernels_of_a_gpu(cuda: EmulatedCuda) -> None:
    """Captured and replayed: what the emulated machine launches is Triton's PTX for sm_90."""
    options: Any = {"plan": hs.Plan(PLAN.legs[1:]), "seeds": 3}
    with launched(cuda) as gpu:
        got = gpu_engine("sd15", runner="graph").sample("ab", **options)
    check(got, tiny_engine("sd15").sample("ab", **options))
    names = {name.removesuffix("_kernel") for name, _ in gpu.launches}
    assert names >= {"fused_step", "geglu", "apply", "philox_normal", "decode_planes"}


def test_where_triton_cannot_launch_a_run_goes_on_with_one_warning(cuda: EmulatedCuda) -> None:
    """tests/dry/test_trial.py has whatever else may be missing there."""
    with (
        launched(cuda) as gpu,
        failing(gpu, RuntimeError("Failed to find C compiler. Please specify via CC")),
        pytest.warns(RuntimeWarning, match="there is no C compiler .*; install gcc") as warned,
    ):
        for runner in ("eager", "graph"):
            check(run(gpu_engine("sd15", runner=runner)), on_cpu("sd15"))
    assert len([one for one in warned if "Triton" in str(one.message)]) == 1 and not gpu.launches


def test_the_pictures_of_a_preview_are_drawn_by_the_step(cuda: EmulatedCuda) -> None:
    """On a side stream, in pinned memory, by events: accesses without an order raise."""
    pictures: dict[bool, list[Any]] = {}
    for gpu in (False, True):
        engine = gpu_engine("sd15") if gpu else tiny_engine("sd15")
        frames = pictures[gpu] = []
        with hs.Preview(hs.decoder(engine, "linear"), frames.append) as preview:
            assert (preview.picture is not None) == gpu
            run(engine, on_step=preview)
        assert preview.problems == [] and preview.dropped == 0
    for ours, theirs in zip(pictures[True], pictures[False], strict=True):
        assert ours.step == theirs.step and abs(ours.rgb.astype(int) - theirs.rgb).max() <= 1


@pytest.mark.parametrize(
    "methods",
    [
        ["cads:0.1", "embedding-noise:1", "pink:1", "particles:128"],
        ["select:2"],
    ],
)
def test_ways_to_variety(cuda: EmulatedCuda, methods: list[str]) -> None:
    options: Any = {"plan": PLAN, "seeds": [3, 4, 5], "diversify": methods}
    engines = gpu_engine("sd15"), tiny_engine("sd15")
    check(*(engine.sample("ab", **options) for engine in engines))


def test_adapters_and_their_strength_by_row(cuda: EmulatedCuda, tmp_path: Path) -> None:
    network: Any = tiny_engine("sd15").denoisers["base"]
    path = write(tmp_path / "a.safetensors", random_lora(network))
    trajectories: list[Trajectory] = []
    for engine in (tiny_engine("sd15"), gpu_engine("sd15", runner="graph")):
        engine.attach(path, [[1.0, -0.5], [0.0, 2.0]])
        trajectories.append(run(engine))
    check(trajectories[1], trajectories[0])
    assert not torch.equal(trajectories[0].latents, on_cpu("sd15").latents)


def test_what_cannot_be_captured_runs_eagerly_and_the_rest_goes_on(cuda: EmulatedCuda) -> None:
    class Looks(nn.Module):
        def forward(self, x_in: Tensor, timestep: Tensor, cond: Any) -> Tensor:
            return x_in * float(timestep[0])

    engine = gpu_engine("sd15", runner="graph")
    before, stream = run(engine), torch.cuda.current_stream()
    x, t = torch.ones(1, 4, 8, 8, device="cuda"), torch.full((1,), 7, device="cuda")
    cond = hs.Conditioning(torch.ones(1, 5, 32, device="cuda"))
    with pytest.raises(CaptureError, match="Looks could not be captured"):
        GraphRunner(Looks())(x, t, cond)
    fallback = GraphRunner(Looks(), fallback=True)
    assert torch.equal(fallback(x, t, cond), x * 7) and len(fallback.refusals) == 1
    assert torch.cuda.current_stream() is stream and not cuda.underway
    assert Site.of(x.device).dead is None
    assert torch.equal(run(engine).latents, before.latents)


def test_a_run_goes_on_from_a_state(cuda: EmulatedCuda) -> None:
    engine, options = gpu_engine("sdxl"), {"plan": PLAN, "seeds": [3, 4]}
    states = list(engine.iterate(["ab", "cd"], **options))
    (last,) = engine.iterate(["ab", "cd"], resume=states[-2], **options)
    assert torch.equal(last.x, states[-1].x) and last.x.is_cuda


def test_what_is_on_the_gpu_stays_there(cuda: EmulatedCuda) -> None:
    """A run leaves no memory behind but its result and its graphs."""
    engine = gpu_engine("sd15", runner="graph")
    run(engine)
    before = cuda.memory_allocated()
    run(engine, seeds=[5, 6])
    assert cuda.memory_allocated() == before


def test_the_bundled_pair_in_half_precision(cuda: EmulatedCuda) -> None:
    """Files of float16 stay so on a GPU, and the decoder takes what it can be given."""
    engine = hs.Engine.demo(device="cuda", runner="eager")
    assert engine.weights.dtype == torch.float16 and engine.runner == "eager"
    options: Any = {"plan": hs.Plan(PLAN.legs[:1]), "seeds": 1}
    got = engine.sample("a fox", **options)
    expected = hs.Engine.demo(device="cpu").sample("a fox", **options)
    change: Tensor = (got.latents.cpu() - expected.latents).abs().max()
    # Rounded at 2^-11, a value of some 4 passes two networks; that is about 1e-2.
    assert float(change) < 0.02 and got.latents.is_cuda
    assert got.record()["machine"]["device_name"] == "emulated GPU"


@pytest.mark.parametrize("how", ["waits", "raises", "falls back"])
def test_what_is_asked_of_a_failed_capture_holds_here(cuda: EmulatedCuda, how: str) -> None:
    """The program that tests/gpu runs on a GPU, with the rules of an emulated one."""
    program = Path(__file__).parents[1] / "gpu" / "failed_capture.py"
    runpy.run_path(str(program))["main"](how)
