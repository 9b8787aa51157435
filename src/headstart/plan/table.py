"""The compiled plan: one row of numbers for each network call, known before the first of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from headstart.errors import PlanError

Start = Literal["sigma", "unit"]
PURE = 1e6
"""A level above this is the first of a flow, 2^24, which means pure noise."""
COLUMNS = ("c_in", "c_skip", "c_out", "keep", "add", "carry", "guidance", "timestep")
FORMAT = "headstart.table/1"
_columns = attrgetter(*COLUMNS)
_FIELDS = ("name", "start", "schedule", "first", "end_scale", "cut")


class Step(NamedTuple):
    """One row: x0 = c_skip*x + c_out*F,  x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n.

    F = F_uncond + guidance*(F_cond - F_uncond) with the network called on c_in*x at `timestep`;
    x goes from level `sigma` to `sigma_next`. `adapters` are (name, strength) pairs.
    """

    model: str
    timestep: float
    sigma: float
    sigma_next: float
    c_in: float
    c_skip: float
    c_out: float
    keep: float
    add: float
    carry: float
    guidance: float
    adapters: tuple[tuple[str, float], ...] = ()

    @property
    def passes(self) -> int:
        """Network passes of this row: two where guidance mixes in the unconditional output."""
        return 1 if self.guidance == 1.0 else 2


@dataclass(frozen=True, slots=True)
class StepTable:
    """Rows of falling sigma: each ends at exactly the sigma at which the next one starts.

    steps     the rows, at least one
    start     how unit noise becomes the first x, see `init_scale`
    schedule  fingerprint of the models' noise schedule, or of each model's
    name      the plan's name
    end_scale the last x is multiplied by it before a VAE decodes it: 1 at sigma 0. If a plan ends
              above 0: c_in there for originals whose state is the network's input (DDIM, LCM, TCD,
              flows), 1 for k-diffusion's Euler family
    cut       whether this is a part that stops before the plan's last row; then end_scale is 1
    first     index of steps[0] in the whole table. Noise is keyed by it, so a slice draws the same
              noise as the whole run.

    Raises PlanError for rows that do not chain or are not finite.
    """

    steps: tuple[Step, ...]
    start: Start = "sigma"
    schedule: str = ""
    name: str = "custom"
    first: int = 0
    end_scale: float = 1.0
    cut: bool = False

    def __post_init__(self) -> None:
        if not self.steps:
            raise PlanError("a table needs at least one row")
        if not (isinstance(self.end_scale, float) and 0.0 < self.end_scale <= 1.0):
            raise PlanError(f"end_scale must be a number in (0, 1], not {self.end_scale!r}")
        if self.first < 0:
            raise PlanError(f"first must be a row number of the whole plan, not {self.first}")
        if self.start not in ("sigma", "unit"):
            raise PlanError(f"start must be 'sigma' or 'unit', not {self.start!r}")
        for index, pair in enumerate(zip(self.steps, (*self.steps[1:], None), strict=True)):
            _check(index, *pair)

    @property
    def init_scale(self) -> float:
        """x = init_scale * n before the first row: sigma ("sigma") or sqrt(1 + sigma^2) ("unit").

        The originals differ: Euler on trailing and linspace grids starts at sigma*n, while DDIM,
        LCM and Euler on leading grids start with c_in*x = n (diffusers `init_noise_sigma`).
        """
        sigma = self.steps[0].sigma
        return sigma if self.start == "sigma" else math.sqrt(1.0 + sigma * sigma)

    @property
    def handoffs(self) -> tuple[int, ...]:
        """Row numbers at which another model takes over."""
        pairs = enumerate(pairwise(self.steps), start=1)
        return tuple(index for index, (step, next_step) in pairs if step.model != next_step.model)

    @property
    def models(self) -> tuple[str, ...]:
        """The models in order of first use."""
        return tuple(dict.fromkeys(step.model for step in self.steps))

    def passes(self, model: str | None = None) -> int:
        """Network passes of the whole table, or of one model's rows."""
        return sum(step.passes for step in self.steps if model in (None, step.model))

    def strengths(self, adapter: str) -> tuple[float, ...] | None:
        """A column: this adapter's strength on each row, 0 on rows that do not name it.

        None if no row names it: then the plan does not set the adapter's strength.
        """
        rows = [dict(step.adapters) for step in self.steps]
        if not any(adapter in row for row in rows):
            return None
        return tuple(row.get(adapter, 0.0) for row in rows)

    def coefficients(self) -> npt.NDArray[np.float32]:
        """[N, 8] float32, columns as in COLUMNS: the table on a device."""
        return np.array([_columns(step) for step in self.steps], dtype=np.float32)

    @property
    def c_in_next(self) -> npt.NDArray[np.float32]:
        """[N] float32: c_in of the next row, the scale of the next network input; 1 at the end."""
        return np.array([*(step.c_in for step in self.steps[1:]), 1.0], dtype=np.float32)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> StepTable: ...
    def __getitem__(self, index: int | slice) -> Step | StepTable:
        """A row, or a slice of rows as a table; one that starts with carry != 0 needs resume=."""
        if isinstance(index, int):
            return self.steps[index]
        begin, end, stride = index.indices(len(self.steps))
        if stride != 1 or begin >= end:
            raise PlanError(f"a part of a {len(self)}-row table is a run of rows, not {index}")
        part, first = self.steps[begin:end], self.first + begin
        if end == len(self.steps):
            return replace(self, steps=part, first=first)
        return replace(self, steps=part, first=first, end_scale=1.0, cut=True)

    def to_json(self) -> str:
        """JSON for `from_json`; every float64 is exact."""
        return json.dumps(
            {
                "format": FORMAT,
                **{name: getattr(self, name) for name in _FIELDS},
                "columns": Step._fields,
                "rows": self.steps,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> StepTable:
        """The table of `to_json`. Raises PlanError for other text."""
        try:
            document: Any = json.loads(text)
            if document["format"] != FORMAT or tuple(document["columns"]) != Step._fields:
                raise PlanError(f"not a {FORMAT} with columns {', '.join(Step._fields)}")
            return cls(
                steps=tuple(_step_of(row) for row in document["rows"]),
                start=document["start"],
                schedule=str(document["schedule"]),
                name=str(document["name"]),
                first=int(document["first"]),
                end_scale=float(document.get("end_scale", 1.0)),
                cut=_boolean(document.get("cut", False)),
            )
        except PlanError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise PlanError(f"not a step table in JSON: {error!r:.300}") from error

    def __str__(self) -> str:
        return self.describe()

    def describe(self, ratio: float | None = None) -> str:
        """The rows as an aligned table, with a line where one model hands over to the next.

        ratio   `Pair.ratio`: a level here looks like `level/ratio` of SDXL. Adds a column with the
                level of SDXL, and that of the hand-off; None or 1: does not
        """
        ratio = None if ratio == 1.0 else ratio
        sdxl = ("SDXL's",) if ratio else ()
        header = ("step", "model", "timestep", "sigma", *sdxl, "sigma_next", "keep", "add")
        cells = [(*header, "carry", "guidance")]
        cells += [self._cells(index, ratio) for index in range(len(self))]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(_pad(row, widths)).rstrip() for row in cells]
        for index in reversed(self.handoffs):
            lines.insert(index + 1, self._handoff_line(index, len(lines[0]), ratio))
        return "\n".join([*lines, self._summary()])

    def _cells(self, index: int, ratio: float | None) -> tuple[str, ...]:
        step = self.steps[index]
        sdxl = (step.sigma / ratio,) if ratio else ()
        levels = [level_text(level) for level in (step.sigma, *sdxl, step.sigma_next)]
        numbers = (step.keep, step.add, step.carry)
        return (
            str(self.first + index),
            step.model,
            f"{step.timestep:g}",
            *levels,
            *(_number(number) for number in numbers),
            f"{step.guidance:g}",
        )

    def _handoff_line(self, index: int, width: int, ratio: float | None) -> str:
        before, after = self.steps[index - 1], self.steps[index]
        level = f"sigma {after.sigma:.4f}"
        level += f" (SDXL's {after.sigma / ratio:.4f})" if ratio else ""
        return f"-- {before.model} hands over to {after.model} at {level} ".ljust(width, "-")

    def _summary(self) -> str:
        parts = ", ".join(f"{model} {self.passes(model)}" for model in self.models)
        passes = f"{self.passes()} network passes ({parts})"
        end = self.steps[-1].sigma_next
        ending = f", and ends at sigma {_number(end)}" if end else ""
        return f"{self.name}: {passes}; x starts as {_number(self.init_scale)} * noise{ending}"


def level_text(sigma: float, spec: str = ".4f") -> str:
    """A level as text; "noise" for the first level of a flow."""
    return "noise" if sigma >= PURE else format(sigma, spec)


def _number(number: float) -> str:
    return f"{number:.4f}" if abs(number) < 1e5 else f"{number:.4g}"


def _check(index: int, step: Step, next_step: Step | None) -> None:
    numbers = [getattr(step, column) for column in (*COLUMNS, "sigma", "sigma_next")]
    if not all(math.isfinite(number) for number in numbers):
        raise PlanError(f"row {index} is not finite: {step}")
    if not step.sigma > step.sigma_next >= 0.0:
        raise PlanError(f"row {index} must go down, not from {step.sigma} to {step.sigma_next}")
    if next_step is not None and step.sigma_next != next_step.sigma:
        raise PlanError(
            f"row {index} ends at sigma {step.sigma_next}, but row {index + 1} starts at "
            f"{next_step.sigma}: rows must chain exactly"
        )


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f"cut must be true or false, not {value!r:.40}")
    return value


def _step_of(row: Any) -> Step:
    model, *numbers, adapters = row
    return Step(
        str(model),
        *(float(number) for number in numbers),
        adapters=tuple((str(name), float(strength)) for name, strength in adapters),
    )


def _pad(row: tuple[str, ...], widths: list[int]) -> Iterator[str]:
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if column == 1 else cell.rjust(width)
