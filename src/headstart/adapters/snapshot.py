"""The adapters of one moment: which there are, what they change, and how strongly they act.

A run keeps those that it began with. Attaching, detaching and swapping make the next ones.
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
from headstart.adapters.cache_key import Share, share_of
from headstart.adapters.delta import Delta, LowRank
from headstart.adapters.hooks import Changes, Host, Leaf, acting
from headstart.adapters.layers import Weights
from headstart.adapters.merged_weights import Merged
from headstart.adapters.report import AdapterReport
from headstart.adapters.slots import Slot, Slots
from headstart.adapters.strength import Asked, Strength, as_strength
from headstart.adapters.textual_inversion import Embedding
from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.networks.text import ClipText
from headstart.plan.table import StepTable

ROLE = "adapter:"
"""What the role of an adapter's file starts with in a record; its name follows."""
Asking: TypeAlias = "Mapping[str, Asked] | Sequence[str] | None"
"""Strengths by name for one run, or the names of those that act in it; None: all, as attached."""
Deltas: TypeAlias = Mapping[str, Delta]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """One attached adapter.

    to      the models that it is on; allow: what of its file was let be
    steers  changes a model; texts: changes the text
    deltas  what it changes, by network, where it is merged: sums are made of all of them
    tokens  what its file teaches prompts, whatever its strength
    """

    report: AdapterReport
    to: tuple[str, ...]
    allow: tuple[str, ...]
    texts: bool
    steers: bool = True
    deltas: Mapping[Host, Deltas] = field(default_factory=dict[Host, Deltas])
    strength: Strength = field(default_factory=Strength)
    tokens: tuple[Embedding, ...] = ()

    @property
    def name(self) -> str:
        return self.report.name

    def at(self, asked: Asked) -> Held:
        """With this strength from now on. Raises InputError where it cannot have it."""
        strength = self._possible(as_strength(asked))
        if not self.report.live:
            self.one_number(strength)
        return replace(self, strength=strength)

    def for_run(self, asked: Asked | None) -> Strength:
        """What holds in one run. Raises InputError where the adapter is merged at another."""
        strength = self._possible(self.strength if asked is None else as_strength(asked))
        if not self.report.live and strength != self.strength:
            self.one_number(strength)
            raise InputError(
                f"adapter {self.name!r} is merged at strength {self.strength.constant:g}, and "
                f"this run asks for {strength.constant:g}: other runs share the weights, so set "
                f"engine.adapters[{self.name!r}].strength first"
            )
        return strength

    def _possible(self, strength: Strength) -> Strength:
        """Itself. Raises InputError where it is one of rows, and the adapter acts on the text."""
        by_row = (strength.models, strength.below, strength.rows)
        if not self.steers and any(part is not None for part in by_row):
            raise InputError(
                f"adapter {self.name!r} changes the text alone, which is encoded once for all rows "
                "and models: its strength is a number, or one for each sample"
            )
        return strength

    def one_number(self, strength: Strength) -> float:
        """The strength of a merged adapter. Raises InputError where it is not one for all."""
        if strength.constant is None:
            raise InputError(
                f"adapter {self.name!r} ({self.report.form}) is merged into the weights, because "
                "no low-rank path computes it exactly; the weights serve all samples and rows, so "
                "its strength is one number for all"
            )
        return strength.constant


@final
@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Attached:
    """The adapters of one moment; equal to those of another in which they change the same.

    models   the names that adapters may be attached to
    held     by name, sorted, so that neither columns nor sums depend on the order of attaching
    slots    adapter -> network -> where its low-rank changes are
    merged   network -> the sums that its layers run on
    text     what reads prompts, with the tokens of these adapters; None where networks are alone
    """

    models: tuple[str, ...]
    held: Mapping[str, Held] = field(default_factory=dict[str, Held])
    slots: Mapping[str, Mapping[Host, Slots]] = field(
        default_factory=dict[str, Mapping[Host, Slots]]
    )
    merged: Mapping[Host, Merged] = field(default_factory=dict[Host, Merged])
    text: ClipText | None = None
    changes: Changes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "changes", _changes(self.slots, self.merged))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Attached):
            return NotImplemented
        return self.slots == other.slots and self.merged == other.merged

    def __hash__(self) -> int:
        return hash(self.columns)

    def __iter__(self) -> Iterator[Held]:
        return iter(self.held.values())

    def __getitem__(self, name: str) -> Held:
        if name not in self.held:
            raise InputError(
                f"no adapter {name!r} is attached: attached are "
                f"{', '.join(map(repr, self.held)) or 'none'}"
            )
        return self.held[name]

    @property
    def tokens(self) -> tuple[Embedding, ...]:
        return tuple(token for held in self for token in held.tokens)

    def teachers(self, name: str) -> dict[str, str]:
        """Token -> the adapter that teaches it, besides the one of this name."""
        others = [held for held in self if held.name != name]
        return {token.token: held.name for held in others for token in held.tokens}

    @property
    def columns(self) -> tuple[str, ...]:
        """The adapters with live strengths: the last axis of `strengths`."""
        return tuple(sorted(self.slots))

    def parts(self, network: object) -> tuple[nn.Module, ...]:
        """The modules whose tensors a call of `network` reads, besides its own."""
        found: list[nn.Module] = []
        for by_host in (*(self.slots.get(name, {}) for name in self.columns), self.merged):
            found += [part for host, part in by_host.items() if host.module is network]
        return tuple(found)

    def acts_on(self, layers: Sequence[nn.Module], cond: Conditioning) -> Share | None:
        """What is changed of these layers in a call with `cond`: the same while it is equal. None
        where nothing says whether it is."""
        return share_of(self.changes, self.columns, layers, cond)

    def all_parts(self) -> tuple[Slots | Merged, ...]:
        slots = [part for by_host in self.slots.values() for part in by_host.values()]
        return (*slots, *self.merged.values())

    def acts(self, asked: Asking = None) -> dict[str, Strength]:
        """Every adapter -> its strength in a run that asks for `asked`."""
        if asked is None:
            given: dict[str, Asked] = {}
        elif isinstance(asked, Mapping):
            given = dict(asked)
        else:
            names = _names(asked)
            given = {name: self[name].strength for name in names}
            given |= {name: 0.0 for name in self.held if name not in given}
        for name in given:
            self[name]
        acts = {name: held.for_run(given.get(name)) for name, held in self.held.items()}
        for name, strength in acts.items():
            check_acts(name, self[name].to, strength, self.models)
        return acts

    def strengths(self, table: StepTable, batch: int, asked: Asking = None) -> Tensor | None:
        """[rows, batch, adapters] float32 for `headstart.sample`; None where none is live.

        strength = the plan's column (1 where it has none) * what was asked for, or attached with;
        0 on rows of models that the adapter is not attached to. Raises InputError for a name that
        is not attached, also in the plan, and for counts that are not the run's.
        """
        acts = self.acts(asked)
        self._check_plan(table)
        grids = [self._grid(name, acts[name], table, batch) for name in self.columns]
        return torch.as_tensor(np.stack(grids, axis=-1)) if grids else None

    def text_strengths(self, batch: int, acts: Mapping[str, Strength]) -> Tensor | None:
        """[batch, adapters] for the text encoders; None where no live adapter changes them."""
        if not any(self.held[name].texts for name in self.columns):
            return None
        columns = [
            acts[name].for_text(name, batch) if self.held[name].texts else np.zeros(batch)
            for name in self.columns
        ]
        return torch.as_tensor(np.stack(columns, axis=-1).astype(np.float32))

    def acting(self, strengths: Tensor | None) -> AbstractContextManager[None]:
        """Text encoders called inside have these adapters, at strengths [texts, adapters]."""
        return acting(self.changes, self.columns, strengths)

    def describe(self, acts: Mapping[str, Strength]) -> dict[str, dict[str, Any]]:
        """What the record says of each adapter in a run, beside its file."""
        return {
            name: {"to": self[name].to, "allow": self[name].allow, "strength": strength.to_json()}
            for name, strength in acts.items()
        }

    def recorded(self, described: Mapping[str, Mapping[str, Any]]) -> dict[str, Strength]:
        """The strengths of a record. Raises InputError where an adapter is on other models."""
        for name, told in described.items():
            if list(told["to"]) != list(self[name].to):
                raise InputError(
                    f"the record has adapter {name!r} on {list(told['to'])}, this engine on "
                    f"{list(self[name].to)}: attach it with to={list(told['to'])}"
                )
        return {name: Strength(**told["strength"]) for name, told in described.items()}

    def files(self) -> dict[str, tuple[str, tuple[Path, ...]]]:
        """Role ("adapter:NAME") -> (name, files), for the record."""
        found: dict[str, tuple[str, tuple[Path, ...]]] = {}
        for held in self:
            files = Checkpoint.open(held.report.path).files
            bundled = Path(headstart_weights.__file__).parent in files[0].parents
            name = f"headstart_weights/{files[0].name}" if bundled else str(held.report.path)
            found[f"{ROLE}{held.name}"] = (name, files)
        return found

    def _check_plan(self, table: StepTable) -> None:
        named = {name for step in table for name, _ in step.adapters}
        unknown = sorted(named - set(self.held))
        if unknown:
            raise InputError(
                f"plan {table.name!r} sets adapter(s) {unknown}: attached are "
                f"{', '.join(map(repr, self.held)) or 'none'}"
            )
        texts = sorted(name for name in named if not self.held[name].steers)
        if texts:
            raise InputError(
                f"plan {table.name!r} sets adapter(s) {texts} on some legs, but they change the "
                "text alone, which is encoded once for all rows; give their strengths to the run"
            )
        merged = sorted(name for name in named if not self.held[name].report.live)
        if merged:
            raise InputError(
                f"plan {table.name!r} sets adapter(s) {merged} on some legs, but they are merged "
                "into the weights, which serve all rows; their strength is one number for all"
            )

    def _grid(self, name: str, strength: Strength, table: StepTable, batch: int) -> Any:
        held = self.held[name]
        here = np.array([step.model in held.to for step in table], dtype=np.float64)
        return (strength.grid(name, table, batch) * here[:, None]).astype(np.float32)


def beside(network: nn.Module, name: str, deltas: Mapping[str, LowRank]) -> Attached:
    """Low-rank changes of one network, layer -> change, that come from no file."""
    host = Host(network, lambda: Attached(()))
    host.hook(deltas)
    return Attached((), slots={name: {host: Slots.of(host.layers, host.dtypes, deltas)}})


def check_acts(name: str, to: tuple[str, ...], strength: Strength, models: tuple[str, ...]) -> None:
    """A strength on models that are not here would steer nothing, without a word."""
    acting = strength.models
    if acting is not None and (set(acting) - set(models) or not set(acting) & set(to)):
        raise InputError(
            f"adapter {name!r} is to act on {', '.join(map(repr, acting))}: it is attached to "
            f"{', '.join(map(repr, to))}, and this engine has {', '.join(map(repr, models))}"
        )


def _names(asked: object) -> list[str]:
    if isinstance(asked, str):
        return [asked]
    names = [*cast("Iterable[object]", asked)] if isinstance(asked, Iterable) else [asked]
    found = [name for name in names if isinstance(name, str)]
    if len(found) < len(names):
        raise InputError(
            f"adapters: expected strengths by name or a list of names, got {asked!r:.60}"
        )
    return found


def _changes(slots: Mapping[str, Mapping[Host, Slots]], merged: Mapping[Host, Merged]) -> Changes:
    beside: dict[Leaf, tuple[tuple[str, Slot], ...]] = {}
    for name, by_host in sorted(slots.items()):
        for host, part in by_host.items():
            for path, slot in part.by_path.items():
                leaf = host.leaf(path)
                beside[leaf] = (*beside.get(leaf, ()), (name, slot))
    sums: dict[Leaf, Weights] = {}
    for host, part in merged.items():
        sums |= {host.leaf(path): own for path, own in part.by_path.items()}
    return Changes(beside, sums)
