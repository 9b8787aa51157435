"""The cases of a study: one plan each, or one other method on a plan.

plans     the paper's: base, distilled, hybrid, skip-first, replace-final (tables 2, 3 and E.1)
k         how many of the distilled steps the base replaces (figure 7b)
n         steps of the base's grid, of which it runs those before the hand-off (figure 7c)
guidance  of the base's step (figure 7a)
handoff   the noise level at which the distilled model takes over; and as a control the distilled
          model itself instead of the base, as it was not trained at most of these levels
methods   other methods for varied pictures, on the distilled model unless a plan is named
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from headstart.errors import InputError
from headstart.plan.leg import Leg
from headstart.plan.pair import Pair
from headstart.plan.plan import Plan
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.spacing import Process, Spacing

Part = Literal["plans", "k", "n", "guidance", "handoff", "methods"]
PARTS: tuple[Part, ...] = get_args(Part)
EXPERIMENTS = ("curve", "control", "timeline")
"""Parts without cases, see `headstart.study.experiments`."""
GUIDANCES = (1.5, 2.0, 3.0, 5.0, 7.0)
SUBSTEPS = (2, 3, 4, 5, 10)
"""n as a multiple of the distilled model's steps, so that the grids meet."""
LEVELS = (13.0, 11.0, 8.3, 6.5, 5.1, 4.1, 2.7, 1.6)
"""Of the hand-off, in SDXL's terms (`Pair.ratio`); from nothing to everything on the bundled pair
(bench/README.md, "The level of the hand-off")."""
NEAR = 0.05
METHODS = (
    *("cads:0.1", "cads:0.25", "embedding-noise:2", "embedding-noise:4", "particles:128"),
    *("pink:1", "select:4", "hybrid+select:4"),
)
DIALS = ("dial:0.25", "dial:0.5", "dial:0.75")
"""More of them where the distilled model is a LoRA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of results.

    plan, settings  of `Engine.compile`
    diversify       methods, as `Engine.sample` takes them
    at              the value on the grid of its part; None for a case without a grid
    method          the name of the first method
    about           a description for tables
    against         the case that shows what distilling lost, of which this one recovers a share
    """

    name: str
    part: Part
    about: str
    plan: str | Plan
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    diversify: tuple[str, ...] = ()
    at: float | None = None
    method: str | None = None
    against: str = "distilled"


Grids = Mapping[Part, Sequence[Any]]
"""The values of each part; the usual ones of a part that is absent. A method is "cads:0.25" on the
distilled model, or "hybrid+select:2" on a plan named before `+`; "hybrid+select:2+cads:0.1" is both
at once."""


def cases_of(
    pair: Pair,
    steps: int,
    schedule: Process,
    grids: Grids,
    parts: Sequence[Part] = PARTS,
    methods: Sequence[str] = METHODS,
) -> dict[str, Case]:
    """Every case by name, in the order of the tables.

    pair      how the distilled model is run
    steps     of the distilled model
    schedule  the distilled model's, which hand-off levels refer to
    methods   the usual ones

    Raises InputError for a value that is on a grid twice or makes no plan.
    """
    ratio = 1.0 if pair.ratio is None else pair.ratio
    values: dict[Part, Sequence[Any]] = {
        "k": range(1, steps),
        "n": [steps * substeps for substeps in SUBSTEPS],
        "guidance": GUIDANCES,
        "handoff": [level * ratio for level in LEVELS if level * ratio < schedule.highest[1]],
        "methods": methods,
        **grids,
    }
    cases = [*_plans(pair)]
    for part, grid in values.items():
        if part in parts and part == "handoff":
            cases += _handoffs(pair, steps, schedule, grid)
        elif part in parts:
            cases += [_method(v) if part == "methods" else _hybrid(part, v, steps) for v in grid]
    names = [case.name for case in cases]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"case {duplicate!r} is there twice: give each value of a grid once")
    return dict(zip(names, cases, strict=True))


def _plans(pair: Pair) -> Iterator[Case]:
    base = f"base, {pair.base_steps} steps, "
    about = {
        "base": f"{base}guidance {pair.base_scale:g}",
        "base-unguided": f"{base}no guidance",
        "distilled": "distilled model alone",
        "hybrid": "hybrid: the base first",
        "skip-first": "distilled model without its first part",
        "replace-final": "the base takes the last step",
    }
    for name, words in about.items():
        plan = name.removesuffix("-unguided")
        settings = {} if plan == name else {"base_guidance": 1.0}
        if plan == name or pair.base_scale != 1.0:
            yield Case(name=name, part="plans", about=words, plan=plan, settings=settings)


_HYBRIDS = {
    "k": ("k", "hybrid, the base takes {:g} of {} steps"),
    "n": ("n", "hybrid, the base on its own {:g}-step grid"),
    "guidance": ("base_guidance", "hybrid, base step at guidance {:g}"),
}
"""Part -> the setting of the hybrid that it varies, and a description of a case."""


def _hybrid(part: Part, value: float, steps: int) -> Case:
    setting, about = _HYBRIDS[part]
    return Case(
        name=f"{part}-{value:g}",
        part=part,
        about=about.format(value, steps),
        plan="hybrid",
        settings={setting: value},
        at=float(value),
    )


def _handoffs(pair: Pair, steps: int, schedule: Process, levels: Sequence[float]) -> Iterator[Case]:
    """One step from the top down to each level, then the distilled model from there on."""
    student = pair.distilled(steps)
    grid = student.grid(schedule)
    column = "timesteps" if isinstance(schedule, NoiseSchedule) else "sigmas"
    grid_points: tuple[float, ...] = getattr(grid, column)

    def leg_on(points: tuple[float, ...]) -> Leg:
        columns: dict[str, Any] = {"timesteps": None, "sigmas": None, column: points}
        return replace(student, steps=None, spacing=Spacing.TRAILING, skip=0, **columns)

    base_step = replace(pair.base_leg(1, Spacing.EVEN), until="next")
    for level in levels:
        if not 0.0 < level < schedule.highest[1]:
            raise InputError(
                f"hand-off level {level:g}: expected a noise level of the distilled model, above 0 "
                f"and below {schedule.highest[1]:.4g}"
            )
        points, sigma = _points(grid_points, grid.sigmas, schedule, level)
        for model, first, words in (
            ("base", base_step, "the base"),
            ("distilled", leg_on(grid_points[:1]), "control: the student itself"),
        ):
            legs, name = (first, leg_on(points)), f"{model}-to-{points[0]:.4g}"
            yield Case(
                name=f"level-{level:.3g}" + "-control" * (model == "distilled"),
                part="handoff",
                about=f"{words} down to sigma {sigma:.3g} in one step",
                plan=Plan(legs, start=pair.start, end=pair.end, name=name),
                at=sigma,
            )


def _points(
    points: tuple[float, ...], sigmas: tuple[float, ...], schedule: Process, level: float
) -> tuple[tuple[float, ...], float]:
    """Timesteps or sigmas at which the distilled model goes on from `level`, and that level.

    These are the grid's points below it, and before them the level itself: on a table of timesteps
    the nearest whole timestep, as networks of such a table were trained on no other. A level within
    5 % of one of the grid's is that one.
    """
    for number, sigma in enumerate(sigmas):
        if abs(sigma - level) <= NEAR * level:
            return points[number:], sigma
    below = tuple(p for p, sigma in zip(points, sigmas, strict=True) if sigma < level)
    if not isinstance(schedule, NoiseSchedule):
        return (level, *below), level
    start = float(np.round(float(schedule.timestep(level))))
    return (start, *below), float(schedule.sigma(start))


def _method(text: str) -> Case:
    plan, _, methods = text.partition("+")
    if ":" in plan:  # a method, and no plan before it
        plan, methods = "distilled", text
    if not methods:
        raise InputError(
            f"method {text!r:.60}: expected NAME:VALUE or PLAN+NAME:VALUE, such as cads:0.1 "
            "or hybrid+select:4; several are joined by +"
        )
    return Case(
        name=text,
        part="methods",
        about=f"{methods} on plan {plan}",
        plan=plan,
        diversify=tuple(methods.split("+")),
        method=methods.partition(":")[0],
    )
