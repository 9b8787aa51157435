"""Previews: every frame of the batch, and a run that neither waits for them nor changes a bit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bundled import needs_pair
from previews import decoder, grey, state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import headstart as hs
from headstart.traces.decoders import Picture, linear_decoder
from headstart.traces.preview import Frame


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
            trajectory = engine.sample("a fox", seeds=[1, 2, 3], on_step=preview)
        assert torch.equal(trajectory.latents, plain.latents)
        assert torch.equal(trajectory.rgb, plain.rgb)
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
    trajectory = engine.sample("a fox", plan=plan, seeds=[1, 2], on_step=observer, **settings)
    assert torch.equal(trajectory.latents, plain.latents) and plain.x0 is not None
    assert len(observer.states) == len(plain.x0)
    for own, x0 in zip(observer.states, plain.x0, strict=True):
        assert own.rgb is not None and torch.equal(own.rgb, linear(x0).rgb)


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
