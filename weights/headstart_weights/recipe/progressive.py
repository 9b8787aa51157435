"""A second kind of student: regression on its teacher's own deterministic trajectories.

For each leg t -> t' of GRID the student learns the one x0 whose Euler step lands where the guided
teacher lands after `SUB_STEPS` steps (progressive distillation, arXiv:2202.00512, appendix G):

    x0* = (x' - (s'/s)*x) / (a' - (s'/s)*a)          loss = max(1, a^2/s^2) * |x0 - x0*|^2

Nothing in it seeks modes, and the teacher draws no noise: diversity that distribution matching
loses and this student keeps is lost to the matching, not to the four steps. It does not ship;
`headstart study --distilled` measures it.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from headstart.networks.unet import UNet
from headstart_weights.recipe import StageOptions, codec, language
from headstart_weights.recipe.base import captions_of, load_unet
from headstart_weights.recipe.dataset import load_dataset
from headstart_weights.recipe.diffusion import (
    GRID,
    LATENT_SHAPE,
    euler_step,
    mix,
    predict_x0,
    write_sheet,
)
from headstart_weights.recipe.training import Average, Run, descend, write_tensors

NAME = "progressive"
GUIDANCE = 2.0
SUB_STEPS = 4
PART, PARTS = 128, 20
_BATCH = 32
_LR = 4e-4

log = logging.getLogger(__name__)


class Pool(NamedTuple):
    """states [N, 5, C, h, w]: a trajectory at the four timesteps of GRID, and its end; context."""

    states: Tensor
    context: Tensor


def substeps(leg: int, count: int = SUB_STEPS) -> list[int]:
    """Timesteps of the teacher on one leg of GRID, the first being the leg's own."""
    ends = (*GRID, 0)
    return torch.linspace(ends[leg], ends[leg + 1], count + 1)[:-1].round().long().tolist()


@torch.no_grad()
def land(
    teacher: UNet, x: Tensor, leg: int, context: Tensor, empty: Tensor, count: int = SUB_STEPS
) -> Tensor:
    """x at GRID[leg] -> where the guided teacher's `count` steps end: a state, at last an x0."""
    times = (*substeps(leg, count), *GRID[leg + 1 : leg + 2])
    for number in range(count):
        timestep = torch.full((len(x),), times[number])
        x0 = predict_x0(teacher, x, timestep, context, empty=empty, guidance=GUIDANCE)
        if number + 1 == len(times):
            return x0
        x = euler_step(x, x0, timestep, torch.full((len(x),), times[number + 1]))
    return x


def teach(teacher: UNet, x: Tensor, context: Tensor, empty: Tensor) -> Tensor:
    """x [B, C, h, w] at GRID[0] -> [B, 5, C, h, w], the last its x0."""
    states = [x]
    for leg in range(len(GRID)):
        states.append(land(teacher, states[-1], leg, context, empty))
    return torch.stack(states, dim=1)


def target(x: Tensor, endpoint: Tensor, leg: int) -> Tensor:
    """The x0 whose step from x ends at `endpoint`; on the last leg that is `endpoint` itself."""
    if leg + 1 == len(GRID):
        return endpoint
    a, s = mix(torch.tensor([GRID[leg]]))
    a_next, s_next = mix(torch.tensor([GRID[leg + 1]]))
    return (endpoint - s_next / s * x) / (a_next - s_next / s * a)


def load_pool(options: StageOptions) -> Pool:
    """The teacher's trajectories, drawn part by part, and only those that the folder lacks."""
    folder = options.work / "trajectories"
    folder.mkdir(exist_ok=True)
    missing = [n for n in range(PARTS) if not _pool_file(folder, n).exists()]
    if missing:
        data, text = load_dataset(options.work), language.load(options.work)
        teacher = load_unet(options.work / "base.safetensors")
        for number in missing:
            torch.manual_seed(options.seed + 1_000_000 + number)
            indices = torch.randint(len(data), (PART,))
            with torch.no_grad():
                context, empty = text(captions_of(data, indices)), text([""])
            states = teach(teacher, torch.randn(PART, *LATENT_SHAPE), context, empty)
            write_tensors({"states": states, "context": context}, _pool_file(folder, number), {})
            log.info("trajectories: %d of %d", (number + 1) * PART, PARTS * PART)
    parts = [Pool(**load_file(_pool_file(folder, n))) for n in range(PARTS)]
    return Pool(torch.cat([p.states for p in parts]), torch.cat([p.context for p in parts]))


def main(options: StageOptions) -> None:
    """The `progressive` stage: regress for `options.minutes`, resuming."""
    pool = load_pool(options)
    student = copy.deepcopy(load_unet(options.work / "base.safetensors")).requires_grad_(True)
    optimiser = torch.optim.AdamW(student.parameters(), lr=_LR, weight_decay=0.0, fused=True)
    average = Average(student, 0.99)
    run = Run(NAME, options, {"student": student}, [optimiser], average)

    def step(index: int, fraction: float) -> dict[str, float]:
        leg = int(torch.randint(len(GRID), (1,)))
        rows = torch.randint(len(pool.states), (_BATCH,))
        x, endpoint = pool.states[rows, leg], pool.states[rows, leg + 1]
        x0 = predict_x0(student, x, torch.full((_BATCH,), GRID[leg]), pool.context[rows])
        a, s = mix(torch.tensor([GRID[leg]]))
        weight = (a / s).square().clamp_min(1.0)
        loss = (weight * (x0 - target(x, endpoint, leg)).square()).mean()
        descend(optimiser, loss, _LR * min(1.0, (index + 1) / 50, (1 - fraction) / 0.6))
        return {"loss": loss.item()}

    run.loop(step, save_every_s=60.0)
    path = options.work / f"{NAME}.safetensors"
    write_tensors(average.values, path, {"steps": str(run.step)})
    vae, text = codec.load(options.work), language.load(options.work)
    write_sheet(load_unet(path), text, vae, GRID, options.work / f"{NAME}_{run.step:06d}.png")


def _pool_file(folder: Path, number: int) -> Path:
    return folder / f"{number:03d}.safetensors"
