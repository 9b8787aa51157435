"""A capture that fails leaves stream, pool and site usable, or a site that says it is dead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headstart.errors import CaptureError, InputError
from headstart.interfaces import Conditioning
from headstart.runner.cuda import Cuda
from headstart.runner.runner import EagerRunner

T7 = torch.tensor([7])


class Looks(nn.Module):
    """Waits for the device: reads a tensor as a Python number."""

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return x_in * float(timestep[0])


class Stops(nn.Module):
    """Ends a capture by an error of its own, which makes nothing invalid."""

    calls = 0

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise InputError("the third call")
        return x_in


class Interrupted(Stops):
    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return x_in


def refused(stand: Any, network: nn.Module, error: type[BaseException] = CaptureError) -> str:
    runner = stand.runner()
    runner.network = network
    with pytest.raises(error) as caught:
        runner(stand.latent(1), T7, stand.words(1))
    return str(caught.value)


KINDS = [(Looks, CaptureError), (Stops, InputError), (Interrupted, KeyboardInterrupt)]


@pytest.mark.parametrize(("network", "error"), KINDS)
def test_the_stream_the_pool_and_the_site_are_usable_after_it(
    stand: Any, network: type[nn.Module], error: type[BaseException]
) -> None:
    """Graphs from before replay, others are captured, memory is given back, draws are eager."""
    runner, eager = stand.runner(), EagerRunner(stand.denoisers["base"])
    caller, cond = stand.cuda.current_stream(), stand.words(1)
    expected = eager(stand.latent(1), T7, cond)
    assert torch.equal(runner(stand.latent(1), T7, cond), expected)
    refused(stand, network(), error)
    assert stand.cuda.current_stream() is caller and stand.cuda.underway == []
    assert not stand.cuda.is_current_stream_capturing() and stand.site.dead is None
    stand.cuda.empty_cache()
    assert stand.cuda.happened("empty_cache")[-1].detail == "given back"
    captures = stand.site.captures
    assert torch.equal(runner(stand.latent(1), T7, cond), expected)
    assert stand.site.captures == captures, "the graph from before"
    two = stand.latent(2), torch.tensor([7, 7]), stand.words(2)
    assert torch.equal(runner(*two), eager(*two)) and stand.site.captures == captures + 1


def test_what_comes_after_has_a_pool_and_a_stream_of_its_own(stand: Any) -> None:
    runner = stand.runner()
    runner(stand.latent(1), T7, stand.words(1))
    refused(stand, Looks())
    runner(stand.latent(2), torch.tensor([7, 7]), stand.words(2))
    captures = stand.cuda.happened("capture")
    first, last = captures[0], captures[-1]
    assert first.stream != last.stream and first.detail[0] != last.detail[0]
    used = [memory.users for memory in stand.cuda.pools.values()]
    assert used.count(1) == 2 and sum(used) == 2, "a graph each, and none for what failed"


def test_the_error_is_the_first_one_and_not_that_of_the_end(stand: Any) -> None:
    message = refused(stand, Looks())
    assert ".item()" in message and "previous error" not in message


def test_a_device_that_does_not_end_the_capture_makes_the_site_dead(stand: Any) -> None:
    """Whoever asks again hears it in a line, before anything is tried."""
    runner = stand.runner()
    runner(stand.latent(1), T7, stand.words(1))
    stand.cuda.stuck = True
    caller = stand.cuda.current_stream()
    refused(stand, Looks())
    assert stand.cuda.current_stream() is caller
    assert stand.site.dead is not None and "still capturing" in stand.site.dead
    stand.cuda.stuck = False
    events = len(stand.cuda.log)
    for batch in (1, 2):
        call = stand.latent(batch), T7.repeat(batch), stand.words(batch)
        with pytest.raises(CaptureError, match=r"any more.*start the process anew") as caught:
            runner(*call)
        with pytest.raises(CaptureError, match="any more"):
            runner.prepare([call])
        assert "\n" not in str(caught.value)
    assert len(stand.cuda.log) == events


def test_with_a_fallback_a_dead_site_runs_eagerly(stand: Any) -> None:
    runner, eager = stand.runner(fallback=True), EagerRunner(stand.denoisers["base"])
    stand.site.dead = "it was said so"
    for batch in (1, 1, 2):
        call = stand.latent(batch), T7.repeat(batch), stand.words(batch)
        assert torch.equal(runner(*call), eager(*call))
    assert len(runner.refusals) == 2 and "it was said so" in runner.refusals[0]
    assert stand.cuda.happened("capture") == []


def test_a_pool_that_every_graph_has_left_is_not_used_again(stand: Any) -> None:
    """torch asserts `use_count > 0` for a pool that it still knows."""
    stand.site.max_graphs = 1
    runner = stand.runner()
    for batch in (1, 2):
        runner(stand.latent(batch), T7.repeat(batch), stand.words(batch))
    assert (stand.site.captures, stand.site.graph_count) == (2, 1)


class Allocator:
    """torch._C's calls, with the rules of CUDACachingAllocator."""

    def __init__(self, open_pools: list[tuple[int, int]]) -> None:
        self.open, self.released = open_pools, list[tuple[int, int]]()

    def end(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open.remove(pool)

    def release(self, device: int, pool: tuple[int, int]) -> None:
        self.released.append(pool)


@pytest.mark.parametrize(
    "name", ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"]
)
def test_torchs_allocator_is_told_that_the_capture_ended(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Under the name of this torch or an older one; a closed pool is not released twice."""
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool", raising=False)
    device, pool = torch.device("cuda", 1), (0, 7)
    with pytest.raises(RuntimeError, match="has no _cuda_endAllocateToPool"):
        Cuda().close_pool(device, pool)
    allocator = Allocator([pool])
    monkeypatch.setattr(torch._C, name, allocator.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", allocator.release, raising=False)
    Cuda().close_pool(device, pool)
    Cuda().close_pool(device, pool)
    assert allocator.open == [] and allocator.released == [pool]
    assert Cuda().synchronize is torch.cuda.synchronize
