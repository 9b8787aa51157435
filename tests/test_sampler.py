"""The loop: a run may be cut, resumed, handed to itself, interleaved or dropped without a trace."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_runs import CPU, RULES, SCHEDULE, SHAPE, Toy, run, same, table_of, text

from headstart.interfaces import Conditioning
from headstart.noise import Philox
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan
from headstart.plan.preset import preset
from headstart.plan.table import Step
from headstart.runner.runner import EagerRunner
from headstart.sampler import State, sample
from headstart_kernels import scale_input

STOCHASTIC = {"ddim", "ancestral", "renoise", "tcd"}
rules = st.sampled_from(sorted(RULES))


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
    timesteps = [timestep for _, timestep, _ in network.calls]
    assert [t.dtype for t in timesteps] == [torch.int64, torch.float32]
    assert [t.tolist() for t in timesteps] == [[999, 999], [499.5, 499.5]]


def test_each_row_has_a_timestep_of_its_own_for_one_pass_or_a_pair() -> None:
    """A network may write to it; and a compiled one copies what begins at an odd address."""
    guided = Leg(model="m", timesteps=(999.0,), guidance=3.0)
    network, calls = Toy(), list[tuple[list[int], int]]()

    def writes(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        calls.append((timestep.tolist(), timestep.data_ptr() % 32))
        f = network(x_in, timestep, cond)
        timestep.zero_()
        return f

    plan = Plan((guided, Leg(model="m", timesteps=(749.0, 499.0, 249.0))))
    table = plan.compile(SCHEDULE)
    noise, cond = Philox([1, 2, 3]), text(3)
    list(sample(table, {"m": writes}, cond, noise, uncond=cond, shape=SHAPE))
    assert calls == [([999] * 6, 0), *(([t] * 3, 0) for t in (749, 499, 249))]


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
    first = next(states)
    tensors = [weakref.ref(first.x), weakref.ref(first.x0)]
    rng = torch.get_rng_state()
    del states
    assert len(network.calls) == 1
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), rng)
    assert same([first], run(table_of("ancestral"))[:1])
    del first
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
    pairs: list[tuple[State, State]] = []
    for state in sample(table_of("tcd"), {"m": Toy()}, text(), Philox([3, 8]), shape=SHAPE):
        pairs.append((state, State(state.step, state.x.clone(), state.x0.clone())))
    assert same([now for now, _ in pairs], [then for _, then in pairs])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_state_changed_in_place_is_the_state_that_the_next_row_sees(guidance: float) -> None:
    table, noise, words = table_of("ancestral", guidance=guidance), Philox([3, 8]), text(2, seed=1)
    options = {"uncond": words, "shape": SHAPE}
    changed: list[State] = []
    for state in sample(table, {"m": Toy()}, text(), noise, **options):
        if state.step == 1:
            state.x[:, 0] *= 0.5
        changed.append(state)
    fresh = State(1, changed[1].x.clone(), changed[1].x0)
    resumed = sample(table, {"m": Toy()}, text(), noise, **options, resume=fresh)
    assert same(changed[2:], list(resumed))
    assert not same(changed[2:], run(table, uncond=words)[2:])


def test_what_a_network_sees_is_its_own_scaling_of_the_state_in_its_own_dtype() -> None:
    """Whether it was made one row ahead, or anew because the network became another."""

    class Moody(Toy):
        dtype = torch.float32

        def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            results.append(x_in.clone())
            return super().__call__(x_in, timestep, cond)

    results, moody, table = list[Tensor](), Moody(), table_of("euler", guidance=2.0)
    rows = torch.tensor(table.coefficients())

    def turn(step: Step) -> None:
        moody.dtype = torch.float16 if len(results) == 2 else torch.float32

    states = sample(
        *(table, {"m": moody}, text(), Philox([3, 8])),
        **{"shape": SHAPE, "uncond": text(2, seed=1), "before_row": turn},
    )
    before = [Philox([3, 8]).initial(SHAPE, CPU) * table.init_scale, *(s.x for s in states)]
    assert [x_in.dtype for x_in in results] == [torch.float32] * 2 + [torch.float16, torch.float32]
    for row, x_in in enumerate(results):
        assert torch.equal(x_in, scale_input(before[row], rows, row, x_in.dtype, copies=2))
