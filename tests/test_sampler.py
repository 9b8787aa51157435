"""The loop: a run may be cut, resumed, handed to itself, interleaved or dropped without a trace."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from evidence.oracle import random_latents
from headstart.conditioning.inputs import Start
from headstart.diversify.pink import PinkNoise
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.noise import Given, Philox
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan
from headstart.plan.preset import preset
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.table import Step, StepTable
from headstart.plan.update import Update
from headstart.runner.runner import EagerRunner
from headstart.sampler import State, sample
from headstart_kernels import INITIAL, LinearMap, philox_normal, scale_input

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (4, 3, 5)
CPU = torch.device("cpu")
# Every rule of a row, the stochastic ones with noise; TCD and DDIM with their own parameter.
RULES: dict[str, dict[str, object]] = {
    "euler": {"update": Update.EULER},
    "ddim": {"update": Update.DDIM, "eta": 0.6},
    "ancestral": {"update": Update.ANCESTRAL},
    "renoise": {"update": Update.RENOISE, "boundary": True},
    "tcd": {"update": Update.TCD, "gamma": 0.4},
    "dpmpp_2m": {"update": Update.DPMPP_2M},
}
STOCHASTIC = {"ddim", "ancestral", "renoise", "tcd"}
rules = st.sampled_from(sorted(RULES))


@dataclass
class Toy:
    """A network that depends on everything it is told, and remembers what that was."""

    bias: float = 0.0
    calls: list[tuple[Tensor, Tensor, Conditioning]] = field(default_factory=list)

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.calls.append((x_in.clone(), timestep, cond))
        time = timestep.to(x_in.dtype).view(-1, 1, 1, 1) / 1000
        text = cond.context.mean((1, 2)).view(-1, 1, 1, 1)
        return torch.tanh(x_in * (0.5 + time) + text + self.bias)


def text(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Conditioning:
    return Conditioning(philox_normal(range(batch), [seed] * batch, 0, (3, 8)).to(dtype))


def table_of(rule: str, steps: int = 4, guidance: float = 1.0) -> StepTable:
    leg = Leg(model="m", steps=steps, guidance=guidance, **RULES[rule])  # pyright: ignore
    return Plan((leg,)).compile(SCHEDULE)


def run(
    table: StepTable, network: object | None = None, resume: State | None = None, **options: object
) -> list[State]:
    models = {step.model: network or Toy() for step in table}
    arguments = {"uncond": text(seed=1), "shape": SHAPE} | options
    return list(sample(table, models, text(), Philox([3, 8]), resume=resume, **arguments))  # pyright: ignore


def same(a: Sequence[State], b: Sequence[State]) -> bool:
    """Equal in every bit, row by row."""
    return len(a) == len(b) and all(
        s.step == t.step and torch.equal(s.x, t.x) and torch.equal(s.x0, t.x0)
        for s, t in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("rule", ["hybrid", *sorted(RULES)])
def test_the_loop_is_the_formula(rule: str) -> None:
    plan = preset("dmd2", base_guidance=2.0)
    table = plan.compile(SCHEDULE) if rule == "hybrid" else table_of(rule, guidance=2.0)
    networks, noise = {"base": Toy(), "distilled": Toy(0.3), "m": Toy()}, Philox([3, 8])
    cond, uncond = text(), text(seed=1)
    states = list(sample(table, networks, cond, noise, uncond=uncond, shape=SHAPE))
    x = x0_prev = noise.initial(SHAPE, CPU).double() * table.init_scale
    for row, (step, state) in enumerate(zip(table, states, strict=True)):
        network, time = networks[step.model], torch.full((2,), step.timestep)
        f = network((step.c_in * x).float(), time, cond).double()
        if step.guidance != 1.0:
            f_uncond = network((step.c_in * x).float(), time, uncond).double()
            f = f_uncond + step.guidance * (f - f_uncond)
        x0 = step.c_skip * x + step.c_out * f
        x = x0 + step.keep * (x - x0) + step.carry * (x0 - x0_prev)
        x = x + step.add * noise.step(row, SHAPE, CPU).double()
        # At most 30 float32 roundings of values below 16*sigma, each row from the state before.
        tolerance = 30 * 2.0**-24 * 16 * step.sigma
        assert (state.x0.double() - x0).abs().max() < tolerance
        assert (state.x.double() - x).abs().max() < tolerance
        x, x0_prev = state.x.double(), state.x0.double()
    assert [state.step for state in states] == [0, 1, 2, 3]
    assert torch.equal(states[-1].x, states[-1].x0)


@settings(max_examples=30, deadline=None)
@given(rule=rules, steps=st.integers(1, 5), data=st.data())
def test_a_run_that_is_split_equals_the_unsplit_run(
    rule: str, steps: int, data: st.DataObject
) -> None:
    table = table_of(rule, steps, guidance=data.draw(st.sampled_from([1.0, 3.0])))
    whole = run(table)
    cut = data.draw(st.integers(1, steps))
    head = run(table[:cut])
    assert same(head, whole[:cut])
    assert same(run(table, resume=head[-1]), whole[cut:])
    if cut < steps:
        assert same(run(table[cut:], resume=head[-1]), whole[cut:])


@settings(max_examples=30, deadline=None)
@given(rule=rules, steps=st.integers(2, 5), data=st.data())
def test_handing_a_model_to_itself_changes_nothing(
    rule: str, steps: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, steps - 1))
    leg = {"model": "m", "steps": steps, **RULES[rule]}
    table = Plan((Leg(**leg), Leg(**leg, skip=k))).compile(SCHEDULE)  # pyright: ignore
    assert same(run(table), run(table_of(rule, steps)))


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"dpmpp_2m"}))
def test_two_names_for_one_network_are_one_network(rule: str) -> None:
    # A second-order rule starts afresh at a handoff, so it is the one that may differ.
    first = Leg(model="a", steps=4, **RULES[rule])  # pyright: ignore
    second = Leg(model="b", steps=4, skip=2, **RULES[rule])  # pyright: ignore
    assert same(run(Plan((first, second)).compile(SCHEDULE)), run(table_of(rule)))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_only_a_stochastic_rule_draws_and_each_row_draws_afresh(rule: str) -> None:
    rows: list[int] = []

    class Counting(Philox):
        def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
            rows.append(index)
            return super().step(index, shape, device)

    list(sample(table_of(rule), {"m": Toy()}, text(), Counting([3, 8]), shape=SHAPE))
    assert rows == ([0, 1, 2] if rule in STOCHASTIC else [])


@settings(max_examples=15, deadline=None)
@given(rule=rules, guidance=st.sampled_from([1.0, 3.0]))
def test_an_image_alone_equals_the_image_in_a_batch(rule: str, guidance: float) -> None:
    table, seeds = table_of(rule, guidance=guidance), [3, 8, 2**64 - 1]
    cond, uncond = text(3), text(3, seed=1)
    batch = list(sample(table, {"m": Toy()}, cond, Philox(seeds), uncond=uncond, shape=SHAPE))
    for i, seed in enumerate(seeds):
        one = slice(i, i + 1)
        alone = sample(
            table, {"m": Toy()}, cond[one], Philox(seed), uncond=uncond[one], shape=SHAPE
        )
        picked = [State(state.step, state.x[one], state.x0[one]) for state in batch]
        assert same(list(alone), picked)


def test_guidance_of_1_is_one_pass_and_other_guidance_one_batched_call() -> None:
    table = preset("lightning", base_guidance=4.0).compile(SCHEDULE)
    base, distilled = EagerRunner(Toy()), EagerRunner(Toy())
    cond, uncond = text(), text(seed=1)
    models = {"base": base, "distilled": distilled}
    list(sample(table, models, cond, Philox([3, 8]), uncond=uncond, shape=SHAPE))
    assert (base.calls, base.rows) == (1, 4)
    assert (distilled.calls, distilled.rows) == (3, 6)
    assert base.rows + distilled.rows == table.passes() * 2
    x_in, timestep, both = base.network.calls[0]
    assert torch.equal(x_in[:2], x_in[2:]) and timestep.tolist() == [999] * 4
    assert torch.equal(both.context, torch.cat((uncond.context, cond.context)))


def test_guidance_of_1_ignores_uncond_altogether() -> None:
    poison = Conditioning(torch.full((2, 3, 8), float("nan")))
    assert same(run(table_of("euler"), uncond=poison), run(table_of("euler"), uncond=None))


def test_timesteps_are_int64_when_whole_and_float32_when_not() -> None:
    leg = Leg(model="m", timesteps=(999.0, 499.5))
    network = Toy()
    run(Plan((leg,)).compile(SCHEDULE), network)
    told = [timestep for _, timestep, _ in network.calls]
    assert [t.dtype for t in told] == [torch.int64, torch.float32]
    assert [t.tolist() for t in told] == [[999, 999], [499.5, 499.5]]


def test_each_row_has_a_timestep_of_its_own_for_one_pass_or_a_pair() -> None:
    """A network may write to it; and a compiled one copies what begins at an odd address."""
    guided = Leg(model="m", timesteps=(999.0,), guidance=3.0)
    network, told = Toy(), list[tuple[list[int], int]]()

    def writes(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        told.append((timestep.tolist(), timestep.data_ptr() % 32))
        f = network(x_in, timestep, cond)
        timestep.zero_()
        return f

    plan = Plan((guided, Leg(model="m", timesteps=(749.0, 499.0, 249.0))))
    table = plan.compile(SCHEDULE)
    noise, cond = Philox([1, 2, 3]), text(3)
    list(sample(table, {"m": writes}, cond, noise, uncond=cond, shape=SHAPE))
    assert told == [([999] * 6, 0), *(([t] * 3, 0) for t in (749, 499, 249))]


def test_the_state_is_float32_whatever_the_network_computes_in() -> None:
    network = Toy()
    cond = text(dtype=torch.bfloat16)
    states = list(sample(table_of("euler"), {"m": network}, cond, Philox([3, 8]), shape=SHAPE))
    assert {x_in.dtype for x_in, _, _ in network.calls} == {torch.bfloat16}
    assert {t.dtype for state in states for t in (state.x, state.x0)} == {torch.float32}


def test_a_denoiser_may_name_its_own_dtype() -> None:
    inner = Toy()
    runner = EagerRunner(inner, dtype=torch.float64)
    list(sample(table_of("euler"), {"m": runner}, text(), Philox([3, 8]), shape=SHAPE))
    assert {x_in.dtype for x_in, _, _ in inner.calls} == {torch.float64}
    assert {cond.context.dtype for _, _, cond in inner.calls} == {torch.float64}


def test_two_interleaved_runs_do_not_disturb_each_other() -> None:
    tables = table_of("ancestral"), table_of("dpmpp_2m")
    alone = [run(table) for table in tables]
    network = Toy()
    runs = [sample(table, {"m": network}, text(), Philox([3, 8]), shape=SHAPE) for table in tables]
    mixed = list(zip(*runs, strict=True))
    for i in range(2):
        assert same([pair[i] for pair in mixed], alone[i])


def test_a_cancelled_run_leaves_nothing_behind() -> None:
    network = Toy()
    states = sample(table_of("ancestral"), {"m": network}, text(), Philox([3, 8]), shape=SHAPE)
    kept = next(states)
    tensors = [weakref.ref(kept.x), weakref.ref(kept.x0)]
    rng = torch.get_rng_state()
    del states
    assert len(network.calls) == 1
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), rng)
    assert same([kept], run(table_of("ancestral"))[:1])
    del kept
    gc.collect()
    assert [ref() for ref in tensors] == [None, None]


def test_the_callers_grad_mode_is_its_own_between_rows() -> None:
    linear = nn.Linear(5, 5)
    for state in sample(
        table_of("euler"), {"m": lambda x, t, c: linear(x)}, text(), Philox([3, 8]), shape=SHAPE
    ):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not state.x.requires_grad and not state.x.is_inference()


def test_states_are_not_written_to_later() -> None:
    seen: list[tuple[State, State]] = []
    for state in sample(table_of("tcd"), {"m": Toy()}, text(), Philox([3, 8]), shape=SHAPE):
        seen.append((state, State(state.step, state.x.clone(), state.x0.clone())))
    assert same([now for now, _ in seen], [then for _, then in seen])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_state_changed_in_place_is_the_state_that_the_next_row_sees(guidance: float) -> None:
    table, noise, words = table_of("ancestral", guidance=guidance), Philox([3, 8]), text(2, seed=1)
    told = {"uncond": words, "shape": SHAPE}
    changed: list[State] = []
    for state in sample(table, {"m": Toy()}, text(), noise, **told):
        if state.step == 1:
            state.x[:, 0] *= 0.5
        changed.append(state)
    fresh = State(1, changed[1].x.clone(), changed[1].x0)
    resumed = sample(table, {"m": Toy()}, text(), noise, **told, resume=fresh)
    assert same(changed[2:], list(resumed))
    assert not same(changed[2:], run(table, uncond=words)[2:])


def test_what_a_network_sees_is_its_own_scaling_of_the_state_in_its_own_dtype() -> None:
    """Whether it was made one row ahead, or anew because the network became another."""

    class Moody(Toy):
        dtype = torch.float32

        def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            seen.append(x_in.clone())
            return super().__call__(x_in, timestep, cond)

    seen, moody, table = list[Tensor](), Moody(), table_of("euler", guidance=2.0)
    rows = torch.tensor(table.coefficients())

    def turn(step: Step) -> None:
        moody.dtype = torch.float16 if len(seen) == 2 else torch.float32

    states = sample(
        *(table, {"m": moody}, text(), Philox([3, 8])),
        **{"shape": SHAPE, "uncond": text(2, seed=1), "before_row": turn},
    )
    before = [Philox([3, 8]).initial(SHAPE, CPU) * table.init_scale, *(s.x for s in states)]
    assert [x_in.dtype for x_in in seen] == [torch.float32] * 2 + [torch.float16, torch.float32]
    for row, x_in in enumerate(seen):
        assert torch.equal(x_in, scale_input(before[row], rows, row, x_in.dtype, copies=2))


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
        drawn, given = (
            list(sample(part, {"m": Toy()}, text(), source, shape=SHAPE, resume=start))
            for source in (noise, Elsewhere(noise))
        )
        assert same(drawn, given)


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
    given = Given(source.initial(SHAPE, CPU), rows)
    expected = list(sample(table, {"m": Toy()}, text(), given, shape=SHAPE))
    drawn: list[int] = []
    monkeypatch.setattr(
        "headstart.noise.philox_normal",
        lambda *a: drawn.append(a[2]) or philox_normal(*a),  # pyright: ignore
    )
    assert same(list(sample(table, {"m": Toy()}, text(), source, shape=SHAPE)), expected)
    assert drawn == ([] if isinstance(source, Start) else [INITIAL])


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
    drawn = Given(noise.initial(SHAPE, CPU), [*rows, None])
    assert same(list(sample(table, {"m": Toy()}, text(), drawn)), run(table))


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
    asked = {"models": ["base", "distilled"], "seeds": [3, 8], "cond": text(), "shape": SHAPE}
    asked |= {"uncond": text(seed=1)} | change
    models = {name: network for name in asked.pop("models")}
    with pytest.raises(InputError, match=message):
        sample(table, models, asked.pop("cond"), Philox(asked.pop("seeds")), **asked)
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
