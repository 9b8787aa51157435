"""The memory estimate: told before anything is allocated, and obeyed by the batch."""

from __future__ import annotations

import pytest
import torch

from headstart.engine import memory
from headstart.engine.memory import Footprint, Shape, estimate_bytes, plan_chunk
from headstart.errors import InputError

CPU = torch.device("cpu")
VALUES = Footprint(latent_values=1000.0, pixel_values=10.0, itemsize=4)
SHAPE = Shape(batch=16, channels=4, latent=(16, 16), pixels=(64, 64))


def free(monkeypatch: pytest.MonkeyPatch, count: int | None) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: count)


def test_the_estimate_is_states_of_the_batch_and_activations_of_the_chunk() -> None:
    states = 16 * (4 * 256 * 8 * 4 + 64 * 64 * 15)
    assert estimate_bytes(SHAPE, VALUES, 3) == states + 3 * 256_000 * 4


def test_keeping_x0_is_counted() -> None:
    kept = SHAPE._replace(kept=30)
    more = estimate_bytes(kept, VALUES, 1) - estimate_bytes(SHAPE, VALUES, 1)
    assert more == 16 * 30 * 4 * 256 * 4


def test_everything_runs_at_once_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10**9)
    assert plan_chunk(SHAPE, VALUES, 1, CPU, None) == 16
    free(monkeypatch, None)
    assert plan_chunk(SHAPE, VALUES, 1, CPU, None) == 16


def test_a_batch_that_does_not_fit_is_cut_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10_000_000)
    chunk = plan_chunk(SHAPE, VALUES, 2, CPU, None)
    assert chunk == 2
    assert estimate_bytes(SHAPE, VALUES, 2 * chunk) <= 8_000_000
    assert estimate_bytes(SHAPE, VALUES, 4 * chunk) > 8_000_000


def test_what_never_fits_is_refused_with_need_and_supply(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 2_000_000_000)
    absurd = Shape(batch=1, channels=4, latent=(20_000, 20_000), pixels=(80_000, 80_000))
    with pytest.raises(InputError, match=r"80000x80000 need about \d+\.\d GB .* 2\.0 GB are free"):
        plan_chunk(absurd, VALUES, 1, CPU, None)


def test_a_batch_that_was_asked_for_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10_000_000)
    assert plan_chunk(SHAPE, VALUES, 1, CPU, 2) == 2
    with pytest.raises(InputError, match="with 16 in the network"):
        plan_chunk(SHAPE, VALUES, 1, CPU, 16)


def test_this_machine_says_what_is_free() -> None:
    count = memory.available_bytes(CPU)
    assert count is not None
    assert 10**7 < count < 10**14
