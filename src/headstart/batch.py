"""Many runs at once: those whose next row asks the same network share one call of it.

    batch = engine.batch()               # or Batch(networks)
    batch.add(run_a)
    batch.add(run_b)                 # another prompt, plan, step count, guidance, seed, strength
    while batch:
        for served in batch.step():  # one call of one network
            ...

In a server, `async for state in batch.run(run)` in every request does the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakSet

import torch
from torch import Tensor

from headstart.call import Call
from headstart.errors import InputError
from headstart.interfaces import Conditioning, Denoiser
from headstart.joint import Group, advance, is_joint
from headstart.prompt_cache import cached_prompt
from headstart.run import Run, State

MOST_SAMPLES = 16
"""Samples in one call, guided ones counted twice; what a network's memory holds is its own."""
KEPT_SAMPLES = 64
"""Of so many samples at most, in all runs, what networks made of their prompts is kept between
calls: 1.7 GB of SDXL in half precision. Runs that came first keep theirs until their end."""


def doubling(most: int) -> Iterator[int]:
    """1, 2, 4, ... and `most`: buckets that pad a call to less than twice its samples."""
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


class Served(NamedTuple):
    """What a step did for one run: its new state, or the error that ended it."""

    run: Run
    state: State | None
    error: Exception | None = None


class Batch:
    """Runs that share network calls, each with a plan, prompt, seed and strengths of its own.

    denoisers   as in `headstart.sample`
    most        samples in one call at most, guided ones counted twice; a run of more has its own
    buckets     sizes that calls are padded to, such as (1, 2, 4, 8, 16), for networks that are
                captured or compiled once a shape; () for none
    joint       whether one step serves the samples of all runs of a call; by default on a GPU

    A run is admitted and retired between rows. Those that wait longest go first, and with them all
    that ask the same network in the same shape and dtype, with the same adapters. Noise does not
    depend on the company, and results are those of the run alone up to the network's rounding in
    another batch. What a network makes of a run's prompt is made once and goes with the run, of up
    to `KEPT_SAMPLES` samples in all.
    """

    def __init__(
        self,
        denoisers: Mapping[str, Denoiser],
        *,
        most: int = MOST_SAMPLES,
        buckets: Sequence[int] = (),
        joint: bool | None = None,
    ) -> None:
        if most < 1 or min(buckets, default=1) < 1:
            raise InputError(f"most and buckets are at least 1 sample, got {most}, {[*buckets]}")
        self.denoisers, self.most = denoisers, most
        self.buckets, self.joint = sorted(buckets), joint
        self._waiting: dict[Run, None] = {}  # in the order of waiting
        self._keeping: WeakSet[Run] = WeakSet()
        self._answers: dict[Run, asyncio.Future[State]] = {}
        self._driver: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Runs that wait for a call."""
        return len(self._waiting)

    def add(self, run: Run) -> None:
        """Admit a run. Raises InputError for one at its end, or that needs an unknown network."""
        row = run.row
        if row is None:
            raise InputError(f"the run of plan {run.table.name!r} is at its end: nothing to add")
        models = {step.model for step in run.table}
        if unknown := sorted(models - set(self.denoisers)):
            raise InputError(
                f"the run's plan names model(s) {unknown}, but this batch has "
                f"{sorted(self.denoisers)}: give their networks to Batch too"
            )
        self._waiting[run] = None

    def remove(self, run: Run) -> None:
        """Cancel a run: it is asked no more. One that is not there is let be."""
        self._waiting.pop(run, None)
        run.prompts.forget()

    def step(self) -> list[Served]:
        """One call of one network, and the row's step of every run in it; empty if none waits.

        A run that is not done waits again, behind the others. One whose answer is not finite ends
        with its error; the others go on. An error of the network itself, or an answer that is none,
        ends all runs of the call.
        """
        served = self._served(*self._group())
        for run, state, _ in served:
            if state is not None and run.row is not None:
                self._waiting[run] = None
        return served

    async def run(self, run: Run) -> AsyncIterator[State]:
        """The States of a run, which shares calls with all others that are iterated meanwhile.

        Networks run in a thread, so the event loop stays free. To leave the iteration cancels the
        run at its next row and disturbs nobody. Raises what ended the run.
        """
        loop = asyncio.get_running_loop()
        try:
            while run.row is not None:
                self._check_free(run, loop)
                self.add(run)
                answer = loop.create_future()
                self._answers[run] = answer
                if self._driver is None or self._driver.done():
                    self._driver = loop.create_task(self._drive())
                try:
                    yield await answer
                finally:
                    self._waiting.pop(run, None)
                    if self._answers.get(run) is answer:
                        del self._answers[run]
        finally:
            run.prompts.forget()

    def _check_free(self, run: Run, loop: asyncio.AbstractEventLoop) -> None:
        """Raise InputError for a run that somebody iterates, or a batch in another event loop."""
        if self._driver is not None and (own := self._driver.get_loop()) is not loop:
            if own.is_running() and not self._driver.done():
                raise InputError(
                    "this batch is iterated in another event loop: ask there, with "
                    "asyncio.run_coroutine_threadsafe, or give each loop a Batch of its own"
                )
            for left in self._answers:  # nobody in a loop that has ended hears an answer
                self.remove(left)
            self._answers.clear()
            self._driver = None
        if run in self._answers:
            raise InputError(
                f"this run of plan {run.table.name!r} is iterated already: a run has one reader; "
                "begin another for the second"
            )

    async def _drive(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # those that were just answered ask for their next row
            for run, state, error in await asyncio.to_thread(self._served, *self._group()):
                answer = self._answers.get(run)
                if answer is None or answer.done():  # its request has left
                    continue
                if state is not None:
                    answer.set_result(state)
                else:
                    answer.set_exception(error or InputError("the run ended without an answer"))
            await asyncio.sleep(0)

    def _group(self) -> tuple[list[tuple[Run, Call]], list[Served]]:
        """The run that waits longest, and those that fit in its call; and runs that have no call,
        with the reason. They wait no more."""
        group: list[tuple[Run, Call]] = []
        gone: list[Served] = []
        kind: Hashable = None
        samples = 0
        for run in [*self._waiting]:
            if samples >= self.most:
                break
            try:
                call = run.call
            except Exception as error:  # of its noise, or its memory
                gone.append(Served(run, None, error))
                del self._waiting[run]
                continue
            if call is None:
                ended = f"the run of plan {run.table.name!r} was advanced to its end elsewhere"
                gone.append(Served(run, None, InputError(ended)))
                del self._waiting[run]
                continue
            own = _kind(call)
            if group and (own != kind or samples + len(call.x_in) > self.most):
                continue
            kind, samples = own, samples + len(call.x_in)
            group.append((run, call))
            del self._waiting[run]
        return group, gone

    def _served(self, group: Group, gone: Sequence[Served]) -> list[Served]:
        if not group:
            return [*gone]
        calls = [call for _, call in group]
        try:
            with torch.no_grad():
                f = _ask(self.denoisers[calls[0].model], calls, self._size(calls))
                self._keep(run for run, _ in group)
                together = self._joint(f) and is_joint(group)
                made = advance(group, f) if together else _apart(group, f)
        except Exception as error:  # whatever the network raises is its requests' to hear
            made = [error] * len(group)
        for (run, _), state in zip(group, made, strict=True):
            if isinstance(state, Exception) or run.row is None:
                run.prompts.forget()
        return [*gone] + [
            Served(run, None, state) if isinstance(state, Exception) else Served(run, state)
            for (run, _), state in zip(group, made, strict=True)
        ]

    def _keep(self, runs: Iterable[Run]) -> None:
        """Let those that have just read their prompts keep them as long as there is room."""
        kept = sum(run.prompts.samples for run in self._keeping)
        for run in runs:
            if run not in self._keeping and (samples := run.prompts.samples):
                if kept + samples > KEPT_SAMPLES:
                    run.prompts.forget()
                    continue
                kept += samples
                self._keeping.add(run)

    def _size(self, calls: Sequence[Call]) -> int:
        """Samples that the network is given: the next bucket, so that few shapes are captured."""
        count = sum(len(call.x_in) for call in calls)
        return min((size for size in self.buckets if size >= count), default=count)

    def _joint(self, f: Tensor) -> bool:
        """On a CPU a step is one call in C, and takes no longer for being called once a run."""
        return f.device.type != "cpu" if self.joint is None else self.joint


def _kind(call: Call) -> Hashable:
    """What calls that share one must have in common."""
    x_in, timestep, cond = call.x_in, call.timestep, call.cond
    if not isinstance(cond, Conditioning):
        return object()  # nobody knows how to stack it: a call of its own
    told = tuple((name, t.shape[1:], t.dtype) for name, t in cond.tensors.items())
    form = x_in.shape[1:], x_in.dtype, x_in.device, timestep.dtype
    return call.model, *form, cond.adapters, told


def _ask(network: Denoiser, calls: Sequence[Call], size: int) -> Tensor:
    """F of all calls, one after the other; the network sees `size` samples, the last one again
    where there are fewer."""
    x_in, timestep, _ = calls[0][3:]
    cond, *others = _told(network, calls)
    if others:
        x_in = torch.cat([call.x_in for call in calls])
        timestep = torch.cat([call.timestep for call in calls])
        cond = Conditioning.cat([cond, *others])
    count = len(x_in)
    if count < size and isinstance(cond, Conditioning):
        more = torch.arange(size, device=x_in.device).clamp(max=count - 1)
        x_in, timestep, cond = x_in[more], timestep[more], cond[more]
    f = cast("object", network(x_in, timestep, cond))
    if not isinstance(f, Tensor) or f.shape != x_in.shape:
        came = list(f.shape) if isinstance(f, Tensor) else type(f).__name__
        raise InputError(
            f"the {calls[0].model!r} network answered {came}: expected a tensor of the shape of "
            f"its x_in {list(x_in.shape)}"
        )
    return f[:count]


def _told(network: Denoiser, calls: Sequence[Call]) -> list[Any]:
    """What the network is told in each call, with what it makes of the prompts, made once a run;
    without, where it would not do so for all: it is called once."""
    told = [cached_prompt(network, call.cond) for call in calls]
    names = {frozenset(cond.extra) for cond in told if isinstance(cond, Conditioning)}
    return told if len(names) < 2 else [call.cond for call in calls]


def _apart(group: Group, f: Tensor) -> list[State | Exception]:
    """A step for each run."""
    made: list[State | Exception] = []
    parts = f.split_with_sizes([len(call.x_in) for _, call in group])
    for (run, _), part in zip(group, parts, strict=True):
        try:
            made.append(run.advance(part))
        except (InputError, ValueError, TypeError) as error:
            made.append(error)
    return made
