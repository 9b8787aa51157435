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
from typing import Any, final

from torch import Tensor, nn

from headstart import fork
from headstart.adapters.delta import Delta, LowRank
from headstart.adapters.file import AdapterFile, read_adapter
from headstart.adapters.group import Grouping
from headstart.adapters.hooks import Host
from headstart.adapters.kinds import WHOLE
from headstart.adapters.layers import Layer
from headstart.adapters.merged_weights import Merged, Sums, in_place
from headstart.adapters.report import AdapterReport, report_of
from headstart.adapters.resolution import Match, Resolved
from headstart.adapters.slots import Slots
from headstart.adapters.snapshot import Asking, Attached, Deltas, Held, check_acts
from headstart.adapters.snapshots import Present
from headstart.adapters.strength import Asked, Strength, as_strength
from headstart.adapters.tokens import reading, teachable
from headstart.errors import AdapterError, HeadstartError
from headstart.networks.casting import weight_of
from headstart.networks.text import ClipText
from headstart.plan.table import StepTable

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
    def strength(self, asked: Asked) -> None:
        self._adapters.set(self.name, asked)


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
        self._text, self._present = text, Present(networks, text)
        present, towers = self._present, () if text is None else text.towers
        shared = {net: present.host(Host(net, present.look)) for net in networks.values()}
        self._models = {name: shared[network] for name, network in networks.items()}
        self._texts = {
            name: present.host(Host(tower, present.look, conditioned=False))
            for name, tower in zip(("text", "text_2"), towers, strict=False)
        }
        self._matches: dict[str, tuple[Grouping, tuple[str, ...], Match]] = {}
        self._changing = threading.RLock()  # one change at a time; runs do not wait for it

    def __iter__(self) -> Iterator[Adapter]:
        return (Adapter(self, held.name, held.report) for held in self.look())

    def __len__(self) -> int:
        return len(self.look().held)

    def __contains__(self, name: object) -> bool:
        return name in self.look().held

    def __getitem__(self, name: str) -> Adapter:
        return Adapter(self, name, self.look()[name].report)

    @property
    def columns(self) -> tuple[str, ...]:
        """The adapters with live strengths: the last axis of `strengths`."""
        return self.look().columns

    def now(self) -> Attached:
        """The adapters of this moment. A run whose `Conditioning.adapters` they are goes on with
        them whatever is attached, detached or swapped; an engine's runs do."""
        return self._present.now()

    def look(self) -> Attached:
        """The adapters of this moment, for a look: a swap may write into their buffers."""
        return self._present.look()

    def strengths(self, table: StepTable, batch: int, asked: Asking = None) -> Tensor | None:
        """Of the adapters of this moment: see `Attached.strengths`."""
        return self.look().strengths(table, batch, asked)

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
        fork.check_threads()
        asked = as_strength(strength)
        with self._changing:
            if not name or (name in self and not replace):
                raise AdapterError(
                    f"an adapter named {name!r} is attached already: detach it, give another "
                    "name=, or replace=True to swap it"
                )
            check_acts(name, to, asked, tuple(self._models))
            resolved = self._resolve(file, to, tuple(allow))
            tokens, left = teachable(self._text, file, self.look().teachers(name), allow)
            deltas = self._deltas(resolved)
            live = all(isinstance(d, LowRank) for own in deltas.values() for d in own.values())
            held = Held(
                report=report_of(name, file, resolved, live, tokens, left),
                to=to,
                allow=tuple(allow),
                texts=any(host in deltas for host in self._texts.values()),
                steers=any(host in deltas for host in self._models.values()),
                deltas={} if live else deltas,
                tokens=tokens,
            ).at(asked)
            self._check_shared(held)
            if not live:
                self._check_merged(held)
            return self._hold(held, deltas)

    def set(self, name: str, strength: Asked) -> None:
        """Set the strength of an attached adapter, from the next run on."""
        with self._changing:
            before = self.look()
            held = before[name].at(strength)
            if held.report.live:
                self._present.become(changed(before, held={**before.held, name: held}))
            else:
                self._hold(held, held.deltas)

    def detach(self, name: str) -> None:
        """Take an adapter out; with the last one, the networks are to the bit what they were. Runs
        that began with it go on with it."""
        with self._changing:
            before = self.look()
            before[name]
            held = {other: own for other, own in before.held.items() if other != name}
            slots = _without(before.slots, name)
            self._present.become(self._moment(before, held, slots))
            self._present.unhook()

    def attach_distilled(self, path: str | Path, name: str = DISTILLED_LORA) -> AdapterReport:
        """A LoRA that is the distilled model: it acts on that model's rows alone.

        Raises AdapterError for one that changes the text or its tokens, which both models share;
        InputError for one that has to be merged.
        """
        report = self.attach(path, name=name)
        try:
            if self.look()[name].texts or self.look()[name].tokens:
                raise AdapterError(
                    f"{path}: expected a distilled model's LoRA, which changes the UNet alone; "
                    "this one changes the text encoders or their tokens: attach it as an adapter"
                )
            self.set(name, Strength(models=("distilled",)))
        except HeadstartError:
            self.detach(name)
            raise
        return report

    def _hold(self, held: Held, deltas: Mapping[Host, Deltas]) -> AdapterReport:
        """Name the moment in which `held` is attached, with what it changes."""
        before, name = self.look(), held.name
        try:
            slots = _without(before.slots, name)
            if held.report.live:
                slots[name] = self._room(before, held, deltas)
                in_place = slots[name] is before.slots.get(name)
                held = changed(held, report=changed(held.report, in_place=in_place))
            following = dict(sorted({**before.held, name: held}.items()))
            self._present.become(self._moment(before, following, slots))
        except BaseException:  # an interrupt, too, leaves things as they were
            self._present.unhook()
            raise
        return held.report

    def _room(
        self, before: Attached, held: Held, deltas: Mapping[Host, Deltas]
    ) -> Mapping[Host, Slots]:
        """The changes in slots: those that are there, where they fit and no run has them."""
        room, old = before.slots.get(held.name, {}), before.held.get(held.name)
        fits = old is not None and old.to == held.to
        fits = fits and all(host in room and room[host].fits(d) for host, d in deltas.items())
        if fits and self._present.set_aside(room.values()):
            for host, part in room.items():  # and nothing of what was there stays
                part.fill(deltas.get(host, {}))
            return room
        return {host: Slots.of(host.layers, host.dtypes, own) for host, own in deltas.items()}

    def _moment(
        self,
        before: Attached,
        held: Mapping[str, Held],
        slots: Mapping[str, Mapping[Host, Slots]],
    ) -> Attached:
        """The adapters `held`, with the sums of those that are merged; layers look at them."""
        sums: dict[Host, Sums] = {}
        for name, own in held.items():
            for host, deltas in own.deltas.items():
                strength = own.one_number(own.strength)
                sums[host] = {**sums.get(host, {}), name: (deltas, strength)}
        merged = {host: self._merged(before.merged.get(host), host, s) for host, s in sums.items()}
        text = reading(self._text, before, held)
        following = Attached(before.models, held, slots, merged, text)
        for by_host in slots.values():
            for host, part in by_host.items():
                host.hook(part.by_path)
        for host, part in merged.items():
            host.hook((), part.by_path)
        return following

    def _merged(self, old: Merged | None, host: Host, sums: Sums) -> Merged:
        """In the memory that there is, where the sums fit and no run has them."""
        if old is not None and old.holds(sums):
            return old
        with in_place(host.module):
            if old is not None and old.fits(sums) and self._present.set_aside([old]):
                old.fill(sums)
                return old
            return Merged(host.layers, host.dtypes, sums)

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
                grouping, strays, match = self._matches.get(model, (None, (), None))
                try:
                    if match is None or grouping is not file.grouping or strays != file.strays:
                        match = file.match(networks)
                    done = file.resolve(networks, match).require(allow)
                except AdapterError as error:
                    raise AdapterError(f"attaching to the {model} model: {error}") from error
                self._matches[model] = (file.grouping, file.strays, match)
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
                    _check_in_memory(model, [host.layers[path] for path in layers])
                    found[host] = {
                        path: self._difference(host, path, d) for path, d in layers.items()
                    }
        return found

    def _difference(self, host: Host, path: str, delta: Delta) -> Delta:
        """Whole weights as a difference from the base they were tuned on, so that they transfer;
        and what a grouped convolution cannot have beside it, to be merged."""
        if isinstance(delta, LowRank):
            return delta.dense() if getattr(host.layers[path], "groups", 1) != 1 else delta
        if delta.kind is not WHOLE:
            return delta
        base = self._models.get("base")
        of_base = host in self._models.values() and base is not None and path in base.layers
        source = base if of_base and base is not None else host
        layer = source.layers[path]
        with in_place(source.module):
            return delta.relative_to(weight_of(layer), layer.bias)

    def _check_shared(self, held: Held) -> None:
        """A text encoder serves all models, so what changes nothing else is for all of them."""
        apart = [model for model in self._models if model not in held.to]
        if apart and not held.steers:
            raise AdapterError(
                f"{held.report.path} changes the text alone, which {' and '.join(self._models)} "
                f"read alike, and to={list(held.to)} leaves out {', '.join(apart)}: attach it "
                "without to="
            )

    def _check_merged(self, held: Held) -> None:
        apart = [m for m in self._models if m not in held.to]
        shared = [m for m in apart if any(self._models[m] is self._models[t] for t in held.to)]
        if shared:
            raise AdapterError(
                f"adapter {held.name!r} ({held.report.form}) has to be merged, and "
                f"{', '.join(self._models)} are one network here: attach it to all of them"
            )


def _check_in_memory(model: str, layers: Sequence[Layer]) -> None:
    if any(layer.weight.is_meta for layer in layers):
        raise AdapterError(
            f"attaching to the {model} model: its weights are elsewhere between calls, as "
            "enable_sequential_cpu_offload keeps them, and an adapter is made beside them: attach "
            "to a network that is in memory, such as with enable_model_cpu_offload"
        )


def _without(
    slots: Mapping[str, Mapping[Host, Slots]], name: str
) -> dict[str, Mapping[Host, Slots]]:
    return {other: own for other, own in slots.items() if other != name}
