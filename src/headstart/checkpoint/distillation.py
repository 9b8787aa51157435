"""Which distillation a checkpoint is: from its tensors, its metadata, or a guess from its name.

No tensor shows at which timesteps a Turbo, a Lightning or a DMD2 was trained, nor whether an SD2.1
predicts eps or v. A guess is printed, and can be overridden: preset=, prediction=.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from headstart.checkpoint.distillations import (
    ANCESTRAL,
    DISTILLATIONS,
    EULER,
    RENOISE,
    Distillation,
)
from headstart.checkpoint.folder import json_in, root_of
from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import counted
from headstart.plan.prediction import Prediction

if TYPE_CHECKING:
    from headstart.plan.table import Step  # loads numpy, which `headstart inspect` does without

_GUIDANCE_PROJECTION = "cond_proj.weight"
_LCM = next(row for row in DISTILLATIONS if row.name == "LCM")
_METADATA = ("headstart.preset", "modelspec.title", "ss_output_name")
"""Ours, the Stability AI model specification's, and kohya's; the surest first."""
_STEPS = re.compile(r"(?<![0-9])([1-9][0-9]?)[-_ ]?steps?(?![a-z])")
_HUB_FOLDER = re.compile(r"models--[^/]+--([^/]+)")


class _Predicts(NamedTuple):
    pattern: str
    prediction: Prediction
    image_size: int | None = None


# Of SD2.1's lineage: the 512 px models predict eps, the 768 px one v (their model cards).
_OF_SD21 = (
    _Predicts(r"turbo", Prediction.EPS, 512),
    _Predicts(r"2[-_.]?[01]?[-_ ]base|512", Prediction.EPS, 512),
    _Predicts(r"768", Prediction.V, 768),
)
# sdxl_lightning_1step_unet_x0 is the one published network here that predicts x0.
_OF_LIGHTNING = (_Predicts("x0", Prediction.X0),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """What a checkpoint probably is; a field is None if it is unknown.

    steps        the count in its name, such as 4 in `sdxl_lightning_4step_unet`
    prediction   and image_size (pixels): for models whose shapes do not show them
    why          the source: "tensors", "metadata", "scheduler" or "name"
    """

    distillation: Distillation | None = None
    steps: int | None = None
    prediction: Prediction | None = None
    image_size: int | None = None
    why: str | None = None

    @property
    def preset(self) -> str | None:
        """The pair that runs it."""
        return None if self.distillation is None else self.distillation.preset(self.steps)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timesteps of its training, highest first; () if unknown."""
        row = self.distillation
        if row is None:
            return ()
        if row.timesteps and self.steps not in row.by_steps:
            return row.timesteps
        return _timesteps(row.preset(self.steps), self.steps)

    def note(self, *, without_prediction: bool = False) -> str | None:
        """One line for a user: the guess, its source, and how to override it."""
        parts: list[str] = []
        if row := self.distillation:
            count = f", {counted(self.steps, 'step')}" if self.steps else ""
            override = f"preset {self.preset} (set with --preset or preset=)"
            parts.append(f"taken for {row.name}{count}: {override}")
        if self.prediction is not None and not without_prediction:
            value = self.prediction.value
            parts.append(f"predicts {value} (set with --prediction or prediction=)")
        return f"{'; '.join(parts)}, by its {self.why}" if parts else None

    def complaint(self, role: str, rows: Sequence[Step], name: str) -> str | None:
        """Why the network was not trained for these rows of a plan, or None."""
        row = self.distillation
        if row is None or not rows:
            return None
        trained = self.timesteps
        unknown = [step.timestep for step in rows if step.timestep not in trained]
        jumps = _skips(rows, trained) if row.jumps and self.steps else []
        rules = {_rule(step) for step in rows if step.sigma_next}
        wrong_rule = bool(row.updates) and not rules <= set(row.updates)
        if not (unknown or jumps or wrong_rule):
            return None
        many = f"{len(trained)} of them, {_joined(trained[:3])} ... {trained[-1]:g}"
        timesteps = _joined(trained) if len(trained) <= 8 else many
        rule: dict[tuple[str, ...], str] = {
            (RENOISE,): " with fresh noise after each",
            (EULER,): " with Euler steps",
        }
        actual = _joined([step.timestep for step in rows])
        update = " with another update" if wrong_rule and not unknown else ""
        count = f", steps={self.steps}" if self.steps and self.steps not in row.by_steps else ""
        return (
            f"the {role} model is taken for {row.name} by its {self.why}, trained at timesteps "
            f"{timesteps}{rule.get(row.updates, '')}; plan {name!r} runs it at {actual}{update}: "
            f"use preset={self.preset!r}{count}"
        )


def _timesteps(pair_name: str, steps: int | None) -> tuple[float, ...]:
    """The timesteps of a pair's distilled model, of one step count or of all it has."""
    from headstart.plan.pairs import PAIRS  # loads numpy
    from headstart.plan.preset import preset

    pair = PAIRS[pair_name]
    counts = (steps,) if steps and (not pair.timesteps or steps in pair.timesteps) else pair.steps
    tables = [
        preset(pair_name, steps=count, mode="distilled").compile(
            pair.schedules, prediction=pair.predictions
        )
        for count in counts
    ]
    return tuple(sorted({step.timestep for table in tables for step in table}, reverse=True))


def _rule(step: Step) -> str:
    """The update of a row that does not end at 0; "" for any but the plain ones."""
    q = step.sigma_next / step.sigma
    if step.carry:
        return ""
    if step.keep == 0.0:
        return RENOISE
    if step.add == 0.0:
        return EULER
    return ANCESTRAL if abs(step.keep - q * q) < 1e-9 else ""


Row = TypeVar("Row", Distillation, _Predicts)
_Clue = tuple[str, str]
"""A text to search, and its source."""


def guess(path: str | Path, checkpoint: Checkpoint, lineage: str) -> Guess:
    """What the checkpoint at `path`, a model of `lineage`, probably is; headers only.

    The sources in order: LCM's guidance projection among the tensors; the metadata
    `headstart.preset`, then `modelspec.title` and `ss_output_name`; the scheduler of a diffusers
    folder; the name of the file, of its diffusers folder, or of its Hub repository. The step count
    comes from the first name or text with one.
    """
    path = Path(path)
    clues = _clues(path, checkpoint)
    steps = next((int(m[1]) for text, _ in clues if (m := _STEPS.search(text))), None)
    row, source = _distillation(path, checkpoint, clues)
    rows = _OF_SD21 if lineage == "sd21" else ()
    if row is not None and row.name == "Lightning" and steps == 1:
        rows += _OF_LIGHTNING
    predicts, why = _first(clues, rows)
    return Guess(
        distillation=row,
        steps=None if row is None or row.any_steps else steps,
        prediction=predicts and predicts.prediction,
        image_size=predicts and predicts.image_size,
        why=source or why,
    )


def _first(clues: Iterable[_Clue], rows: Sequence[Row]) -> tuple[Row, str] | tuple[None, None]:
    """The first row whose pattern is in a clue, and the clue's source."""
    matches = ((row, why) for text, why in clues for row in rows if re.search(row.pattern, text))
    return next(matches, (None, None))


def _clues(path: Path, checkpoint: Checkpoint) -> list[_Clue]:
    """Lower-case texts to search, the surest first."""
    metadata = checkpoint.metadata
    texts = [metadata.get(key, "") for key in _METADATA]
    names = [path.name.removesuffix(".safetensors")]
    if root := root_of(path):
        names.append(root.name)
    names += [m[1] for part in path.absolute().parts if (m := _HUB_FOLDER.fullmatch(part))]
    clues = [(text, "metadata") for text in texts] + [(name, "name") for name in names]
    return [(text.lower(), why) for text, why in clues if text]


def _distillation(
    path: Path, checkpoint: Checkpoint, clues: Iterable[_Clue]
) -> tuple[Distillation, str] | tuple[None, None]:
    if any(name.endswith(_GUIDANCE_PROJECTION) for name in checkpoint.names):
        return _LCM, "tensors"
    clues = list(clues)
    scheduler = json_in(root_of(path), "scheduler/scheduler_config.json").get("_class_name")
    if scheduler == "LCMScheduler":
        clues.insert(sum(why == "metadata" for _, why in clues), ("lcm", "scheduler"))
    return _first(clues, DISTILLATIONS)


def _skips(rows: Sequence[Step], trained: tuple[float, ...]) -> list[float]:
    """Starting points of steps that jump over one of the trained timesteps."""
    following = dict(pairwise(trained))
    jumps = pairwise([step.timestep for step in rows])
    return [here for here, there in jumps if following.get(here) != there]


def _joined(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
