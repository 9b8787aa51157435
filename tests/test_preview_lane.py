"""Where previews are made beside a run: the side stream, emulated, and lanes that fail or wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from previews import decoder, grey, state
from torch import Tensor

import headstart as hs
from headstart.traces.decoders import Decoder, HostPicture, Picture, linear_decoder
from headstart.traces.preview import Frame, SideStream


class FakeCuda:
    """Streams and events that write down who did what, in which order. Work itself is eager."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = "run"

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802  (torch.cuda's name)
        return FakeStream(self)

    def Event(self) -> FakeEvent:  # noqa: N802
        return FakeEvent(self)

    def current_stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, self.now)

    @contextmanager
    def stream(self, stream: FakeStream):
        before, self.now = self.now, stream.name
        try:
            yield
        finally:
            self.now = before


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str = "side") -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: FakeEvent) -> None:
        assert event.recorded_on == "run"
        self.cuda.log.append(f"{self.name} waits")


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.recorded_on = cuda, ""

    def record(self, stream: FakeStream) -> None:
        self.recorded_on = stream.name
        self.cuda.log.append(f"{stream.name} records")

    def synchronize(self) -> None:
        assert self.recorded_on
        thread = threading.current_thread().name
        self.cuda.log.append(f"{thread} synchronizes {self.recorded_on}")


def emulated(slots: int = 2) -> tuple[FakeCuda, SideStream]:
    cuda = FakeCuda()
    return cuda, SideStream(torch.device("cpu"), slots, cuda=cuda, pin=False)


def test_the_side_stream_decodes_on_itself_after_the_runs_copy() -> None:
    cuda, lane = emulated()

    def draw(x0: Tensor) -> Picture:
        cuda.log.append(f"{cuda.now} decodes")
        return grey(x0)

    picture = lane.begin(decoder(draw), state(0, 7.0).x0)()
    assert cuda.log == [
        "run records",
        "side waits",
        "side decodes",
        "side records",
        "MainThread synchronizes side",
    ]
    assert (picture.rgb == 7).all() and picture.finite.all()


def test_only_the_delivering_thread_waits_for_the_device() -> None:
    cuda, lane = emulated()
    frames: list[Frame] = []
    with hs.Preview(decoder(grey), frames.append, slots=2, lane=lane) as preview:
        for step in range(3):
            preview(state(step, float(step)))
    waits = [line for line in cuda.log if "synchronizes" in line]
    assert waits == ["preview synchronizes side"] * len(frames)
    assert len(frames) + preview.dropped == 3


def test_a_ring_slot_is_a_private_copy_that_later_rows_cannot_overwrite() -> None:
    """A captured graph writes every x0 into one buffer."""
    _, lane = emulated(slots=2)
    buffer = torch.full((1, 4, 3, 2), 1.0)
    tensors: list[Tensor] = []

    def draw(x0: Tensor) -> Picture:
        tensors.append(x0)
        return grey(x0)

    first = lane.begin(decoder(draw), buffer)
    buffer.fill_(2.0)
    second = lane.begin(decoder(draw), buffer)
    assert [finish().rgb[0, 0, 0, 0] for finish in (first, second)] == [1, 2]
    assert tensors[0].data_ptr() not in (buffer.data_ptr(), tensors[1].data_ptr())


def test_a_delivered_frame_stays_when_its_slot_is_used_again() -> None:
    _, lane = emulated(slots=1)
    pictures: list[HostPicture] = []
    for value in (1.0, 2.0, 3.0):
        pictures.append(lane.begin(decoder(grey), state(0, value).x0)())
    assert [int(picture.rgb.max()) for picture in pictures] == [1, 2, 3]
    lane.begin(decoder(grey), state(0, 4.0, batch=5).x0)()


def test_more_frames_than_slots_are_refused_by_the_ring() -> None:
    _, lane = emulated(slots=1)
    finish = lane.begin(decoder(grey), state(0).x0)
    with pytest.raises(queue.Empty):
        lane.begin(decoder(grey), state(1).x0)
    finish()
    lane.begin(decoder(grey), state(1).x0)()


def test_a_failure_on_the_side_stream_gives_its_slot_back() -> None:
    _, lane = emulated(slots=1)

    def broken(x0: Tensor) -> Picture:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        lane.begin(decoder(broken), state(0).x0)()
    assert lane.begin(decoder(grey), state(1, 3.0).x0)().rgb.max() == 3


def test_a_preview_with_more_slots_than_its_lane_drops_frames_and_the_run_goes_on() -> None:
    _, lane = emulated(slots=1)
    release = threading.Event()
    got: list[int] = []

    class Waiting:
        """The lane, whose pictures are not done before `release`."""

        def begin(self, decoder: Decoder, x0: Tensor) -> Callable[[], HostPicture]:
            finish = lane.begin(decoder, x0)

            def wait() -> HostPicture:
                release.wait(10)
                return finish()

            return wait

    preview = hs.Preview(
        decoder(grey), lambda frame: got.append(frame.step), slots=4, lane=Waiting()
    )
    for step in range(3):
        preview(state(step))
    assert preview.dropped == 2
    release.set()
    preview.close()
    preview(state(3))
    preview.close()
    assert got == [0, 3]


def test_a_lane_that_cannot_begin_is_reported_and_the_run_goes_on() -> None:
    class Broken:
        def begin(self, decoder: Decoder, x0: Tensor) -> Callable[[], HostPicture]:
            raise RuntimeError("no stream")

    preview = hs.Preview(decoder(grey), lambda _: None, slots=1, lane=Broken())
    for step in range(2):
        preview(state(step))
    with pytest.warns(UserWarning, match="step 0: .* no stream; step 1: .* no stream"):
        preview.close()
    assert preview.dropped == 0


def test_a_picture_that_the_step_drew_is_delivered_and_x0_is_not_read_again() -> None:
    _, lane = emulated()
    frames: list[Frame] = []
    rgb = torch.arange(2 * 3 * 2 * 3, dtype=torch.uint8).view(2, 3, 2, 3)
    x0 = torch.empty(2, 4, 3, 2, device="meta")  # holds nothing that could be read
    with hs.Preview(linear_decoder("sd15"), frames.append, lane=lane) as preview:
        preview(hs.State(0, x0, x0, rgb))
    assert preview.problems == []
    assert torch.equal(torch.from_numpy(frames[0].rgb), rgb) and frames[0].bad == ()
