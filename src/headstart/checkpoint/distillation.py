"""Which distillation a checkpoint is: told by its tensors, its metadata, or guessed from its names.

No tensor says at which timesteps a Turbo, a Lightning or a DMD2 was trained, nor whether an SD2.1
predicts eps or v. What is guessed is printed, and can be set by hand: preset=, prediction=.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from headstart.checkpoint.folder import json_in, root_of
from headstart.checkpoint.tensors import Checkpoint
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import Spacing, grid

if TYPE_CHECKING:
    from headstart.plan.table import Step  # loads numpy, which `headstart inspect` does without

_GUIDANCE_PROJECTION = "cond_proj.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """How one kind of distilled model was trained, so how it must be run.

    pattern     of its published names
    preset      the pair of `headstart.preset` that runs it
    timesteps   at which it was trained; () where that is the trailing grid of its own step count
    renoises    every x0 goes on under fresh noise; None: by fresh noise or by Euler, both are used
    only_step   the timestep of its 1-step variant, if that is not the first of the grid
    """

    name: str
    pattern: str
    preset: str
    timesteps: tuple[float, ...] = ()
    renoises: bool | None = None
    only_step: float | None = None


DISTILLATIONS: tuple[Distillation, ...] = (
    # arXiv:2405.14867 and its model card; the last three of the paper this package follows
    # (arXiv:2503.10637, its notebooks). The 1-step UNet was trained at 399 alone.
    Distillation(
        name="DMD2",
        pattern=r"(?<![a-z])dmd2?(?![a-z])",
        preset="dmd2",
        timesteps=(999.0, 759.0, 749.0, 499.0, 259.0, 249.0),
        renoises=True,
        only_step=399.0,
    ),
    # arXiv:2402.13929: one network for each step count, on the trailing grid of that count.
    Distillation(name="Lightning", pattern="lightning", preset="lightning", renoises=False),
    # arXiv:2404.13686; the 1-step UNet starts at 800 (its model card).
    Distillation(
        name="Hyper-SD",
        pattern="hyper[-_ ]?sd",
        preset="lightning",
        renoises=False,
        only_step=800.0,
    ),
    # arXiv:2310.04378: consistency on the 50 steps of a DDIM teacher, 19, 39, ... 999.
    Distillation(
        name="LCM",
        pattern=r"(?<![a-z])lcm(?![a-z])",
        preset="lcm",
        timesteps=tuple(float(t) for t in range(999, 0, -20)),
        renoises=True,
    ),
    # arXiv:2311.17042, section 4: four timesteps. SD-Turbo and SDXL-Turbo alike.
    Distillation(name="Turbo", pattern="turbo", preset="turbo", timesteps=(999, 749, 499, 249)),
)

_LCM = next(row for row in DISTILLATIONS if row.name == "LCM")
_STEPS = re.compile(r"(?<![0-9])([1-9][0-9]?)[-_ ]?steps?(?![a-z])")
_HUB_FOLDER = re.compile(r"models--[^/]+--([^/]+)")

# Of SD2.1's lineage: the 512 px models predict eps, the 768 px one v (their model cards).
_PREDICTIONS: tuple[tuple[str, Prediction, int], ...] = (
    (r"turbo", Prediction.EPS, 512),
    (r"2[-_.]?[01]?[-_ ]base|512", Prediction.EPS, 512),
    (r"768", Prediction.V, 768),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """What a checkpoint probably is; every field is None where nothing tells.

    steps        stated in its name, such as 4 of `sdxl_lightning_4step_unet`
    prediction   and image_size (pixels): of models that share all shapes with one that differs
    why          where it was read: "tensors", "metadata", "scheduler" or "name"
    """

    distillation: Distillation | None = None
    steps: int | None = None
    prediction: Prediction | None = None
    image_size: int | None = None
    why: str | None = None

    @property
    def preset(self) -> str | None:
        """The pair to run it as; None for a 1-step variant that starts at a timestep of its own."""
        row = self.distillation
        if row is None or (self.steps == 1 and row.only_step is not None):
            return None
        return row.preset

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Where it was trained, highest first; () where nothing tells."""
        row = self.distillation
        if row is None:
            return ()
        if self.steps == 1 and row.only_step is not None:
            return (row.only_step,)
        if row.timesteps:
            return row.timesteps
        counts = (self.steps,) if self.steps else (1, 2, 4, 8)
        found = {float(t) for count in counts for t in grid(count, Spacing.TRAILING)}
        return tuple(sorted(found, reverse=True))

    def note(self, *, without_prediction: bool = False) -> str | None:
        """One line for a person: what was guessed, from what, and how to set it by hand."""
        told: list[str] = []
        if row := self.distillation:
            count = f", {self.steps} steps" if self.steps and self.steps > 1 else ""
            count = ", 1 step" if self.steps == 1 else count
            use = f"preset {self.preset}" if self.preset else f"timestep {self.timesteps[0]:g}"
            told.append(f"taken for {row.name}{count}: {use} (set with --preset or preset=)")
        if self.prediction is not None and not without_prediction:
            value = self.prediction.value
            told.append(f"predicts {value} (set with --prediction or prediction=)")
        return f"{'; '.join(told)}, by its {self.why}" if told else None

    def complaint(self, role: str, rows: Sequence[Step], name: str) -> str | None:
        """Why these rows of a plan are not what the network was trained for, or None."""
        row = self.distillation
        if row is None or not rows:
            return None
        trained = self.timesteps
        strange = [step.timestep for step in rows if step.timestep not in trained]
        # A trajectory-preserving network makes the jumps of its grid, a consistency model any.
        jumps = [] if row.timesteps else _skipping(rows, trained) if self.steps else []
        rules = {step.keep == 0.0 for step in rows if step.sigma_next}
        wrong_rule = row.renoises is not None and bool(rules - {row.renoises})
        if not (strange or jumps or wrong_rule):
            return None
        made = f"{len(trained)} of them, {_listed(trained[:3])} ... {trained[-1]:g}"
        made = _listed(trained) if len(trained) <= 8 else made
        rule = {True: " with fresh noise after each", False: " with Euler steps", None: ""}
        ran = _listed([step.timestep for step in rows])
        other = " with another update" if wrong_rule and not strange else ""
        fix = f"preset={self.preset!r}" if self.preset else f"Leg(timesteps={trained})"
        steps = f", steps={self.steps}" if self.preset and self.steps else ""
        return (
            f"the {role} model is taken for {row.name} by its {self.why}, trained at timesteps "
            f"{made}{rule[row.renoises]}; plan {name!r} runs it at {ran}{other}: use {fix}{steps}"
        )


class _Clue(NamedTuple):
    text: str
    why: str


def guess(path: str | Path, checkpoint: Checkpoint, lineage: str) -> Guess:
    """What the checkpoint at `path`, a model of `lineage`, probably is; headers only.

    In this order: LCM's guidance projection among the tensors; the metadata `headstart.preset`,
    then `modelspec.title`; the scheduler of a diffusers folder; the name of the file, of the
    diffusers folder it lies in, or of its Hub repository. Only a step count is taken from a name
    as well.
    """
    path = Path(path)
    clues = _clues(path, checkpoint)
    steps = next((int(m[1]) for clue in clues if (m := _STEPS.search(clue.text))), None)
    found = _distillation(path, checkpoint, clues)
    prediction, size, why = _prediction(clues, lineage, found, steps)
    if found is None:
        return Guess(prediction=prediction, image_size=size, why=why)
    return Guess(
        distillation=found[0], steps=steps, prediction=prediction, image_size=size, why=found[1]
    )


def preset_of(path: str | Path) -> str | None:
    """The pair that a distilled file is probably run as, or None where nothing tells."""
    return guess(path, Checkpoint.open(path, "unet"), "").preset


def _clues(path: Path, checkpoint: Checkpoint) -> list[_Clue]:
    """Lower-cased texts that may tell, the surest first."""
    metadata = checkpoint.metadata
    told = [metadata.get(key, "") for key in ("headstart.preset", "modelspec.title")]
    names = [path.name.removesuffix(".safetensors")]
    if root := root_of(path):
        names.append(root.name)
    names += [m[1] for part in path.absolute().parts if (m := _HUB_FOLDER.fullmatch(part))]
    clues = [_Clue(text, "metadata") for text in told] + [_Clue(name, "name") for name in names]
    return [_Clue(clue.text.lower(), clue.why) for clue in clues if clue.text]


def _distillation(
    path: Path, checkpoint: Checkpoint, clues: Iterable[_Clue]
) -> tuple[Distillation, str] | None:
    if any(name.endswith(_GUIDANCE_PROJECTION) for name in checkpoint.names):
        return _LCM, "tensors"
    clues = list(clues)
    kind = json_in(root_of(path), "scheduler/scheduler_config.json").get("_class_name")
    if kind == "LCMScheduler":
        clues.insert(sum(clue.why == "metadata" for clue in clues), _Clue("lcm", "scheduler"))
    for clue in clues:
        for row in DISTILLATIONS:
            if re.search(row.pattern, clue.text):
                return row, clue.why
    return None


def _prediction(
    clues: Iterable[_Clue],
    lineage: str,
    found: tuple[Distillation, str] | None,
    steps: int | None,
) -> tuple[Prediction | None, int | None, str | None]:
    for clue in clues:
        if lineage == "sd21":
            for pattern, prediction, size in _PREDICTIONS:
                if re.search(pattern, clue.text):
                    return prediction, size, clue.why
        # sdxl_lightning_1step_unet_x0 is the one published network here that predicts x0.
        if found and found[0].name == "Lightning" and steps == 1 and "x0" in clue.text:
            return Prediction.X0, None, clue.why
    return None, None, None


def _skipping(rows: Sequence[Step], trained: tuple[float, ...]) -> list[float]:
    """Starting points of steps that jump over one of the trained timesteps."""
    following = dict(pairwise(trained))
    jumps = pairwise([step.timestep for step in rows])
    return [here for here, there in jumps if following.get(here) != there]


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
