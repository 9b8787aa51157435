"""The recorder and the fake torch.cuda keep the rules that the other tests here rely on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from evidence.fake_cuda import FakeCuda, NotPermittedError
from evidence.open_tape import poison
from headstart_kernels import ops
from headstart_kernels.recording.host import Host
from headstart_kernels.recording.tape import Tape, WaitError

CPU = torch.device("cpu")


def record(body: Callable[[], Tensor]) -> tuple[Tape, Tensor]:
    tape = Tape()
    with torch.no_grad(), tape.recording():
        out = body()
    poison(tape)
    return tape, out


def test_replay_computes_again_from_the_memory_as_it_is_now() -> None:
    linear, x = nn.Linear(8, 8), torch.linspace(-1, 1, 16).view(2, 8)

    def body() -> Tensor:
        y = linear(x).view(8, 2).T
        return torch.softmax(torch.cat((y, y * 2)).contiguous().to(torch.float64), -1)

    tape, out = record(body)
    for change in (lambda: None, lambda: x.neg_(), lambda: linear.weight.mul_(3)):
        with torch.no_grad():
            change()
            tape.replay()
            assert torch.equal(out, body())


def test_an_operator_that_writes_and_returns_is_repeated_in_both() -> None:
    """Our fused step fills x_in and gives new x' and x0."""
    x, table = torch.ones(1, 4, 2, 2), torch.full((1, 8), 0.5)
    step, x_in = torch.zeros((), dtype=torch.int64), torch.zeros(1, 4, 2, 2)
    tape, out = record(lambda: ops.fused_step(x, x, table, step, x_in=x_in)[0])
    assert x_in.eq(0).all() and out.isnan().all()
    x.fill_(3)
    tape.replay()
    expected, _ = ops.fused_step(x, x, table, step)
    assert torch.equal(out, expected) and torch.equal(x_in, expected * 0.5)


def test_a_python_number_is_what_it_was() -> None:
    scale, x = [2.0], torch.ones(3)
    tape, out = record(lambda: x * scale[0])
    scale[0] = 5.0
    tape.replay()
    assert out.tolist() == [2.0, 2.0, 2.0]


def test_recording_leaves_no_trace() -> None:
    count, view = torch.zeros(4), torch.zeros(4)
    tape, _ = record(lambda: count[1:].add_(1).mul_(view[1:].add_(2)))
    assert count.eq(0).all() and view.eq(0).all()
    tape.replay()
    assert count.tolist() == [0, 2, 2, 2] and view.tolist() == [0, 2, 2, 2]


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "branch": lambda x: 1 if x.sum() > 0 else 2,
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "put by mask": lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
    "unique": lambda x: torch.unique(x),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_refused_as_a_capturing_stream_does(name: str) -> None:
    with pytest.raises(WaitError, match="not permitted when stream is capturing"):
        record(lambda: WAITING[name](torch.ones(3)))  # pyright: ignore[reportArgumentType]


def test_memory_is_counted_and_given_back() -> None:
    host, x = Host(), torch.ones(1000)
    graph = host.CUDAGraph()
    graph.capture_begin(host.graph_pool_handle(), capture_error_mode="global")
    (x * 2).view(10, 100).sum()
    graph.capture_end()
    assert host.memory_reserved(CPU) == 4032 + 64  # aligned, as the allocator has it
    graph.reset()
    assert host.memory_reserved(CPU) == 0


def test_a_fake_gpu_refuses_what_cuda_refuses() -> None:
    cuda, x = FakeCuda(), torch.ones(3)
    pool, stream, graph = cuda.graph_pool_handle(), cuda.Stream(CPU), cuda.CUDAGraph()
    options = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
    with pytest.raises(NotPermittedError, match="not captured"):
        graph.replay()
    with cuda.graph(graph, **options):
        out = x * 2
    with cuda.stream(stream), pytest.raises(NotPermittedError, match="captured once"):
        graph.capture_begin(pool, capture_error_mode="thread_local")
    assert out.isnan().all(), "a capture runs nothing"
    graph.replay()
    assert out.eq(2).all()
    graph.reset()
    with pytest.raises(NotPermittedError, match="was reset"):
        graph.replay()


def test_a_failed_capture_ends_as_torchs_own_does() -> None:
    """torch.cuda.graph, 2.13: the second error hides the first, the stream is not left, the pool
    stays open, and as long as it does `empty_cache` gives nothing back."""
    cuda, x = FakeCuda(), torch.ones(3)
    pool, stream, graph = cuda.graph_pool_handle(), cuda.Stream(CPU), cuda.CUDAGraph()
    with (
        pytest.raises(NotPermittedError, match="due to a previous error during capture"),
        cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        x.sum().item()
    assert cuda.current_stream() is stream and not cuda.is_current_stream_capturing()
    cuda.empty_cache()
    assert cuda.underway == [pool] and cuda.happened("empty_cache")[-1].detail == "kept"
    again = cuda.CUDAGraph()
    with pytest.raises(NotPermittedError, match="already recording"):
        again.capture_begin(pool, capture_error_mode="thread_local")
    cuda.close_pool(CPU, pool)
    cuda.empty_cache()
    assert cuda.underway == [] and cuda.happened("empty_cache")[-1].detail == "given back"
    with pytest.raises(NotPermittedError, match="use_count > 0"):
        again.capture_begin(pool, capture_error_mode="thread_local")


def test_memory_that_one_graph_leaves_for_another_is_lost() -> None:
    cuda, x, result = FakeCuda(), torch.ones(3), torch.zeros(3)
    pool, stream = cuda.graph_pool_handle(), cuda.Stream(CPU)
    first, second = cuda.CUDAGraph(), cuda.CUDAGraph()
    with cuda.graph(first, pool=pool, stream=stream, capture_error_mode="thread_local"):
        left = x * 2
    with cuda.graph(second, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result.copy_(left)
    first.replay()
    second.replay()
    assert result.isnan().all()
