"""Engines whose parts take turns, or are on two devices: the bits of those where all stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_pair import folder  # noqa: F401
from torch import Tensor

import headstart as hs
from evidence.card import Card
from evidence.fake_tensors import DEVICE, UnknownBuildError, fake_tensors
from headstart.diversify.method import Images
from headstart.engine import denoising
from headstart.engine.clock import Clock
from headstart.interfaces import Conditioning
from headstart.memory import planning, residency
from headstart.memory.blocks import weights_of
from headstart.memory.budget import Chunks
from headstart.memory.offload import Placement
from headstart.memory.residency import Residency
from headstart.networks.unet import UNet
from headstart.traces.decoders import linear_decoder

PLAN = hs.Plan((hs.Leg(model="base", steps=4, guidance=3.0, until="next"),
                hs.Leg(model="distilled", timesteps=(499, 249))))  # fmt: skip


def loaded(files: Path, **options: Any) -> hs.Engine:
    options = {"dtype": "float32", **options}
    return hs.Engine.load(files / "base.safetensors", files / "distilled.safetensors", **options)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[str, ...], int], None]:
    """Make a CPU a device where these parts take turns in an arena of so many bytes."""

    def make(parts: tuple[str, ...], arena: int) -> None:
        def placement_of(weights: Any, *args: Any, device: str, **options: Any) -> Placement:
            return Placement(device=device, weights=weights, work={}, turns=parts, arena=arena)

        monkeypatch.setattr(planning, "takes_turns", lambda device: True)
        monkeypatch.setattr(planning, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
        monkeypatch.setattr(planning, "place", placement_of)

    return make


ALL = ("text", "base", "distilled")


@pytest.mark.parametrize(
    ("parts", "arena", "runner"),
    [
        (ALL, 10**9, "replay"),
        (("text", "distilled"), 1000, "eager"),
        (("base", "distilled"), 5000, "replay"),
    ],
)
def test_pictures_are_to_the_bit_those_of_an_engine_where_all_stays(
    folder: Path,  # noqa: F811
    turns: Callable[[tuple[str, ...], int], None],
    parts: tuple[str, ...],
    arena: int,
    runner: Any,
) -> None:
    want = loaded(folder, runner=runner).sample(["a fox", "an owl"], plan=PLAN, seeds=3)
    turns(parts, arena)
    engine = loaded(folder, runner=runner)
    (own,) = engine.weights.residency.arenas
    for _ in range(2):
        got = engine.sample(["a fox", "an owl"], plan=PLAN, seeds=3)
        assert torch.equal(got.rgb, want.rgb) and torch.equal(got.latents, want.latents)
    assert own.moved_bytes > own.size_bytes and own.pinned, "more than one of them came"
    assert any(line.startswith("memory: ") for line in engine.weights.notes)


@pytest.mark.parametrize("parts", [("text", "distilled"), ()])
def test_a_unet_that_stays_is_laid_out_on_the_host_and_lies_in_one_memory(
    folder: Path,  # noqa: F811
    turns: Callable[[tuple[str, ...], int], None],
    monkeypatch: pytest.MonkeyPatch,
    parts: tuple[str, ...],
) -> None:
    """Weights one by one, laid out where they stay, left 1.4 GB of holes on a card: SDXL's hybrid
    did not load on 12 GB, nor on 14 where nothing takes turns."""
    turns(parts, 1000)
    original, laid = UNet.lay_out, list[Any]()
    monkeypatch.setattr(UNet, "lay_out", lambda u, d=None: (laid.append((u, d)), original(u, d))[1])
    engine = loaded(folder)
    base = engine.denoisers["base"]
    assert isinstance(base, UNet)
    assert len({weight.tensor.untyped_storage().data_ptr() for weight in weights_of([base])}) == 1
    assert {u for u, device in laid if device is not None} == set(engine.denoisers.values())
    assert len(engine.weights.residency.arenas) == (1 if parts else 0)


def test_where_the_host_has_no_memory_for_it_a_unet_is_laid_out_where_it_stays(
    folder: Path,  # noqa: F811
    turns: Callable[[tuple[str, ...], int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns((), 0)
    sent, original = list[Any](), UNet.to
    monkeypatch.setattr(
        UNet, "to", lambda u, *a, **k: (sent.append((u, *a)), original(u, *a, **k))[1]
    )
    monkeypatch.setattr(planning, "available_bytes", lambda _: 1000)
    engine = loaded(folder)
    assert [device for _, device in sent[-2:]] == [torch.device("cpu")] * 2
    assert {u for u, _ in sent[-2:]} == set(engine.denoisers.values())
    assert not any("to pin" in line for line in engine.weights.notes)


def test_two_devices_hand_the_latent_over_and_give_the_same_pictures(folder: Path) -> None:  # noqa: F811
    """With a CPU as both: every row has its inputs on its own device."""
    want = loaded(folder).sample("a fox", plan=PLAN, seeds=[3, 4], keep_x0=True)
    engine = loaded(folder, device={"base": "cpu", "distilled": "cpu"})
    got = engine.sample("a fox", plan=PLAN, seeds=[3, 4], keep_x0=True)
    assert torch.equal(got.rgb, want.rgb)
    assert got.x0 is not None and want.x0 is not None and torch.equal(got.x0, want.x0)


def test_inputs_of_a_row_are_on_the_device_of_its_model(monkeypatch: Any) -> None:
    """Base on one fake GPU, distilled and decoder on another: no operator mixes them."""
    other = torch.device("cuda", 1)
    try:
        fake = fake_tensors()
    except UnknownBuildError as error:
        pytest.skip(str(error))
    moves: list[tuple[str, torch.device]] = []
    timed: list[torch.device] = []

    class Network(torch.nn.Module):
        def __init__(self, name: str, device: torch.device) -> None:
            super().__init__()
            self.name = name
            self.weight = torch.nn.Parameter(torch.ones((), device=device), requires_grad=False)

        def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            moves.append((self.name, x_in.device))
            assert cond.context.device == timestep.device == x_in.device == self.weight.device
            return x_in * self.weight

    table = PLAN.compile(hs.NoiseSchedule.scaled_linear())
    devices = {"text": DEVICE, "base": DEVICE, "distilled": other, "vae": other}
    with fake, Card(10**9, DEVICE):  # which leaves the host's tensors their values
        networks = {"base": Network("base", DEVICE), "distilled": Network("distilled", other)}
        context = torch.empty(1, 5, 8, device=DEVICE)
        both = Conditioning(context), Conditioning(context)
        where = Residency(devices=devices)
        request = SimpleNamespace(
            table=table, methods=(), chunks=Chunks(1, 1), guided=True, strengths=None, inputs=None,
            latent=(4, 8, 8), noise=None, images=Images(("",), (5,)), spare=None,
        )  # fmt: skip
        weights = SimpleNamespace(residency=where, denoisers=networks, device=DEVICE)
        monkeypatch.setattr(denoising, "encode", lambda *_: both)
        monkeypatch.setattr("headstart.finite.FiniteCheck.read", lambda *_, **__: None)
        monkeypatch.setattr(denoising, "open_runner", lambda _, n: Plain(n))
        monkeypatch.setattr("headstart.engine.clock.record_event", timed.append)
        clock = Clock(torch.device("cpu"))
        states = [*denoising.DenoisingLoop(weights, "eager", request, clock).states()]  # type: ignore[arg-type]
    assert moves == [("base", DEVICE)] * 2 + [("distilled", other)] * 2
    assert [state.x.device for state in states] == [DEVICE] * 2 + [other] * 2
    assert timed == [DEVICE] * 4 + [other] * 4, "both ends of a span, on the row's own device"


class Plain:
    dtype = torch.float32

    def __init__(self, network: Any) -> None:
        self.network = network

    def __call__(self, *inputs: Any) -> Tensor:
        return self.network(*inputs)


def test_a_host_without_memory_to_pin_is_noted(
    folder: Path,  # noqa: F811
    turns: Callable[[tuple[str, ...], int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Too little by its own account, or refused by the system."""
    want = loaded(folder).sample("a fox", plan=PLAN, seeds=3)
    for name, answer in (("available_bytes", lambda _: 1000), ("pinned", lambda _: None)):
        turns(ALL, 10**9)
        monkeypatch.setattr(planning, name, answer)
        engine = loaded(folder)
        (line,) = [note for note in engine.weights.notes if "to pin" in note]
        assert "the host has no 0.0 GB to pin for cpu" in line and "--dtype float8" in line
        assert torch.equal(engine.sample("a fox", plan=PLAN, seeds=3).rgb, want.rgb)
        monkeypatch.undo()


def test_a_size_of_memory_says_what_it_limits_where_nothing_takes_turns(folder: Path) -> None:  # noqa: F811
    (line,) = [note for note in loaded(folder, memory="1GB").weights.notes if "memory" in note]
    assert line.startswith("memory: of cpu a size limits what runs take beside the weights")
    assert not any("memory" in line for line in loaded(folder).weights.notes)


def test_memory_is_planned_for_a_picture_of_plan_size(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests: list[Any] = []

    def placement_of(weights: Any, values: Any, shape: Any, *_: Any, **__: Any) -> Placement:
        requests.append(shape)
        return Placement(device="cpu", weights=weights, work={})

    monkeypatch.setattr(planning, "takes_turns", lambda device: True)
    monkeypatch.setattr(planning, "place", placement_of)
    for size in (None, 64, (32, 48)):
        loaded(folder, plan_size=size)
    assert [shape.pixels for shape in requests] == [(32, 32), (64, 64), (32, 48)]
    assert [shape.latent for shape in requests] == [(8, 8), (16, 16), (8, 12)]
    with pytest.raises(hs.InputError, match="size 33x33: both sides must be"):
        loaded(folder, plan_size=33)


def test_a_resumed_run_loads_only_the_models_that_are_left(
    folder: Path,  # noqa: F811
    turns: Callable[[tuple[str, ...], int], None],
) -> None:
    turns(ALL, 10**9)
    engine = loaded(folder)
    states = [*engine.iterate("a fox", plan=PLAN, seeds=3)]
    (arena,) = engine.weights.residency.arenas
    with arena.using("text"):
        before = arena.moved_bytes
    again = [*engine.iterate("a fox", plan=PLAN, seeds=3, resume=states[1])]
    assert torch.equal(again[-1].x, states[-1].x)
    assert arena.resident == "distilled" and arena.moved_bytes - before <= arena.size_bytes


def test_a_preview_of_a_row_is_drawn_on_its_decoders_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The base's x0 may be on another GPU, and a lane's streams are of one."""
    moves: list[tuple[torch.device, torch.device]] = []
    other = torch.device("meta")

    def opened(_: Any, device: torch.device) -> Any:
        def begin(_: Any, x0: Tensor) -> Any:
            moves.append((device, x0.device))
            raise ValueError("seen")

        return SimpleNamespace(begin=begin)

    monkeypatch.setattr(hs.Preview, "_lane_on", opened)
    decoder = replace(linear_decoder("sd15"), linear=None, device=other)
    state = hs.State(0, torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.warns(UserWarning, match="seen"), hs.Preview(decoder, print) as preview:
        preview(state)
    assert moves == [(other, other)]


def test_a_limit_of_memory_counts_what_captured_graphs_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A UNet's rows use it again, and nothing beyond the limit."""
    placement = Placement(device="cuda:0", weights={"base": 3_000}, work={})
    device = torch.device("cuda", 0)
    monkeypatch.setattr(residency, "available_bytes", lambda _: 10**6)
    monkeypatch.setattr(residency, "pool_bytes", lambda _: 500)
    found = Residency(devices={"base": device}, placements=(placement,), most_bytes=8_000)
    free, pools = found.free(["base"])
    assert (free, pools) == (4_500, 500)
    assert replace(found, most_bytes=None).free(["base"]) == (10**6, 500)


def test_an_adapter_is_merged_from_weights_that_are_in_place(
    folder: Path,  # noqa: F811
    turns: Callable[[tuple[str, ...], int], None],
    tmp_path: Path,
) -> None:
    """Base and distilled share memory: whichever is resident, each is merged from its own."""
    plain = loaded(folder)
    torch.manual_seed(0)
    layer = plain.denoisers["base"].get_submodule("mid_block.resnets.0.conv1")  # type: ignore[attr-defined]
    path = tmp_path / "whole.safetensors"
    name = "lora_unet_mid_block_resnets_0_conv1.diff"
    save_file({name: 0.1 * torch.randn_like(layer.weight)}, path)
    plain.attach(path)
    want = plain.sample("a fox", plan=PLAN, seeds=3)
    turns(ALL, 10**9)
    engine = loaded(folder)
    engine.attach(path)
    assert torch.equal(engine.sample("a fox", plan=PLAN, seeds=3).rgb, want.rgb)


def test_texts_that_memory_cannot_hold_at_once_are_refused(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = loaded(folder).weights
    assert weights.footprint is not None
    engine = hs.Engine(replace(weights, footprint=replace(weights.footprint, text_values=1e6)))
    monkeypatch.setattr(residency, "available_bytes", lambda _: 10**8)
    with pytest.raises(hs.InputError, match=r"200 texts of \d+ tokens need .* fewer prompts"):
        engine.sample([f"a fox {n}" for n in range(200)], plan="distilled", batch=1)
