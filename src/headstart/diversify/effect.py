"""What methods change of a run, all of them in the order given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.adapters.snapshot import Snapshot
from headstart.adapters.strength import Strength
from headstart.diversify.method import (
    ChangesConditioning,
    ChangesNoise,
    ChangesOutput,
    ChangesStrengths,
    ChangesTable,
    Images,
    Method,
    Row,
)
from headstart.diversify.select import Select
from headstart.errors import InputError
from headstart.interfaces import Conditioning, NoiseSource
from headstart.noise import Philox
from headstart.plan.table import Step, StepTable
from headstart.runner.batch import Chunked

Methods = Sequence[Method]


def check_images(methods: Methods, images: Images) -> None:
    """Raise InputError where a method needs more images of a prompt than a call has."""
    for method in methods:
        for prompt, group in images.by_prompt.items():
            if len(group) < method.least:
                raise InputError(
                    f"diversify {method}: needs at least {method.least} images of a prompt in one "
                    f"call, and {prompt!r:.60} has {len(group)}: give more seeds, or leave it out"
                )


def table_of(methods: Methods, table: StepTable) -> StepTable:
    """The table to run. Raises InputError for a method that would change nothing of it."""
    for method in methods:
        method.check(table)
        if isinstance(method, ChangesTable):
            table = method.table(table)
    return table


def strengths_of(
    methods: Methods, acts: dict[str, Strength], attached: Snapshot, table: StepTable
) -> dict[str, Strength]:
    """Adapter -> its strength in the run."""
    for method in methods:
        if isinstance(method, ChangesStrengths):
            acts = method.strengths(acts, attached, table)
    return acts


def select_of(methods: Methods) -> Select | None:
    return next((method for method in methods if isinstance(method, Select)), None)


def passes_of(methods: Methods, table: StepTable) -> int:
    """Network passes an image."""
    select = select_of(methods)
    return table.passes() + (0 if select is None else select.extra(table))


def methods_of_rest(methods: Methods) -> list[Method]:
    """Those that still act in a later part of a run: others have done their work when it begins."""
    at_start = ChangesTable, ChangesStrengths, Select
    return [method for method in methods if not isinstance(method, at_start)]


def noise_for(methods: Methods, images: Images, noise: NoiseSource | None = None) -> NoiseSource:
    """The caller's noise, or that of the seeds, as methods change it."""
    if noise is None:
        noise = Philox.shared(images.seeds)
    for method in methods:
        if isinstance(method, ChangesNoise):
            noise = method.noise(noise)
    return noise


class Position:
    """The row that a run is at. `begin` gets each row before its network is called, as reading the
    row from the call's timestep would wait for the device.

    tokens  [rows][images], see `Row`
    """

    def __init__(
        self, table: StepTable, images: Images, tokens: Sequence[tuple[int, ...]] = ()
    ) -> None:
        self._table, self._images, self._tokens = table, images, tokens
        self.row = self._row(0)

    def begin(self, step: Step) -> None:
        self.row = self._row(self._table.steps.index(step))  # levels fall, so no two rows are equal

    def _row(self, index: int) -> Row:
        table = self._table
        tokens = self._tokens[index] if self._tokens else ()
        return Row(table.first + index, len(table), table[index], self._images, tokens)


class Diversified(NamedTuple):
    """A denoiser with methods around it; outside of Chunked, so that they see all samples."""

    network: Chunked
    methods: Methods
    position: Position

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        row = self.position.row
        for method in self.methods:
            if isinstance(method, ChangesConditioning):
                cond = method.conditioning(cond, row)
        f = self.network(x_in, timestep, cond)
        for method in self.methods:
            if isinstance(method, ChangesOutput):
                f = method.output(f, x_in, row)
        return f


def networks_of(
    networks: Mapping[str, Chunked], methods: Methods, position: Position
) -> Mapping[str, Chunked | Diversified]:
    """Model -> its denoiser with the methods, as it is where there are none."""
    if not methods:
        return networks
    return {model: Diversified(network, methods, position) for model, network in networks.items()}
