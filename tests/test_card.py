"""A GPU's memory on fake tensors: the allocator's blocks, and an engine that keeps to its plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import headstart as hs
import headstart_weights
from evidence.card import Card, Segments
from evidence.fake_tensors import DEVICE, UnknownBuildError, fake_tensors
from headstart.memory import offload
from headstart.networks.load import weight_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
MIB = 2**20


@pytest.fixture(autouse=True)
def _supported_build() -> None:
    try:
        fake_tensors()
    except UnknownBuildError as error:
        pytest.skip(str(error))


def test_blocks_are_taken_cut_joined_and_given_back_as_the_caching_allocator_does() -> None:
    memory = Segments(64 * MIB)
    small, other = memory.take(1), memory.take(1000)
    assert (small.size, other.size, memory.reserved) == (512, 1024, 2 * MIB)
    middle = [memory.take(3 * MIB) for _ in range(6)]
    assert memory.reserved == 22 * MIB, "six blocks out of one segment of 20 MiB"
    large = memory.take(11 * MIB)
    assert (large.size, memory.reserved) == (12 * MIB, 34 * MIB), "1 MiB is not cut off"
    for block in middle:
        memory.give(block)
    assert memory.take(9 * MIB).segment == middle[0].segment, "free neighbours became one"
    memory.give(large)
    memory.take(32 * MIB)
    assert memory.reserved == 2 * MIB + 20 * MIB + 32 * MIB, "an empty segment made room"
    with pytest.raises(MemoryError):
        memory.take(30 * MIB)


def test_a_storage_counts_until_its_last_view_is_gone_and_the_end_is_out_of_memory() -> None:
    card = Card(40 * MIB, DEVICE)
    with fake_tensors(), card:
        tensor = torch.empty(3 * MIB, dtype=torch.uint8, device=DEVICE)
        view = tensor[1:].view(-1)
        assert card.live_bytes == 3 * MIB
        del tensor
        assert card.live_bytes == 3 * MIB
        host = torch.tensor([2.0, 3.0])
        assert host.sum().item() == 5.0, "the host's tensors have values"
        with pytest.raises(torch.OutOfMemoryError, match=r"of 0\.04 GB"):
            torch.empty(30 * MIB, dtype=torch.uint8, device=DEVICE)
        del view
        assert card.live_bytes == 0 and card.reset() == 20 * MIB


def test_an_engine_loads_samples_and_decodes_within_its_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bundled pair, by Engine itself, on a GPU that is not there and is too small for it by
    more than the text encoder. SDXL on cards of 24, 16, 12 and 8 GB: `bench/memory.py`."""
    import memory as bench  # of bench/

    monkeypatch.setattr(offload, "RESERVE", 48 * MIB)  # segments are 20 MiB
    paths = {role: headstart_weights.path(role) for role in ("base", "distilled")}
    text = weight_bytes(paths["base"], "text", torch.float16)
    unets = sum(weight_bytes(path, "unet", torch.float16) for path in paths.values())
    vae = weight_bytes(paths["base"], "vae", torch.bfloat16)
    whole = int((text + unets + vae) * (1 + offload.SPREAD)) + offload.RESERVE
    card = bench.Answers(int(whole - 1.5 * text), DEVICE)
    with bench.simulated(card):
        engine = hs.Engine.load(**paths, device="cuda", runner="eager", dtype="float16")
        (placement,) = engine.weights.residency.placements
        assert placement.turns == ("text", "base", "distilled")
        assert placement.weights["text"] == text
        assert card.reset() <= placement.need <= card.size_bytes
        done: Any = engine.sample("a fox", plan=bench.PLAN, seeds=[0, 1])
    assert done.rgb.shape == (2, 64, 64, 3)
    (arena,) = engine.weights.residency.arenas
    assert 2 * arena.size_bytes < arena.moved_bytes <= 3 * arena.size_bytes
