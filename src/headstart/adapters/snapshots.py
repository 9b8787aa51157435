"""Which adapters are attached now, and who still has those of an earlier moment."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import replace
from typing import final

from headstart.adapters.hooks import Host, Leaf
from headstart.adapters.merged_weights import Merged
from headstart.adapters.slots import Slots
from headstart.adapters.snapshot import Attached
from headstart.networks.text import ClipText


@final
class Present:
    """The present moment. `now` takes no longer than a look; changes are prepared elsewhere."""

    def __init__(self, models: Iterable[str], text: ClipText | None = None) -> None:
        self._current = Attached(tuple(models), text=text)
        self._had: list[weakref.ref[Attached]] = []
        self._hosts: weakref.WeakSet[Host] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._stale = False

    def host(self, host: Host) -> Host:
        """Hooks of this network are taken off once nobody needs them."""
        self._hosts.add(host)
        return host

    def now(self) -> Attached:
        """The adapters of this moment, for as long as the caller keeps what it gets."""
        with self._lock:
            own = copy(self._current)
            self._had = [other for other in self._had if other() is not None]
            self._had.append(weakref.ref(own))
            if self._stale:
                self._unhook()
        return own

    def look(self) -> Attached:
        """The adapters of this moment, for who only looks: it holds nothing back."""
        return self._current

    def become(self, following: Attached) -> None:
        """The next moment, in one assignment."""
        self._stale = True
        self._current = following

    def set_aside(self, parts: Iterable[Slots | Merged]) -> bool:
        """Make these free to be written to: the present goes on with copies of them.

        False where a run has them: then nothing has been done.
        """
        copies = {part: part.copy() for part in parts}
        with self._lock:
            if any(part in copies for own in self._held() for part in own.all_parts()):
                return False
            self._current = _moved(self._current, copies)
        return True

    def unhook(self) -> None:
        with self._lock:
            self._unhook()

    def _held(self) -> list[Attached]:
        return [own for had in self._had if (own := had()) is not None]

    def _unhook(self) -> None:
        held = self._held()
        needed: set[Leaf] = {*self._current.changes.leaves}
        for own in held:
            needed |= own.changes.leaves
        for host in self._hosts:
            host.unhook(needed)
        self._stale = needed != self._current.changes.leaves


def _moved(attached: Attached, copies: Mapping[Slots | Merged, Slots | Merged]) -> Attached:
    """The same adapters with copies in place of some parts."""
    return replace(
        attached,
        held=dict(attached.held),
        slots={
            name: {host: copies.get(part, part) for host, part in by_host.items()}
            for name, by_host in attached.slots.items()
        },
        merged={host: copies.get(part, part) for host, part in attached.merged.items()},
    )  # pyright: ignore[reportArgumentType]: a copy is of the kind of its part
