"""Our plans in place of k-diffusion's samplers, and our networks as its denoisers.

Its contract is written out here in float64; `test_bridges_k_diffusion_host.py` runs k-diffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from k_diffusion_runs import (
    COND,
    EXACT,
    HIGH,
    LOW,
    SCHEDULE,
    UNCOND,
    budget,
    karras,
    network,
    noise,
    toy,
)
from torch import Tensor

import headstart as hs
from headstart.bridges.k_diffusion import denoiser, sample_plan
from headstart.errors import HeadstartError, InputError, PlanError
from headstart.plan.edm import EdmSchedule
from headstart.plan.schedule import NoiseSchedule


def euler(d: Callable[..., Tensor], x: Tensor, levels: list[float], **extra: Any) -> Iterator[Any]:
    """Karras et al.'s algorithm 1 without its correction, (x, x0) of each row."""
    for here, after in pairwise(levels):
        x0 = d(x, torch.full((len(x),), here, dtype=x.dtype), **extra)
        x = x + (x - x0) / here * (after - here)
        yield x, x0


# ------------------------------------------------------------------ our plan as a sampler


@pytest.mark.parametrize("end", [0.0, 0.4])
def test_a_run_by_sigmas_is_eulers_loop(end: float) -> None:
    levels = [*karras(9, 10.0, 0.5)[:-1], end]
    x = HIGH * noise()
    *_, (expected, _) = euler(toy, x, levels, amount=0.4)
    latents = sample_plan(toy, x.float(), torch.tensor(levels), {"amount": 0.4}, None, True)
    # Levels come in float32: one more rounding, which moves a row by at most |x - x0|.
    assert (latents - expected).abs().max() <= budget(10, x.abs().max())


def test_callbacks_see_what_k_diffusions_do() -> None:
    levels, states = karras(4), list[dict[str, Any]]()
    x = (HIGH * noise()).float()
    sample_plan(toy, x, levels, callback=states.append, disable=True)
    assert [set(row) for row in states] == [{"x", "i", "sigma", "sigma_hat", "denoised"}] * 4
    assert [row["i"] for row in states] == [0, 1, 2, 3]
    assert torch.equal(states[0]["x"], x)
    for row, level in zip(states, levels, strict=False):
        assert row["sigma"].shape == () and row["sigma"] == row["sigma_hat"] == np.float32(level)
        assert torch.equal(row["denoised"], toy(row["x"], row["sigma"].expand(3)))


def test_a_finished_run_is_the_last_rows_x0_to_the_bit() -> None:
    states: list[dict[str, Any]] = []
    x = (HIGH * noise()).float()
    latents = sample_plan(toy, x, karras(5), callback=states.append, disable=True)
    assert torch.equal(latents, states[-1]["denoised"])


def test_what_came_in_stays_as_it_was() -> None:
    x = (HIGH * noise()).float()
    before = x.clone()
    sample_plan(toy, x, karras(5), disable=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_d_sees_and_the_caller_gets_the_dtype_that_came_in(dtype: torch.dtype) -> None:
    dtypes: list[torch.dtype] = []

    def d(x: Tensor, sigma: Tensor) -> Tensor:
        dtypes.extend((x.dtype, sigma.dtype))
        return 0.5 * x

    assert sample_plan(d, noise().to(dtype), [1.0, 0.5, 0.0], disable=True).dtype == dtype
    assert set(dtypes) == {dtype}


def hybrid(**leg: Any) -> hs.StepTable:
    base = hs.Leg(model="base", steps=8, until="next", **leg)
    legs = (base, hs.Leg(model="tuned", steps=4, skip=1))
    return hs.Plan(legs).compile(SCHEDULE)


def test_each_row_of_a_table_asks_the_d_of_its_model() -> None:
    calls: list[tuple[str, float]] = []

    def d_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def d(x: Tensor, sigma: Tensor) -> Tensor:
            calls.append((name, float(sigma[0])))
            return toy(x, sigma, 0.3 if name == "base" else 0.1)

        return d

    table = hybrid()
    x = (table.init_scale * noise()).float()
    models = {name: d_of(name) for name in ("base", "tuned")}
    latents = sample_plan(models, x, disable=True, table=table)
    assert calls == [(row.model, float(np.float32(row.sigma))) for row in table]
    assert len({name for name, _ in calls}) == 2
    state, levels = x.double(), [*(row.sigma for row in table), 0.0]
    for row, after in zip(table, levels[1:], strict=True):
        x0 = toy(state, torch.full((3,), row.sigma).double(), 0.3 if row.model == "base" else 0.1)
        state = x0 + after / row.sigma * (state - x0)
    assert (latents - state).abs().max() <= budget(len(table), x.abs().max())


def test_a_table_is_entered_at_the_row_of_the_first_sigma() -> None:
    """As image to image does: x is at the level where it starts."""
    table, calls = hybrid(), list[float]()

    def d(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma[0]))
        return toy(x, sigma)

    level = table[2].sigma
    levels = torch.tensor([level, 0.1, 0.0])
    sample_plan(d, (level * noise()).float(), levels, None, None, True, table=table)
    assert calls == [float(np.float32(row.sigma)) for row in table.steps[2:]]


def test_noise_is_asked_for_on_rows_that_add_it() -> None:
    levels, calls = karras(4), list[tuple[float, float]]()

    def fresh_noise(sigma: Tensor, after: Tensor) -> Tensor:
        calls.append((float(sigma), float(after)))
        return noise(seed=len(calls) + 1)

    x = HIGH * noise()
    latents = sample_plan(
        toy, x.float(), levels, disable=True, update="ancestral", noise_sampler=fresh_noise
    )
    pairs = list(pairwise(levels[:-1]))
    assert calls == [(np.float32(here), np.float32(after)) for here, after in pairs]
    for row, (here, after) in enumerate([*pairs, (levels[-2], 0.0)]):
        x0, q = toy(x, torch.full((3,), here, dtype=torch.float64)), after / here
        x = x0 + q * q * (x - x0) + after * (1 - q * q) ** 0.5 * noise(seed=row + 2)
    assert (latents - x).abs().max() <= budget(4, HIGH * noise().abs().max())


def test_without_a_noise_sampler_noise_is_torchs() -> None:
    x, runs = (HIGH * noise()).float(), list[Tensor]()
    for seed in (5, 5, 6):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            runs.append(sample_plan(toy, x, karras(4), disable=True, update="ancestral"))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "which levels to run"),
        ({"sigmas": [1.0]}, "where the last ends"),
        ({"sigmas": torch.ones(2, 2)}, r"got \[2, 2\] numbers"),
        (
            {"sigmas": [1.0, 0.0], "x": torch.ones(2, 3, dtype=torch.int64)},
            "expected float latents",
        ),
        ({"sigmas": [1.0, 1.0, 0.0]}, "must fall"),
        ({"sigmas": [1.0, float("nan"), 0.0]}, "finite"),
        ({"sigmas": [0.0, 0.0]}, "> 0"),
        ({"sigmas": [1.0, 0.5, -0.5]}, "at least 0"),
        ({"sigmas": [3.0, 0.0], "table": hybrid()}, "give a latent at one of"),
        ({"table": hybrid(guidance=5.0)}, "which D.x, sigma. does itself"),
        ({"table": hybrid(adapters=(("ink", 0.5),))}, "which D.x, sigma. does itself"),
        ({"table": hybrid(), "model": {"base": toy}}, r"name model\(s\) \['tuned'\]"),
        ({"sigmas": [1.0, 0.0], "model": {"base": toy}}, "give table="),
        ({"table": hybrid(), "update": "ancestral"}, "rows have their own"),
        ({"sigmas": [1.0, 0.0], "update": "heun"}, "unknown update"),
        ({"sigmas": [1.0, 0.0], "model": lambda x, _: x[:1]}, r"expected x0 .* got \[1, 4, 6, 6\]"),
        ({"sigmas": [1.0, 0.0], "model": lambda x, _: (x,)}, "got tuple"),
        ({"sigmas": [1.0, 0.5, 0.0], "model": lambda x, sigma: x * float("nan")}, "NaN|nan|finite"),
    ],
)
def test_what_cannot_be_run_says_why(arguments: dict[str, Any], message: str) -> None:
    inputs = {"model": toy, "x": noise().float()} | arguments
    with pytest.raises(HeadstartError, match=message):
        sample_plan(**inputs, disable=True)


# ------------------------------------------------------------------ our network as its denoiser


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_loop_over_our_denoiser_is_our_plan(prediction: str, guidance: float) -> None:
    """Two ways to one run in float32, each within its budget of what it would be exactly; guidance
    4 makes errors of F seven times as large, and x0 of eps moves 15 times as much as F."""
    levels = karras(6)
    leg = hs.Leg(model="base", sigmas=tuple(levels[:-1]), guidance=guidance)
    table = hs.Plan((leg,)).compile(SCHEDULE, prediction=hs.Prediction(prediction))
    x = noise().float()
    run = hs.sample(table, {"base": network}, COND, hs.Given(x), uncond=UNCOND)
    ours = denoiser(network, prediction=prediction)
    extra = {"cond": COND, "uncond": UNCOND, "guidance": guidance}
    loop = euler(ours, HIGH * x, levels, **extra)
    growth = 1.0 if guidance == 1.0 else 2 * guidance - 1
    for state, (z, x0) in zip(run, loop, strict=True):
        largest = HIGH * x.abs().max() + HIGH * growth * 2.0
        assert (state.x0 - x0).abs().max() <= 4 * growth * budget(6, largest)
        assert (state.x - z).abs().max() <= 4 * growth * budget(6, largest)


def test_the_network_sees_both_halves_in_one_call() -> None:
    shapes: list[tuple[int, ...]] = []

    def counted(x_in: Tensor, timestep: Tensor, cond: hs.Conditioning) -> Tensor:
        shapes.append((len(x_in), len(timestep), len(cond)))
        assert torch.equal(cond.context[3:], COND.context) and not cond.context[:3].any()
        return network(x_in, timestep, cond)

    denoiser(counted)(noise().float(), torch.full((3,), 2.0), COND, UNCOND, 3.0)
    assert shapes == [(6, 6, 6)]


def test_samples_of_a_batch_may_be_at_levels_of_their_own() -> None:
    ours, x, levels = denoiser(network), noise(), [0.5, 3.0, 14.0]
    together = ours(x, torch.tensor(levels), EXACT)
    for index, level in enumerate(levels):
        one = slice(index, index + 1)
        alone = ours(x[one], torch.tensor([level]), EXACT[one])
        assert torch.allclose(together[one], alone, rtol=0, atol=4 * 2.0**-52 * 20 * HIGH)


def test_timesteps_and_levels_are_each_others_inverse() -> None:
    ours = denoiser(network)
    t = torch.tensor([[0.0, 0.5], [499.25, 999.0]])
    back = ours.sigma_to_t(ours.t_to_sigma(t))
    # A level rounded by 2^-24 is off by that of a timestep's share of log sigma, at least 0.0036.
    assert (back - t).abs().max() <= 2.0**-24 / 0.0036 + 1000 * 2.0**-24
    assert ours.sigma_to_t(ours.t_to_sigma(t), quantize=True).tolist() == [[0, 0], [499, 999]]
    assert ours.sigma_to_t(ours.sigma_max).dtype == torch.int64
    assert ours.sigmas.shape == (1000,) and ours.sigmas[-1] == ours.sigma_max
    assert ours.sigma_min == np.float32(LOW)


def test_get_sigmas_are_even_in_timestep_and_end_at_0() -> None:
    ours = denoiser(network)
    sigmas = ours.get_sigmas(5)
    expected = [SCHEDULE.sigma(t, "log") for t in (999, 749.25, 499.5, 249.75, 0)]
    assert sigmas.tolist() == [*np.float32(expected).tolist(), 0.0]
    assert torch.equal(ours.get_sigmas()[:-1], ours.sigmas.flip(0))


def test_an_edm_network_is_called_by_its_own_process() -> None:
    """At sigma its input is x/sqrt(sigma^2 + d^2), and it is told log(sigma)/4."""
    calls: list[tuple[Tensor, Tensor]] = []

    def edm(x_in: Tensor, timestep: Tensor, cond: hs.Conditioning) -> Tensor:
        calls.append((x_in, timestep))
        return torch.zeros_like(x_in)

    ours = denoiser(edm, EdmSchedule(), "edm")
    assert ours.sigma_max == 80.0 and len(ours.get_sigmas(7)) == 8
    x0 = ours(noise().float(), torch.full((3,), 2.0), COND)
    exact = noise() / (4.0 + 0.25)
    assert (x0 - 0.25 * exact).abs().max() <= 8 * 2.0**-24 * x0.abs().max()
    assert (calls[0][0] - exact * 4.25**0.5).abs().max() <= 4 * 2.0**-24 * calls[0][0].abs().max()
    assert calls[0][1].tolist() == pytest.approx([np.log(2.0) / 4] * 3, rel=2.0**-23)
    with pytest.raises(InputError, match="no list of them"):
        _ = ours.sigmas


def test_a_level_as_it_is_printed_is_the_end_of_the_schedule() -> None:
    ours = denoiser(network)
    assert ours.sigma_to_t(torch.tensor([14.615, 0.0291])).tolist() == [999.0, 0.0]
    with pytest.raises(PlanError, match="the levels this schedule has a timestep for"):
        ours(noise(), torch.full((3,), 20.0), COND)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: denoiser(hs.X0Denoiser(network)), "already"),
        (lambda: denoiser(network, NoiseSchedule.flow()), "no finite one"),
        (lambda: denoiser(network, SCHEDULE, "flow"), "on which networks predict"),
        (lambda: denoiser(network)(noise(), torch.ones(2), COND), r"expected \[3\]"),
        (lambda: denoiser(network)(noise(), torch.zeros(3), COND), "above 0"),
        (lambda: denoiser(network)(noise(), torch.full((3,), torch.nan), COND), "above 0"),
        (lambda: denoiser(network)(noise(), torch.ones(3), COND, None, 5.0), "needs uncond="),
        (lambda: denoiser(network)(noise(), torch.ones(3), COND, UNCOND, 0.0), "at least 1"),
        (lambda: denoiser(network)(noise(2), torch.ones(2), COND), "cannot serve a batch of 2"),
    ],
)
def test_what_cannot_be_asked_says_why(made: Callable[[], object], message: str) -> None:
    with pytest.raises(HeadstartError, match=message):
        made()
