"""A network as a graph gives the network's own bits, and Python does not run through it again."""

from __future__ import annotations

import gc
import threading
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evidence.fake_cuda import FakeCuda, RaceError
from headstart.errors import CaptureError, InputError
from headstart.interfaces import Conditioning
from headstart.runner.capture import Program, Site
from headstart_kernels.recording.host import Host

T = torch.tensor


def eager(network: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    with torch.inference_mode():
        return network(x, timestep, cond)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("size", [(8, 8), (4, 10)])
def test_the_graph_has_the_bits_of_the_network(
    stand: Any, batch: int, size: tuple[int, int]
) -> None:
    runner, cond = stand.runner(), stand.words(batch)
    for timestep in (T([999] * batch), T([499.5] * batch), T([20] * batch)):
        x = stand.latent(batch, size, seed=int(timestep[0]))
        assert torch.equal(runner(x, timestep, cond), eager(runner.network, x, timestep, cond))
    assert stand.site.captures == 2, "one for whole timesteps, one for the others"


def test_replay_runs_no_python_of_the_network(stand: Any) -> None:
    runner = stand.runner()
    runner(stand.latent(2), T([999, 999]), stand.words(2))
    calls = stand.calls
    for seed in range(3):
        runner(stand.latent(2, seed=seed), T([seed, 5]), stand.words(2, seed))
    assert stand.calls == calls == stand.site.warmups + 1


@pytest.mark.parametrize(
    "name", [field.name for field in fields(Conditioning) if field.name != "adapters"]
)
def test_every_field_of_the_conditioning_is_copied_in(stand: Any, name: str) -> None:
    """Also one that this UNet does not read, or that did not exist when this was written."""

    class Reads(nn.Module):
        def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            read = cond.extra["mask"] if name == "extra" else getattr(cond, name)
            return x_in + read.float().sum(1).view(len(x_in), -1)[:, :1, None, None]

    runner = stand.runner()
    runner.network = Reads()

    def value(number: float) -> object:
        tensor = torch.full((2, 3), number)
        return {"mask": tensor} if name == "extra" else tensor

    cond = replace(stand.words(2), **{name: value(1.0)})
    other = replace(cond, **{name: value(2.0)})
    x, timestep = stand.latent(2), T([1, 1])
    first, second = runner(x, timestep, cond), runner(x, timestep, other)
    assert torch.equal(first, eager(runner.network, x, timestep, cond))
    assert torch.equal(second, eager(runner.network, x, timestep, other))
    assert stand.site.captures == 1 and not torch.equal(first, second)


def test_weights_changed_in_place_are_seen_without_a_new_capture(stand: Any) -> None:
    runner, cond, x, t = stand.runner(), stand.words(1), stand.latent(1), T([7])
    before = runner(x, t, cond)
    with torch.no_grad():
        runner.network.conv_out.weight.mul_(1.5)
    after = runner(x, t, cond)
    assert stand.site.captures == 1
    assert torch.equal(after, eager(runner.network, x, t, cond)) and not torch.equal(after, before)


def rebind_parameter(network: Any) -> None:
    network.conv_out.weight = nn.Parameter(network.conv_out.weight.detach() * 2)


def rebind_module(network: Any) -> None:
    network.conv_in = nn.Conv2d(4, 16, 3, padding=1)


def add_a_buffer(network: Any) -> None:
    network.mid_block.resnets[0].register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize("change", [rebind_parameter, rebind_module, add_a_buffer])
def test_a_weight_that_is_bound_anew_is_captured_anew(stand: Any, change: Any) -> None:
    runner, cond, x, t = stand.runner(), stand.words(1), stand.latent(1), T([7])
    runner(x, t, cond)
    change(runner.network)
    assert torch.equal(runner(x, t, cond), eager(runner.network, x, t, cond))
    assert stand.site.captures == 2 and stand.site.graph_count == 1


def test_outputs_belong_to_the_caller(stand: Any) -> None:
    """Another replay overwrites the memory of every graph in the pool."""
    runner, other = stand.runner(), stand.runner("distilled")
    x, t, cond = stand.latent(1), T([7]), stand.words(1)
    first = runner(x, t, cond)
    copy = first.clone()
    other(x, t, cond)
    runner(x * 2, t, cond)
    assert torch.equal(first, copy)


def test_one_pool_one_stream_and_thread_local_captures(stand: Any) -> None:
    for model in ("base", "distilled"):
        for batch in (1, 2):
            stand.runner(model)(stand.latent(batch), T([7] * batch), stand.words(batch))
    captures = stand.cuda.happened("capture")
    assert len(captures) == 4
    assert {event.stream for event in captures} == {"stream 1"}
    assert {event.detail for event in captures} == {((0, 1), "thread_local")}
    assert {event.stream for event in stand.cuda.happened("replay")} == {"stream 1"}


def test_a_capture_comes_after_two_warm_ups_that_the_device_has_finished(stand: Any) -> None:
    runner = stand.runner()
    runner(stand.latent(1), T([7]), stand.words(1))
    assert runner.network.calls == 3
    order = [event.what for event in stand.cuda.log]
    assert order[: order.index("capture")].count("synchronize") == 1


@pytest.mark.parametrize("before", [False, True])
def test_algorithms_are_chosen_in_warm_ups_and_not_in_the_capture(stand: Any, before: bool) -> None:
    """cuDNN's benchmark: on while warming up, then as the caller has it, also after an error."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[bool] = []

        def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            self.seen.append(torch.backends.cudnn.benchmark)
            if len(self.seen) > 3:
                raise InputError("enough")
            return x_in + 1

    runner, cudnn = stand.runner(), torch.backends.cudnn
    runner.network = network = Asks()
    result, cudnn.benchmark = cudnn.benchmark, before
    try:
        runner(stand.latent(1), T([7]), stand.words(1))
        assert network.seen == [True, True, before] and cudnn.benchmark is before
        with pytest.raises(InputError, match="enough"):
            runner(stand.latent(2), T([7, 7]), stand.words(2))
        assert network.seen[3:] == [True] and cudnn.benchmark is before
    finally:
        cudnn.benchmark = result


def test_two_devices_that_warm_up_at_once_leave_the_switch_as_it_was() -> None:
    """The first to begin ends before the second."""
    cudnn, site = torch.backends.cudnn, partial(Site, torch.device("cpu"), warmups=1)
    events = begun, other, done = [threading.Event() for _ in range(3)]

    def first(inputs: Any) -> tuple[Tensor]:
        begun.set()
        assert other.wait(20)
        return (inputs["x"] + 1,)

    def second(inputs: Any) -> tuple[Tensor]:
        other.set()
        assert done.wait(20)
        return (inputs["x"] + 1,)

    def run(body: Any) -> None:
        site(Host()).run(Program("it", body, ()), {"x": torch.ones(1)})
        done.set()

    result, cudnn.benchmark = cudnn.benchmark, False
    try:
        threads = [threading.Thread(target=run, args=(body,)) for body in (first, second)]
        threads[0].start()
        assert begun.wait(20)
        threads[1].start()
        for thread in threads:
            thread.join()
        assert all(event.is_set() for event in events) and cudnn.benchmark is False
    finally:
        cudnn.benchmark = result


def test_what_is_to_be_deterministic_is_not_chosen_by_time(stand: Any) -> None:
    class Asks(nn.Module):
        def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            assert not torch.backends.cudnn.benchmark
            return x_in + 1

    runner = stand.runner()
    runner.network = Asks()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        runner(stand.latent(1), T([7]), stand.words(1))


def test_warm_ups_leave_the_state_of_a_network_as_it_was(stand: Any) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            self.count.add_(1)
            return x_in + self.count

    runner = stand.runner()
    runner.network = Counts()
    x = torch.zeros(1, 4, 8, 8)
    for count in (1.0, 2.0, 3.0):
        assert runner(x, T([7]), stand.words(1)).unique().tolist() == [count]


def test_the_largest_is_prepared_first(stand: Any) -> None:
    sizes = (1, 4, 2)
    runner = stand.runner()
    runner.prepare([(stand.latent(n), T([7] * n), stand.words(n)) for n in sizes])
    held = [graph.tape.size_bytes for graph in stand.cuda.graphs]
    assert held == sorted(held, reverse=True) and len(held) == 3
    calls = stand.calls
    for n in sizes:
        runner(stand.latent(n), T([7] * n), stand.words(n))
    assert stand.calls == calls


def test_the_graph_used_longest_ago_makes_room(stand: Any) -> None:
    stand.site.max_graphs = 2
    runner = stand.runner()
    for batch in (1, 2, 1, 3):
        runner(stand.latent(batch), T([7] * batch), stand.words(batch))
    assert (stand.site.captures, stand.site.graph_count) == (3, 2)
    runner(stand.latent(1), T([7]), stand.words(1))
    assert stand.site.captures == 3, "1 was used after 2, so 2 made room"
    runner(stand.latent(2), T([7, 7]), stand.words(2))
    assert stand.site.captures == 4


def test_past_the_bytes_allowed_a_pool_is_given_back_whole(stand: Any) -> None:
    runner, site = stand.runner(), stand.site
    runner(stand.latent(2), T([7, 7]), stand.words(2))
    assert site.size_bytes > stand.cuda.memory_reserved(site.device) > 0
    site.max_bytes = site.size_bytes
    runner(stand.latent(1), T([7]), stand.words(1))
    assert site.graph_count == 1 and site.size_bytes < site.max_bytes
    assert [memory.reserved > 0 for memory in stand.cuda.pools.values()] == [False, True]
    runner(stand.latent(1), T([8]), stand.words(1))
    assert site.captures == 3, "2, then 1 in the shared pool, then 1 alone"


def test_a_graph_too_large_for_the_bytes_allowed_is_an_error(stand: Any) -> None:
    stand.site.max_bytes = 1000
    with pytest.raises(CaptureError, match=r"holds .* MB .* raise max_bytes"):
        stand.runner()(stand.latent(1), T([7]), stand.words(1))
    assert stand.site.graph_count == 0 and stand.cuda.memory_reserved(stand.site.device) == 0


def test_a_network_that_is_gone_takes_its_graphs_along(stand: Any) -> None:
    stand.runner()(stand.latent(1), T([7]), stand.words(1))
    stand.runner("distilled")(stand.latent(1), T([7]), stand.words(1))
    del stand.denoisers["base"]
    gc.collect()
    stand.runner("distilled")(stand.latent(1), T([7]), stand.words(1))
    assert (stand.site.captures, stand.site.graph_count) == (2, 1)


class Looks(nn.Module):
    """Waits for the device: reads a tensor as a Python number."""

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return x_in * float(timestep[0])


def test_what_cannot_be_captured_is_an_error_that_says_why(stand: Any) -> None:
    runner = stand.runner()
    runner.network = Looks()
    with pytest.raises(CaptureError, match=r"Looks could not be captured for x_in \[1, 4, 8, 8\]"):
        runner(stand.latent(1), T([7]), stand.words(1))
    assert stand.site.graph_count == 0


def test_eager_is_a_fallback_only_when_asked_for(stand: Any) -> None:
    runner = stand.runner(fallback=True)
    runner.network = Looks()
    x = stand.latent(1)
    assert torch.equal(runner(x, T([7]), stand.words(1)), x * 7.0)
    assert len(runner.refusals) == 1 and ".item()" in runner.refusals[0]
    tries = len(stand.cuda.happened("capture"))
    assert torch.equal(runner(x, T([3]), stand.words(1)), x * 3.0)
    assert len(runner.refusals) == 1 and len(stand.cuda.happened("capture")) == tries
    runner(stand.latent(2), T([7, 7]), stand.words(2))
    assert len(runner.refusals) == 2


def test_an_error_of_the_network_itself_stays_what_it_is(stand: Any) -> None:
    with pytest.raises(InputError, match="add_embedding"):
        stand.runner()(stand.latent(1), T([7]), Conditioning(torch.zeros(1, 5, 8)))


def test_results_follow_the_callers_stream(stand: Any) -> None:
    """On a stream of its own: inputs written there are read after, outputs are there to read."""
    runner, side = stand.runner(), stand.cuda.Stream(stand.site.device)
    cond = stand.words(1)
    side.wait_stream(stand.cuda.current_stream())
    with stand.cuda.stream(side):
        for scale in (1.0, 2.0):
            x = stand.latent(1) * scale
            f = runner(x, T([7]), cond)
            assert torch.equal(f, eager(runner.network, x, T([7]), cond))


def test_threads_take_turns(stand: Any) -> None:
    runner, cond = stand.runner(), stand.words(1)
    inputs = [stand.latent(1, seed=seed) for seed in range(4)]
    expected = [eager(runner.network, x, T([7]), cond) for x in inputs]
    runner(inputs[0], T([7]), cond)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            f = runner(inputs[number], T([7]), cond)
            if not torch.equal(f, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_missing_wait_is_noticed() -> None:
    """The fake GPU itself: an access across streams that nothing orders is an error."""
    cuda = FakeCuda()
    with cuda.running():
        x, side = torch.ones(3), cuda.Stream(torch.device("cpu"))
        x.add_(1)
        with (
            cuda.stream(side),
            pytest.raises(RaceError, match="stream 1 reads memory that default wrote"),
        ):
            x + 1
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            y = x + 1
        with pytest.raises(RaceError, match="default writes to memory that stream 1 read"):
            x.zero_()
        with pytest.raises(RaceError, match="default reads memory that stream 1 wrote"):
            y.sum()


def test_a_graph_needs_a_cuda_device() -> None:
    with pytest.raises(CaptureError, match="runner='replay'"):
        Site.of("cpu")
