"""Every line that a CUDA device switches on is known here, and taken on an emulated GPU.

A row says which run below takes the branches of one function; lines are traced, so a row that no
longer holds fails, as does a function with a branch that has no row.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from adapter_samples import random_lora, write
from networks import random_unet, random_vae, single_file
from stand import VAE, Stand, hybrid
from tiny_gpu import gpu_engine
from tiny_pair import tiny_engine

import headstart as hs
from evidence.oracle import random_latents, random_table
from evidence.ptx.on_gpu import launched
from evidence.torch_cuda import EmulatedCuda
from headstart.commands.session import use_local_device
from headstart.compare.latency import Case, latency
from headstart.conditioning import text_cache
from headstart.engine.devices import choose_device
from headstart.errors import CaptureError
from headstart.memory.available import available_bytes, pool_bytes
from headstart.memory.planning import streams_of, takes_turns
from headstart.networks.load import load_unet
from headstart.networks.vae import Vae
from headstart.noise import Given
from headstart.runner.runner import choose_runner
from headstart.runner.trajectory_graph import TrajectoryGraph
from headstart_kernels import fused_step, scale_input

ROOT = Path(__file__).parents[2]
SOURCES = ("src/headstart", "kernels/headstart_kernels", "weights")
PLAN = hs.Plan((hs.Leg(model="base", timesteps=(999,), guidance=3.0),))


class Branch(NamedTuple):
    """What is asked of the device, in which function, and the line that runs if it is CUDA."""

    file: str
    function: str
    asked: str
    line: int

    @property
    def row(self) -> str:
        return f"{self.file} {self.function}"


@cache
def branches() -> list[Branch]:
    results: list[Branch] = []
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            results += _branches_of(path)
    return results


def _branches_of(path: Path) -> Iterator[Branch]:
    name = str(path.relative_to(ROOT)).split("/", 1)[1]

    def visit(node: ast.AST, inside: tuple[str, ...], line: int) -> Iterator[Branch]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inside = (*inside, node.name)
        if isinstance(node, ast.stmt):
            line = node.lineno
        if _asks(node):
            yield Branch(name, ".".join(inside), ast.unparse(node), line)
            return
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    body = isinstance(node, ast.If) and field == "test" and not _negated(child)
                    yield from visit(child, inside, node.body[0].lineno if body else line)

    yield from visit(ast.parse(path.read_text()), (), 0)


def _asks(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        names = [node.attr]
        while isinstance(node.value, ast.Attribute):
            node = node.value
            names.append(node.attr)
        module = isinstance(node.value, ast.Name) and node.value.id == "torch"
        return names[0] == "is_cuda" or (module and names[-1] == "cuda")
    operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    return any(isinstance(side, ast.Constant) and side.value == "cuda" for side in operands)


def _negated(test: ast.AST) -> bool:
    """`not x.is_cuda`, `!= "cuda"`: with CUDA the test itself runs, and its body does not."""
    return any(isinstance(node, (ast.Not, ast.NotEq, ast.NotIn)) for node in ast.walk(test))


# --------------------------------------------------------------------- the runs


def samples(folder: Path) -> None:
    engine = gpu_engine("sd15", runner="graph")
    with hs.Preview(hs.decoder(engine, "linear"), lambda frame: None) as preview:
        engine.sample("ab", plan=PLAN, on_step=preview).record()
    assert preview.problems == []


def compares(folder: Path) -> None:
    engine = gpu_engine("sd15", runner="eager")
    latency([Case("base", engine, engine.compile(PLAN))], "ab", [0], rounds=1, warmup=1)


def launches(folder: Path) -> None:
    stand = Stand()
    for network in stand.denoisers.values():
        network.to("cuda")
    noise = Given(random_latents(1, 4, 8, 8).cuda(), [None, None])
    graph = TrajectoryGraph(stand.denoisers, Vae(VAE).cuda())
    graph(hybrid(1, 1), stand.words(1).to("cuda", torch.float32), noise, shape=(4, 8, 8))


def loads(folder: Path) -> None:
    path = single_file(random_unet(), random_vae(), folder / "a.safetensors")
    assert (available_bytes(torch.device("cuda", 0)) or 0) > 10**9
    gpu = torch.device("cuda", 0)
    assert takes_turns(gpu) and streams_of(gpu) is torch.cuda and pool_bytes(gpu) == 0
    assert next(load_unet(path, device="cuda", head_dim=8).parameters()).is_cuda
    with pytest.raises(CaptureError, match="use 'graph'"):
        choose_runner("replay", "cuda")
    assert choose_runner("auto", choose_device("auto")).name == "graph"


def adapts(folder: Path) -> None:
    network: Any = tiny_engine("sd15").denoisers["base"]
    engine = gpu_engine("sd15", runner="eager")
    engine.attach(write(folder / "a.safetensors", random_lora(network)))
    engine.sample("ab", plan=PLAN)


def encodes(folder: Path) -> None:
    """By hand: nothing is kept of encodings while operators are watched, as they are here."""
    weights: Any = SimpleNamespace(tensors=[torch.ones(1, device="cuda")])
    assert torch.device("cuda", 0) in text_cache._surroundings(weights)


def compiles(folder: Path) -> None:
    gpu_engine("sd15", runner="compiled").sample("ab", plan=PLAN)


def shares(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "3")
        args: Any = type("Args", (), {"device": "cuda"})()
        use_local_device(args)
    assert args.device == "cuda:1", "the fourth process of a machine with two GPUs"


def computes(folder: Path) -> None:
    x, table = random_latents(1, 4, 8, 8).cuda(), random_table(2).cuda()
    noise, row = random_latents(1, 4, 8, 8, seed=1).cuda(), torch.tensor(0).cuda()
    fused_step(x, x, table, row, noise=noise, f_uncond=x, x0_prev=x)
    scale_input(x, table.cpu(), 0, torch.float16)
    with launched(torch.cuda.emulated) as gpu:  # type: ignore[attr-defined]
        for impl in (None, "triton"):
            scale_input(x, table, row, torch.float16, impl=impl)
    names = [name for name, _ in gpu.launches]
    assert names == ["trial_kernel", "scale_input_kernel", "scale_input_kernel"]


RUNS: dict[str, Callable[[Path], None]] = {
    run.__name__: run
    for run in (*(samples, compares, launches, loads, adapts, encodes, compiles, shares, computes),)
}
TAKEN = {
    "headstart/commands/session.py use_local_device": "shares",
    "headstart/compare/latency.py _forget_peak": "compares",
    "headstart/compare/latency.py _peak_bytes": "compares",
    "headstart/engine/clock.py _now": "samples",
    "headstart/engine/clock.py _elapsed_ms": "samples",
    "headstart/memory/available.py available_bytes": "loads",
    "headstart/engine/devices.py choose_device": "loads",
    "headstart/conditioning/text_cache.py _surroundings": "encodes",
    "headstart/memory/planning.py streams_of": "loads",
    "headstart/memory/planning.py takes_turns": "loads",
    "headstart/memory/available.py pool_bytes": "loads",
    "headstart/runner/compiled.py CompiledNetwork.__call__": "compiles",
    "headstart/engine/record.py machine": "samples",
    "headstart/networks/fusion.py fused": "adapts",
    "headstart/networks/assembly.py device_of": "loads",
    "headstart/runner/capture.py Site.of": "samples",
    "headstart/runner/cuda.py record_event": "adapts",
    "headstart/runner/cuda.py Cuda.__getattr__": "samples",
    "headstart/runner/runner.py choose_runner": "loads",
    "headstart/runner/runner.py EagerRunner.__call__": "adapts",
    "headstart/runner/trajectory_body.py _to_device": "launches",
    "headstart/traces/preview.py Preview.picture": "samples",
    "headstart/traces/preview.py Preview._lane_on": "samples",
    "headstart_kernels/dispatch.py choose": "computes",
    "headstart_kernels/observers.py stands_in": "computes",
    "headstart_kernels/dispatch.py _require_triton": "computes",
    "headstart_kernels/launch.py launch": "computes",
}
"""Function -> the run that takes its branches."""
CANNOT = {
    "headstart/engine/parts.py computes_bfloat16": "one of its lines is for HIP; loading the "
    "bundled pair takes the other",
    "headstart_kernels/trial.py _why_not": "Triton is tried with every mode off, so with no "
    "emulated tensor; tests/kernels/test_trial.py runs it",
    "headstart_kernels/trial.py launches": "asked of plain tensors alone, as above",
    "headstart/traces/preview.py SideStream.__init__": "torch.cuda is the default of an argument, "
    "which Python evaluates at import; `samples` draws on such a stream",
}
"""Function -> why no line of a run shows it."""


def test_every_branch_has_a_row_and_every_row_a_branch() -> None:
    rows = {branch.row for branch in branches()}
    missing = sorted(rows - set(TAKEN) - set(CANNOT))
    assert missing == [], "say which run takes it (TAKEN), or why none can (CANNOT)"
    assert sorted((set(TAKEN) | set(CANNOT)) - rows) == [], "these have no branch any more"


@pytest.mark.parametrize("run", RUNS)
def test_the_branches_are_taken(
    run: str, cuda: EmulatedCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "emulated", cuda, raising=False)
    expected = [branch for branch in branches() if TAKEN.get(branch.row) == run]
    assert expected, "this run is for nothing"
    lines = _lines(lambda: RUNS[run](tmp_path), {branch.file for branch in expected})
    left = [f"{b.row}: {b.asked}" for b in expected if (b.file, b.line) not in lines]
    assert left == []


def _lines(run: Callable[[], None], files: set[str]) -> set[tuple[str, int]]:
    """(file, line) of what runs in these files."""
    visited: set[tuple[str, int]] = set()
    names: dict[str, str | None] = {}

    def begins(frame: FrameType, event: str, argument: object) -> Any:
        path = frame.f_code.co_filename
        if path not in names:
            names[path] = next((file for file in files if path.endswith(file)), None)
        return lines if names[path] is not None else None

    def lines(frame: FrameType, event: str, argument: object) -> Any:
        visited.add((str(names[frame.f_code.co_filename]), frame.f_lineno))
        return lines

    before = sys.gettrace()
    sys.settrace(begins)
    try:
        run()
    finally:
        sys.settrace(before)
    return visited
