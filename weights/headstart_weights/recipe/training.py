"""A training run of so many minutes or steps that survives being killed: state, log, checkpoints.

The learning-rate schedule follows the fraction that is spent. A run limited by wall clock takes
fewer steps on a slower machine and still ends annealed; one limited by steps gives the same weights
again on the same machine. All randomness of step i comes from `SEED_STRIDE*seed + i`: a resumed run
goes on as the unbroken one would, and runs of different seeds share no step.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headstart_weights.recipe import StageOptions
from headstart_weights.recipe.artwork import write_atomically

StepFunction = Callable[[int, float], dict[str, float]]
"""(step, fraction of the time box spent) -> numbers to log, which may differ from step to step."""

SEED_STRIDE = 1_000_003
"""More than any run has steps; torch's CPU generator reads 32 bits of a seed."""


class Optimiser(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class Average:
    """Exponential moving average of a module, with a warm-up that forgets the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._parameters = dict(module.named_parameters())
        self._decay = decay
        self.values = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, 1.0 - 1.0 / (step / 8 + 1))
        for name, parameter in self._parameters.items():
            self.values[name].lerp_(parameter, 1.0 - decay)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict(self.values, strict=False)


class Run:
    """One stage: all of its state is checkpointed, and `average` is its result."""

    def __init__(
        self,
        name: str,
        options: StageOptions,
        modules: Mapping[str, nn.Module],
        optimisers: Sequence[Optimiser],
        average: Average,
    ) -> None:
        self.name, self.seed = name, options.seed
        self._budget_s, self._steps = options.minutes * 60, options.steps
        self._modules, self._optimisers, self._average = modules, optimisers, average
        self.step, self.elapsed_s = 0, 0.0
        self._checkpoint = options.work / f"{name}.ckpt"
        self._log = options.work / f"{name}.jsonl"
        if self._checkpoint.exists():
            self._resume()

    def loop(
        self,
        step: StepFunction,
        *,
        log_every: int = 50,
        save_every_s: float = 120.0,
        on_save: Callable[[], None] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        numbers: dict[str, list[float]] = defaultdict(list)
        last_save = time.monotonic()
        while (fraction := self._fraction()) < 1.0:
            begin = time.monotonic()
            torch.manual_seed(SEED_STRIDE * self.seed + self.step)
            for key, value in step(self.step, fraction).items():
                numbers[key].append(value)
            self.step += 1
            self._average.update(self.step)
            self.elapsed_s += time.monotonic() - begin
            if on_step:
                on_step()
            if self.step % log_every == 0:
                self._write_log({key: fmean(values) for key, values in numbers.items()})
                numbers.clear()
            if time.monotonic() - last_save > save_every_s:
                self._save()
                if on_save:
                    on_save()
                last_save = time.monotonic()
        self._save()

    def _fraction(self) -> float:
        if self._steps is not None:
            return self.step / self._steps if self._steps else 1.0
        return self.elapsed_s / self._budget_s if self._budget_s else 1.0

    def _write_log(self, means: dict[str, float]) -> None:
        row = {"step": self.step, "elapsed_s": round(self.elapsed_s, 1)}
        row |= {key: round(value, 5) for key, value in means.items()}
        with self._log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _save(self) -> None:
        state = {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "modules": {k: m.state_dict() for k, m in self._modules.items()},
            "optimisers": [o.state_dict() for o in self._optimisers],
            "averages": {self.name: self._average.values},
        }
        write_atomically(self._checkpoint, lambda part: torch.save(state, part))

    def _resume(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        for key, module in self._modules.items():
            module.load_state_dict(state["modules"][key])
        for optimiser, values in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        (average,) = state["averages"].values()
        for name, value in average.items():
            self._average.values[name].copy_(value)


def descend(optimiser: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """One step of gradients clipped to a norm of 1."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.zero_grad()
    loss.backward()
    for group in optimiser.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimiser.step()


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, then rename it into place."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda part: save_file(contiguous, part, metadata=dict(metadata)))
