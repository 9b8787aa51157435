"""Adapters on both models of an engine, with strengths that are numbers at run time.

attach(file)   low-rank changes go into slots (`slots`): a strength for each row, sample and adapter
               any other change is merged (`merged_weights`): one strength for everything

Attaching or detaching builds the next snapshot of adapters aside, and publishes it in one
assignment. So runs keep the adapters that they began with, and an interrupt changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, TypeVar, final

from torch import Tensor, nn

from headstart import fork
from headstart.adapters.delta import LowRank
from headstart.adapters.file import AdapterFile, read_adapter
from headstart.adapters.group import Grouping
from headstart.adapters.hooks import Host
from headstart.adapters.host_deltas import deltas_of
from headstart.adapters.merged_weights import MergedWeights, Sums, in_place
from headstart.adapters.report import AdapterReport, report_of
from headstart.adapters.resolution import Match, Resolution
from headstart.adapters.slots import Slots
from headstart.adapters.snapshot import (
    AdapterOptions,
    AllSlots,
    AttachedAdapter,
    Deltas,
    Snapshot,
    check_models,
)
from headstart.adapters.snapshots import Snapshots
from headstart.adapters.strength import Strength, StrengthLike, as_strength
from headstart.adapters.tokens import file_tokens, text_encoder_for
from headstart.errors import AdapterError, HeadstartError
from headstart.networks.text import ClipText
from headstart.plan.table import StepTable

V = TypeVar("V")
DISTILLED_LORA = "distilled-lora"
"""The name of an adapter that is the distilled model."""


@final
class Adapter:
    """One attached adapter. Its strength may be set at any time, and holds from the next run on."""

    __slots__ = ("_adapters", "name", "report")

    def __init__(self, adapters: AdapterSet, name: str, report: AdapterReport) -> None:
        self._adapters, self.name, self.report = adapters, name, report

    @property
    def strength(self) -> Strength:
        return self._adapters.look()[self.name].strength

    @strength.setter
    def strength(self, value: StrengthLike) -> None:
        self._adapters.set(self.name, value)


@final
class AdapterSet:
    """The adapters of an engine, or of any networks, by name. They may come and go while runs are
    under way.

    models  "base" and "distilled" -> network; both names may mean one network, of which the
            distilled model is a strength
    text    the text encoders, which serve both models, and learn the tokens of adapters' files
    """

    def __init__(self, models: Mapping[str, object], text: ClipText | None = None) -> None:
        networks = {n: model for n, model in models.items() if isinstance(model, nn.Module)}
        self._text_encoder, self._snapshots = text, Snapshots(networks, text)
        add, look = self._snapshots.host, self._snapshots.peek
        hosts = {network: add(Host(network, look)) for network in networks.values()}
        self._models = {name: hosts[network] for name, network in networks.items()}
        self._texts = {
            name: add(Host(tower, look, conditioned=False))
            for name, tower in zip(("text", "text_2"), text.towers if text else (), strict=False)
        }
        self._matches: dict[str, tuple[Grouping, tuple[str, ...], Match]] = {}
        self._changing = threading.RLock()  # one change at a time; runs do not wait for it

    def __iter__(self) -> Iterator[Adapter]:
        return (Adapter(self, adapter.name, adapter.report) for adapter in self.look())

    def __len__(self) -> int:
        return len(self.look().attached)

    def __contains__(self, name: object) -> bool:
        return name in self.look().attached

    def __getitem__(self, name: str) -> Adapter:
        return Adapter(self, name, self.look()[name].report)

    @property
    def columns(self) -> tuple[str, ...]:
        """The adapters with live strengths: the last axis of `strengths`."""
        return self.look().columns

    def now(self) -> Snapshot:
        """The adapters of this moment. A run with these as its `Conditioning.adapters` keeps them,
        whatever is attached, detached or swapped meanwhile; an engine's runs do so."""
        return self._snapshots.take()

    def look(self) -> Snapshot:
        """The adapters of this moment, to look at only: a swap may write into their buffers."""
        return self._snapshots.peek()

    def strengths(
        self, table: StepTable, batch: int, asked: AdapterOptions = None
    ) -> Tensor | None:
        """Of the adapters of this moment: see `Snapshot.strengths`."""
        return self.look().strengths(table, batch, asked)

    def attach(
        self,
        path: str | Path,
        strength: StrengthLike = 1.0,
        *,
        to: Sequence[str] | None = None,
        name: str | None = None,
        allow: Sequence[str] = (),
        replace: bool = False,
    ) -> AdapterReport:
        """See `Engine.attach`."""
        file, targets = read_adapter(path), self._targets(to)
        name = Path(path).stem if name is None else name
        return self.put(name, file, strength, to=targets, allow=allow, replace=replace)

    def put(
        self,
        name: str,
        file: AdapterFile,
        strength: StrengthLike = 1.0,
        *,
        to: tuple[str, ...],
        allow: Sequence[str] = (),
        replace: bool = False,
    ) -> AdapterReport:
        """Attach a file whose header has been read; an error changes nothing."""
        fork.check_threads()
        strength = as_strength(strength)
        with self._changing:
            if not name or (name in self and not replace):
                raise AdapterError(
                    f"an adapter named {name!r} is attached already: detach it, give another "
                    "name=, or replace=True to swap it"
                )
            check_models(name, to, strength, tuple(self._models))
            resolutions = self._resolve(file, to, tuple(allow))
            owners = self.look().token_owners(name)
            tokens, skipped = file_tokens(self._text_encoder, file, owners, allow)
            deltas = deltas_of(resolutions, self._models, self._texts)
            live = all(isinstance(d, LowRank) for part in deltas.values() for d in part.values())
            adapter = AttachedAdapter(
                report=report_of(name, file, resolutions, live, tokens, skipped),
                to=to,
                allow=tuple(allow),
                changes_text=any(host in deltas for host in self._texts.values()),
                changes_unet=any(host in deltas for host in self._models.values()),
                deltas={} if live else deltas,
                tokens=tokens,
            ).with_strength(strength)
            self._check_shared(adapter)
            return self._publish(adapter, deltas)

    def set(self, name: str, strength: StrengthLike) -> None:
        """Set the strength of an attached adapter, from the next run on."""
        with self._changing:
            before = self.look()
            adapter = before[name].with_strength(strength)
            if adapter.report.live:
                attached = {**before.attached, name: adapter}
                self._snapshots.publish(changed(before, attached=attached))
            else:
                self._publish(adapter, adapter.deltas)

    def detach(self, name: str) -> None:
        """Take an adapter out; without any, the networks give the same bits as before. Runs that
        began with it keep it."""
        with self._changing:
            before = self.look()
            before[name]
            attached = _without(before.attached, name)
            slots = _without(before.slots, name)
            self._snapshots.publish(self._snapshot(before, attached, slots))
            self._snapshots.unhook()

    def attach_distilled(self, path: str | Path, name: str = DISTILLED_LORA) -> AdapterReport:
        """A LoRA that is the distilled model: it acts on that model's rows alone.

        Raises AdapterError for one that changes the text or its tokens, which both models share;
        InputError for one that has to be merged.
        """
        report = self.attach(path, name=name)
        try:
            if self.look()[name].changes_text or self.look()[name].tokens:
                raise AdapterError(
                    f"{path}: expected a distilled model's LoRA, which changes the UNet alone; "
                    "this one changes the text encoders or their tokens: attach it as an adapter"
                )
            self.set(name, Strength(models=("distilled",)))
        except HeadstartError:
            self.detach(name)
            raise
        return report

    def _publish(self, adapter: AttachedAdapter, deltas: Mapping[Host, Deltas]) -> AdapterReport:
        """Publish the snapshot in which `adapter` is attached with these changes."""
        before, name = self.look(), adapter.name
        try:
            slots = _without(before.slots, name)
            if adapter.report.live:
                slots[name] = self._slots(before, adapter, deltas)
                in_place = slots[name] is before.slots.get(name)
                adapter = changed(adapter, report=changed(adapter.report, in_place=in_place))
            attached = dict(sorted({**before.attached, name: adapter}.items()))
            self._snapshots.publish(self._snapshot(before, attached, slots))
        except BaseException:  # an interrupt, too, changes nothing
            self._snapshots.unhook()
            raise
        return adapter.report

    def _slots(
        self, before: Snapshot, adapter: AttachedAdapter, deltas: Mapping[Host, Deltas]
    ) -> Mapping[Host, Slots]:
        """The changes in slots: the existing ones, where they fit and no run uses them."""
        slots, old = before.slots.get(adapter.name, {}), before.attached.get(adapter.name)
        fits = old is not None and old.to == adapter.to
        fits = fits and all(host in slots and slots[host].fits(d) for host, d in deltas.items())
        if fits and self._snapshots.set_aside(slots.values()):
            for host, part in slots.items():  # also those without a new change, which are cleared
                part.fill(deltas.get(host, {}))
            return slots
        return {host: Slots.of(host.layers, host.dtypes, part) for host, part in deltas.items()}

    def _snapshot(
        self, before: Snapshot, attached: Mapping[str, AttachedAdapter], slots: AllSlots
    ) -> Snapshot:
        """The snapshot with these adapters; merges weights and hooks the layers."""
        sums: dict[Host, Sums] = {}
        for name, adapter in attached.items():
            for host, deltas in adapter.deltas.items():
                strength = adapter.merged_strength(adapter.strength)
                sums[host] = {**sums.get(host, {}), name: (deltas, strength)}
        merged = {host: self._merged(before.merged.get(host), host, s) for host, s in sums.items()}
        encoder = text_encoder_for(self._text_encoder, before, attached)
        following = Snapshot(before.models, attached, slots, merged, encoder)
        for by_host in slots.values():
            for host, part in by_host.items():
                host.hook(part.by_path)
        for host, part in merged.items():
            host.hook((), part.by_path)
        return following

    def _merged(self, old: MergedWeights | None, host: Host, sums: Sums) -> MergedWeights:
        """The merged weights; in the old memory, where they fit and no run uses it."""
        if old is not None and old.has(sums):
            return old
        with in_place(host.module):
            if old is not None and old.fits(sums) and self._snapshots.set_aside([old]):
                old.fill(sums)
                return old
            return MergedWeights(host.layers, host.dtypes, sums)

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
    ) -> dict[str, Resolution]:
        """Model -> the file's resolution there. Networks of the same shapes share one, and files of
        the same names and shapes, one after the other, share the match of their names."""
        texts: Any = {name: host.shapes for name, host in self._texts.items()}
        resolutions: dict[str, Resolution] = {}
        for model in to:
            shapes = self._models[model].shapes
            alike = [r for name, r in resolutions.items() if self._models[name].shapes == shapes]
            if alike:
                resolutions[model] = alike[0]
                continue
            networks: Any = {"unet": shapes, **texts}
            grouping, strays, match = self._matches.get(model, (None, (), None))
            try:
                if match is None or grouping is not file.grouping or strays != file.strays:
                    match = file.match(networks)
                resolutions[model] = file.resolve(networks, match).require(allow)
            except AdapterError as error:
                raise AdapterError(f"attaching to the {model} model: {error}") from error
            self._matches[model] = (file.grouping, file.strays, match)
        return resolutions

    def _check_shared(self, adapter: AttachedAdapter) -> None:
        """Where text encoders, or one network, serve several models, `to` has all of these."""
        apart = [model for model in self._models if model not in adapter.to]
        if apart and not adapter.changes_unet:
            raise AdapterError(
                f"{adapter.report.path} changes the text alone, which {' and '.join(self._models)} "
                f"read alike, and to={list(adapter.to)} leaves out {', '.join(apart)}: attach it "
                "without to="
            )
        hosts = [self._models[model] for model in adapter.to]
        if not adapter.report.live and any(self._models[model] in hosts for model in apart):
            raise AdapterError(
                f"adapter {adapter.name!r} ({adapter.report.form}) has to be merged, and "
                f"{', '.join(self._models)} are one network here: attach it to all of them"
            )


def _without(table: Mapping[str, V], name: str) -> dict[str, V]:
    return {key: value for key, value in table.items() if key != name}
