"""The emulated machine has a GPU's rules: a dry run that it lets pass would mean nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import headstart_kernels
from evidence.fake_cuda import NotPermittedError, RaceError
from evidence.gpu import CudaTensor, emulated_gpu
from evidence.ptx.on_gpu import launched
from evidence.torch_cuda import EmulatedCuda


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.ones(2, device="cuda"),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.ones(2).cuda(),
        lambda: torch.tensor([1.0, 1.0], device="cuda"),
        lambda: torch.zeros(2, device="cuda:0").add_(1),
        lambda: torch.ones(2).pin_memory().to("cuda", non_blocking=True),
        lambda: torch.empty_like(torch.ones(2), device="cuda").fill_(1),
        lambda: nn.Linear(3, 2).to("cuda").requires_grad_(False).bias.fill_(1),
    ],
)
def test_tensors_have_values_and_are_on_the_gpu(cuda: EmulatedCuda, made: object) -> None:
    x = made()  # type: ignore[operator]
    assert x.is_cuda and x.device == torch.device("cuda", 0) and x.tolist() == [1.0, 1.0]
    assert not x.cpu().is_cuda and (x + x).is_cuda and float(x.sum()) == 2.0


def test_views_share_memory_in_every_mode(cuda: EmulatedCuda) -> None:
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with mode:
            host = torch.ones(2, device="cuda").to("cpu")
            other = host.to("cuda:0").to("cuda:1").fill_(3)
        assert host.tolist() == [1, 1] and not host.is_cuda and str(other.device) == "cuda:1"
        x = torch.zeros(4, 2, device="cuda")
        with mode:
            x[1].add_(5)
            x.view(8)[:2] = 3
            torch.add(x, 1, out=x)
        assert x.tolist() == [[4, 4], [6, 6], [1, 1], [1, 1]]


def test_devices_do_not_mix(cuda: EmulatedCuda) -> None:
    zero, one = (torch.ones(2, device=f"cuda:{index}") for index in range(2))
    for other in (torch.ones(2), one):
        with pytest.raises(RuntimeError, match="on the same device"):
            zero + other
    assert (zero + torch.tensor(1.0)).tolist() == [2, 2]  # a number, as on a GPU
    assert (zero + one.to("cuda:0")).device == zero.device
    for read in (zero.numpy, zero.__array__):
        with pytest.raises(TypeError, match="to numpy"):
            read()
    with pytest.raises(RuntimeError, match="ordinal"):
        torch.cuda.set_device("cuda:2")


def test_memory_is_counted_and_ends() -> None:
    with emulated_gpu(memory_bytes=1000) as cuda:
        x = torch.zeros(100, device="cuda")
        view = x[1:]
        del x
        assert cuda.memory_allocated() == 400 and view.is_cuda
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(200, device="cuda")
        del view
        assert (cuda.memory_allocated(), cuda.max_memory_allocated()) == (0, 400)
        cuda.reset_peak_memory_stats()
        cuda.set_per_process_memory_fraction(0.1)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(100, device="cuda")
        assert torch.cuda.mem_get_info() == (1000, 1000) and cuda.max_memory_allocated() == 0


def test_streams_race_and_events_order_them(cuda: EmulatedCuda) -> None:
    x, side, done = torch.zeros(2, device="cuda"), torch.cuda.Stream(), torch.cuda.Event()
    x.add_(1)
    with torch.cuda.stream(side), pytest.raises(RaceError):
        x + 1
    done.record()
    side.wait_event(done)
    with torch.cuda.stream(side):
        assert (x + 1).tolist() == [2, 2]


def test_graphs_replay_and_refuse_what_waits(cuda: EmulatedCuda) -> None:
    x, graph, python = torch.ones(2, device="cuda"), torch.cuda.CUDAGraph(), []
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        python.append("ran")
        y = x * 2
        x.add_(torch.ones(2, device="cuda"))
    torch.cuda.synchronize()
    assert x.tolist() == [1, 1]
    for _ in range(2):
        graph.replay()
    assert (y.tolist(), x.tolist(), python) == ([4, 4], [3, 3], ["ran"])
    with (
        pytest.raises(NotPermittedError, match="previous error during capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool, stream=stream),
    ):
        float(x[0])


def test_nothing_of_it_stays() -> None:
    with emulated_gpu():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        ones = torch.ones(2, device="cuda")
    assert isinstance(ones, CudaTensor)
    assert not torch.cuda.is_available() and torch.ones(2).device.type == "cpu"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda")


def test_an_operator_of_ours_is_the_kernel_that_it_launches(cuda: EmulatedCuda) -> None:
    """Called by its registered name, as a whole run in one graph calls it, and captured there."""
    pixels = torch.rand(1, 3, 8, 8)
    want = headstart_kernels.decode_u8(pixels)
    x, decode = pixels.to("cuda"), torch.ops.headstart_kernels.decode_u8
    assert torch.equal(decode(x).cpu(), want), "its reference, where nothing is launched"
    with launched(cuda) as gpu:
        assert torch.equal(decode(x).cpu(), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decode(x)
        graph.replay()
    assert [name for name, _ in gpu.launches].count("decode_planes_kernel") == 2
    assert [call.name for call in graph.tape.calls].count("decode_planes_kernel") == 1  # type: ignore[attr-defined]
