"""`bench/flow_pair.py`: a network of another process called as a flow's, by the exact formulas."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bundled import needs_pair
from torch import Tensor

import headstart as hs
from headstart.errors import PlanError
from headstart.interfaces import Conditioning
from headstart.plan.pairs import DEMO_SCHEDULE, DEMO_TIMESTEPS

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import flow_pair  # noqa: E402

sys.path.remove(str(BENCH))

COND = Conditioning(torch.zeros(1, 1, 4))
TIMES = (20.0, 146.25, 500.0, 700.5, 850.0)
"""Of a flow; the last is level 5.67, below the pair's highest of 5.85."""


def network(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    """Depends on every input; moves by at most as much as x_in does."""
    shift = (timestep / 1000).view(-1, 1, 1, 1).to(x_in.dtype)
    return 0.6 * x_in.roll(1, -1).sin() - 0.4 * x_in + 0.5 * shift


def velocity(z: Tensor, time: float, prediction: hs.Prediction) -> Tensor:
    """v of one sample in float64, step by step as the papers have it."""
    sigma = time / (1000.0 - time)
    x = (1.0 + sigma) * z
    c_in = 1.0 / math.sqrt(1.0 + sigma**2)
    timesteps = torch.tensor([DEMO_SCHEDULE.timestep(sigma, "log")], dtype=torch.float64)
    f = network(c_in * x, timesteps, COND)
    x0 = {
        hs.Prediction.EPS: x - sigma * f,
        hs.Prediction.V: c_in**2 * x - sigma * c_in * f,
        hs.Prediction.X0: f,
    }[prediction]
    return (x - x0) / sigma - x0


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(3)
    z = torch.randn(len(TIMES), 4, 6, 6, generator=noise, dtype=torch.float64)
    return z.to(dtype), torch.tensor(TIMES, dtype=dtype)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_v_is_the_exact_formula_in_float64(prediction: str) -> None:
    """Every sample of a batch has a time of its own.

    The formula above subtracts: its terms are at most (1 + sigma)/sigma*|z| and |x0|(1 + 1/sigma),
    50 times the state at time 20. Twelve roundings of terms so large, and as many of ours.
    """
    z, times = inputs(torch.float64)
    outputs = flow_pair.as_flow(network, DEMO_SCHEDULE, prediction)(z, times, COND)
    for row, time, one in zip(z, TIMES, outputs, strict=True):
        expected = velocity(row[None], time, hs.Prediction(prediction))[0]
        largest = 1000.0 / time * (row.abs().max() + 2.0) * 4.0
        assert (one - expected).abs().max() <= 24 * 2.0**-52 * largest


def test_half_precision_is_rounded_once_on_the_way_in_and_once_out() -> None:
    """v = of_state*z + of_output*F: the network's input and v are float16, all else float32."""
    z, times = inputs(torch.float16)
    flow = flow_pair.as_flow(network, DEMO_SCHEDULE, "v")
    output, exact = flow(z, times, COND), flow(z.double(), times.double(), COND)
    assert output.dtype == torch.float16
    # The toy network computes in float16 too: 6 roundings in it, 2 around it; |v| < 8, |F| < 4.
    assert (output - exact).abs().max() <= 8 * 2.0**-11 * 8


def test_pure_noise_says_the_x0_that_it_says_on_the_pairs_own_schedule() -> None:
    """At t = 1 the state is the noise, v = noise - x0; and VP starts at the same unit variance."""
    noise = inputs(torch.float64)[0]
    times = torch.full((len(noise),), 1000.0, dtype=torch.float64)
    v = flow_pair.as_flow(network, DEMO_SCHEDULE, "v")(noise, times, COND)
    top, sigma = DEMO_SCHEDULE.highest
    scalings = hs.Prediction.V.scalings(sigma)
    f = network(noise, torch.full_like(times, top), COND)
    x0 = scalings.c_skip / scalings.c_in * noise + scalings.c_out * f
    # sigma = 2^24 stands for infinity: (1 + sigma)/sigma is off by 2^-24 of terms up to 8.
    assert (noise - v - x0).abs().max() <= 8 * 2.0**-24


def test_a_trajectory_on_the_same_levels_is_the_same_in_both_processes() -> None:
    """float32 states. A row rounds some 16 times, the timestep included, and an error of x grows by
    at most c_skip + |c_out|*c_in <= 1.21 a row, the network's slope being at most 1."""
    levels = tuple(DEMO_SCHEDULE.sigma(t) for t in DEMO_TIMESTEPS)
    plan = hs.Plan((hs.Leg(model="base", sigmas=levels),), start="unit")
    flow = hs.NoiseSchedule.flow(shift=flow_pair.SHIFT)
    tables = (
        plan.compile(DEMO_SCHEDULE, prediction=hs.Prediction.V),
        plan.compile(flow, prediction=hs.Prediction.FLOW),
    )
    networks = (network, flow_pair.as_flow(network, DEMO_SCHEDULE, "v"))
    runs = [
        list(hs.sample(table, {"base": own}, COND, hs.Philox((5, 6)), shape=(4, 6, 6)))
        for table, own in zip(tables, networks, strict=True)
    ]
    budget = 0.0
    for one, other in zip(*runs, strict=True):
        largest = tables[0].init_scale * 4.5  # of the noise
        budget = 1.21 * budget + 16 * 2.0**-24 * largest
        assert (one.x - other.x).abs().max() <= budget


@needs_pair
def test_the_bundled_pair_draws_the_same_pictures_as_a_flow_on_its_own_levels() -> None:
    levels = [DEMO_SCHEDULE.sigma(t) for t in DEMO_TIMESTEPS]
    legs = (
        hs.Leg(model="base", sigmas=tuple(levels[:1])),
        hs.Leg(model="distilled", sigmas=tuple(levels[1:])),
    )
    plan = hs.Plan(legs, start="unit")
    trajectory = hs.Engine.demo(device="cpu").sample("a fox", plan="hybrid", seeds=range(3))
    flow = flow_pair.flow_engine().sample("a fox", plan=plan, seeds=range(3))
    assert np.abs(trajectory.rgb.numpy().astype(int) - flow.rgb.numpy().astype(int)).max() <= 1


@needs_pair
def test_plans_of_the_flow_meet_on_the_students_grid() -> None:
    engine = flow_pair.flow_engine()
    alone = engine.compile(flow_pair.flow_plan("distilled", 0))
    assert [round(s.sigma / 0.4, 2) for s in alone[1:]] == [21.0, 9.0, 5.0, 3.0, 1.8, 1.0, 0.43]
    for row in range(1, 9):
        on_grid = engine.compile(flow_pair.flow_plan("base", row))
        assert [s.sigma for s in on_grid] == pytest.approx([s.sigma for s in alone], rel=1e-12)
        assert [s.model for s in on_grid] == ["base"] * row + ["distilled"] * (8 - row)
        one = engine.compile(flow_pair.flow_plan("base", row, 1))
        assert one[0].sigma == alone[0].sigma and one.steps[1:] == alone.steps[row:]
    assert engine.compile(flow_pair.base_plan()).passes() == 60
    with pytest.raises(PlanError, match="of which pair"):
        engine.compile("hybrid")


def test_a_level_below_the_networks_lowest_is_refused() -> None:
    with pytest.raises(PlanError, match="the levels this schedule has a timestep for"):
        flow_pair.velocity_map(3.0, DEMO_SCHEDULE, hs.Prediction.V)


@needs_pair
def test_compare_runs_on_the_pair_as_flows() -> None:
    from headstart.compare.compare import compare, sheet_of
    from headstart.metrics.judges import PictureSource, choose_judge

    engine = flow_pair.flow_engine()
    side = engine.weights.image_size
    inputs = PictureSource("flow", engine.weights.lineage, frozenset({(side, side)}))
    tables = flow_pair.compare_tables(engine)
    hybrid = tables["hybrid"]
    assert hybrid[hybrid.handoffs[0]].sigma == pytest.approx(5.0 * 0.4)
    assert [step.model for step in hybrid] == ["base"] * 3 + ["distilled"] * 5
    lower = flow_pair.compare_tables(engine, handoff=3.5 * 0.4)["hybrid"]
    assert lower[lower.handoffs[0]].sigma == pytest.approx(3.0 * 0.4)
    comparison = compare(engine, "a fox", range(3), choose_judge([inputs]).judge, tables=tables)
    assert [outcome.passes for outcome in comparison.outcomes] == [60, 8, 8, 5]
    assert all(
        outcome.score > 0.4 for outcome in comparison.outcomes[:3] if outcome.score is not None
    )
    assert sheet_of(comparison).width > 0
