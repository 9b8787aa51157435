"""A snapshot of the adapters: which are attached, what they change, and how strongly they act.

A run keeps the snapshot that it began with. Attaching, detaching and swapping make the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, cast, final

import numpy as np
import torch
from torch import Tensor, nn

import headstart_weights
from headstart.adapters.cache_key import CacheKey, cache_key
from headstart.adapters.delta import Delta, LowRank
from headstart.adapters.hooks import Changes, Host, LayerHooks, adapters_active
from headstart.adapters.layers import Weights
from headstart.adapters.merged_weights import MergedWeights
from headstart.adapters.report import AdapterReport
from headstart.adapters.slots import Slot, Slots
from headstart.adapters.strength import Strength, StrengthLike, as_strength
from headstart.adapters.textual_inversion import Embedding
from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.networks.text import ClipText
from headstart.plan.table import StepTable

ROLE = "adapter:"
"""The beginning of the role of an adapter's file in a record; its name follows."""
AdapterOptions: TypeAlias = "Mapping[str, StrengthLike] | Sequence[str] | None"
"""Strengths by name for one run, or the names of adapters that act; None: all, as attached."""
Deltas: TypeAlias = Mapping[str, Delta]
AllSlots: TypeAlias = Mapping[str, Mapping[Host, Slots]]
"""Adapter -> network -> its low-rank changes."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttachedAdapter:
    """One attached adapter.

    to      the models that it is attached to; allow: names that may have no layer
    deltas  of a merged adapter, by network: sums are made of all merged ones
    tokens  the learned tokens of its file, which prompts may use at any strength
    """

    report: AdapterReport
    to: tuple[str, ...]
    allow: tuple[str, ...]
    changes_text: bool
    changes_unet: bool = True
    deltas: Mapping[Host, Deltas] = field(default_factory=dict[Host, Deltas])
    strength: Strength = field(default_factory=Strength)
    tokens: tuple[Embedding, ...] = ()

    @property
    def name(self) -> str:
        return self.report.name

    def with_strength(self, value: StrengthLike) -> AttachedAdapter:
        """The same adapter at this strength. Raises InputError where it cannot have it."""
        return replace(self, strength=self._checked(as_strength(value)))

    def run_strength(self, value: StrengthLike | None) -> Strength:
        """The strength in one run; None is the attached one. Raises InputError where the adapter is
        merged at another."""
        strength = self._checked(self.strength if value is None else as_strength(value))
        if not self.report.live and strength != self.strength:
            raise InputError(
                f"adapter {self.name!r} is merged at strength {self.strength.constant:g}, and "
                f"this run asks for {strength.constant:g}: other runs share the weights, so set "
                f"engine.adapters[{self.name!r}].strength first"
            )
        return strength

    def _checked(self, strength: Strength) -> Strength:
        """Raises InputError for a strength by row of an adapter that changes the text alone, and
        for one that is not the same everywhere of a merged adapter."""
        by_row = (strength.models, strength.below, strength.rows)
        if not self.changes_unet and any(part is not None for part in by_row):
            raise InputError(
                f"adapter {self.name!r} changes the text alone, which is encoded once for all rows "
                "and models: its strength is a number, or one for each sample"
            )
        if not self.report.live:
            self.merged_strength(strength)
        return strength

    def merged_strength(self, strength: Strength) -> float:
        """The strength as one number. Raises InputError where it is not the same everywhere."""
        if strength.constant is None:
            raise InputError(
                f"adapter {self.name!r} ({self.report.form}) is merged into the weights, because "
                "no low-rank path computes it exactly; the weights serve all samples and rows, so "
                "its strength is one number for all"
            )
        return strength.constant


@final
@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Snapshot:
    """The adapters at one moment; equal to another snapshot with the same changes.

    models        the names of the models that adapters may be attached to
    attached      by name, sorted, so that columns and sums do not depend on the order of attaching
    slots         the low-rank changes
    merged        network -> the weights that its layers run on
    text_encoder  with the tokens of these adapters; None where there are networks alone
    """

    models: tuple[str, ...]
    attached: Mapping[str, AttachedAdapter] = field(default_factory=dict[str, AttachedAdapter])
    slots: AllSlots = field(default_factory=dict[str, Mapping[Host, Slots]])
    merged: Mapping[Host, MergedWeights] = field(default_factory=dict[Host, MergedWeights])
    text_encoder: ClipText | None = None
    changes: Changes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "changes", _changes(self.slots, self.merged))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        return self.slots == other.slots and self.merged == other.merged

    def __hash__(self) -> int:
        return hash(self.columns)

    def __iter__(self) -> Iterator[AttachedAdapter]:
        return iter(self.attached.values())

    def __getitem__(self, name: str) -> AttachedAdapter:
        if name not in self.attached:
            raise InputError(
                f"no adapter {name!r} is attached: attached are "
                f"{', '.join(map(repr, self.attached)) or 'none'}"
            )
        return self.attached[name]

    @property
    def tokens(self) -> tuple[Embedding, ...]:
        return tuple(token for adapter in self for token in adapter.tokens)

    def token_owners(self, name: str) -> dict[str, str]:
        """Token -> the adapter that has it, leaving out the adapter of this name."""
        adapters = [adapter for adapter in self if adapter.name != name]
        return {token.token: adapter.name for adapter in adapters for token in adapter.tokens}

    @property
    def columns(self) -> tuple[str, ...]:
        """The adapters with live strengths: the last axis of `strengths`."""
        return tuple(sorted(self.slots))

    def parts(self, network: object) -> tuple[nn.Module, ...]:
        """The modules of adapters whose tensors a call of `network` reads."""
        modules: list[nn.Module] = []
        for by_host in (*(self.slots.get(name, {}) for name in self.columns), self.merged):
            modules += [part for host, part in by_host.items() if host.module is network]
        return tuple(modules)

    def acts_on(self, layers: Sequence[nn.Module], cond: Conditioning) -> CacheKey | None:
        """A key for what changes these layers in a call with `cond`; None where a change cannot be
        noticed."""
        return cache_key(self.changes, self.columns, layers, cond)

    def all_parts(self) -> tuple[Slots | MergedWeights, ...]:
        slots = [part for by_host in self.slots.values() for part in by_host.values()]
        return (*slots, *self.merged.values())

    def run_strengths(self, options: AdapterOptions = None) -> dict[str, Strength]:
        """Every adapter -> its strength in a run with these options."""
        if options is None:
            values: dict[str, StrengthLike] = {}
        elif isinstance(options, Mapping):
            values = dict(options)
        else:
            values = dict.fromkeys(self.attached, 0.0)
            values |= {name: self[name].strength for name in _names(options)}
        for name in values:
            self[name]
        strengths = {n: adapter.run_strength(values.get(n)) for n, adapter in self.attached.items()}
        for name, strength in strengths.items():
            check_models(name, self[name].to, strength, self.models)
        return strengths

    def strengths(
        self, table: StepTable, batch: int, options: AdapterOptions = None
    ) -> Tensor | None:
        """[rows, batch, adapters] float32 for `headstart.sample`; None where none is live.

        strength = the plan's column (1 where it has none) * that of `options`, or else the attached
        one; 0 on rows of models that the adapter is not attached to. Raises InputError for a name
        that is not attached, also in the plan, and for counts that are not the run's.
        """
        by_name = self.run_strengths(options)
        self._check_plan(table)
        grids = [self._grid(name, by_name[name], table, batch) for name in self.columns]
        return torch.as_tensor(np.stack(grids, axis=-1)) if grids else None

    def text_strengths(self, batch: int, strengths: Mapping[str, Strength]) -> Tensor | None:
        """[batch, adapters] for the text encoders; None where no live adapter changes them."""
        if not any(self.attached[name].changes_text for name in self.columns):
            return None
        columns = [
            strengths[n].for_text(n, batch) if self.attached[n].changes_text else np.zeros(batch)
            for n in self.columns
        ]
        return torch.as_tensor(np.stack(columns, axis=-1).astype(np.float32))

    def active(self, strengths: Tensor | None) -> AbstractContextManager[None]:
        """Inside, text encoders have these adapters, at strengths [texts, adapters]."""
        return adapters_active(self.changes, self.columns, strengths)

    def describe(self, strengths: Mapping[str, Strength]) -> dict[str, dict[str, Any]]:
        """The record's entry of each adapter in a run, besides its file."""
        return {
            name: {"to": self[name].to, "allow": self[name].allow, "strength": strength.to_json()}
            for name, strength in strengths.items()
        }

    def recorded_strengths(self, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Strength]:
        """The strengths of a record. Raises InputError where an adapter is on other models."""
        for name, entry in entries.items():
            if list(entry["to"]) != list(self[name].to):
                raise InputError(
                    f"the record has adapter {name!r} on {list(entry['to'])}, this engine on "
                    f"{list(self[name].to)}: attach it with to={list(entry['to'])}"
                )
        return {name: Strength(**entry["strength"]) for name, entry in entries.items()}

    def files(self) -> dict[str, tuple[str, tuple[Path, ...]]]:
        """Role ("adapter:NAME") -> (name, files), for the record."""
        files_of: dict[str, tuple[str, tuple[Path, ...]]] = {}
        for adapter in self:
            files = Checkpoint.open(adapter.report.path).files
            bundled = Path(headstart_weights.__file__).parent in files[0].parents
            name = f"headstart_weights/{files[0].name}" if bundled else str(adapter.report.path)
            files_of[f"{ROLE}{adapter.name}"] = (name, files)
        return files_of

    def _check_plan(self, table: StepTable) -> None:
        planned = sorted({name for step in table for name, _ in step.adapters})
        attached = {name: self.attached[name] for name in planned if name in self.attached}
        for names, why in (
            (
                [name for name in planned if name not in attached],
                f": attached are {', '.join(map(repr, self.attached)) or 'none'}",
            ),
            (
                [name for name, adapter in attached.items() if not adapter.changes_unet],
                " on some legs, but they change the text alone, which is encoded once for all "
                "rows; give their strengths to the run",
            ),
            (
                [name for name, adapter in attached.items() if not adapter.report.live],
                " on some legs, but they are merged into the weights, which serve all rows; their "
                "strength is one number for all",
            ),
        ):
            if names:
                raise InputError(f"plan {table.name!r} sets adapter(s) {names}{why}")

    def _grid(self, name: str, strength: Strength, table: StepTable, batch: int) -> Any:
        to = self.attached[name].to
        on_model = np.array([step.model in to for step in table], dtype=np.float64)
        return (strength.grid(name, table, batch) * on_model[:, None]).astype(np.float32)


def from_deltas(network: nn.Module, name: str, deltas: Mapping[str, LowRank]) -> Snapshot:
    """A snapshot with low-rank changes of one network, layer -> change, that come from no file."""
    host = Host(network, lambda: Snapshot(()))
    host.hook(deltas)
    return Snapshot((), slots={name: {host: Slots.of(host.layers, host.dtypes, deltas)}})


def check_models(
    name: str, to: tuple[str, ...], strength: Strength, models: tuple[str, ...]
) -> None:
    """Raises InputError for a strength on models that are not here: it would change nothing."""
    acting = models if strength.models is None else strength.models
    if set(acting) - set(models) or (strength.models and not set(acting) & set(to)):
        raise InputError(
            f"adapter {name!r} is to act on {', '.join(map(repr, acting))}: it is attached to "
            f"{', '.join(map(repr, to))}, and this engine has {', '.join(map(repr, models))}"
        )


def _names(options: object) -> list[str]:
    if isinstance(options, str):
        return [options]
    names = [*cast("Iterable[object]", options)] if isinstance(options, Iterable) else [options]
    texts = [name for name in names if isinstance(name, str)]
    if len(texts) < len(names):
        raise InputError(
            f"adapters: expected strengths by name or a list of names, got {options!r:.60}"
        )
    return texts


def _changes(slots: AllSlots, merged: Mapping[Host, MergedWeights]) -> Changes:
    by_layer: dict[LayerHooks, tuple[tuple[str, Slot], ...]] = {}
    for name, by_host in sorted(slots.items()):
        for host, part in by_host.items():
            for path, slot in part.by_path.items():
                hooks = host.hooks(path)
                by_layer[hooks] = (*by_layer.get(hooks, ()), (name, slot))
    sums: dict[LayerHooks, Weights] = {}
    for host, part in merged.items():
        sums |= {host.hooks(path): weights for path, weights in part.by_path.items()}
    return Changes(by_layer, sums)
