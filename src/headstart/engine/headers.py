"""A pair as its files' headers declare it: enough to compile plans before weights are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from headstart.checkpoint.distillation import Guess
from headstart.engine.models import (
    FilePath,
    Model,
    Predictions,
    check_belong,
    distilled_by,
    predictions,
    preset_of,
    schedules,
    swapped,
    two_schedules,
)
from headstart.errors import InputError
from headstart.plan.prediction import Prediction
from headstart.plan.spacing import Process


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """What files say, and what their names suggest.

    models       role -> its file
    denoisers    "base" and/or "distilled" -> the file that it is made of; with a distilled LoRA
                 both are the base's
    schedules, predictions, guesses, preset    as `headstart.engine.pair.Pair` has them
    notes        lines for a person; swap: the one that says that they may be swapped, or None
    """

    models: Mapping[str, Model]
    denoisers: Mapping[str, Model]
    schedules: Mapping[str, Process]
    predictions: Mapping[str, Prediction]
    guesses: Mapping[str, Guess]
    preset: str | None
    notes: tuple[str, ...]
    swap: str | None = None


def read_headers(
    base: FilePath | None,
    distilled: FilePath | None,
    distilled_lora: FilePath | None = None,
    *,
    prediction: Predictions | None = None,
    preset: str | None = None,
    allow: Collection[str] = (),
) -> Headers:
    """Read headers alone. Raises CheckpointError for files that are absent, damaged or do not
    belong together, and InputError where none is given."""
    paths = {role: p for role, p in (("base", base), ("distilled", distilled)) if p is not None}
    if not paths:
        raise InputError("no weights: give base=, distilled= or both, or use Engine.demo()")
    models = {role: Model.of(path, allow) for role, path in paths.items()}
    check_belong(models)
    lora = None if distilled_lora is None else distilled_by(distilled_lora, models)
    known = predictions(prediction, models)
    found = schedules(models, known)
    chosen = prediction if isinstance(prediction, Mapping) else dict.fromkeys(models, prediction)
    guessed = (model.note(role, chosen.get(role) is not None) for role, model in models.items())
    swap = swapped(models, lora)
    lines = (*guessed, swap, two_schedules(found))
    headers = Headers(
        models=models,
        denoisers=models,
        schedules=found,
        predictions=known,
        guesses={role: model.guess for role, model in models.items()},
        preset=preset or preset_of(models),
        notes=tuple(line for line in lines if line),
        swap=swap,
    )
    return headers if lora is None else _one_network(headers, lora)


def _one_network(headers: Headers, lora: Guess) -> Headers:
    """A pair whose distilled model is its base, to be told apart by the strength of a LoRA."""
    roles, note = ("base", "distilled"), lora.note()
    return replace(
        headers,
        denoisers=dict.fromkeys(roles, headers.models["base"]),
        schedules=dict.fromkeys(roles, headers.schedules["base"]),
        predictions=dict.fromkeys(roles, headers.predictions["base"]),
        guesses={**headers.guesses, "distilled": lora},
        preset=headers.preset or lora.preset,
        notes=(*headers.notes, *([] if note is None else [f"distilled: {note}"])),
    )
