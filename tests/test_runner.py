"""Which runner is taken, why, and that they all give the network's numbers."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from evidence.fake_tensors import fake_tensors
from headstart.engine.clock import Clock
from headstart.errors import CaptureError, InputError
from headstart.interfaces import Conditioning
from headstart.runner.graph import GraphRunner
from headstart.runner.runner import CompiledRunner, EagerRunner, choose_runner, open_runner

T = torch.tensor


class Small(nn.Module):
    """Reads all inputs of a network; `weight` is its only parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4))

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        mixed = torch.einsum("bchw,cd->bdhw", x_in, self.weight)
        signal = timestep.float().cos() + cond.context.float().mean((1, 2))
        return torch.tanh(mixed) + signal.view(-1, 1, 1, 1)


class Prints(Small):
    """Has a Python side effect, which a compiler cannot keep in one graph."""

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x_in, timestep, cond)


class Event:
    """torch.cuda.Event on a machine without a GPU: 3 ms from one to the next."""

    made: ClassVar[list[Event]] = []

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.stream: object = None
        self.waited = False
        self.made.append(self)

    def record(self, stream: object = "the current device's") -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: Event) -> float:
        assert end.waited and end.stream == self.stream, "two devices have no time between them"
        return 3.0 * (self.made.index(end) - self.made.index(self))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    monkeypatch.setattr(Event, "made", [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"that of {device}")
    return Event.made


def call(batch: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    x = torch.linspace(-2, 2, batch * 4 * 9).view(batch, 4, 3, 3)
    return x, T([7] * batch), Conditioning(torch.ones(batch, 2, 3))


@pytest.mark.parametrize(
    ("device", "name"), [("cpu", "eager"), ("cuda", "graph"), ("cuda:1", "graph"), ("xpu", "eager")]
)
def test_auto_takes_the_best_for_a_device_and_says_why(
    device: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "headstart.runner"):
        choice = choose_runner("auto", device)
    assert choice.name == name and len(choice.why) > 20
    assert caplog.messages == [f"runner auto is {name}: {choice.why}"]


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("eager", "cpu"),
        ("replay", "cpu"),
        ("compiled", "cuda"),
        ("compiled", "xpu"),
        ("graph", "cuda"),
        ("eager", "cuda"),
    ],
)
def test_what_is_asked_for_is_taken(name: Any, device: str) -> None:
    assert choose_runner(name, device) == (name, "asked for")


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [("graph", "cpu", "cuda alone.*'eager'"), ("replay", "cuda", "cpu alone.*'graph'")],
)
def test_a_runner_that_the_device_cannot_have_is_an_error(
    name: Any, device: str, message: str
) -> None:
    with pytest.raises(CaptureError, match=f"{name!r} exists on {message}"):
        choose_runner(name, device)


def test_compiling_for_a_cpu_is_refused_with_the_figure() -> None:
    with pytest.raises(CaptureError, match=r"1\.3 times.*'eager'"):
        choose_runner("compiled", "cpu")


def test_an_unknown_runner_is_an_error() -> None:
    with pytest.raises(InputError, match="runner: expected one of"):
        choose_runner("fast")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("eager", EagerRunner),
        ("compiled", CompiledRunner),
        ("replay", GraphRunner),
        ("graph", GraphRunner),
    ],
)
def test_every_name_opens_its_runner(name: Any, kind: type[object]) -> None:
    runner = open_runner(name, Small().half())
    assert isinstance(runner, kind) and runner.dtype is torch.float16


def test_replay_has_the_bits_of_eager_for_every_shape_and_after_a_change_of_weights() -> None:
    network = Small()
    eager, replay = EagerRunner(network), open_runner("replay", network)
    for batch in (1, 3, 1):
        assert torch.equal(replay(*call(batch)), eager(*call(batch)))
    with torch.no_grad():
        network.weight.neg_()
    assert torch.equal(open_runner("replay", network)(*call()), eager(*call()))
    network.weight = nn.Parameter(torch.ones(4, 4))
    assert torch.equal(replay(*call()), eager(*call()))


def test_a_compiled_network_gives_the_same_numbers() -> None:
    """With dynamo alone, which keeps every operation: the same bits."""
    network = Small()
    compiled, eager = CompiledRunner(network, backend="eager"), EagerRunner(network)
    assert torch.equal(compiled(*call()), eager(*call()))
    with torch.no_grad():
        network.weight.neg_()
    assert torch.equal(compiled(*call()), eager(*call()))


def test_a_network_that_does_not_compile_whole_is_an_error() -> None:
    with pytest.raises(
        CaptureError, match=r"Prints could not be compiled for \[2, 4, 3, 3\].*eager"
    ):
        CompiledRunner(Prints(), backend="eager")(*call())


def test_runners_convert_what_they_are_given() -> None:
    network = Small().double()
    for name in ("eager", "replay"):
        runner = open_runner(name, network)
        assert runner(*call()).dtype is torch.float64


def test_a_network_is_timed_on_the_stream_of_its_own_device(events: list[Event]) -> None:
    """Which need not be the current device: the second GPU of a pair on two."""
    with fake_tensors():
        device = torch.device("cuda", 1)
        x, t, cond = (part.to(device) for part in call())
        runner = EagerRunner(lambda x_in, timestep, cond: x_in, dtype=torch.float32)
        for _ in range(2):
            runner(x, t, cond)
    assert [event.stream for event in events] == ["that of cuda:1"] * 4
    assert runner.latency_ms == 6.0


def test_a_stage_is_timed_on_its_own_device(events: list[Event]) -> None:
    clock = Clock(torch.device("cuda", 0))
    with clock("base"):
        pass
    with clock("distilled", torch.device("cuda", 1)):
        pass
    assert [e.stream for e in events] == ["that of cuda:0"] * 2 + ["that of cuda:1"] * 2
    assert clock.totals(("text", "base")) == {"text": 0.0, "base": 3.0, "distilled": 3.0}


def test_a_stage_on_a_cpu_is_timed_by_the_wall() -> None:
    clock = Clock(torch.device("cpu"))
    with clock("text"):
        pass
    assert 0 <= clock.totals()["text"] < 1000
