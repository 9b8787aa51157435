"""A run that hands out its network's calls: the same bits as the loop, in anybody's hands."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import SD, UPDATES, leg_for, patient
from torch import Tensor

import headstart as hs
from headstart.interfaces import Conditioning
from headstart.plan.plan import Leg, Plan, Update
from headstart.plan.table import StepTable
from headstart_kernels import LinearMap

SHAPE = (4, 5, 3)
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 2


def cond(value: float, batch: int = 1) -> Conditioning:
    return Conditioning(torch.full((batch, 2, 3), value))


def network(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    mixed = torch.einsum("dc,bchw->bdhw", MIX, x_in.float())
    shift = 0.7 * timestep.float() / 1000 + cond.context.float().mean((1, 2))
    return torch.tanh(mixed + shift.view(-1, 1, 1, 1)).to(x_in.dtype)


NETWORKS: Any = {"base": network, "distilled": lambda *a: 0.5 * network(*a)}


def table_of(rule: Update = Update.EULER, guidance: float = 1.0, steps: int = 5) -> StepTable:
    head = leg_for(rule, 0.5, 0.3, steps=steps, guidance=guidance)
    tail = Leg(model="distilled", steps=steps, skip=2, update=rule)
    return Plan((head, tail)).compile(SD)


def run_of(table: StepTable, **more: Any) -> hs.Run:
    options = {"uncond": cond(-0.4), "shape": SHAPE} | more
    return hs.Run(table, cond(0.3), hs.Philox([7, 8]), **options)


def by_hand(run: hs.Run, answer: Callable[..., Tensor] | None = None) -> list[hs.State]:
    states: list[hs.State] = []
    while (call := run.call) is not None:
        f = (answer or NETWORKS[call.model])(call.x_in, call.timestep, call.cond)
        states.append(run.advance(f))
    return states


def sampled(table: StepTable, **more: Any) -> list[hs.State]:
    options = {"uncond": cond(-0.4), "shape": SHAPE} | more
    return list(hs.sample(table, NETWORKS, cond(0.3), hs.Philox([7, 8]), **options))


def same(one: list[hs.State], other: list[hs.State]) -> bool:
    return [s.step for s in one] == [s.step for s in other] and all(
        torch.equal(a.x, b.x) and torch.equal(a.x0, b.x0) for a, b in zip(one, other, strict=True)
    )


@given(rule=UPDATES, guidance=st.sampled_from([1.0, 3.0]), cut=st.integers(0, 3))
@patient
def test_a_run_by_hand_is_the_loop_to_the_bit(rule: Update, guidance: float, cut: int) -> None:
    table = table_of(rule, guidance)
    whole = by_hand(run_of(table))
    assert same(whole, sampled(table))
    resumed = by_hand(run_of(table, resume=whole[cut]))
    assert same(resumed, whole[cut + 1 :])


def test_a_call_says_everything_that_a_network_needs() -> None:
    table = table_of(guidance=3.0)
    run = run_of(table)
    for number, step in enumerate(table):
        call = run.call
        assert call is not None and run.row is step
        assert (call.step, call.model, call.sigma) == (number, step.model, step.sigma)
        copies = 2 if step.guidance != 1.0 else 1
        assert call.x_in.shape == (2 * copies, *SHAPE)
        assert torch.equal(call.x_in[:2], (step.c_in * run.state.x).float()) or (
            (call.x_in[:2] - step.c_in * run.state.x).abs().max() < 1e-5
        )
        assert call.timestep.tolist() == [step.timestep] * 2 * copies
        assert len(call.cond) == 2 * copies
        again = run.call
        assert again is not None and torch.equal(again.x_in, call.x_in)
        run.advance(NETWORKS[call.model](call.x_in, call.timestep, call.cond))
    assert run.call is None and run.row is None and run.state.step == len(table) - 1
    with pytest.raises(hs.InputError, match="is at its end"):
        run.advance(run.state.x)


def test_a_write_to_the_state_is_what_the_next_call_sees() -> None:
    table = table_of()
    run, other = run_of(table), run_of(table)
    for each in (run, other):
        call = each.call
        assert call is not None
        each.advance(network(call.x_in, call.timestep, call.cond))
    run.state.x.mul_(0.5)
    call = run.call
    assert call is not None
    assert torch.allclose(call.x_in, 0.5 * table[1].c_in * other.state.x, rtol=1e-6)
    begun = run.call
    run.state.x.add_(1.0)  # after the call was handed out, before its answer
    again = run.call
    assert begun is not None and again is not None and not torch.equal(begun.x_in, again.x_in)


def test_a_wrong_answer_leaves_the_run_where_it_was() -> None:
    table = table_of()
    run = run_of(table)
    call = run.call
    assert call is not None
    with pytest.raises(ValueError, match="f_cond: expected the shape of x"):
        run.advance(torch.zeros(1, 2, 3))
    with pytest.raises(hs.InputError, match="NaN or infinity"):
        run.advance(torch.full_like(call.x_in, float("nan")))
    assert run.state.step == -1
    assert same(by_hand(run), sampled(table))


def test_each_model_is_fed_its_own_dtype() -> None:
    run = run_of(table_of(), dtypes={"distilled": torch.float16})
    dtypes: list[torch.dtype] = []
    while (call := run.call) is not None:
        dtypes.append(call.x_in.dtype)
        run.advance(NETWORKS[call.model](call.x_in, call.timestep, call.cond))
    assert dtypes == [torch.float32] * 2 + [torch.float16] * 3


def test_a_network_may_live_in_another_thread() -> None:
    asks: Queue[Any] = Queue()

    def serve() -> None:
        while (item := asks.get()) is not None:
            call, answer = item
            answer.put(NETWORKS[call.model](call.x_in, call.timestep, call.cond))

    server = threading.Thread(target=serve)
    server.start()

    def remote(run: hs.Run) -> list[hs.State]:
        states: list[hs.State] = []
        answer: Queue[Tensor] = Queue()
        while (call := run.call) is not None:
            asks.put((call, answer))
            states.append(run.advance(answer.get()))
        return states

    table = table_of(Update.RENOISE, 2.0)
    assert same(remote(run_of(table)), sampled(table))
    asks.put(None)
    server.join()


def test_runs_of_an_event_loop_share_one_call() -> None:
    """Eight requests at different seeds; every network call serves all that wait."""
    table, calls = table_of(), 0

    async def serve(waiting: list[tuple[Any, asyncio.Future[Tensor]]]) -> None:
        nonlocal calls
        while True:
            await asyncio.sleep(0)
            batch, waiting[:] = waiting[:8], waiting[8:]
            if not batch:
                continue
            calls += 1
            x_in = torch.cat([call.x_in for call, _ in batch])
            times = torch.cat([call.timestep for call, _ in batch])
            conds = Conditioning.cat([call.cond for call, _ in batch])
            f = NETWORKS[batch[0][0].model](x_in, times, conds)
            for part, (_, answer) in zip(f.split(1), batch, strict=True):
                answer.set_result(part)

    async def request(seed: int, waiting: list[Any]) -> Tensor:
        run = hs.Run(table, cond(0.3), hs.Philox([seed]), shape=SHAPE)
        while (call := run.call) is not None:
            answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
            waiting.append((call, answer))
            run.advance(await answer)
        return run.state.x

    async def all_of() -> list[Tensor]:
        waiting: list[Any] = []
        server = asyncio.create_task(serve(waiting))
        results = await asyncio.gather(*(request(seed, waiting) for seed in range(8)))
        server.cancel()
        return list(results)

    for seed, x in enumerate(asyncio.run(all_of())):
        alone = hs.Run(table, cond(0.3), hs.Philox([seed]), shape=SHAPE)
        assert (x - by_hand(alone)[-1].x).abs().max() < 1e-5
    assert calls == len(table)


def test_a_run_may_start_from_a_latent_of_ones_own() -> None:
    table = Plan((Leg(model="base", steps=6),)).compile(SD)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5))
    start = hs.from_latent(table, x, table[3].sigma)
    assert (start.step, start.x is x) == (2, True)
    states = by_hand(run_of(table, resume=start))
    assert [state.step for state in states] == [3, 4, 5]
    assert same(states, sampled(table, resume=start))
    first = hs.from_latent(table, x, table[0].sigma)
    assert first.step == -1
    part = table[3:]
    assert hs.from_latent(part, x, part[0].sigma).step == 2
    with pytest.raises(hs.PlanError, match=r"no row of plan .* starts at level 99: give a latent"):
        hs.from_latent(table, x, 99.0)
    second = Plan((Leg(model="base", steps=6, update=Update.DPMPP_2M),)).compile(SD)
    with pytest.raises(hs.PlanError, match="looks back on the x0 before it"):
        hs.from_latent(second, x, second[2].sigma)


def test_a_plan_may_end_above_0_and_another_run_go_on_there() -> None:
    levels = (14.0, 6.0, 2.0, 0.5)
    whole = by_hand(run_of(Plan((Leg(model="base", sigmas=levels),)).compile(SD)))
    first = Plan((Leg(model="base", sigmas=levels[:2]),), end=2.0).compile(SD)
    rest = Plan((Leg(model="base", sigmas=levels[2:]),)).compile(SD)
    middle = by_hand(run_of(first))[-1]
    states = by_hand(run_of(rest, resume=hs.from_latent(rest, middle.x, 2.0)))
    assert torch.equal(states[-1].x, whole[-1].x)


@given(guidance=st.sampled_from([1.0, 3.0]), rule=UPDATES)
@patient
def test_a_denoiser_of_x0_is_sampled_as_the_network_that_it_wraps(
    guidance: float, rule: Update
) -> None:
    """D(x, sigma) = x - sigma*F(c_in*x, t): k-diffusion's wrapper around an eps network."""
    table = table_of(rule, guidance)

    def wrapped(model: str) -> hs.X0Denoiser:
        def denoise(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
            level = sigma.view(-1, 1, 1, 1)
            timestep = torch.tensor([SD.timestep(float(s)) for s in sigma])
            return x - level * NETWORKS[model](x / (1 + level**2).sqrt(), timestep, cond)

        return hs.X0Denoiser(denoise)

    both: Any = {model: wrapped(model) for model in NETWORKS}
    level = {"uncond": cond(-0.4), "shape": SHAPE}
    states = list(hs.sample(table, both, cond(0.3), hs.Philox([7, 8]), **level))  # type: ignore[arg-type]
    for state, expected in zip(states, sampled(table), strict=True):
        assert (state.x - expected.x).abs().max() <= 1e-4 * max(1.0, float(expected.x.abs().max()))
    run = run_of(table)
    while (call := run.call) is not None:
        x = torch.cat([run.state.x] * (len(call.x_in) // 2))
        sigma = torch.full((len(x),), call.sigma)
        run.advance(run.output_of(both[call.model].denoise(x, sigma, call.cond)))
    assert torch.equal(run.state.x, states[-1].x)
    with pytest.raises(hs.InputError, match="needs x and sigma"):
        both["base"](x, sigma, cond(0.0))


def test_what_a_host_reads_is_handed_on_as_it_is() -> None:
    table = table_of(Update.EULER, 1.0)
    mine, theirs = {"prompt": "a fox"}, ["no fox"]
    run = hs.Run(table, mine, hs.Philox([1, 2]), shape=SHAPE)
    call = run.call
    assert call is not None and call.cond is mine
    assert call.x_in.shape == (2, *SHAPE) and call.x_in.dtype is torch.float32
    run.advance(torch.zeros_like(call.x_in))
    guided = table_of(Update.EULER, 3.0)
    call = hs.Run(guided, mine, hs.Philox([1, 2]), uncond=theirs, shape=SHAPE).call
    assert call is not None and call.cond == (theirs, mine) and len(call.x_in) == 4
    with pytest.raises(hs.InputError, match="needs uncond"):
        hs.Run(guided, mine, hs.Philox([1]), shape=SHAPE)
    with pytest.raises(hs.InputError, match="cond is a dict, which is passed on"):
        strengths = torch.ones(len(table), 1, 1)
        hs.Run(table, mine, hs.Philox([1]), shape=SHAPE, strengths=strengths)
    with pytest.raises(hs.InputError, match=r"expected a headstart\.Conditioning, got dict"):
        hs.sample(table, {}, mine, hs.Philox([1]), shape=SHAPE)  # type: ignore[arg-type]


def test_runs_whose_cond_nobody_can_stack_have_calls_of_their_own() -> None:
    table, mine = table_of(Update.EULER, 1.0), {"prompt": "a fox"}
    batch = hs.Batch(dict.fromkeys(("base", "distilled"), lambda x, t, cond: 0.1 * x))
    for seed in range(3):
        batch.add(hs.Run(table, mine, hs.Philox([seed]), shape=SHAPE))
    assert [len(batch.step()) for _ in range(3)] == [1, 1, 1]


def test_conditioning_carries_what_else_a_network_reads() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    conds = Conditioning(torch.zeros(2, 3, 4), extra={"mask": mask, "image": torch.ones(2, 5)})
    assert conds[1:].extra["mask"].tolist() == [[True, True]]
    pair = Conditioning.cat((conds, conds))
    assert pair.extra["image"].shape == (4, 5)
    half = conds.to("cpu", torch.float16)
    assert (half.extra["image"].dtype, half.extra["mask"].dtype) == (torch.float16, torch.bool)
    one = Conditioning(torch.zeros(1, 3, 4), extra={"mask": mask[:1]})
    assert one.expand(3).extra["mask"].tolist() == [[True, False]] * 3
    assert Conditioning.of(conds.tensors).tensors.keys() == conds.tensors.keys()
    with pytest.raises(hs.InputError, match=r"`extra.mask` is present in 1 of 2"):
        Conditioning.cat((conds, Conditioning(torch.zeros(2, 3, 4), extra={"image": mask})))
    with pytest.raises(hs.InputError, match="expected 2 samples first"):
        Conditioning(torch.zeros(2, 3, 4), extra={"mask": mask[:1]})
    calls: list[Any] = []

    def reads(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        calls.append(cond.extra["mask"].tolist())
        return network(x_in, timestep, cond)

    table = Plan((Leg(model="base", steps=2, guidance=2.0),)).compile(SD)
    other = Conditioning(torch.zeros(1, 2, 3), extra={"mask": mask[1:]})
    single = Conditioning(torch.ones(1, 2, 3), extra={"mask": mask[:1]})
    list(hs.sample(table, {"base": reads}, single, hs.Philox([1]), uncond=other, shape=SHAPE))
    assert calls == [[[True, True], [True, False]]] * 2


def test_a_picture_that_steps_could_not_read_is_refused_and_any_layout_is_read() -> None:
    table = table_of()
    factors, bias = torch.randn(4, 3), torch.randn(3)
    turned = factors.t().contiguous().t()

    def latents(*picture: Any) -> Tensor:
        run = run_of(table, picture=LinearMap(*picture))
        call = run.call
        assert call is not None
        f = NETWORKS[call.model](call.x_in, call.timestep, call.cond).contiguous()
        rgb = run.advance(f).rgb
        assert rgb is not None
        return rgb

    assert torch.equal(latents(turned, bias), latents(factors, bias))
    wrong: tuple[tuple[Any, Any], ...] = (
        (factors.double(), bias),
        (factors[:1], bias),
        (factors, bias[0]),
        (factors, bias.half()),
        (factors.to("meta"), bias),
        (factors.tolist(), bias),
    )
    for picture in wrong:
        with pytest.raises(hs.InputError, match=r"picture\.(factors|bias): expected a float32"):
            latents(*picture)


def test_resume_and_uncond_of_another_kind_are_refused() -> None:
    table, guided = table_of(), table_of(guidance=3.0)
    state = by_hand(run_of(table))[0]
    for wrong in (state.x, tuple(state)):
        with pytest.raises(hs.InputError, match=r"resume: expected a headstart\.State"):
            run_of(table, resume=wrong)
    for one, other in ((cond(0.1), {"a": 1}), ({"a": 1}, cond(0.1))):
        with pytest.raises(hs.InputError, match="both to be a Conditioning or neither"):
            hs.Run(guided, one, hs.Philox([7, 8]), uncond=other, shape=SHAPE)


def test_a_device_is_the_same_with_its_number() -> None:
    state = by_hand(run_of(table_of()))[0]
    run = hs.Run(table_of(), {}, hs.Philox([7, 8]), resume=state, device="cpu:0")
    assert run.device == state.x.device


def test_guidance_that_is_1_in_float32_is_1() -> None:
    """As a sum of tenths may come out of a slider: steps compute in float32."""
    table = table_of(guidance=1.0 + 2.0**-25)
    assert table == table_of() and len(by_hand(run_of(table, uncond=None))) == len(table)
