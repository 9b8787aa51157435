"""The strength of an adapter: one number for each row and each sample of a run.

strength[row, sample] = plan[row] * value[sample] * rows[row] * [model(row) in models]
                        * [timestep(row) <= below]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headstart.errors import InputError
from headstart.plan.table import Step, StepTable

Array: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = "float | tuple[float, ...]"


@dataclass(frozen=True, slots=True)
class Strength:
    """A strength, the product of its fields; a field that is left out counts as 1.

    value   a number, one for each sample, or [rows][samples]; a slider's may be negative
    models  acts only on rows of these models: ("distilled",)
    below   acts only at this timestep and lower ones: the Concept Sliders' own trick, off while the
            layout is decided (arXiv:2311.12092; `start_noise` in its code)
    rows    a factor for each row of the table
    text    of the part in the text encoders, a number or one for each sample. The text is encoded
            once a run, so by default it is `value`, whatever the row

    Raises InputError for a number that is not finite, and for no numbers.
    """

    value: Numbers | tuple[tuple[float, ...], ...] = 1.0
    models: tuple[str, ...] | None = None
    below: float | None = None
    rows: tuple[float, ...] | None = None
    text: Numbers | None = None

    def __post_init__(self) -> None:
        for field in ("value", "below", "rows", "text"):
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, _numbers(field, value))
        if self.models is not None:
            names = (self.models,) if isinstance(self.models, str) else tuple(self.models)
            object.__setattr__(self, "models", names)
            if not names:
                raise InputError("strength: it acts on no model: name one, or leave models out")

    @property
    def constant(self) -> float | None:
        """The one number that it is for every row, every sample and the text, or None."""
        varies = any(part is not None for part in (self.models, self.below, self.rows, self.text))
        return None if varies or isinstance(self.value, tuple) else self.value

    @property
    def by_sample(self) -> bool:
        """Whether samples have strengths of their own, so that a seed may be drawn twice."""
        return isinstance(self.value, tuple) or isinstance(self.text, tuple)

    def grid(self, name: str, table: StepTable, batch: int) -> Array:
        """[rows, batch]: this strength times the column that the plan has for adapter `name`.

        A plan that names the adapter on some legs has it at 0 on the others; a plan that does not
        name it has 1 everywhere. Raises InputError for counts that are not the run's.
        """
        column = table.strengths(name)
        factors = np.ones(len(table)) if column is None else np.array(column)
        factors = factors * [self._factor(step) for step in table]
        if self.rows is not None:
            factors = factors * _check_count(name, "rows", self.rows, (len(table),))
        value = np.asarray(self.value)
        shape = (len(table), batch) if value.ndim == 2 else (batch,)
        values = np.broadcast_to(_check_count(name, "samples", value, shape), (len(table), batch))
        return factors[:, None] * values

    def for_text(self, name: str, batch: int) -> Array:
        """[batch]: the strength of the text encoders' part."""
        value = np.asarray(self.value if self.text is None else self.text)
        if value.ndim == 2:
            raise InputError(
                f"adapter {name!r} also acts on the text, which is encoded once and not for each "
                "row: say its strength there, Strength(..., text=1.0)"
            )
        return np.broadcast_to(_check_count(name, "samples", value, (batch,)), (batch,))

    def to_json(self) -> dict[str, Any]:
        """The fields that are not None; `Strength(**fields)` is this strength again."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def _factor(self, step: Step) -> float:
        off = self.models is not None and step.model not in self.models
        early = self.below is not None and step.timestep > self.below
        return 0.0 if off or early else 1.0


StrengthLike: TypeAlias = "float | Sequence[float] | Sequence[Sequence[float]] | Strength"
"""A number, one a sample, [rows][samples], or a Strength."""


def as_strength(value: object) -> Strength:
    """The value as a Strength. Raises InputError for anything that is not one."""
    return value if isinstance(value, Strength) else Strength(_numbers("value", value))


def parse_adapter(text: str) -> tuple[str, Strength]:
    """`FILE[:strength[@legs]]` -> (FILE, Strength).

    legs: model names, or the highest timestep at which it acts, joined by `+`, such as
    `age.safetensors:1.5@distilled` or `age.safetensors:-2@base+800`. A part behind the last colon
    that is no strength belongs to the file's name.
    """
    path, _, tail = text.rpartition(":")
    number, at, legs = tail.partition("@")
    if not (path and NUMBER.fullmatch(number)):
        if not text.strip():
            raise InputError("an adapter without a name: expected FILE[:strength[@legs]]")
        return text, Strength()
    parts = legs.split("+") if at else []
    limits = [float(part) for part in parts if NUMBER.fullmatch(part)]
    models = tuple(part for part in parts if not NUMBER.fullmatch(part))
    if not all(parts) or len(limits) > 1:
        raise InputError(
            f"adapter {text!r:.80}: behind '@' expected models and at most one timestep, joined "
            "by '+', such as @distilled or @base+800"
        )
    return path, Strength(float(number), models or None, limits[0] if limits else None)


def parse_strengths(text: str) -> tuple[float, ...]:
    """`-2,-1,0,1,2` -> numbers in that order. Raises InputError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(NUMBER.fullmatch(part) for part in parts):
        raise InputError(f"strengths {text!r:.60}: expected numbers such as -2,-1,0,1,2")
    values = tuple(float(part) for part in parts)
    if len(set(values)) != len(values):
        raise InputError(f"strengths {text!r:.60}: one is given twice, and would draw the same")
    return values


NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")


def _numbers(field: str, value: object) -> Any:
    """Finite floats, in tuples where there is more than one."""
    try:
        if isinstance(value, Mapping | str | bytes) or value is None:
            raise TypeError
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"strength: {field} is a number, one for each sample, or rows of them (or use "
            f"headstart.Strength); got {value!r:.80}"
        ) from None
    if numbers.ndim > 2 or not numbers.size or not np.isfinite(numbers).all():
        raise InputError(f"strength: expected finite numbers for {field}, got {value!r:.80}")
    return tuples(numbers)


def tuples(values: Array) -> Any:
    """A number, one a sample, or [rows][samples], of an array of that many axes."""
    return tuple(map(tuples, values)) if values.ndim else float(values)


def _check_count(name: str, axis: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> Array:
    """The values as an array. Raises InputError unless they are one number or of this shape."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim and array.shape != shape:
        raise InputError(
            f"adapter {name!r} has strengths for {list(array.shape)} {axis}, this run has "
            f"{list(shape)}: give one number, or as many as the run has"
        )
    return array
