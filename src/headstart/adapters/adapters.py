"""Adapters on both models of an engine at once, with strengths that are numbers at run time.

attach(file) -> a low-rank change in slots (`slots`): strength a row, a sample, an adapter
             -> any other change merged from the pristine weights: one strength for all
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

import headstart_weights
from headstart.adapters.attached import Adapter, AdapterReport, report_of
from headstart.adapters.delta import Delta, Dense, LowRank
from headstart.adapters.file import AdapterFile, Match, Resolved, read_adapter
from headstart.adapters.group import Grouping
from headstart.adapters.slots import Host, acting
from headstart.adapters.strength import Asked, Strength, as_strength
from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import AdapterError, InputError
from headstart.plan.table import StepTable

ROLE = "adapter:"
"""What the role of an adapter's file starts with in a record; its name follows."""
Asking = Mapping[str, Asked] | Sequence[str] | None
"""Strengths by name for one run, or the names of those that act in it; None: all, as attached."""
Deltas = Mapping[str, Delta]


@final
class AdapterSet:
    """The adapters of an engine, or of any networks, by name. Attach and detach between runs.

    models  "base" and "distilled" -> network; both names may mean one network, of which the
            distilled model is a strength
    towers  the text encoders, which serve both models
    """

    def __init__(self, models: Mapping[str, object], towers: Sequence[nn.Module] = ()) -> None:
        shared: dict[int, Host] = {}
        self._models = {
            name: shared.setdefault(id(network), Host(network))
            for name, network in models.items()
            if isinstance(network, nn.Module)
        }
        self._texts = {
            name: Host(tower, conditioned=False)
            for name, tower in zip(("text", "text_2"), towers, strict=False)
        }
        self._held: dict[str, Adapter] = {}
        self._matches: dict[str, tuple[Grouping, Match]] = {}

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._held:
            raise InputError(
                f"no adapter {name!r} is attached: attached are "
                f"{', '.join(map(repr, self._held)) or 'none'}"
            )
        return self._held[name]

    @property
    def columns(self) -> tuple[str, ...]:
        """The adapters with live strengths: the last axis of `strengths`. Sorted, so that neither
        columns nor sums depend on the order of attaching."""
        return tuple(name for name, held in self._held.items() if held.report.live)

    @property
    def epoch(self) -> int:
        """Grows when a buffer or a weight moves; graphs captured at another epoch are stale."""
        return sum(host.epoch for host in self._hosts())

    def attach(
        self,
        path: str | Path,
        strength: Asked = 1.0,
        *,
        to: Sequence[str] | None = None,
        name: str | None = None,
        allow: Sequence[str] = (),
        replace: bool = False,
    ) -> AdapterReport:
        """See `Engine.attach`."""
        file = read_adapter(path)
        name = Path(path).stem if name is None else name
        targets = self._targets(to)
        return self.put(name, file, strength, to=targets, allow=allow, replace=replace)

    def put(
        self,
        name: str,
        file: AdapterFile,
        strength: Asked = 1.0,
        *,
        to: tuple[str, ...],
        allow: Sequence[str] = (),
        replace: bool = False,
    ) -> AdapterReport:
        """Attach a file whose header has been read; nothing is changed where it does not fit."""
        asked = as_strength(strength)
        if not name or (name in self._held and not replace):
            raise AdapterError(
                f"an adapter named {name!r} is attached already: detach it, give another name=, or "
                "replace=True to swap it"
            )
        self._check_acts(name, to, asked)
        resolved = self._resolve(file, to, tuple(allow))
        deltas = self._deltas(resolved)
        live = all(isinstance(d, LowRank) for parts in deltas.values() for d in parts.values())
        old = self._held.get(name)
        fits = old is not None and old.report.live and live and old.to == to
        fits = fits and all(host.fits(name, parts) for host, parts in deltas.items())
        report = report_of(name, file, resolved, live, fits)
        texts = any(host in deltas for host in self._texts.values())
        adapter = Adapter(report, to, tuple(allow), texts)
        if not live:
            self._check_merged(adapter, asked)
        if old is not None and not fits:
            self.detach(name)
        self._apply(adapter, deltas, asked)
        return report

    def detach(self, name: str) -> None:
        """Take an adapter out; with the last one, the networks are to the bit what they were."""
        adapter = self[name]
        for host in adapter.hosts:
            host.remove(name)
        del self._held[name]
        self._set_columns()

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

    def acts(self, asked: Asking = None) -> dict[str, Strength]:
        """Every attached adapter -> its strength in a run that asks for `asked`."""
        if asked is None:
            given: dict[str, Asked] = {}
        elif isinstance(asked, Mapping):
            given = dict(asked)
        else:
            names = [asked] if isinstance(asked, str) else list(asked)
            given = {name: self[name].strength for name in names}
            given |= {name: 0.0 for name in self._held if name not in given}
        for name in given:
            self[name]
        acts = {name: held.for_run(given.get(name)) for name, held in self._held.items()}
        for name, strength in acts.items():
            self._check_acts(name, self[name].to, strength)
        return acts

    def text_strengths(self, batch: int, acts: Mapping[str, Strength]) -> Tensor | None:
        """[batch, adapters] for the text encoders; None where no live adapter changes them."""
        if not any(self._held[name].texts for name in self.columns):
            return None
        columns = [
            acts[name].for_text(name, batch) if self._held[name].texts else np.zeros(batch)
            for name in self.columns
        ]
        return torch.as_tensor(np.stack(columns, axis=-1).astype(np.float32))

    def acting(self, strengths: Tensor | None) -> AbstractContextManager[None]:
        """Text encoders called inside have these strengths [texts, adapters]."""
        return acting(self.columns, strengths)

    def attach_distilled(self, path: str | Path, name: str = "distilled-lora") -> AdapterReport:
        """A LoRA that is the distilled model: it acts on that model's rows alone.

        Raises AdapterError for one that also changes the text, which both models share.
        """
        report = self.attach(path, Strength(models=("distilled",)), name=name)
        if self[name].texts:
            self.detach(name)
            raise AdapterError(
                f"{path}: expected a distilled model's LoRA, which changes the UNet alone; this "
                "one changes the text encoders too: attach it as an adapter"
            )
        return report

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

    def _hosts(self) -> list[Host]:
        return list(dict.fromkeys((*self._models.values(), *self._texts.values())))

    def _targets(self, to: Sequence[str] | None) -> tuple[str, ...]:
        names = tuple(self._models) if to is None else (to,) if isinstance(to, str) else tuple(to)
        unknown = [name for name in names if name not in self._models]
        if unknown or not names:
            raise AdapterError(
                f"to={list(names)}: this engine has {', '.join(map(repr, self._models))}, and an "
                "adapter needs at least one of them"
            )
        return tuple(sorted(set(names)))

    def _resolve(
        self, file: AdapterFile, to: tuple[str, ...], allow: tuple[str, ...]
    ) -> dict[str, Resolved]:
        """Model -> what the file is there; two networks of the same shapes are resolved once, and
        names are matched once for files of the same names and shapes, one after the other."""
        texts: Any = {name: host.shapes for name, host in self._texts.items()}
        known: list[tuple[object, Resolved]] = []
        found: dict[str, Resolved] = {}
        for model in to:
            shapes = self._models[model].shapes
            done = next((resolved for seen, resolved in known if seen == shapes), None)
            if done is None:
                networks: Any = {"unet": shapes, **texts}
                grouping, match = self._matches.get(model, (None, None))
                try:
                    if match is None or grouping is not file.grouping:
                        match = file.match(networks)
                    done = file.resolve(networks, match).require(allow)
                except AdapterError as error:
                    raise AdapterError(f"attaching to the {model} model: {error}") from error
                self._matches[model] = (file.grouping, match)
                known.append((shapes, done))
            found[model] = done
        return found

    def _deltas(self, resolved: Mapping[str, Resolved]) -> dict[Host, Deltas]:
        """Host -> layer -> change. The text encoders serve all models, so any of them may tell."""
        found: dict[Host, Deltas] = {}
        for model, told in resolved.items():
            hosts = {"unet": self._models[model], **self._texts}
            for network, host in hosts.items():
                layers = {path: d for (where, path), d in told.deltas.items() if where == network}
                if layers:
                    found[host] = {
                        path: self._difference(host, path, d) for path, d in layers.items()
                    }
        return found

    def _difference(self, host: Host, path: str, delta: Delta) -> Delta:
        """Whole weights as a difference from the base they were tuned on, so that they transfer."""
        if not isinstance(delta, Dense):
            return delta
        base = self._models.get("base")
        of_base = host in self._models.values() and base is not None and path in base.layers
        origin = base if of_base and base is not None else host
        return delta.relative_to(origin.pristine(path).float())

    def _apply(self, adapter: Adapter, deltas: Mapping[Host, Deltas], asked: Strength) -> None:
        for host, parts in deltas.items():
            if adapter.report.live:
                host.put(adapter.name, {p: d for p, d in parts.items() if isinstance(d, LowRank)})
            else:
                host.merge(adapter.name, parts, asked.constant or 0.0)
        held = self._held.get(adapter.name)
        adapter.hosts = tuple(dict.fromkeys((*(held.hosts if held else ()), *deltas)))
        for host in adapter.hosts:  # a swap in place leaves none of the old changes behind
            if host not in deltas:
                host.put(adapter.name, {})
        adapter.strength = asked
        self._held = dict(sorted({**self._held, adapter.name: adapter}.items()))
        self._set_columns()

    def _set_columns(self) -> None:
        for host in self._hosts():
            if host.columns != self.columns:
                host.columns = self.columns
                host.epoch += 1

    def _check_acts(self, name: str, to: tuple[str, ...], strength: Strength) -> None:
        """A strength on models that are not here would steer nothing, without a word."""
        models = strength.models
        if models is not None and (set(models) - set(self._models) or not set(models) & set(to)):
            raise InputError(
                f"adapter {name!r} is to act on {', '.join(map(repr, models))}: it is attached to "
                f"{', '.join(map(repr, to))}, and this engine has "
                f"{', '.join(map(repr, self._models))}"
            )

    def _check_merged(self, adapter: Adapter, asked: Strength) -> None:
        adapter.one_number(asked)
        apart = [m for m in self._models if m not in adapter.to]
        shared = [m for m in apart if any(self._models[m] is self._models[t] for t in adapter.to)]
        if shared:
            raise AdapterError(
                f"adapter {adapter.name!r} ({adapter.report.form}) has to be merged, and "
                f"{', '.join(self._models)} are one network here: attach it to all of them"
            )

    def _check_plan(self, table: StepTable) -> None:
        named = {name for step in table for name, _ in step.adapters}
        unknown = sorted(named - set(self._held))
        if unknown:
            raise InputError(
                f"plan {table.name!r} sets adapter(s) {unknown}: attached are "
                f"{', '.join(map(repr, self._held)) or 'none'}"
            )
        merged = sorted(name for name in named if not self._held[name].report.live)
        if merged:
            raise InputError(
                f"plan {table.name!r} sets adapter(s) {merged} on some legs, but they are merged "
                "into the weights, which serve all rows; their strength is one number for all"
            )

    def _grid(self, name: str, strength: Strength, table: StepTable, batch: int) -> Any:
        held = self._held[name]
        here = np.array([step.model in held.to for step in table], dtype=np.float64)
        return (strength.grid(name, table, batch) * here[:, None]).astype(np.float32)
