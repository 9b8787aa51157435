"""The distilled model: distribution matching distillation of the base onto four timesteps.

The student's x0 moves along grad = x0_fake - x0_teacher, both predicted from the same re-noised
student output; `fake` is a copy of the base that keeps learning what the student draws
(arXiv:2311.18828, eq. 7; the four-step form is arXiv:2405.14867). The teacher is guided, which is
what makes the student sharp, fast and alike. A student step starts either from the student's own
earlier steps (the backward simulation of DMD2, arXiv:2405.14867), or from a noised
picture (as LCM, ADD and Lightning are trained). The shipped student follows its own steps
deterministically, because that is how it is sampled; DMD2's re-noises between them.

A student may have another target at its first step: where the guided teacher lands, from the same
noise (DP-DMD, arXiv:2602.03139). Only its later steps are matched then, on states that carry no
gradient, and `fake` learns what those draw. The paper adds both losses in one update, 0.05 of the
first; here a step of training is of one step of the student, as it is for every other student.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from headstart.interfaces import Conditioning
from headstart.networks.unet import UNet
from headstart_weights.recipe import StageOptions, codec, language
from headstart_weights.recipe.base import captions_of, load_unet
from headstart_weights.recipe.dataset import load_dataset
from headstart_weights.recipe.diffusion import (
    GRID,
    LATENT_SHAPE,
    add_noise,
    euler_step,
    mix,
    predict_x0,
    stratified_timesteps,
    write_sheet,
)
from headstart_weights.recipe.progressive import GUIDANCE, land, target
from headstart_weights.recipe.training import Average, Run, descend, write_tensors

_BATCH = 16
_FAKE_HEAD_START = 50  # steps in which only the fake score learns

log = logging.getLogger(__name__)


Between: TypeAlias = Literal["euler", "renoise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What distinguishes one student from another."""

    name: str
    guidance: float
    noised_pictures: float
    """Share of the student's later steps that start from a noised picture."""
    between: Between = "euler"
    """Whether the student's steps keep their noise ("euler") or draw new noise ("renoise")."""
    landing: bool = False
    """Whether the first step is trained to end where the teacher does, and not matched."""
    fake_updates: int = 2
    lr: float = 3e-4


STUDENT = Variant(name="student", guidance=2.0, noised_pictures=0.5)
CONTROL = Variant(name="control", guidance=1.0, noised_pictures=0.5)
UNNOISED = Variant(name="unnoised", guidance=2.0, noised_pictures=0.0)
RENOISE = Variant(name="renoise", guidance=2.0, noised_pictures=0.5, between="renoise")
RENOISE_UNNOISED = Variant(
    name="renoise-unnoised", guidance=2.0, noised_pictures=0.0, between="renoise"
)
DP = replace(STUDENT, name="dp", landing=True)
RENOISE_DP = replace(RENOISE, name="renoise-dp", landing=True)

LANDING_STEPS = 5
"""Of the teacher on the student's first leg; arXiv:2602.03139 has 5 of its teacher's 30 steps."""


class Distiller:
    """Teacher, student and fake score, and one training step of each."""

    def __init__(self, options: StageOptions, variant: Variant) -> None:
        self.variant = variant
        self.data = load_dataset(options.work)
        self.latents = codec.Posterior.of(codec.load(options.work), self.data.images)
        self.teacher = load_unet(options.work / "base.safetensors").requires_grad_(False)
        self.student = _first_student(options, variant, self.teacher).requires_grad_(True)
        self.fake = copy.deepcopy(self.teacher).requires_grad_(True)
        self.text = language.load(options.work).requires_grad_(False)
        with torch.no_grad():
            self.empty = self.text([""])
        self.student_optimiser = _adam(self.student, variant.lr)
        self.fake_optimiser = _adam(self.fake, 2 * variant.lr)

    def step(self, index: int, fraction: float) -> dict[str, float]:
        indices = torch.randint(len(self.latents.mean), (_BATCH,))
        with torch.no_grad():
            context = self.text(captions_of(self.data, indices))
            number = int(torch.randint(len(GRID), (1,)))  # one for the whole batch
            x = self.start(number, indices, context)
        x0 = predict_x0(self.student, x, _at(number), context)
        landing = number == 0 and self.variant.landing
        loss = self._landing_loss(x, x0, context) if landing else self._matching_loss(x0, context)
        if index >= _FAKE_HEAD_START:
            scale = 1.0 if fraction < 0.6 else (1.0 - fraction) / 0.4 + 0.02
            descend(self.student_optimiser, loss, self.variant.lr * scale)
        if landing:
            return {"landing": loss.item()}
        output = x0.detach()
        fake = [self._update_fake(output, context) for _ in range(self.variant.fake_updates)]
        return {"matching": loss.item(), "fake": fake[-1], "spread": output.std().item()}

    def start(self, number: int, indices: Tensor, context: Tensor) -> Tensor:
        """Where the student's step at GRID[number] begins, [B, C, h, w]."""
        x = self.follow(torch.randn(_BATCH, *LATENT_SHAPE), context, number)
        if number > 0 and self.variant.noised_pictures > 0:
            pictures, _ = add_noise(self.latents.draw(indices), _at(number))
            pick = torch.rand(_BATCH, 1, 1, 1) < self.variant.noised_pictures
            x = torch.where(pick, pictures, x)
        return x

    @torch.no_grad()
    def follow(self, x: Tensor, context: Tensor, steps: int) -> Tensor:
        """The student's own first `steps` steps from noise x [B, C, h, w]."""
        for i in range(steps):
            x0 = predict_x0(self.student, x, _at(i), context)
            if self.variant.between == "euler":
                x = euler_step(x, x0, _at(i), _at(i + 1))
            else:
                x, _ = add_noise(x0, _at(i + 1))
        return x

    def _landing_loss(self, x: Tensor, x0: Tensor, context: Tensor) -> Tensor:
        """|v - v*|^2 = |x0 - x0*|^2 / s^2, x0* being `first_target`.

        Its gradient, clipped at a norm of 1, is about that long; the matching's has 0.2 to 1.1.
        """
        expected = first_target(self.teacher, x, context, self.empty, self.variant.between)
        return ((x0 - expected) / mix(_at(0)).noise).square().mean()

    def _matching_loss(self, x0: Tensor, context: Tensor) -> Tensor:
        """0.5*|x0 - stop(x0 - grad)|^2, so that d loss/d x0 = grad, normalised a sample."""
        with torch.no_grad():
            timestep = stratified_timesteps(_BATCH, 20, 980)
            x, _ = add_noise(x0, timestep)
            empty, guidance = self.empty, self.variant.guidance
            real = predict_x0(self.teacher, x, timestep, context, empty=empty, guidance=guidance)
            fake = predict_x0(self.fake, x, timestep, context)
            scale = (x0 - real).abs().mean((1, 2, 3), keepdim=True) + 1e-4
            target = x0 - (fake - real) / scale
        return 0.5 * (x0 - target).square().mean()

    def _update_fake(self, x0: Tensor, context: Tensor) -> float:
        timestep = stratified_timesteps(_BATCH)
        x, v = add_noise(x0, timestep)
        loss = (self.fake(x, timestep, Conditioning(context)) - v).square().mean()
        descend(self.fake_optimiser, loss, 2 * self.variant.lr)
        return loss.item()


@torch.no_grad()
def first_target(
    teacher: UNet, x: Tensor, context: Tensor, empty: Tensor, between: Between
) -> Tensor:
    """The x0 that the first step from noise x [B, C, h, w] should predict: the guided teacher's.

    "euler"    the x0 whose step ends where the teacher's LANDING_STEPS end: a deterministic step
               carries noise along, so the state itself is what the teacher can hand over; in
               velocities it is (x - x')/(t - t') of arXiv:2602.03139
    "renoise"  the teacher's x0 there. A step that draws new noise carries x0 alone: no x0 makes it
               land, and the one above is read off the middle of the leg, blurred by noise that the
               teacher has removed at its end
    """
    endpoint = land(teacher, x, 0, context, empty, LANDING_STEPS)
    if between == "euler":
        return target(x, endpoint, 0)
    timestep = torch.full((len(x),), GRID[1])
    return predict_x0(teacher, endpoint, timestep, context, empty=empty, guidance=GUIDANCE)


def student_name(variant: Variant, seed: int) -> str:
    """The file of a student: the variant's name, and the training seed where it is not 0."""
    return variant.name if seed == 0 else f"{variant.name}-{seed}"


def _at(number: int) -> Tensor:
    """GRID[number] for the whole batch."""
    return torch.full((_BATCH,), GRID[number])


def _first_student(options: StageOptions, variant: Variant, teacher: UNet) -> UNet:
    """What an earlier run wrote, else the teacher."""
    path = options.work / f"{student_name(variant, options.seed)}.safetensors"
    return load_unet(path) if path.exists() else copy.deepcopy(teacher)


def _adam(unet: UNet, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        unet.parameters(), lr=lr, betas=(0.0, 0.99), weight_decay=0.0, fused=True
    )


def train(options: StageOptions, variant: Variant) -> None:
    """Distil for `options.minutes` or `.steps`, resuming; writes `<student_name>.safetensors`.

    With `options.keep` also `<student_name>@<step>.safetensors`, for a curve over training.
    """
    name = student_name(variant, options.seed)
    torch.manual_seed(options.seed)
    distiller = Distiller(options, variant)
    average = Average(distiller.student, 0.99)
    networks = {"student": distiller.student, "fake": distiller.fake}
    optimisers = [distiller.student_optimiser, distiller.fake_optimiser]
    run = Run(name, options, networks, optimisers, average)

    def save() -> None:
        path = options.work / f"{name}.safetensors"
        write_tensors(average.values, path, {"steps": str(run.step)})
        sheet = options.work / f"{name}_{run.step:06d}.png"
        write_sheet(load_unet(path), distiller.text, codec.load(options.work), GRID, sheet)

    def keep() -> None:
        if options.keep and run.step % options.keep == 0:
            path = options.work / f"{name}@{run.step}.safetensors"
            write_tensors(average.values, path, {"steps": str(run.step)})

    run.loop(distiller.step, on_save=save, save_every_s=180.0, on_step=keep)
    save()


main = partial(train, variant=STUDENT)
control = partial(train, variant=CONTROL)
unnoised = partial(train, variant=UNNOISED)
renoise = partial(train, variant=RENOISE)
renoise_unnoised = partial(train, variant=RENOISE_UNNOISED)  # DMD2 without its GAN
dp = partial(train, variant=DP)
renoise_dp = partial(train, variant=RENOISE_DP)
"""The stages of these names; `main` is `distill`, the student that ships."""
