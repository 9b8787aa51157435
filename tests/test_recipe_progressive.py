"""The regression student's targets and trajectories, on networks whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from headstart.interfaces import Conditioning
from headstart.networks.unet import UNet
from headstart_weights.recipe import StageOptions, distill, progressive
from headstart_weights.recipe.dataset import Dataset, Item
from headstart_weights.recipe.diffusion import GRID, PARAMS, euler_step, mix, predict_x0, rollout
from headstart_weights.recipe.training import write_tensors

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]


def gaussian_network(variance: float) -> Network:
    """v of data N(0, variance): E[x0|x] = a*variance/(a^2*variance + s^2) * x, in closed form."""

    def network(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        a, s = mix(timestep)
        x0 = a * variance / (a.square() * variance + s.square()) * x
        return (a * x - x0) / s

    return network


def test_the_teachers_steps_cover_the_grid_and_fall() -> None:
    legs = [progressive.substeps(leg) for leg in range(len(GRID))]
    assert [leg[0] for leg in legs] == list(GRID)
    flat = [t for leg in legs for t in leg]
    assert flat == sorted(set(flat), reverse=True) and flat[-1] > 0
    assert all(len(leg) == progressive.SUB_STEPS for leg in legs)


def test_a_step_to_the_target_lands_where_the_teacher_landed() -> None:
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    landed = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    for leg, (t, after) in enumerate(zip(GRID, (*GRID[1:], None), strict=True)):
        x0 = progressive.target(x, landed, leg)
        if after is None:
            assert x0 is landed
        else:
            stepped = euler_step(x, x0, torch.full((3,), t), torch.full((3,), after))
            torch.testing.assert_close(stepped, landed, rtol=0, atol=1e-5)


def test_a_trajectory_is_the_rollout_and_keeps_the_states_of_the_grid() -> None:
    network: UNet = gaussian_network(0.3)  # type: ignore[assignment]
    x = torch.randn(2, 4, 16, 16)
    context, empty = torch.zeros(2, 16, 128), torch.zeros(1, 16, 128)
    states = progressive.teach(network, x, context, empty)
    assert states.shape == (2, 5, 4, 16, 16) and torch.equal(states[:, 0], x)
    times = [t for leg in range(len(GRID)) for t in progressive.substeps(leg)]
    expected = rollout(
        network, x, times, context, empty=empty, guidance=progressive.GUIDANCE
    )  # fmt: skip
    torch.testing.assert_close(states[:, 4], expected)
    # the flow of a Gaussian scales x by the ratio of deviations: it is a line, and loses nothing
    spread = states.std(dim=(0, 2, 3, 4))
    a, s = (v.flatten() for v in mix(torch.tensor([*GRID])))
    exact = (a.square() * 0.3 + s.square()).sqrt() / (a[0].square() * 0.3 + s[0].square()).sqrt()
    torch.testing.assert_close(spread[:4] / spread[0], exact, rtol=0.06, atol=0)


def exact_network(variance: float) -> Network:
    """The same about a mean that the caption says, so that guidance moves it."""
    network = gaussian_network(variance)

    def shifted(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.context is not None
        mean = cond.context.mean((1, 2))[:, None, None, None]
        a, s = mix(timestep)
        return network(x - a * mean, timestep, cond) - s * mean

    return shifted


@pytest.mark.parametrize("seed", range(3))
def test_the_first_target_is_where_the_guided_teacher_lands(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Euler: the step ends in the teacher's state; re-noise: the x0 that it predicts from there."""
    teacher: UNet = exact_network(0.3)  # type: ignore[assignment]
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 16, 16, generator=draw)
    context = torch.randn(3, 16, 128, generator=draw)
    empty = torch.zeros(1, 16, 128)
    for count in (1, progressive.SUB_STEPS, 5):
        monkeypatch.setattr(distill, "LANDING_STEPS", count)
        carried, timesteps = (
            distill.first_target(teacher, x, context, empty, between)
            for between in ("euler", "renoise")
        )
        stepped = euler_step(x, carried, torch.full((3,), GRID[0]), torch.full((3,), GRID[1]))
        if count == progressive.SUB_STEPS:
            landed = progressive.teach(teacher, x, context, empty)[:, 1]
            torch.testing.assert_close(stepped, landed, rtol=0, atol=1e-5)
        times = torch.linspace(GRID[0], GRID[1], count + 1).round().long().tolist()
        expected = rollout(teacher, x, times, context, empty=empty, guidance=2.0)
        torch.testing.assert_close(timesteps, expected, rtol=0, atol=1e-5)
        now = torch.full((3,), GRID[1])
        again = predict_x0(teacher, stepped, now, context, empty=empty, guidance=2.0)
        torch.testing.assert_close(again, timesteps, rtol=0, atol=1e-4)
        # of one step the first is the teacher's own prediction, and the second is another
        guided = predict_x0(
            teacher, x, torch.full((3,), GRID[0]), context, empty=empty, guidance=2.0
        )
        assert torch.allclose(carried, guided, atol=1e-4) is (count == 1)
        assert not torch.allclose(carried, timesteps, atol=1e-2)


def test_the_stage_goes_on_from_its_parts_and_writes_a_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def pool_of(teacher: UNet, x: Tensor, context: Tensor, empty: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.zeros(len(x), 5, 4, 16, 16)

    class Text(torch.nn.Module):
        def forward(self, prompts: list[str]) -> Tensor:
            return torch.zeros(len(prompts), 16, 128)

    torch.manual_seed(0)
    write_tensors(UNet(PARAMS).state_dict(), tmp_path / "base.safetensors", {})
    Dataset(np.zeros((4, 64, 64, 3), np.uint8), (Item("fox", "noto", "blue", False),) * 4).save(
        tmp_path
    )
    monkeypatch.setattr(progressive, "teach", pool_of)
    monkeypatch.setattr(progressive, "PARTS", 2)
    monkeypatch.setattr(progressive, "PART", 4)
    monkeypatch.setattr(progressive, "write_sheet", lambda *_: None)
    monkeypatch.setattr(progressive.language, "load", lambda _: Text())
    monkeypatch.setattr(progressive.codec, "load", lambda _: None)
    options = StageOptions(work=tmp_path, minutes=1e-6)
    progressive.main(options)
    assert calls == [4, 4]
    (tmp_path / "trajectories/001.safetensors").unlink()
    progressive.main(options)
    assert calls == [4, 4, 4]  # the part that was gone, and not the other
    student = progressive.load_unet(tmp_path / "progressive.safetensors")
    assert sum(p.numel() for p in student.parameters()) > 4_000_000
