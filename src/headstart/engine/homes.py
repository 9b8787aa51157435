"""Where each part of an engine lives: its device, and the room that it shares with others, if any.

text, base       on the base's device, where a run begins
distilled, vae   on the distilled model's, where it ends; the latent goes over at the hand-off
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from headstart.engine.memory import available_bytes, pool_bytes
from headstart.engine.places import Placement
from headstart.engine.room import Room
from headstart.interfaces import Conditioning
from headstart.prompt_cache import ReadsPrompt, prompt_key
from headstart.run import State
from headstart.runner.runner import Runner

_NOWHERE = nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Homes:
    """Where parts are. `using` is entered around what launches a network.

    devices     part ("text", "base", "distilled", "vae") -> device; a part without one is on
                whatever device it is given tensors of
    rooms       in which parts take turns, at most one a device; placements: what was planned
    most_bytes  of one device that the engine may have, None for what is free
    one         whether the base's network is the distilled model too, by the strength of a LoRA
    """

    devices: Mapping[str, torch.device] = field(default_factory=dict[str, torch.device])
    rooms: tuple[Room, ...] = ()
    placements: tuple[Placement, ...] = ()
    most_bytes: int | None = None
    one: bool = False

    def using(self, part: str) -> AbstractContextManager[None]:
        """Inside, the weights of a part are where its network reads them."""
        part = self._named(part)
        return next((room.using(part) for room in self.rooms if part in room), _NOWHERE)

    def ahead(self, parts: Iterable[str]) -> None:
        """Begin to bring what is needed next, in this order."""
        parts = tuple(map(self._named, parts))
        for room in self.rooms:
            room.ahead(parts)

    def after(self, models: Iterable[str]) -> None:
        """At the end of a run: what the next one begins with, where no new prompt comes first."""
        if not any("text" in room for room in self.rooms):
            self.ahead(models)

    def shares(self, *parts: str) -> bool:
        """Whether these cannot be on the device at once, because they take turns."""
        return any(all(self._named(part) in room for part in parts) for room in self.rooms)

    def device(self, part: str) -> torch.device | None:
        """Where a part computes; None where that is where its tensors are."""
        return self.devices.get(self._named(part))

    def _named(self, part: str) -> str:
        return "base" if self.one and part == "distilled" else part

    def runner(self, runner: Runner, model: str) -> Runner:
        """The same runner, where it is to be called without a thought of where its weights are."""
        if not self.rooms and len(set(self.devices.values())) < 2:
            return runner
        return Housed(runner, self, model)

    def free(self, parts: Iterable[str]) -> tuple[int | None, int]:
        """Bytes that the fullest of these parts' devices has free, and what graphs hold there."""
        found: list[tuple[int | None, int]] = []
        for place in dict.fromkeys(map(self.device, parts)):
            if place is None:
                continue
            free = available_bytes(place)
            pools = pool_bytes(place)
            if free is not None and self.most_bytes is not None:
                free = min(free, self.most_bytes - self._held(place) - pools)
            found.append((free, pools))
        known = [own for own in found if own[0] is not None]
        return min(known, key=lambda own: sum(map(int, filter(None, own)))) if known else (None, 0)

    def _held(self, place: torch.device) -> int:
        """What is planned to be on a device."""
        return sum(own.held for own in self.placements if own.device == str(place))


def moved(state: State, place: torch.device) -> State:
    """A state on a device; where it is there, itself."""
    if state.x.device == place:
        return state
    rgb = None if state.rgb is None else state.rgb.to(place)
    return State(state.step, state.x.to(place), state.x0.to(place), rgb)


class Housed(NamedTuple):
    """A runner whose weights come when it is called, and whose device may be another."""

    network: Runner
    homes: Homes
    model: str

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        place = self.homes.device(self.model) or x_in.device
        with self.homes.using(self.model):
            if place == x_in.device:
                return self.network(x_in, timestep, cond)
            f = self.network(x_in.to(place), timestep.to(place), cond.to(place))
        return f.to(x_in.device)

    def prompt_key(self, cond: Conditioning) -> Hashable | None:
        """With the weights in their place, because it says where they are; None where the prompt is
        on another device, and would be copied on every row."""
        if self.homes.device(self.model) not in (None, cond.context.device):
            return None
        with self.homes.using(self.model):
            return prompt_key(self.network, cond)

    def read_prompt(self, cond: Conditioning) -> Mapping[str, Tensor]:
        with self.homes.using(self.model):
            return cast("ReadsPrompt", self.network).read_prompt(cond)
