"""Many runs at once: runs whose next row calls the same network share one call.

    batch = engine.batch()               # or Batch(networks)
    batch.add(run_a)
    batch.add(run_b)                 # another prompt, plan, step count, guidance, seed, strength
    while batch:
        for served in batch.step():      # one call of one network
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
from headstart.run import Run
from headstart.state import State

MOST_SAMPLES = 16
"""Samples in one call; a guided sample counts twice."""
CACHED_SAMPLES = 64
"""Samples of all runs together whose prompt caches stay filled between calls: 1.7 GB of SDXL in
half precision. The runs that come first have a cache until their end."""


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

    Runs are added and removed between rows. The run that waits longest goes first, together with
    all that call the same network with the same shapes, dtypes and adapters. The noise of a run
    does not depend on the others. Its results equal those of the run alone, up to the network's
    rounding in another batch size. Each run has its prompt cache, for up to `CACHED_SAMPLES`
    samples of all runs.
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
        self._waiting: dict[Run, None] = {}  # the longest wait first
        self._caching: WeakSet[Run] = WeakSet()
        self._futures: dict[Run, asyncio.Future[State]] = {}
        self._driver: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many runs wait for a call."""
        return len(self._waiting)

    def add(self, run: Run) -> None:
        """Add a run. Raises InputError for one at its end, or that needs an unknown network."""
        if run.row is None:
            raise InputError(f"the run of plan {run.table.name!r} is at its end: nothing to add")
        if unknown := sorted(set(run.table.models) - set(self.denoisers)):
            raise InputError(
                f"the run's plan names model(s) {unknown}, but this batch has "
                f"{sorted(self.denoisers)}: give their networks to Batch too"
            )
        self._waiting[run] = None

    def remove(self, run: Run) -> None:
        """Cancel a run. A run that was not added is ignored."""
        self._waiting.pop(run, None)
        run.prompt_cache.forget()

    def step(self) -> list[Served]:
        """Make one network call, and the step of every run in it; empty if no run waits.

        An unfinished run waits again, behind the others. A run whose output is not finite ends with
        its error, and the others go on. An error of the network itself, or an output that is no
        tensor of the right shape, ends all runs of the call.
        """
        served = self._served(*self._group())
        for run, state, _ in served:
            if state is not None and run.row is not None:
                self._waiting[run] = None
        return served

    async def run(self, run: Run) -> AsyncIterator[State]:
        """Yield the States of a run, which shares its calls with all runs iterated meanwhile.

        Networks run in a thread, so the event loop stays free. To cancel the run at its next row,
        stop iterating; the others go on. Raises the error that ended the run.
        """
        loop = asyncio.get_running_loop()
        try:
            while run.row is not None:
                self._check_free(run, loop)
                self.add(run)
                future = loop.create_future()
                self._futures[run] = future
                if self._driver is None or self._driver.done():
                    self._driver = loop.create_task(self._drive())
                try:
                    yield await future
                finally:
                    self._waiting.pop(run, None)
                    if self._futures.get(run) is future:
                        del self._futures[run]
        finally:
            run.prompt_cache.forget()

    def _check_free(self, run: Run, loop: asyncio.AbstractEventLoop) -> None:
        """Raise InputError for a run that is iterated already, or in another event loop."""
        if self._driver is not None and (other := self._driver.get_loop()) is not loop:
            if other.is_running() and not self._driver.done():
                raise InputError(
                    "this batch is iterated in another event loop: ask there, with "
                    "asyncio.run_coroutine_threadsafe, or give each loop a Batch of its own"
                )
            for orphan in self._futures:  # nothing in an ended loop awaits them
                self.remove(orphan)
            self._futures.clear()
            self._driver = None
        if run in self._futures:
            raise InputError(
                f"this run of plan {run.table.name!r} is iterated already: a run has one reader; "
                "begin another for the second"
            )

    async def _drive(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # lets runs with a new state add their next row
            for run, state, error in await asyncio.to_thread(self._served, *self._group()):
                future = self._futures.get(run)
                if future is None or future.done():  # cancelled
                    continue
                if state is not None:
                    future.set_result(state)
                else:
                    future.set_exception(error or InputError("the run ended without an answer"))
            await asyncio.sleep(0)

    def _group(self) -> tuple[list[tuple[Run, Call]], list[Served]]:
        """The run that waits longest with those that fit in its call; and failed runs.

        A run fails here if it has no call. All these runs leave the queue.
        """
        group: list[tuple[Run, Call]] = []
        failed: list[Served] = []
        key: Hashable = None
        samples = 0
        for run in [*self._waiting]:
            if samples >= self.most:
                break
            try:
                if (call := run.call) is None:
                    raise InputError(
                        f"the run of plan {run.table.name!r} was advanced to its end elsewhere"
                    )
            except Exception as error:  # also of its noise, or its memory
                failed.append(Served(run, None, error))
                del self._waiting[run]
                continue
            call_key = _call_key(call)
            if group and (call_key != key or samples + len(call.x_in) > self.most):
                continue
            key, samples = call_key, samples + len(call.x_in)
            group.append((run, call))
            del self._waiting[run]
        return group, failed

    def _served(self, group: Group, failed: Sequence[Served]) -> list[Served]:
        if not group:
            return [*failed]
        calls = [call for _, call in group]
        count = sum(len(call.x_in) for call in calls)
        size = min((size for size in self.buckets if size >= count), default=count)
        try:
            with torch.no_grad():
                f = _call_network(self.denoisers[calls[0].model], calls, size)
                self._limit_caches(run for run, _ in group)
                # On a CPU one step a run, each one call in C, takes as long as a joint one.
                joint = f.device.type != "cpu" if self.joint is None else self.joint
                step = advance if joint and is_joint(group) else _advance_each
                results = step(group, f)
        except Exception as error:  # each run of the call reports it
            results = [error] * len(group)
        served = [*failed]
        for (run, _), state in zip(group, results, strict=True):
            error, state = (state, None) if isinstance(state, Exception) else (None, state)
            if error is not None or run.row is None:
                run.prompt_cache.forget()
            served.append(Served(run, state, error))
        return served

    def _limit_caches(self, runs: Iterable[Run]) -> None:
        """Empty the prompt caches of `runs` that exceed `CACHED_SAMPLES`."""
        cached = sum(run.prompt_cache.samples for run in self._caching)
        for run in runs:
            if run not in self._caching and (samples := run.prompt_cache.samples):
                if cached + samples > CACHED_SAMPLES:
                    run.prompt_cache.forget()
                    continue
                cached += samples
                self._caching.add(run)


def _call_key(call: Call) -> Hashable:
    """Calls with the same key can share one network call."""
    x_in, timestep, cond = call.x_in, call.timestep, call.cond
    if not isinstance(cond, Conditioning):
        return object()  # of unknown type, so it cannot be stacked
    tensors = tuple((name, t.shape[1:], t.dtype) for name, t in cond.tensors.items())
    form = x_in.shape[1:], x_in.dtype, x_in.device, timestep.dtype
    return call.model, *form, cond.adapters, tensors


def _call_network(network: Denoiser, calls: Sequence[Call], size: int) -> Tensor:
    """F of all calls, concatenated. The last sample is repeated to make `size` samples."""
    x_in, timestep, _ = calls[0][3:]
    cond, *others = _conds(network, calls)
    if others:
        x_in = torch.cat([call.x_in for call in calls])
        timestep = torch.cat([call.timestep for call in calls])
        cond = Conditioning.cat([cond, *others])
    count = len(x_in)
    if count < size and isinstance(cond, Conditioning):
        samples = torch.arange(size, device=x_in.device).clamp(max=count - 1)
        x_in, timestep, cond = x_in[samples], timestep[samples], cond[samples]
    f = cast("object", network(x_in, timestep, cond))
    if not isinstance(f, Tensor) or f.shape != x_in.shape:
        actual = list(f.shape) if isinstance(f, Tensor) else type(f).__name__
        raise InputError(
            f"the {calls[0].model!r} network answered {actual}: expected a tensor of the shape of "
            f"its x_in {list(x_in.shape)}"
        )
    return f[:count]


def _conds(network: Denoiser, calls: Sequence[Call]) -> list[Any]:
    """The cond of each call, extended by what the network computes from the prompt, or all plain.

    They are stacked into one call, so all must have the same tensors.
    """
    conds = [cached_prompt(network, call.cond) for call in calls]
    names = {frozenset(cond.extra) for cond in conds if isinstance(cond, Conditioning)}
    return conds if len(names) < 2 else [call.cond for call in calls]


def _advance_each(group: Group, f: Tensor) -> list[State | Exception]:
    """As `advance`, with one step for each run."""
    results: list[State | Exception] = []
    parts = f.split_with_sizes([len(call.x_in) for _, call in group])
    for (run, _), part in zip(group, parts, strict=True):
        try:
            results.append(run.advance(part))
        except (InputError, ValueError, TypeError) as error:
            results.append(error)
    return results
