"""Flow transformers of today beside diffusers' own loops: a guided base, then a second network.

Tiny random networks, each called as its pipeline in diffusers 0.42 calls it, the base on its own
schedule and then the student on another. Ours is one table, `hs.sample` and the denoisers of
`headstart.bridges.diffusers`; theirs is FlowMatchEulerDiscreteScheduler, its `step`, and a loop.

The largest difference of any state, of its max |z|, over Euler and re-noising students (measured,
torch 2.13 on a CPU):

| network    | ours - diffusers' | ours - float64 | diffusers' - float64 |
|------------|-------------------|----------------|----------------------|
| SD 3       | 1.9e-7            | 1.9e-7         | 9.3e-8               |
| Flux       | 2.1e-7            | 2.7e-7         | 1.3e-7               |
| Qwen-Image | 1.9e-7            | 1.6e-7         | 1.5e-7               |
| Z-Image    | 3.3e-7            | 2.1e-7         | 3.3e-7               |
| Wan, video | 2.1e-7            | 1.6e-7         | 1.1e-7               |

What is left is rounding. With weights 1.7 times as large Flux differed by 2.2e-6: diffusers rounds
1000*t twice, we once, so one of eight timesteps was one ulp off, and such a network answers a
change of t with 40 times as much. Told diffusers' timestep, ours came to 3.1e-7.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import headstart as hs
from headstart.bridges.diffusers import denoiser
from headstart.interfaces import Denoiser
from headstart.plan.table import StepTable

diffusers = pytest.importorskip("diffusers")

from flow_transformers import FAMILIES, GUIDANCE, WORDS, Family, networks  # noqa: E402

BATCH, BASE_STEPS, STUDENT_STEPS = 2, 8, 4
TOLERANCE = 1e-6
"""Of max |z|: 16 roundings of 2^-24. A row of either loop makes a few, and so does its network; the
worst that was measured is 6 of them. Every mistake below shows as 100 tolerances or more."""
SCHEDULER = "diffusers.schedulers.scheduling_flow_match_euler_discrete"


def cond_of(seed: int) -> hs.Conditioning:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(BATCH, WORDS, 12, generator=generator)
    return hs.Conditioning(context, torch.randn(BATCH, 10, generator=generator))


POSITIVE, NEGATIVE = cond_of(1), cond_of(2)


def inputs(family: Family) -> list[Tensor]:
    """The start, and fresh noise for each row."""
    generator = torch.Generator().manual_seed(9)
    count = 1 + BASE_STEPS + STUDENT_STEPS
    return [torch.randn(BATCH, *family.shape, generator=generator) for _ in range(count)]


def exact_rows(family: Family) -> list[tuple[str, float]]:
    """Model and t: the student from the second point of its grid, the base above that level."""
    student = family.student.exactly(STUDENT_STEPS)[1:]
    base = [t for t in family.base.exactly(BASE_STEPS) if t > student[0]]
    return [("base", t) for t in base] + [("distilled", t) for t in student]


def table(family: Family, update: hs.Update, guidance: float = GUIDANCE) -> StepTable:
    legs = (
        hs.Leg(model="base", steps=BASE_STEPS, guidance=guidance),
        hs.Leg(model="distilled", steps=STUDENT_STEPS, skip=1, update=update),
    )
    grids = {"base": family.base.ours(), "distilled": family.student.ours()}
    return hs.Plan(legs).compile(grids, prediction=hs.Prediction.FLOW)


def sampled(family: Family, rows: StepTable, denoisers: Mapping[str, Denoiser]) -> list[Tensor]:
    """z after every row, by headstart."""
    noise = inputs(family)
    run = hs.sample(rows, denoisers, POSITIVE, hs.Given(noise[0], noise[1:]), uncond=NEGATIVE)
    return [state.x / (1.0 + row.sigma_next) for state, row in zip(run, rows, strict=True)]


def looped(family: Family, update: hs.Update, models: dict[str, nn.Module]) -> list[Tensor]:
    """z after every row, by diffusers: a scheduler for each leg, as only one of them re-noises. The
    base's knows all levels, because its last row goes to the level at which the student starts."""
    rows, (z, *fresh), states = exact_rows(family), inputs(family), list[Tensor]()
    for name, stochastic in (("base", False), ("distilled", update is hs.Update.RENOISE)):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic)
        scheduler.set_timesteps(sigmas=[t for model, t in rows if name in (model, "base")])
        words = [NEGATIVE, POSITIVE] if name == "base" else [POSITIVE]
        for t in scheduler.timesteps[: [model for model, _ in rows].count(name)]:
            noise_pred = family.theirs(models[name], z, t, words)
            with pytest.MonkeyPatch.context() as patch:
                noise = fresh[len(states)]
                patch.setattr(f"{SCHEDULER}.randn_tensor", lambda *_, noise=noise, **__: noise)
                z = scheduler.step(noise_pred, t, z, return_dict=False)[0]
            states.append(z)
    return states


def exactly(family: Family, update: hs.Update, models: dict[str, nn.Module]) -> list[Tensor]:
    """The same in float64, as far as diffusers' networks go: their sinusoids stay float32."""
    doubles = {name: copy.deepcopy(model).double() for name, model in models.items()}
    words = [part.to("cpu", torch.float64) for part in (NEGATIVE, POSITIVE)]
    rows, states = exact_rows(family), list[Tensor]()
    z, *fresh = (tensor.double() for tensor in inputs(family))
    for (name, t), (_, following), noise in zip(rows, [*rows[1:], ("", 0.0)], fresh, strict=False):
        time = torch.tensor(1000 * t, dtype=torch.float64)
        f = family.theirs(doubles[name], z, time, words if name == "base" else words[1:])
        if name == "distilled" and update is hs.Update.RENOISE:
            z = (1 - following) * (z - t * f) + following * noise
        else:
            z = z + (following - t) * f
        states.append(z)
    return states


def worst(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any state, of the largest |z| of that state."""
    pairs = zip(got, expected, strict=True)
    return max(float((x.double() - y).abs().max() / y.abs().max()) for x, y in pairs)


@pytest.mark.parametrize("update", [hs.Update.EULER, hs.Update.RENOISE])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_state_is_that_of_diffusers_loop(name: str, update: hs.Update) -> None:
    family = FAMILIES[name]
    models, rows = networks(family), table(family, update)
    ours = sampled(family, rows, {name: denoiser(model) for name, model in models.items()})
    assert ours[0].shape == (BATCH, *family.shape)
    assert worst(ours, looped(family, update, models)) <= TOLERANCE
    assert worst(ours, exactly(family, update, models)) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_each_model_is_called_at_the_timesteps_of_its_own_scheduler(name: str) -> None:
    """Diffusers shifts, stretches and multiplies by 1000 in float32: at most 8 roundings."""
    family = FAMILIES[name]
    rows = table(family, hs.Update.EULER)
    student = family.student.theirs(STUDENT_STEPS)[1:]
    base = [t for t in family.base.theirs(BASE_STEPS) if t > student[0]]
    assert [row.model for row in rows] == ["base"] * len(base) + ["distilled"] * len(student)
    assert [row.timestep for row in rows] == pytest.approx([*base, *student], rel=8 * 2.0**-24)


@pytest.mark.parametrize("mistake", ["timestep", "words", "guidance", "networks"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_mistake_shows(name: str, mistake: str) -> None:
    """Told a timestep that is off by 1/1000, the words of the other half, another guidance, or the
    other network: each moves the states by 100 tolerances or more, so none could pass."""
    family, euler = FAMILIES[name], hs.Update.EULER
    models, rows = networks(family), table(family, euler)
    denoisers = {name: denoiser(model) for name, model in models.items()}
    wrong: dict[str, Denoiser] = dict(denoisers)
    if mistake == "timestep":
        wrong["distilled"] = lambda z, t, cond: denoisers["distilled"](z, t * 1.001, cond)
    elif mistake == "words":
        wrong["distilled"] = lambda z, t, cond: denoisers["distilled"](z, t, NEGATIVE)
    elif mistake == "networks":
        wrong["distilled"] = denoisers["base"]
    guidance = GUIDANCE + (mistake == "guidance")
    got = sampled(family, table(family, euler, guidance), wrong)
    assert worst(got, sampled(family, rows, denoisers)) > 100 * TOLERANCE
