"""Adapters that come and go while runs are under way: a run keeps those that it began with."""

from __future__ import annotations

import copy
import linecache
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pytest
import torch
from adapter_samples import layers_of, random_lora
from bundled import needs_pair
from safetensors.torch import save_file
from torch import Tensor, nn

import headstart as hs
from headstart.adapters import adapters

pytestmark = needs_pair
SMALL: dict[str, Any] = {"plan": "hybrid", "size": 32}
NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four LoRAs of one rank, so that one swapped for another computes in the same order; and
    "full", which has to be merged, in a norm too."""
    folder, network = tmp_path_factory.mktemp("adapters"), hs.Engine.demo().denoisers["base"]
    assert isinstance(network, nn.Module)
    paths = {name: folder / f"{name}.safetensors" for name in (*NAMES, "full")}
    for seed, name in enumerate(NAMES):
        part = "mid_block.attentions.0.transformer_blocks.0.attn"
        save_file(random_lora(network, part, seed=seed, size=0.5), paths[name])
    whole = layers_of(network, "mid_block.attentions.0.proj_in")
    full = {path: 0.1 * torch.ones(layer.weight.shape) for path, layer in whole.items()}
    full["conv_norm_out"] = 0.1 * torch.ones(network.get_parameter("conv_norm_out.weight").shape)
    tensors = {f"lora_unet_{path.replace('.', '_')}.diff": change for path, change in full.items()}
    save_file(tensors, paths["full"])
    return paths


@pytest.fixture(scope="module", params=["eager", "replay"])
def shared_engine(request: pytest.FixtureRequest) -> hs.Engine:
    return hs.Engine.demo(device="cpu", runner=request.param)


@pytest.fixture
def engine(shared_engine: hs.Engine) -> Iterator[hs.Engine]:
    yield shared_engine
    for adapter in [*shared_engine.adapters]:
        shared_engine.detach(adapter.name)
    shared_engine.adapters.now()  # takes off hooks that only a run which has ended needed
    for network in shared_engine.denoisers.values():
        assert isinstance(network, nn.Module)
        hooked = [m for m in network.modules() if m._forward_hooks or "forward" in vars(m)]
        assert not hooked and not network._forward_pre_hooks


def alone(engine: hs.Engine, path: Path | None, strength: float = 1.0, seed: int = 1) -> Tensor:
    """The latents of a run with this adapter and no other, attached before and detached after."""
    if path is not None:
        engine.attach(path, strength, name="alone")
    done = engine.sample("a fox", seeds=seed, adapters=["alone"] if path else [], **SMALL)
    if path is not None:
        engine.detach("alone")
    return done.latents


def test_a_swap_in_on_step_changes_nothing_of_this_run(
    engine: hs.Engine, files: dict[str, Path]
) -> None:
    expected = [alone(engine, files[name]) for name in ("a", "b")]
    assert not torch.equal(*expected)
    for swap in ("attach", "detach"):
        engine.attach(files["a"], name="y")

        def act(state: hs.State, swap: str = swap) -> None:
            if state.step == 0 and swap == "attach":
                assert not engine.attach(files["b"], name="y", replace=True).in_place
            elif state.step == 0:
                engine.detach("y")
                engine.attach(files["b"], name="y")

        done = engine.sample("a fox", seeds=1, on_step=act, **SMALL)
        assert torch.equal(done.latents, expected[0])
        assert files["a"].name in str(done.record()["weights"])
        after = engine.sample("a fox", seeds=1, **SMALL)
        assert torch.equal(after.latents, expected[1])
        engine.detach("y")
        engine.attach(files["a"], name="y")
        assert torch.equal(hs.replay(done.record(), engine).latents, expected[0])
        engine.detach("y")


@pytest.mark.parametrize("name", ["a", "full"])
def test_whatever_happens_between_rows_the_run_goes_on_as_it_began(
    engine: hs.Engine, files: dict[str, Path], name: str
) -> None:
    expected, plain = alone(engine, files[name]), alone(engine, None)
    engine.attach(files[name], name="y")
    first = engine.iterate("a fox", seeds=1, **SMALL)
    begun = engine.begin("a fox", seeds=1, **SMALL)
    next(first)
    engine.adapters["y"].strength = 3.0
    strong = engine.iterate("a fox", seeds=1, **SMALL)
    next(strong)
    engine.detach("y")
    bare = engine.iterate("a fox", seeds=1, **SMALL)
    next(bare)
    engine.attach(files["c"], name="y")
    engine.attach(files["full"], 2.0, name="z")
    assert torch.equal([*first][-1].x, expected)
    assert torch.equal([*bare][-1].x, plain)
    assert not torch.equal([*strong][-1].x, expected)
    batch = hs.Batch(engine.denoisers)
    batch.add(begun)
    while batch:
        batch.step()
    assert torch.equal(begun.state.x, expected)
    del first, bare, strong, begun, batch
    engine.detach("z")
    engine.detach("y")
    assert torch.equal(alone(engine, None), plain)


def test_buffers_are_written_to_only_where_no_run_has_them(
    engine: hs.Engine, files: dict[str, Path]
) -> None:
    engine.attach(files["a"], name="y")
    assert engine.attach(files["b"], name="y", replace=True).in_place
    snapshot = engine.adapters.now()
    assert not engine.attach(files["c"], name="y", replace=True).in_place
    assert engine.attach(files["d"], name="y", replace=True).in_place, "nobody has those of c"
    del snapshot


def test_requests_with_adapters_of_their_own_on_one_shared_engine(
    engine: hs.Engine, files: dict[str, Path]
) -> None:
    """Threads that attach, set, swap, sample and detach at random: the bits of runs alone."""
    strengths = (-1.0, 0.5, 2.0)
    expected = {
        (name, strength): alone(engine, files[name], strength)
        for name in NAMES
        for strength in strengths
    }
    plain = alone(engine, None)

    def request(thread: int, seed: int) -> bool:
        draw, label = random.Random(seed), f"of thread {thread}"
        name, strength = draw.choice(NAMES), draw.choice(strengths)
        engine.attach(files[name], strength, name=label)
        for _ in range(draw.randrange(3)):
            name = draw.choice(NAMES)
            engine.attach(files[name], strength, name=label, replace=True)
        if draw.random() < 0.5:
            strength = draw.choice(strengths)
            engine.adapters[label].strength = strength
        adapters = [label] if draw.random() < 0.8 else []
        states = engine.iterate("a fox", seeds=1, adapters=adapters, **SMALL)
        if early := draw.random() < 0.5:
            next(states)
            engine.detach(label)
        *_, last = states
        if not early:
            engine.detach(label)
        return torch.equal(last.x, expected[name, strength] if adapters else plain)

    for threads in (2, 4):
        runs = 24 if engine.runner == "eager" else 8
        shares = [range(thread, runs, threads) for thread in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            jobs = [
                pool.submit(
                    lambda label=label, share=share: [request(label, seed) for seed in share]
                )
                for label, share in enumerate(shares)
            ]
            assert [set(job.result()) for job in jobs] == [{True}] * threads


class _Interrupts:
    """Raises `error` at one line of the adapters' code, counted from when it is entered.

    Not at a line that says `with`: it is passed again on the way out, before the lock is released,
    where Python itself looks for no signal: it does so where a call or a loop ends.
    """

    def __init__(self, line: int, error: type[BaseException]) -> None:
        self.left, self.error, self.fired = line, error, False

    def __enter__(self) -> None:
        sys.settrace(self.call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def call(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        return self.line if frame.f_code.co_filename in _FILES else None

    def line(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not code.startswith("with "):
            self.left -= 1
            if self.left == 0:
                self.fired = True
                raise self.error
        return self.line


_FILES = {
    str(Path(adapters.__file__).with_name(f"{name}.py").resolve(strict=True))
    for name in (
        *("adapters", "host_deltas", "hooks", "merged_weights"),
        *("slots", "snapshot", "snapshots"),
    )
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("what", ["attach", "swap", "merge", "set"])
def test_an_interrupt_at_any_line_leaves_the_engine_as_it_was(
    engine: hs.Engine, files: dict[str, Path], what: str, error: type[BaseException]
) -> None:
    """Every 11th line, from another one for each error; after the last the change is made."""
    if engine.runner != "eager":
        pytest.skip("once is enough: how networks are called does not matter here")
    network: Any = engine.denoisers["base"]
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 128)

    def answer() -> Tensor:
        now = engine.adapters.now()
        strengths = torch.ones(1, len(now.columns)) if now.columns else None
        cond = hs.Conditioning(context, strengths=strengths, adapters=now)
        with torch.inference_mode():
            return network(x, torch.tensor([500]), cond)

    changes: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "attach": (lambda: None, lambda: engine.attach(files["a"], name="y")),
        "swap": (
            lambda: engine.attach(files["b"], name="y"),
            lambda: engine.attach(files["a"], name="y", replace=True),
        ),
        "merge": (lambda: None, lambda: engine.attach(files["full"], name="z")),
        "set": (
            lambda: engine.attach(files["full"], name="z"),
            lambda: setattr(engine.adapters["z"], "strength", 2.0),
        ),
    }
    before, change = changes[what]
    before()
    names, original = [adapter.name for adapter in engine.adapters], answer()
    line = 1 if error is KeyboardInterrupt else 6
    while True:
        interrupts = _Interrupts(line, error)
        try:
            with interrupts:
                change()
        except BaseException as raised:
            assert type(raised) is error
        if not interrupts.fired:
            break
        if [adapter.name for adapter in engine.adapters] != names or not torch.equal(
            answer(), original
        ):
            break  # only where it came when everything was done: the end says so
        line += 11
    assert line > 50
    changed = answer()
    assert not torch.equal(changed, original)
    engine.attach(files["c"], name="other")
    engine.detach("other")
    assert torch.equal(answer(), changed)


def test_a_reader_never_sees_half_a_change(engine: hs.Engine, files: dict[str, Path]) -> None:
    engine.attach(files["a"], name="y")
    stop = threading.Event()
    columns: set[tuple[str, ...]] = set()

    def read() -> None:
        while not stop.wait(1e-4):  # else it has the lock nearly always, and the changes wait
            now = engine.adapters.now()
            columns.add(now.columns)
            assert set(now.columns) == set(now.slots) <= set(now.attached)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        engine.attach(files["b"], name="x")
        engine.attach(files["c"], name="y", replace=True)
        engine.detach("x")
    stop.set()
    reader.join()
    assert columns <= {("y",), ("x", "y")}


@pytest.mark.parametrize("names", [("full", "other"), ("a", "b")])
@pytest.mark.parametrize("first", [0, 1])
def test_engines_that_share_a_network_come_and_go_in_any_order(
    engine: hs.Engine, files: dict[str, Path], names: tuple[str, str], first: int
) -> None:
    network: Any = engine.denoisers["base"]
    engines = engine, hs.Engine(engine.weights)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 128)

    def answers() -> list[Tensor]:
        outputs: list[Tensor] = []
        for each in engines:
            now = each.adapters.now()
            strengths = torch.ones(1, len(now.columns))
            cond = hs.Conditioning(context, strengths=strengths, adapters=now)
            with torch.inference_mode():
                outputs.append(network(x, torch.tensor([500]), cond))
        return outputs

    def equal(*expected: Tensor) -> bool:
        return all(map(torch.equal, answers(), expected))

    plain, paths = answers()[0], [files.get(name, files["full"]) for name in names]
    for each, path, strength in zip(engines, paths, (1.0, 2.0), strict=True):
        each.attach(path, strength, name="y")
    changed = answers()
    assert not torch.equal(*changed) and not torch.equal(changed[0], plain)
    engines[first].detach("y")
    one = [*changed]
    one[first] = plain
    assert equal(*one)
    engines[first].attach(paths[first], 1.0 + first, name="y")
    assert equal(*changed)
    for each in engines:
        each.detach("y")
    assert equal(plain, plain)


def test_a_network_called_inside_another_leaves_it_its_adapters(
    engine: hs.Engine, files: dict[str, Path]
) -> None:
    other, network = hs.Engine.demo(device="cpu"), cast("Any", engine.denoisers["base"])
    x, context, t = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 128), torch.tensor([500])
    conds: list[hs.Conditioning] = []
    for own, name in ((engine, "a"), (other, "b")):
        own.attach(files[name], name="y")
        now = own.adapters.now()
        conds.append(hs.Conditioning(context, strengths=torch.ones(1, 1), adapters=now))
    with torch.inference_mode():
        alone = network(x, t, conds[0])
        inner: Any = other.denoisers["base"]
        conditionings = iter((conds[1], replace(conds[1], strengths=torch.ones(1, 3))))

        def inside(*_: Any) -> None:
            with suppress(hs.AdapterError):
                inner(x, t, next(conditionings))

        hook = network.conv_in.register_forward_hook(inside)
        within = [network(x, t, conds[0]) for _ in range(2)]
        hook.remove()
    assert next(conditionings, None) is None and all(torch.equal(alone, each) for each in within)


def test_a_network_with_adapters_says_why_it_is_not_copied(
    engine: hs.Engine, files: dict[str, Path]
) -> None:
    for name in ("a", "full"):
        engine.attach(files[name], name="y")
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(hs.AdapterError, match="detach them first"):
                copied(engine.denoisers["base"])
        engine.detach("y")
    copy.deepcopy(engine.denoisers["base"])
