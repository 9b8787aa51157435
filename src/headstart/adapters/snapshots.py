"""The current snapshot of adapters, and the earlier ones that runs still use."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from typing import final

from headstart.adapters.hooks import Host, LayerHooks
from headstart.adapters.merged_weights import MergedWeights
from headstart.adapters.slots import Slots
from headstart.adapters.snapshot import Snapshot
from headstart.networks.text import ClipText


@final
class Snapshots:
    """Publishes snapshots. `take` never waits for a change: changes are prepared elsewhere."""

    def __init__(self, models: Iterable[str], text_encoder: ClipText | None = None) -> None:
        self._current = Snapshot(tuple(models), text_encoder=text_encoder)
        self._references: list[weakref.ref[Snapshot]] = []
        self._hosts: weakref.WeakSet[Host] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._stale = False

    def host(self, host: Host) -> Host:
        """Register a network, so that its hooks are removed once nobody needs them."""
        self._hosts.add(host)
        return host

    def take(self) -> Snapshot:
        """The current snapshot, which stays valid for as long as the caller keeps it."""
        with self._lock:
            snapshot = copy(self._current)
            self._references = [ref for ref in self._references if ref() is not None]
            self._references.append(weakref.ref(snapshot))
            if self._stale:
                self._unhook()
        return snapshot

    def peek(self) -> Snapshot:
        """The current snapshot, to look at only: a swap may write into its buffers."""
        return self._current

    def publish(self, following: Snapshot) -> None:
        """Make this the current snapshot, in one assignment."""
        self._stale = True
        self._current = following

    def set_aside(self, parts: Iterable[Slots | MergedWeights]) -> bool:
        """Make these parts free to be written to: the current snapshot goes on with copies.

        False where a run uses them; then nothing has changed.
        """
        copies: dict[Slots | MergedWeights, Slots | MergedWeights] = {p: p.copy() for p in parts}
        with self._lock:
            if any(part in copies for snapshot in self._in_use() for part in snapshot.all_parts()):
                return False
            before = self._current
            self._current = replace(
                before,
                attached=dict(before.attached),
                slots={
                    name: {host: copies.get(part, part) for host, part in by_host.items()}
                    for name, by_host in before.slots.items()
                },
                merged={host: copies.get(part, part) for host, part in before.merged.items()},
            )  # pyright: ignore[reportArgumentType]: a copy has the type of its part
        return True

    def unhook(self) -> None:
        with self._lock:
            self._unhook()

    def _in_use(self) -> list[Snapshot]:
        return [snapshot for ref in self._references if (snapshot := ref()) is not None]

    def _unhook(self) -> None:
        snapshots = (self._current, *self._in_use())
        needed = set[LayerHooks]().union(*(snapshot.changes.layers for snapshot in snapshots))
        for host in self._hosts:
            host.unhook(needed)
        self._stale = needed != self._current.changes.layers
