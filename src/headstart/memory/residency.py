"""The device of each part of an engine, and the arena in which it takes turns with others, if any.

text, base       on the base's device, where a run begins
distilled, vae   on the distilled model's, where it ends; the latent is copied at the hand-off
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from headstart.interfaces import Conditioning
from headstart.memory.arena import Arena
from headstart.memory.available import available_bytes, pool_bytes
from headstart.memory.offload import Placement
from headstart.prompt_cache import ReadsPrompt, prompt_key
from headstart.runner.runner import Runner
from headstart.state import State

_NO_ARENA = nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Residency:
    """Where the parts of an engine are. Enter `using` around everything that launches a network.

    devices      part ("text", "base", "distilled", "vae") -> device; a part without one computes
                 on the device of its inputs
    arenas       in which parts take turns, at most one a device; placements: what was planned
    most_bytes   of one device that the engine may use, None for all that is free
    one_network  whether the base's network is also the distilled model, by the strength of a LoRA
    """

    devices: Mapping[str, torch.device] = field(default_factory=dict[str, torch.device])
    arenas: tuple[Arena, ...] = ()
    placements: tuple[Placement, ...] = ()
    most_bytes: int | None = None
    one_network: bool = False

    def using(self, part: str) -> AbstractContextManager[None]:
        """Inside, the weights of a part are where its network reads them."""
        part = self._network(part)
        arena = next((arena for arena in self.arenas if part in arena), None)
        return _NO_ARENA if arena is None else arena.using(part)

    def prefetch(self, parts: Iterable[str]) -> None:
        """Start to copy what is needed next; `parts` are in the order of use."""
        parts = tuple(map(self._network, parts))
        for arena in self.arenas:
            arena.prefetch(parts)

    def end_run(self, models: Iterable[str]) -> None:
        """Prefetch what the next run begins with, unless it begins with the text encoders."""
        if not any("text" in arena for arena in self.arenas):
            self.prefetch(models)

    def device(self, part: str) -> torch.device | None:
        """Where a part computes; None: on the device of its inputs."""
        return self.devices.get(self._network(part))

    def _network(self, part: str) -> str:
        return "base" if self.one_network and part == "distilled" else part

    def runner(self, runner: Runner, model: str) -> Runner:
        """A runner that brings its weights and its inputs to the model's device when called."""
        if not self.arenas and len(set(self.devices.values())) < 2:
            return runner
        return ResidentRunner(runner, self, model)

    def free(self, parts: Iterable[str]) -> tuple[int | None, int]:
        """(free bytes of the fullest of these parts' devices, bytes of graphs' pools there)."""
        sizes: list[tuple[int, int]] = []
        for device in filter(None, dict.fromkeys(map(self.device, parts))):
            free, pools = available_bytes(device), pool_bytes(device)
            if free is None:
                continue
            if self.most_bytes is not None:
                planned = sum(p.resident_bytes for p in self.placements if p.device == str(device))
                free = min(free, self.most_bytes - planned - pools)
            sizes.append((free, pools))
        return min(sizes, key=sum, default=(None, 0))


def state_to(state: State, device: torch.device) -> State:
    """A state on a device; itself where it is there already."""
    if state.x.device == device:
        return state
    rgb = None if state.rgb is None else state.rgb.to(device)
    return State(state.step, state.x.to(device), state.x0.to(device), rgb)


class ResidentRunner(NamedTuple):
    """A runner whose weights are loaded when it is called, on the model's own device."""

    network: Runner
    residency: Residency
    model: str

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        device = self.residency.device(self.model) or x_in.device
        with self.residency.using(self.model):
            if device == x_in.device:
                return self.network(x_in, timestep, cond)
            f = self.network(x_in.to(device), timestep.to(device), cond.to(device))
        return f.to(x_in.device)

    def prompt_key(self, cond: Conditioning) -> Hashable | None:
        """Computed with the weights loaded, because it holds their addresses. None where the prompt
        is on another device, and would be copied on every row."""
        if self.residency.device(self.model) not in (None, cond.context.device):
            return None
        with self.residency.using(self.model):
            return prompt_key(self.network, cond)

    def read_prompt(self, cond: Conditioning) -> Mapping[str, Tensor]:
        with self.residency.using(self.model):
            return cast("ReadsPrompt", self.network).read_prompt(cond)
