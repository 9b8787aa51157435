"""Runs for tests of batches, and a network that counts its calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plans import SD
from test_run import NETWORKS, SHAPE, cond
from torch import Tensor

import headstart as hs
from headstart.interfaces import Conditioning
from headstart.plan.plan import Leg, Plan, Update

NEAR = 2e-5
"""A float32 network of 4 channels in another batch: its matrix products may round otherwise."""


class Counted:
    """Networks that count their calls and their samples."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __getitem__(self, model: str) -> Any:
        def network(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            self.calls.append((model, len(x_in)))
            return NETWORKS[model](x_in, timestep, cond)

        return network

    def __iter__(self) -> Iterator[str]:
        return iter(NETWORKS)

    def networks(self) -> dict[str, Any]:
        return {model: self[model] for model in NETWORKS}


def run_of(seed: int, k: int = 2, steps: int = 5, guidance: float = 1.0, count: int = 1) -> hs.Run:
    update = list(Update)[seed % 4]
    legs = (
        Leg(model="base", steps=steps, guidance=guidance, update=update),
        Leg(model="distilled", steps=steps, skip=k, update=update),
    )
    table = Plan(legs).compile(SD)
    noise = hs.Philox([seed + n for n in range(count)])
    return hs.Run(table, cond(0.1 * seed), noise, uncond=cond(-0.2), shape=SHAPE)


def served(batch: hs.Batch) -> dict[hs.Run, list[hs.State]]:
    results: dict[hs.Run, list[hs.State]] = {}
    while batch:
        for run, state, error in batch.step():
            assert error is None and state is not None
            results.setdefault(run, []).append(state)
    return results
