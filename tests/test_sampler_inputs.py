"""The loop's inputs: noise of every source, latents, conditioning, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from toy_runs import CPU, RULES, SCHEDULE, SHAPE, Toy, run, same, table_of, text

from evidence.oracle import random_latents
from headstart.conditioning.inputs import Start
from headstart.diversify.pink import PinkNoise
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.noise import Given, Philox
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan
from headstart.plan.preset import preset
from headstart.plan.table import StepTable
from headstart.runner.runner import EagerRunner
from headstart.sampler import State, sample
from headstart_kernels import INITIAL, LinearMap, philox_normal


@pytest.mark.parametrize("rule", RULES)
def test_noise_drawn_inside_the_step_is_the_noise_of_its_source(rule: str) -> None:
    class Elsewhere(NamedTuple):
        own: Philox

        def __len__(self) -> int:
            return len(self.own)

        def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
            return self.own.initial(shape, device)

        def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
            return self.own.step(index, shape, device)

    table, noise = table_of(rule), Philox([3, 8], samples=[5, 0])
    for part in (table, table[1:]):
        start = None if part is table else State(0, *[random_latents(2, *SHAPE)] * 2)
        drawn, inputs = (
            list(sample(part, {"m": Toy()}, text(), source, shape=SHAPE, resume=start))
            for source in (noise, Elsewhere(noise))
        )
        assert same(drawn, inputs)


@pytest.mark.parametrize("kind", ["one seed for all", "a start of one's own", "a pink start"])
def test_noise_is_drawn_inside_the_step_also_where(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """By count: the start is the one draw that is written to memory."""
    keys = Philox.shared([3, 3])
    source = {
        "one seed for all": keys,
        "a start of one's own": Start(Given(keys.initial(SHAPE, CPU)), keys),
        "a pink start": PinkNoise(keys, 1.0),
    }[kind]
    table, rows = table_of("ancestral"), [source.step(row, SHAPE, CPU) for row in range(3)]
    inputs = Given(source.initial(SHAPE, CPU), rows)
    expected = list(sample(table, {"m": Toy()}, text(), inputs, shape=SHAPE))
    rows_drawn: list[int] = []
    monkeypatch.setattr(
        "headstart.noise.philox_normal",
        lambda *a: rows_drawn.append(a[2]) or philox_normal(*a),  # pyright: ignore
    )
    assert same(list(sample(table, {"m": Toy()}, text(), source, shape=SHAPE)), expected)
    assert rows_drawn == ([] if isinstance(source, Start) else [INITIAL])


def test_a_run_under_inference_mode_is_the_same_run() -> None:
    table = table_of("ancestral")
    with torch.inference_mode():
        states = run(table)
        assert states[0].x.is_inference()
    assert same(states, run(table))


def test_a_run_may_start_from_a_latent() -> None:
    table = table_of("euler")
    noise = Philox([3, 8])
    x = noise.initial(SHAPE, CPU) * table.init_scale
    assert same(run(table, resume=State(-1, x, x)), run(table))


def test_given_noise_tells_the_latents_size() -> None:
    noise, table = Philox([3, 8]), table_of("ancestral")
    rows = [noise.step(row, SHAPE, CPU) for row in range(3)]
    source = Given(noise.initial(SHAPE, CPU), [*rows, None])
    assert same(list(sample(table, {"m": Toy()}, text(), source)), run(table))


def test_one_conditioning_serves_the_whole_batch() -> None:
    table, noise = table_of("euler", guidance=2.0), Philox([3, 8])
    one, other = text(1), text(1, seed=1)
    shared = sample(table, {"m": Toy()}, one, noise, uncond=other, shape=SHAPE)
    full = sample(table, {"m": Toy()}, one.expand(2), noise, uncond=other.expand(2), shape=SHAPE)
    assert same(list(shared), list(full))


def bad_after(calls: int, value: float) -> Callable[..., Tensor]:
    """A network whose second sample goes wrong on a later call."""
    toy = Toy()

    def network(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        f = toy(x_in, timestep, cond)
        if len(toy.calls) > calls:
            f[1, 2, 1, 1] = value
        return f

    return network


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_nan_or_infinity_is_an_error_naming_step_model_and_sample(value: float) -> None:
    states = sample(
        table_of("euler"), {"m": bad_after(2, value)}, text(), Philox([3, 8]), shape=SHAPE
    )
    assert [next(states).step, next(states).step] == [0, 1]
    with pytest.raises(
        InputError, match=r"step 2: the 'm' network gave NaN .* \[1\] of 2.*float32"
    ):
        next(states)


def test_large_numbers_are_not_taken_for_infinity_where_their_sum_is() -> None:
    def large(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return torch.full_like(x_in, -2e37)

    leg = Leg(model="m", timesteps=(999.0,))
    (state,) = run(Plan((leg,)).compile(SCHEDULE), large)
    assert torch.isinf(state.x0.sum()) and torch.isfinite(state.x0).all()


def test_the_check_may_wait_for_the_last_row_or_be_left_out() -> None:
    arguments = (text(), Philox([3, 8]))
    last = sample(
        table_of("euler"), {"m": bad_after(1, float("nan"))}, *arguments, shape=SHAPE, check="last"
    )
    assert [next(last).step for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="step 1: the 'm' network"):
        next(last)
    never = sample(
        table_of("euler"), {"m": bad_after(1, float("nan"))}, *arguments, shape=SHAPE, check="never"
    )
    assert bool(list(never)[-1].x.isnan().any())


def test_before_row_sees_each_row_before_its_network_does() -> None:
    network = Toy()
    order: list[tuple[int, float]] = []
    table = Plan((Leg(model="m", steps=3, adapters=(("age", 0.5),)),)).compile(SCHEDULE)
    run(table, network, before_row=lambda step: order.append((len(network.calls), step.timestep)))
    assert order == [(row, step.timestep) for row, step in enumerate(table)]


def hybrid() -> StepTable:
    return preset("lightning", base_guidance=4.0).compile(SCHEDULE)


STATE = State(0, torch.zeros(2, *SHAPE), torch.zeros(2, *SHAPE))
MAP = LinearMap(torch.zeros(4, 3), torch.zeros(3))
ADAPTED = Plan((Leg(model="m", steps=2, adapters=(("age", 1.0),)),)).compile(SCHEDULE)
MISSING = [
    (hybrid(), dict(models=["base"]), r"names model\(s\) \['distilled'\].*has \['base'\]"),
    (hybrid(), dict(uncond=None), r"the 'base' row at timestep 999 has guidance 4.*needs uncond="),
    (hybrid(), dict(shape=None), r"size is unknown: give shape=\(C, h, w\)"),
    (hybrid(), dict(shape=(4, 0, 4)), r"sizes of one latent.*got \[4, 0, 4\]: leave out the batch"),
    (hybrid(), dict(shape=()), r"sizes of one latent.*got \[\]"),
    (hybrid(), dict(shape=(4, 4), picture=MAP), r"picture needs latents \[C, h, w\].*\[4, 4\]"),
    (hybrid(), dict(seeds=[1, 2, 3]), "conditioning for 2 samples cannot serve a batch of 3"),
    (hybrid(), dict(resume=STATE, seeds=[1], cond=text(1)), r"resume.x: expected float32 \[1, 4"),
    (hybrid(), dict(resume=STATE._replace(step=4)), "resume is a State of row 4.*rows 0 to 3"),
    (hybrid()[2:], dict(resume=STATE), "resume is a State of row 0.*rows 2 to 3"),
    (hybrid()[2:], dict(), r"begins at row 2: give resume=, the State of row 1"),
    (hybrid(), dict(check="often"), "check: expected one of"),
    (ADAPTED, dict(models=["m"]), r"set adapter\(s\) \['age'\].*before_row="),
]


@pytest.mark.parametrize(("table", "change", "message"), MISSING, ids=[case[2] for case in MISSING])
def test_what_is_missing_is_an_error_before_any_network_call(
    table: StepTable, change: dict[str, object], message: str
) -> None:
    network = Toy()
    options = {"models": ["base", "distilled"], "seeds": [3, 8], "cond": text(), "shape": SHAPE}
    options |= {"uncond": text(seed=1)} | change
    models = {name: network for name in options.pop("models")}
    with pytest.raises(InputError, match=message):
        sample(table, models, options.pop("cond"), Philox(options.pop("seeds")), **options)
    assert network.calls == []


def test_rows_that_are_done_need_neither_their_model_nor_uncond() -> None:
    table = hybrid()
    whole = run(table)
    rest = sample(table, {"distilled": Toy()}, text(), Philox([3, 8]), resume=whole[0], shape=SHAPE)
    assert same(list(rest), whole[1:])
    assert run(table, resume=whole[-1]) == []


def test_the_eager_runner_counts_times_and_forgets() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1).to(torch.float64)

        def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            assert torch.is_inference_mode_enabled()
            assert x_in.is_contiguous(memory_format=torch.channels_last)
            return self.conv(x_in)

    runner = EagerRunner(Network(), memory_format=torch.channels_last)
    assert runner.dtype is torch.float64
    f = runner(torch.zeros(3, 4, 2, 2), torch.zeros(3), text(3))
    assert f.dtype is torch.float64
    assert (runner.calls, runner.rows) == (1, 3) and runner.latency_ms > 0
    runner.reset()
    assert (runner.calls, runner.rows, runner.latency_ms) == (0, 0, 0.0)
