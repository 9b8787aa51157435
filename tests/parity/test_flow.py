"""Rectified flow beside diffusers' FlowMatchEulerDiscreteScheduler: every state of every grid."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import SD, patient

import headstart as hs
from headstart.errors import PlanError
from headstart.plan.flow import HIGHEST_SIGMA
from headstart.plan.plan import Leg, Plan, StepTable

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 6, 6)
GRIDS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "shift 1, FLUX schnell": ({"shift": 1.0}, {}, 4),
    "shift 3, SD 3": ({"shift": 3.0}, {}, 8),
    "Z-Image-Turbo": ({"shift": 3.0}, {}, 9),
    "Flux, mu 1.15": ({"use_dynamic_shifting": True}, {"mu": 1.15}, 6),
    "Qwen-Image, mu 0.8, terminal": (
        {"use_dynamic_shifting": True, "shift_terminal": 0.02}, {"mu": 0.8}, 10,
    ),
    "Qwen-Image-Lightning, mu log 3": ({"use_dynamic_shifting": True}, {"mu": math.log(3)}, 4),
    "Wan, shift 5": ({"shift": 5.0}, {}, 4),
}  # fmt: skip


def network(z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Anything that depends on every input."""
    t = (timestep / 1000).view(-1, *[1] * (z.ndim - 1)).to(z.dtype)
    return 0.7 * z.sin() - (1 + t) * z.roll(1, -1) + 0.1


def schedule(config: dict[str, Any], call: dict[str, Any]) -> Any:
    mu = call.get("mu")
    shift = {"mu": mu} if mu is not None else {"shift": config["shift"]}
    return hs.NoiseSchedule.flow(**shift, terminal=config.get("shift_terminal"))


def table(plan: Plan, flow: Any) -> StepTable:
    return plan.compile(flow, prediction=hs.Prediction.FLOW)


@pytest.mark.parametrize("stochastic", [False, True], ids=["euler", "stochastic"])
@pytest.mark.parametrize("name", GRIDS)
def test_every_state_is_diffusers(name: str, stochastic: bool) -> None:
    """float32 against float32: a state near z = 1 moves by a few ulps a step, 1e-6 in all."""
    config, call, steps = GRIDS[name]
    peer = diffusers.FlowMatchEulerDiscreteScheduler(**config, stochastic_sampling=stochastic)
    peer.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)], **call)
    rule = hs.Update.RENOISE if stochastic else hs.Update.EULER
    rows = table(Plan((Leg(model="base", steps=steps, update=rule),)), schedule(config, call))
    assert [row.timestep for row in rows] == pytest.approx(peer.timesteps.tolist(), abs=1e-3)

    torch.manual_seed(0)
    noise = torch.randn(SHAPE)
    steps_noise = [torch.randn(SHAPE) for _ in rows]
    z = noise
    theirs: list[torch.Tensor] = []
    for timestep, fresh in zip(peer.timesteps, steps_noise, strict=True):
        velocity = network(z, timestep.expand(len(z)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda _, draw=fresh: draw)
            patch.setattr(
                "diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor",
                lambda *_, draw=fresh, **__: draw,
                raising=False,
            )
            z = peer.step(velocity, timestep, z).prev_sample
        theirs.append(z)

    run = hs.sample(
        rows,
        {"base": lambda x_in, timestep, cond: network(x_in, timestep.expand(len(x_in)))},
        hs.Conditioning(torch.zeros(len(noise), 1, 1)),
        hs.Given(noise, steps_noise),
    )
    for state, row, expected in zip(run, rows, theirs, strict=True):
        ours = state.x / (1.0 + row.sigma_next)
        assert (ours - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))


def test_diffusers_own_grid_of_a_bare_step_count_is_linspace() -> None:
    for shift in (1.0, 3.0):
        peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        peer.set_timesteps(7)
        timesteps = hs.NoiseSchedule.flow(shift).timesteps(7, hs.Spacing.LINSPACE)
        assert timesteps.tolist() == pytest.approx(peer.timesteps.tolist(), abs=1e-3)


def test_a_flow_hands_over_to_a_model_of_another_schedule_at_a_level() -> None:
    """A base of shift 6 and a student of shift 3: each on its own grid, meeting in sigma."""
    base, student = hs.NoiseSchedule.flow(6.0), hs.NoiseSchedule.flow(3.0)
    legs = (Leg(model="base", steps=8), Leg(model="distilled", steps=8, skip=3))
    rows = Plan(legs).compile({"base": base, "distilled": student}, prediction=hs.Prediction.FLOW)
    first = rows[rows.handoffs[0]]
    assert first.sigma == pytest.approx(5.0)  # levels of Z-Image-Turbo's grid: 21, 9, 5, 3
    for row in rows:
        network = base if row.model == "base" else student
        assert row.sigma == network.sigma(row.timestep)
    assert rows[0].sigma == HIGHEST_SIGMA


def test_a_flow_student_may_follow_a_vp_base() -> None:
    legs = (Leg(model="base", timesteps=(999,)), Leg(model="distilled", steps=4, skip=1))
    kinds = {"base": hs.Prediction.EPS, "distilled": hs.Prediction.FLOW}
    rows = Plan(legs).compile(
        {"base": SD, "distilled": hs.NoiseSchedule.flow(3.0)}, prediction=kinds
    )
    assert rows[0].sigma == SD.sigma(999) and rows[0].sigma_next == pytest.approx(9.0)
    assert rows[1].c_in == pytest.approx(0.1)


@given(shift=st.floats(0.2, 12.0), level=st.floats(1e-4, 1e4))
@patient
def test_a_flows_timestep_and_level_are_inverses(shift: float, level: float) -> None:
    flow = hs.NoiseSchedule.flow(shift)
    assert flow.sigma(flow.timestep(level)) == pytest.approx(level, rel=1e-9)
    assert flow.sigma(1000.0) == HIGHEST_SIGMA and flow.timestep(HIGHEST_SIGMA) == 1000.0


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: hs.NoiseSchedule.flow(0.0), "positive"),
        (lambda: hs.NoiseSchedule.flow(3.0, mu=1.0), "two names of one thing"),
        (lambda: hs.NoiseSchedule.flow(terminal=1.0), r"inside \(0, 1\)"),
        (lambda: hs.NoiseSchedule.flow().sigma(0.0), r"\(0, 1000\]"),
        (lambda: hs.NoiseSchedule.flow().timesteps(4, hs.Spacing.LEADING), "no leading grid"),
        (lambda: Plan((Leg(model="m", steps=4),)).compile(SD, prediction=hs.Prediction.FLOW),
         "networks predict eps, v, x0"),
        (lambda: Plan((Leg(model="m", steps=4),)).compile(hs.NoiseSchedule.flow()),
         "networks predict flow: give it NoiseSchedule"),
        (lambda: table(Plan((Leg(model="m", steps=4, update=hs.Update.TCD),)),
                       hs.NoiseSchedule.flow()), "counts whole timesteps"),
    ],
)  # fmt: skip
def test_what_no_flow_can_be_is_refused(made: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        made()
