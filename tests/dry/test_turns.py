"""Two networks that take turns in one arena of an emulated GPU, captured, in float8, with adapters.

The arena's bytes are written over at every turn, so a graph that read another address, or began
before its copy had come, would give other bits, or raise as an access without an order.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import random_lora, write
from test_pair import folder  # noqa: F401

import headstart as hs
from evidence.torch_cuda import EmulatedCuda
from headstart.cli import main
from headstart.commands import session
from headstart.memory import planning
from headstart.memory.offload import Placement
from headstart.networks.casting import FLOAT8
from headstart.plan.pairs import PAIRS
from headstart.plan.update import Update

PLAN = hs.Plan(
    (
        hs.Leg(model="base", timesteps=(999,), guidance=3.0),
        hs.Leg(model="distilled", timesteps=(499,), update=Update.RENOISE),
    )
)


def loaded(files: Path, **options: Any) -> hs.Engine:
    models = files / "base.safetensors", files / "distilled.safetensors"
    return hs.Engine.load(*models, device="cuda", **options)


@pytest.fixture
def turns(cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> EmulatedCuda:
    """The tiny pair is placed as a large one is on a small GPU."""

    def choose(weights: Any, *args: Any, device: str, **options: Any) -> Placement:
        parts = ("text", "base", "distilled")
        return Placement(device=device, weights=weights, work={}, turns=parts, arena=3000)

    monkeypatch.setattr(planning, "place", choose)
    return cuda


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_graphs_of_networks_that_take_turns_give_the_bits_of_networks_that_stay(
    folder: Path,  # noqa: F811
    turns: EmulatedCuda,
    tmp_path: Path,
    adapted: bool,
) -> None:
    options: Any = {"plan": PLAN, "seeds": [3, 4]}
    stored = loaded(folder, dtype="float8", memory="none", runner="eager")
    engine = loaded(folder, dtype="float8", runner="graph")
    base: Any = stored.denoisers["base"]
    assert any(weight.dtype == FLOAT8 for weight in base.parameters())
    if adapted:
        lora = write(tmp_path / "a.safetensors", random_lora(base))
        stored.attach(lora, 0.7)
        engine.attach(lora, 0.7)
    want = stored.sample(["a fox", "an owl"], **options)
    for _ in range(2):  # captured, and replayed
        got = engine.sample(["a fox", "an owl"], **options)
        assert torch.equal(got.latents.cpu(), want.latents.cpu())
        assert torch.equal(got.rgb.cpu(), want.rgb.cpu())
    assert len(turns.happened("replay")) == 2 * 2 and len(turns.happened("capture")) == 2
    (arena,) = engine.weights.residency.arenas
    assert arena.moved_bytes > 2 * arena.size_bytes, "more than one network came for a picture"


@pytest.mark.slow
def test_a_study_of_networks_that_take_turns_says_what_one_of_networks_that_stay_does(
    folder: Path,  # noqa: F811
    turns: EmulatedCuda,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = {**PAIRS, "demo": replace(PAIRS["demo"], base_steps=1)}
    monkeypatch.setattr("headstart.plan.by_name.PAIRS", few)
    (tmp_path / "one.txt").write_text("a fox\n")
    devices: list[Any] = []
    for memory, runner in (("auto", "graph"), ("none", "eager")):
        engine = loaded(folder, memory=memory, runner=runner)
        assert bool(engine.weights.residency.arenas) == (memory == "auto")
        monkeypatch.setattr(session, "_load", lambda args, engine=engine: engine)
        out = tmp_path / memory
        options = ["--prompts", str(tmp_path / "one.txt"), "--seeds", "0,1", "--out", str(out)]
        options += ["--timesteps", "999,499", "--parts", "plans,curve", "--device", "cuda"]
        options += ["--features", "structure", "--base", "given"]
        assert main(["study", *options]) == 0, capsys.readouterr().err
        devices.append(json.loads((out / "report.json").read_text()))
    turned, stayed = devices
    assert turned["curve"] == stayed["curve"]
    for name, row in stayed["rows"].items():
        assert turned["rows"][name]["spaces"] == row["spaces"], name
