"""Networks that take turns in one buffer: the bits of those that stay, at addresses that stay."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import PARAMS
from torch import Tensor, nn

from headstart.interfaces import Conditioning
from headstart.memory.arena import Arena
from headstart.memory.blocks import ALIGNED, blocks_of, weights_of
from headstart.networks.unet import UNet
from headstart_kernels.recording.host import Host

CPU = torch.device("cpu")


def unet(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(PARAMS).requires_grad_(False).eval()


def on_host(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def nothing(size: int) -> None:
    """A host without memory to give."""


def call(network: nn.Module) -> Tensor:
    torch.manual_seed(9)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, PARAMS.context_dim)
    with torch.inference_mode():
        return network(x, torch.tensor([7, 7]), Conditioning(context))


def arena_of(size: int, pin: Callable[[int], Tensor | None] = on_host) -> tuple[Arena, list[UNet]]:
    networks = [unet(1), unet(2)]
    parts = {"base": networks[:1], "distilled": networks[1:]}
    return Arena(parts, size, CPU, Host(), pin), networks


@pytest.mark.parametrize("pin", [on_host, nothing])
@pytest.mark.parametrize("size", [1, 20_000, 10**9])
def test_outputs_are_to_the_bit_those_of_networks_that_stay(
    size: int, pin: Callable[[int], Tensor | None]
) -> None:
    want = [call(unet(1)), call(unet(2))]
    arena, networks = arena_of(size, pin)
    for _ in range(2):
        for name, network, expected in zip(("base", "distilled"), networks, want, strict=True):
            with arena.using(name):
                assert arena.resident == name
                assert torch.equal(call(network), expected)


def test_only_that_size_moves_and_the_arena_is_as_large_as_that() -> None:
    arena, _ = arena_of(20_000)
    whole = sum(block.aligned_bytes for block in blocks_of([unet(1)]))
    assert 20_000 <= arena.size_bytes < whole
    for name in ("base", "distilled", "distilled", "base"):
        with arena.using(name):
            pass
    assert arena.moved_bytes == 3 * arena.size_bytes


def test_weights_keep_their_addresses_while_they_come_and_go() -> None:
    """A captured graph reads from there."""
    arena, networks = arena_of(10**9)

    def where() -> list[int]:
        return [weight.tensor.data_ptr() for weight in weights_of(networks)]

    before = where()
    for name in ("base", "distilled"):
        with arena.using(name):
            assert where() == before
    first, second = ([w.tensor.data_ptr() for w in weights_of([n])] for n in networks)
    assert first == second, "two networks of one shape: one memory"
    assert all(address % ALIGNED == before[0] % ALIGNED for address in first)


def test_what_is_needed_next_is_prefetched_and_what_is_in_use_stays() -> None:
    arena, _ = arena_of(20_000)
    arena.prefetch(["text", "distilled", "base"])
    assert arena.resident == "distilled", "the first of them that is in the arena"
    arena.prefetch(["distilled", "base"])
    assert arena.resident == "distilled"
    arena.prefetch(["text"])
    assert arena.resident == "distilled"


class Recorder:
    """Streams that note who waits for whom, and on which a copy is made."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.now = "run"

    class _Stream:
        def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
            self.name, self.seen = name, log

        def wait_stream(self, other: Any) -> None:
            self.seen.append((self.name, other.name))

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Recorder._Stream) and other.name == self.name

        def __hash__(self) -> int:
            return hash(self.name)

    def Stream(self, device: torch.device) -> Any:  # noqa: N802
        return Recorder._Stream("side", self.seen)

    def current_stream(self, device: torch.device) -> Any:
        return Recorder._Stream(self.now, self.seen)

    def stream(self, stream: Any) -> Any:
        self.seen.append(("copies on", stream.name))
        return Host().stream(stream)


def test_a_copy_waits_for_earlier_users_of_the_arena_and_later_users_wait_for_the_copy() -> None:
    streams = Recorder()
    arena = Arena({"base": [unet(1)], "distilled": [unet(2)]}, 20_000, CPU, streams, on_host)
    streams.now = "first"
    with arena.using("base"):
        pass
    streams.now = "second"
    with arena.using("base"):
        pass
    streams.seen.clear()
    streams.now = "third"
    with arena.using("distilled"):
        assert streams.seen == [
            ("side", "first"), ("side", "second"), ("copies on", "side"), ("third", "side"),
        ]  # fmt: skip


def test_threads_take_turns() -> None:
    want = {"base": call(unet(1)), "distilled": call(unet(2))}
    arena, networks = arena_of(10**9)
    by_size = dict(zip(want, networks, strict=True))
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(20):
            with arena.using(name):
                if not torch.equal(call(by_size[name]), want[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in (*want, *want)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_weights_that_lie_side_by_side_stay_so_whether_they_move_or_not() -> None:
    """As those of joined layers: one matrix product reads them as one."""
    layers = [nn.Linear(24, 24, bias=False).requires_grad_(False) for _ in range(4)]
    joint = torch.cat([layer.weight for layer in layers[:3]])
    for layer, part in zip(layers, joint.split(24), strict=False):
        layer.weight.data = part
    assert sorted(len(block.weights) for block in blocks_of(layers)) == [1, 3]
    other = nn.Linear(40, 40, bias=False)
    for size in (1, 10**9):
        arena = Arena({"base": layers, "distilled": [other]}, size, CPU, Host(), on_host)
        with arena.using("distilled"):
            pass
        with arena.using("base"):
            offsets = [layer.weight.storage_offset() for layer in layers[:3]]
            assert [offset - offsets[0] for offset in offsets] == [0, 576, 1152]
            memory = {layer.weight.untyped_storage().data_ptr() for layer in layers[:3]}
            assert len(memory) == 1
            assert torch.equal(torch.cat([layer.weight for layer in layers[:3]]), joint)


def test_half_precision_other_orders_of_axes_and_buffers_move_as_they_are() -> None:
    layer = nn.Conv2d(8, 8, 3).half().requires_grad_(False).to(memory_format=torch.channels_last)
    layer.register_buffer("table", torch.arange(5))
    before = {name: (t.clone(), t.stride(), t.dtype) for name, t in layer.state_dict().items()}
    arena = Arena({"base": [layer], "distilled": [nn.Linear(40, 40)]}, 10**9, CPU, Host(), on_host)
    with arena.using("distilled"):
        pass
    with arena.using("base"):
        for name, tensor in layer.state_dict().items():
            want, stride, dtype = before[name]
            assert torch.equal(tensor, want) and (tensor.stride(), tensor.dtype) == (stride, dtype)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
