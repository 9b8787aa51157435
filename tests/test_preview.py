"""Previews: every frame of the batch, and a run that neither waits for them nor changes a bit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import headstart as hs
import headstart_weights
from headstart.traces.decoders import Decoder, Picture, linear_decoder
from headstart.traces.preview import Frame, HostPicture, SideStream

needs_pair = pytest.mark.skipif(
    not (Path(headstart_weights.__file__).parent / headstart_weights.MANIFEST).is_file(),
    reason="needs the bundled pair",
)


@pytest.fixture(scope="module")
def engine() -> hs.Engine:
    return hs.Engine.demo(device="cpu")


def state(step: int, value: float = 0.0, batch: int = 2) -> hs.State:
    x = torch.full((batch, 4, 3, 2), value)
    return hs.State(step, x, x)


def decoder(draw: Callable[[Tensor], Picture]) -> Decoder:
    return Decoder(name="tiny", space=None, channels=4, scale=1, draw=draw)


def grey(x0: Tensor) -> Picture:
    """One level a sample: its first value."""
    level = x0[:, 0, 0, 0].to(torch.uint8).view(-1, 1, 1, 1)
    rgb = level.expand(-1, *x0.shape[2:], 3).contiguous()
    return Picture(rgb, torch.isfinite(x0).flatten(1).all(1))


class OpCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_pair
def test_sampling_with_previews_on_is_bit_identical_to_previews_off(engine: hs.Engine) -> None:
    plain = engine.sample("a fox", seeds=[1, 2, 3])
    for name in ("linear", "tiny", "full"):
        frames: list[Frame] = []
        with hs.Preview(hs.decoder(engine, name), frames.append, slots=8) as preview:
            seen = engine.sample("a fox", seeds=[1, 2, 3], on_step=preview)
        assert torch.equal(seen.latents, plain.latents)
        assert torch.equal(seen.rgb, plain.rgb)
        assert [frame.step for frame in frames] == [0, 1, 2, 3]
        assert all(len(frame.rgb) == 3 and frame.rgb.dtype == "uint8" for frame in frames)
        assert preview.dropped == 0


@needs_pair
def test_the_last_full_frame_is_the_finished_image(engine: hs.Engine) -> None:
    frames: queue.Queue[Frame] = queue.Queue()
    with hs.Preview(hs.decoder(engine, "full"), frames, every=3) as preview:
        done = engine.sample("a fox", seeds=[1, 2], on_step=preview)
    first, last = frames.get_nowait(), frames.get_nowait()
    assert (first.step, last.step) == (0, 3)
    assert torch.equal(torch.from_numpy(last.rgb), done.rgb)


@needs_pair
def test_previews_add_no_operation_to_the_sampling_thread_of_a_cpu(engine: hs.Engine) -> None:
    """Off costs nothing, and on costs the sampling thread nothing either: the same operations."""

    def operations(on_step: Callable[[hs.State], object] | None) -> list[str]:
        with OpCounter() as counter:
            engine.sample("a fox", seeds=[1], on_step=on_step)
        return counter.seen

    operations(None)  # what is looked at once a process (does torch round twice?) is behind us
    off = operations(None)
    with hs.Preview(hs.decoder(engine, "linear"), lambda _: None) as preview:
        on = operations(preview)
    assert len(off) > 100
    assert on == off


def test_a_slow_receiver_loses_frames_and_never_holds_up_the_run() -> None:
    release = threading.Event()
    got: list[int] = []

    def slow(frame: Frame) -> None:
        release.wait(10)
        got.append(frame.step)

    preview = hs.Preview(decoder(grey), slow, slots=2)
    for step in range(6):
        preview(state(step))
    assert preview.dropped == 4
    release.set()
    preview.close()
    assert got == [0, 1]


def test_a_full_queue_counts_as_dropped() -> None:
    frames: queue.Queue[Frame] = queue.Queue(maxsize=1)
    with hs.Preview(decoder(grey), frames) as preview:
        for step in range(3):
            preview(state(step))
    assert preview.dropped == 2
    assert frames.get_nowait().step == 0


def test_nan_is_reported_for_its_step_and_sample_and_the_rest_goes_on() -> None:
    frames: list[Frame] = []
    preview = hs.Preview(decoder(grey), frames.append)
    preview(state(0, 1.0))
    spoilt = state(1, 2.0)
    spoilt.x0[1] = torch.nan
    preview(spoilt)
    preview(state(2, 3.0))
    with pytest.warns(UserWarning, match=r"step 1: the tiny decoder gave NaN .* sample\(s\) \[1\]"):
        preview.close()
    assert [(frame.step, frame.bad) for frame in frames] == [(0, ()), (1, (1,)), (2, ())]
    assert len(preview.problems) == 1


@needs_pair
def test_a_decoder_that_fails_is_reported_and_the_images_are_still_there(
    engine: hs.Engine,
) -> None:
    def broken(x0: Tensor) -> Picture:
        raise RuntimeError("out of memory")

    preview = hs.Preview(decoder(broken), lambda _: None)
    done = engine.sample("a fox", seeds=[1], on_step=preview)
    with pytest.warns(UserWarning, match="step 0: the tiny decoder failed: out of memory"):
        preview.close()
    assert torch.equal(done.rgb, engine.sample("a fox", seeds=[1]).rgb)


def test_what_the_callback_raises_comes_out_at_the_end() -> None:
    def angry(frame: Frame) -> None:
        raise KeyError(frame.step)

    preview = hs.Preview(decoder(grey), angry)
    preview(state(5))
    with pytest.raises(KeyError, match="5"):
        preview.close()
    preview.close()


def test_latents_of_another_family_are_refused_at_once() -> None:
    preview = hs.Preview(linear_decoder("sdxl"), lambda _: None)
    with pytest.raises(hs.InputError, match="reads latents"):
        preview(hs.State(0, torch.zeros(1, 16, 2, 2), torch.zeros(1, 16, 2, 2)))
    with pytest.raises(hs.InputError, match="at least 1"):
        hs.Preview(linear_decoder("sdxl"), lambda _: None, every=0)


# ---------------------------------------------------------------- drawn by the step itself


@needs_pair
@pytest.mark.parametrize("plan", ["distilled", "base"])
def test_a_run_that_draws_as_it_steps_has_the_same_bits_and_each_rows_own_picture(
    engine: hs.Engine, plan: str
) -> None:
    linear = hs.decoder(engine, "linear")
    assert linear.linear is not None

    class Observer:
        picture = linear.linear

        def __init__(self) -> None:
            self.states: list[hs.State] = []

        def __call__(self, state: hs.State) -> None:
            self.states.append(state)

    settings = {"steps": 3} if plan == "base" else {}
    plain = engine.sample("a fox", plan=plan, seeds=[1, 2], keep_x0=True, **settings)
    observer = Observer()
    drawn = engine.sample("a fox", plan=plan, seeds=[1, 2], on_step=observer, **settings)
    assert torch.equal(drawn.latents, plain.latents) and plain.x0 is not None
    assert len(observer.states) == len(plain.x0)
    for state, x0 in zip(observer.states, plain.x0, strict=True):
        assert state.rgb is not None and torch.equal(state.rgb, linear(x0).rgb)


def test_a_picture_that_the_step_drew_is_delivered_and_x0_is_not_read_again() -> None:
    _, lane = emulated()
    frames: list[Frame] = []
    rgb = torch.arange(2 * 3 * 2 * 3, dtype=torch.uint8).view(2, 3, 2, 3)
    x0 = torch.empty(2, 4, 3, 2, device="meta")  # holds nothing that could be read
    with hs.Preview(linear_decoder("sd15"), frames.append, lane=lane) as preview:
        preview(hs.State(0, x0, x0, rgb))
    assert preview.problems == []
    assert torch.equal(torch.from_numpy(frames[0].rgb), rgb) and frames[0].bad == ()


def test_another_decoder_still_decodes_where_the_step_drew_a_picture() -> None:
    frames: list[Frame] = []
    rgb = torch.zeros(2, 3, 2, 3, dtype=torch.uint8)
    with hs.Preview(decoder(grey), frames.append) as preview:
        preview(state(0, 9.0)._replace(rgb=rgb))
    assert (frames[0].rgb == 9).all()


def test_only_a_linear_preview_on_a_gpu_asks_the_step_to_draw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = hs.Preview(linear_decoder("sd15"), lambda _: None)
    assert linear.picture is None
    assert linear.decoder.linear is not None
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert linear.picture is linear.decoder.linear
    assert hs.Preview(decoder(grey), lambda _: None).picture is None


@needs_pair
def test_a_decoder_of_another_family_is_refused_before_the_run_begins(engine: hs.Engine) -> None:
    """Latents of SD and of the bundled pair both have 4 channels: only the lineage tells."""
    began: list[int] = []
    for lineage in ("sd15", "sdxl"):
        preview = hs.Preview(linear_decoder(lineage), lambda frame: began.append(frame.step))
        with pytest.raises(hs.InputError, match=f"for {lineage} latents, these are demo latents"):
            engine.sample("a fox", seeds=1, on_step=preview)
        preview.close()
    assert not began


@needs_pair
def test_a_run_that_is_stopped_early_still_delivers_what_it_began(engine: hs.Engine) -> None:
    frames: list[int] = []
    with hs.Preview(hs.decoder(engine, "tiny"), lambda frame: frames.append(frame.step)) as preview:
        for state in engine.iterate("a fox", seeds=1):
            preview(state)
            if state.step == 1:
                break
    assert frames == [0, 1]


def test_what_the_block_raises_is_not_hidden_by_what_the_callback_raised() -> None:
    def angry(frame: Frame) -> None:
        raise KeyError(frame.step)

    with (
        pytest.warns(UserWarning, match="the receiver failed: KeyError: 5"),
        pytest.raises(ZeroDivisionError),
        hs.Preview(decoder(grey), angry) as preview,
    ):
        preview(state(5))
        raise ZeroDivisionError


# ---------------------------------------------------------------- the side stream, emulated


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

    drawn = lane.begin(decoder(draw), state(0, 7.0).x0)()
    assert cuda.log == [
        "run records",
        "side waits",
        "side decodes",
        "side records",
        "MainThread synchronizes side",
    ]
    assert (drawn.rgb == 7).all() and drawn.finite.all()


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
    seen: list[Tensor] = []

    def draw(x0: Tensor) -> Picture:
        seen.append(x0)
        return grey(x0)

    first = lane.begin(decoder(draw), buffer)
    buffer.fill_(2.0)
    second = lane.begin(decoder(draw), buffer)
    assert [drawn().rgb[0, 0, 0, 0] for drawn in (first, second)] == [1, 2]
    assert seen[0].data_ptr() not in (buffer.data_ptr(), seen[1].data_ptr())


def test_a_delivered_frame_stays_when_its_slot_is_used_again() -> None:
    _, lane = emulated(slots=1)
    kept: list[HostPicture] = []
    for value in (1.0, 2.0, 3.0):
        kept.append(lane.begin(decoder(grey), state(0, value).x0)())
    assert [int(drawn.rgb.max()) for drawn in kept] == [1, 2, 3]
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

    class Held:
        """The lane, whose pictures are not done before `release`."""

        def begin(self, decoder: Decoder, x0: Tensor) -> Callable[[], HostPicture]:
            finish = lane.begin(decoder, x0)

            def wait() -> HostPicture:
                release.wait(10)
                return finish()

            return wait

    preview = hs.Preview(decoder(grey), lambda frame: got.append(frame.step), slots=4, lane=Held())
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
