"""A record run again, every bit compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from headstart.engine import record as recording
from headstart.engine.engine import Engine
from headstart.engine.trajectory import Trajectory
from headstart.errors import InputError
from headstart.sampler import State


def replay(
    record: Mapping[str, Any],
    engine: Engine,
    *,
    on_step: Callable[[State], object] | None = None,
) -> Trajectory:
    """Run a record again and compare SHA-256 of every latent and image.

    Raises InputError for a record of other weights, and for a result that is not equal, with the
    first image that differs and what differs of the machine. A network's rounding depends on
    device, versions, thread count and batch, so only the same of these promise the same bits.
    """
    recorded = recording.parse(record)
    adapters = engine.adapters.look()
    files = {**engine.weights.files, **adapters.files()}
    recording.check_weights(recorded, recording.weigh(files))
    again = engine.sample(
        recorded.prompts,
        plan=recorded.table,
        seeds=recorded.seeds,
        negative=recorded.negative,
        size=recorded.size,
        batch=recorded.chunk,
        adapters=adapters.recorded(recorded.adapters),
        diversify=recorded.diversify,
        on_step=on_step,
    )
    difference = recording.first_difference(recorded, again.recorded())
    if difference:
        raise InputError(f"the replay is not equal to the record: {difference}")
    return again
