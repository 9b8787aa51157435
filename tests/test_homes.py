"""Engines whose parts take turns, or live on two devices: the bits of those where all stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pair import folder  # noqa: F401

import headstart as hs
from headstart.engine import fitting
from headstart.engine.places import Placement

PLAN = hs.Plan((hs.Leg(model="base", steps=4, guidance=3.0, until="next"),
                hs.Leg(model="distilled", timesteps=(499, 249))))  # fmt: skip


def loaded(files: Path, **options: Any) -> hs.Engine:
    options = {"dtype": "float32", **options}
    return hs.Engine.load(files / "base.safetensors", files / "distilled.safetensors", **options)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[str, ...], int], None]:
    """Make a CPU a device where these parts take turns in a room of so many bytes."""

    def make(parts: tuple[str, ...], room: int) -> None:
        def place(weights: Any, *args: Any, device: str, **options: Any) -> Placement:
            return Placement(device=device, weights=weights, work={}, turns=parts, room=room)

        monkeypatch.setattr(fitting, "takes_turns", lambda device: True)
        monkeypatch.setattr(fitting, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
        monkeypatch.setattr(fitting, "place", place)

    return make


ALL = ("text", "base", "distilled")


@pytest.mark.parametrize(
    ("parts", "room", "runner"),
    [
        (ALL, 10**9, "replay"),
        (("text", "distilled"), 1000, "eager"),
        (("base", "distilled"), 5000, "replay"),
    ],
)
def test_pictures_are_to_the_bit_those_of_an_engine_where_all_stays(
    folder: Path,  # noqa: F811
    turns: Callable[[tuple[str, ...], int], None],
    parts: tuple[str, ...],
    room: int,
    runner: Any,
) -> None:
    want = loaded(folder, runner=runner).sample(["a fox", "an owl"], plan=PLAN, seeds=3)
    turns(parts, room)
    engine = loaded(folder, runner=runner)
    (own,) = engine.weights.homes.rooms
    for _ in range(2):
        got = engine.sample(["a fox", "an owl"], plan=PLAN, seeds=3)
        assert torch.equal(got.rgb, want.rgb) and torch.equal(got.latents, want.latents)
    assert own.moved_bytes >= 2 * own.size_bytes and own.pinned
    assert any(line.startswith("memory: ") for line in engine.weights.notes)
