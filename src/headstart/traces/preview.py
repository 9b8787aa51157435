"""Pictures of a run while it runs: engine.sample(..., on_step=Preview(decoder, deliver)).

row -> x0 -> (side stream) decoder -> pinned slot -> (delivering thread) deliver(Frame)

The sampling thread only starts work and never waits for it: where every slot is still on its way,
the frame is dropped and counted. Nothing writes to x or x0, so the run has the same bits.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart.errors import InputError, first_line
from headstart.sampler import State
from headstart.traces.decoders import Decoder, HostPicture, Picture
from headstart_kernels import LinearMap


class Frame(NamedTuple):
    """One row's pictures, on the host, for the receiver to keep.

    step  the row's number in the plan
    rgb   uint8 [B, H, W, 3], the whole batch
    bad   samples for which the decoder gave NaN or infinity; NaN is drawn black
    """

    step: int
    rgb: NDArray[np.uint8]
    bad: tuple[int, ...]


class Lane(Protocol):
    """Where pictures are made beside the run."""

    def begin(self, decoder: Decoder, x0: Tensor, /) -> Callable[[], HostPicture]:
        """Called by the sampling thread: start without waiting. The result may wait, elsewhere."""
        ...


class HostLane:
    """For a CPU: the delivering thread decodes.

    A row's x0 is a tensor of its own, which no later row writes to.
    """

    def begin(self, decoder: Decoder, x0: Tensor) -> Callable[[], HostPicture]:
        return lambda: decoder(x0).host()


@final
class SideStream:
    """A CUDA stream of its own with a ring of pinned buffers (audited, not measured).

    The run's stream copies x0 into the slot, which orders it before the next row may overwrite a
    captured graph's buffers, and goes on; the side stream waits for that copy, decodes, and copies
    the picture to the slot's pinned memory. Only the delivering thread waits for a device event.

    cuda  what has Stream, Event, stream and current_stream: `torch.cuda`, or a stand-in for tests
    pin   page-lock the host buffers, without which a copy to the host is not asynchronous
    """

    def __init__(
        self, device: torch.device, slots: int = 4, *, cuda: Any = torch.cuda, pin: bool = True
    ) -> None:
        self.device, self.cuda, self.pin = device, cuda, pin
        self.stream = cuda.Stream(device)
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(slots):
            self._free.put(_Slot(cuda.Event(), cuda.Event()))

    def begin(self, decoder: Decoder, x0: Tensor) -> Callable[[], HostPicture]:
        slot = self._free.get_nowait()  # raises queue.Empty where all slots are in use
        failure: Exception | None = None
        try:
            self._start(slot, decoder, x0)
        except Exception as error:  # raised by finish, once the device has done what was started
            failure = error
        slot.finished.record(self.stream)
        return lambda: self._finish(slot, failure)

    def _start(self, slot: _Slot, decoder: Decoder, x0: Tensor) -> None:
        batch, _, height, width = x0.shape
        slot.fit(x0, (batch, height * decoder.scale, width * decoder.scale, 3), self.pin)
        slot.x0.copy_(x0, non_blocking=True)
        slot.ready.record(self.cuda.current_stream(self.device))
        with self.cuda.stream(self.stream):
            self.stream.wait_event(slot.ready)
            picture = decoder(slot.x0)
            slot.rgb.copy_(picture.rgb, non_blocking=True)
            slot.finite.copy_(picture.finite, non_blocking=True)

    def _finish(self, slot: _Slot, failure: Exception | None) -> HostPicture:
        slot.finished.synchronize()
        try:
            if failure is not None:
                raise failure
            return HostPicture(slot.rgb.numpy().copy(), slot.finite.numpy().copy())
        finally:
            self._free.put(slot)


@dataclass(slots=True)
class _Slot:
    """Buffers for one frame on its way; allocated on first use and for another size of run."""

    ready: Any
    finished: Any
    x0: Tensor = field(default_factory=lambda: torch.empty(0))
    rgb: Tensor = field(default_factory=lambda: torch.empty(0))
    finite: Tensor = field(default_factory=lambda: torch.empty(0))

    def fit(self, x0: Tensor, rgb_shape: tuple[int, ...], pin: bool) -> None:
        if self.x0.shape == x0.shape and self.rgb.shape == rgb_shape:
            return
        self.x0 = torch.empty_like(x0)
        self.rgb = torch.empty(rgb_shape, dtype=torch.uint8, pin_memory=pin)
        self.finite = torch.empty(rgb_shape[0], dtype=torch.bool, pin_memory=pin)


_Pending = tuple[int, Callable[[], HostPicture]]
"""A row, and what waits for its picture."""


@final
class Preview:
    """An observer for `on_step`: rgb uint8 of the whole batch to a callback or a queue.

        with hs.Preview(hs.decoder(engine, "linear"), show, every=2) as preview:
            engine.sample("a fox", seeds=range(8), on_step=preview)

    deliver  called with each Frame, in the order of the rows, on a thread of its own; or a queue
    every    rows between frames, counted in the plan
    slots    frames on their way at once; a slow receiver loses frames (`dropped`), not time
    lane     where frames are made; None: a side stream on CUDA, a thread on a CPU

    A decoder that fails, or gives NaN, ends nothing: the run goes on, and `problems` and a warning
    at the end name the step. `close`, or leaving the `with` block, waits for the frames still on
    their way and raises what the callback raised, or warns of it where the block itself raised. It
    may serve one run after another.
    """

    def __init__(
        self,
        decoder: Decoder,
        deliver: Callable[[Frame], object] | queue.Queue[Frame],
        *,
        every: int = 1,
        slots: int = 4,
        lane: Lane | None = None,
    ) -> None:
        if every < 1 or slots < 1:
            raise InputError(f"every and slots are at least 1, got {every} and {slots}")
        self.decoder, self.every, self.slots = decoder, every, slots
        self.dropped = 0
        self.problems: list[str] = []
        self._deliver = deliver if callable(deliver) else deliver.put_nowait
        self._lane = lane
        self._lanes: dict[torch.device, Lane] = {}
        self._slots = threading.BoundedSemaphore(slots)
        self._pending: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._reported = 0

    @property
    def picture(self) -> LinearMap | None:
        """What `sample` draws for it in the pass that computes x0: a linear picture, on a GPU.

        On a CPU that would be a pass more on the run's thread; the delivering thread makes it.
        """
        linear = self.decoder.linear
        return linear if linear is not None and linear.factors.is_cuda else None

    def check_space(self, lineage: str | None) -> None:
        """Raise InputError for a run of another family; `Engine.sample` calls it first."""
        self.decoder.check_space(lineage)

    def __call__(self, state: State) -> None:
        """Start the picture of a row. Raises InputError for latents the decoder cannot read."""
        if state.step % self.every:
            return
        self.decoder.check(state.x0)
        if not self._slots.acquire(blocking=False):
            self.dropped += 1
            return
        decoder, source = self.decoder, state.x0
        if decoder.linear is not None and state.rgb is not None:
            decoder, source = _READY, state.rgb.permute(0, 3, 1, 2)
        elif decoder.device is not None:  # a lane's streams are of one device
            source = source.to(decoder.device)
        try:
            finish = self._lane_on(source.device).begin(decoder, source)
        except queue.Empty:  # of a lane with fewer slots than this preview
            self._slots.release()
            self.dropped += 1
            return
        except Exception as error:
            self._slots.release()
            self._note(state.step, f"failed: {first_line(error)}")
            return
        self._pending.put((state.step, finish))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="preview", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait for the frames on their way; warn of problems; raise what the callback raised."""
        self._end(quiet=False)

    def __enter__(self) -> Preview:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._end(quiet=kind is not None)

    def _end(self, *, quiet: bool) -> None:
        if self._thread is not None:
            self._pending.put(None)
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None and quiet:
            self.problems.append(f"the receiver failed: {type(error).__name__}: {error}")
        new, self._reported = self.problems[self._reported :], len(self.problems)
        if new:
            warnings.warn(f"preview: {'; '.join(new)}", stacklevel=3)
        if error is not None and not quiet:
            raise error

    def _lane_on(self, device: torch.device) -> Lane:
        if self._lane is not None:
            return self._lane
        if device not in self._lanes:
            on_gpu = device.type == "cuda"
            self._lanes[device] = SideStream(device, self.slots) if on_gpu else HostLane()
        return self._lanes[device]

    def _work(self) -> None:
        while (pending := self._pending.get()) is not None:
            step, finish = pending
            try:
                self._hand_over(step, finish())
            except Exception as error:
                self._note(step, f"failed: {first_line(error)}")
            finally:
                self._slots.release()

    def _hand_over(self, step: int, picture: HostPicture) -> None:
        bad = tuple(np.flatnonzero(~picture.finite).tolist())
        if bad:
            self._note(step, f"gave NaN or infinity for sample(s) {list(bad)}")
        try:
            self._deliver(Frame(step, picture.rgb, bad))
        except queue.Full:
            self.dropped += 1
        except Exception as error:
            self._error = self._error or error

    def _note(self, step: int, problem: str) -> None:
        self.problems.append(f"step {step}: the {self.decoder.name} decoder {problem}")


def _ready(rgb: Tensor) -> Picture:
    finite = torch.ones(len(rgb), dtype=torch.bool, device=rgb.device)
    return Picture(rgb.permute(0, 2, 3, 1), finite)


_READY = Decoder(name="linear", space=None, channels=3, scale=1, draw=_ready)
"""For a picture that the step drew: uint8 [B, 3, h, w]."""
