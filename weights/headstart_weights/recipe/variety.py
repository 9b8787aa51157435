"""Adapters that give a student its teacher's diversity back, at its first step.

A low-rank adapter (arXiv:2106.09685) on a finished student that is left as it is:

    E |v_1(x, c) - v*|^2        x: noise at GRID[0]; v* of `distill.first_target`

It is to act on the first row alone, `Strength(rows=(1, 0, 0, 0))`: the later steps stay the
student's own, so nothing has to hold them in place. The adapter known for this,
huggingface.co/F16/z-image-turbo-sda, acts at every step; it therefore aligns directions of x0 and
is pulled back to the student, and reports 70 % of the teacher's LPIPS diversity. None is bundled.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart_weights.recipe import StageOptions, language
from headstart_weights.recipe.base import captions_of, load_unet
from headstart_weights.recipe.control import train_adapter, train_slots
from headstart_weights.recipe.dataset import load_dataset
from headstart_weights.recipe.diffusion import GRID, LATENT_SHAPE, mix
from headstart_weights.recipe.distill import RENOISE, STUDENT, Variant, first_target, student_name

RANK = 16
STUDENTS: dict[str, Variant] = {"variety": STUDENT, "renoise-variety": RENOISE}
"""Adapter -> the student that it is trained on."""
_BATCH = 16
_LR = 4e-3


def train(options: StageOptions, adapter: str) -> None:
    """Train for `options.minutes` or `.steps`, resuming; writes `<adapter>[-seed].safetensors`."""
    variant = STUDENTS[adapter]
    student = student_name(variant, options.seed)
    name = student_name(replace(variant, name=adapter), options.seed)
    torch.manual_seed(options.seed)
    unet = load_unet(options.work / f"{student}.safetensors").requires_grad_(False)
    teacher = load_unet(options.work / "base.safetensors").requires_grad_(False)
    data, text = load_dataset(options.work), language.load(options.work).requires_grad_(False)
    adapters, slots = train_slots(unet, RANK)
    empty, timestep = text([""]), torch.full((_BATCH,), GRID[0])
    a, s = mix(timestep)

    def loss_of() -> Tensor:
        context = text(captions_of(data, torch.randint(len(data), (_BATCH,))))
        x = torch.randn(_BATCH, *LATENT_SHAPE)
        target = (a * x - first_target(teacher, x, context, empty, variant.between)) / s
        cond = Conditioning(context, strengths=torch.ones(_BATCH, 1), adapters=adapters)
        return (unet(x, timestep, cond) - target).square().mean()

    train_adapter(options, name, slots, loss_of, _LR, student)


def main(options: StageOptions) -> None:
    """The `variety` stage: an adapter of each of the seed's two students."""
    for variant in STUDENTS.values():
        file = f"{student_name(variant, options.seed)}.safetensors"
        if not (options.work / file).is_file():
            raise InputError(
                f"no {file} in {options.work}: run the stages `distill` and `renoise` with "
                f"--seed {options.seed} first"
            )
    for adapter in STUDENTS:
        train(options, adapter)
