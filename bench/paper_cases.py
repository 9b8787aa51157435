"""What `bench/paper.py` draws: a literal table of cases, each a few lines on the same engine.

A case is a plan of the paper, or one of `headstart.diversify` at one strength. Strengths are a
short grid that was written down before anything was drawn, but for particle guidance: 4, 16 and 64
changed next to nothing on four pictures of "a fox" (seeds 20000 to 20003), so it begins at 64; and
256 and 1024 drew noise on the distilled model, so that 96, 128 and 192 were added, before they ran.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import headstart as hs
from headstart.adapters.strength import Strength
from headstart.diversify.cads import Cads
from headstart.diversify.interval import Interval
from headstart.diversify.method import Method
from headstart.diversify.particles import Particles
from headstart.diversify.pink import Pink
from headstart.diversify.select import Select, pooled
from headstart.plan.pairs import DEMO_RATIO

INTERVAL = Interval(0.28 * DEMO_RATIO, 5.42 * DEMO_RATIO)
"""arXiv:2404.07724's interval for SDXL, at the levels that hide as much of a smaller latent."""
LORA = "distilled-lora"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of results.

    plan, settings  of `Engine.compile`
    method, value   of METHODS: what is done differently, and how strongly
    student         whose weights are "distilled", a name of paper_cells.STUDENTS
    about           what it is, in a table's words
    """

    plan: str
    about: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    method: str = "plan"
    value: float = 0.0
    student: str = "distilled"


class Images(NamedTuple):
    """rgb uint8 [n, H, W, 3]; passes an image; spread of x0 over the seeds after each row."""

    rgb: NDArray[np.uint8]
    passes: float
    spread: tuple[float, ...] = ()


def cases() -> dict[str, Case]:
    """Every case by name, in the order of the tables."""
    return {**_tables(), **_figure_7(), **_students(), **_few_step_methods(), **_base_methods()}


QUICK = ("base", "distilled", "hybrid", "skip-first", "hybrid-k2", "cads-0.25", "pink-1")


def _tables() -> dict[str, Case]:
    return {
        "base": Case(plan="base", about="base, 30 steps, guidance 2"),
        "base-unguided": Case(
            plan="base", about="base, 30 steps, no guidance", settings={"base_guidance": 1.0}
        ),
        "distilled": Case(plan="distilled", about="distilled, 4 steps"),
        "hybrid": Case(plan="hybrid", about="hybrid, k=1"),
        "skip-first": Case(plan="skip-first", about="skip the first step"),
        "replace-final": Case(
            plan="replace-final",
            about="distilled first step, then the base's 30 of 40 guided steps",
            settings={"k": 3, "n": 40, "base_guidance": 2.0},
        ),
        "replace-last": Case(plan="replace-final", about="base takes the last of four steps"),
    }


def _figure_7() -> dict[str, Case]:
    found = {
        f"hybrid-g{g:g}": Case(
            plan="hybrid", about=f"hybrid, base step at guidance {g:g}",
            settings={"base_guidance": g},
        )
        for g in (1.5, 2.0, 3.0, 5.0, 7.0)
    }  # fmt: skip
    for k in (2, 3):
        found[f"hybrid-k{k}"] = Case(plan="hybrid", about=f"hybrid, k={k}", settings={"k": k})
    found["hybrid-k4"] = Case(  # a hybrid has a row of the student
        plan="replace-final", about="base alone on the four steps (k=4)", settings={"k": 4}
    )
    for n in (8, 12, 16, 20, 40):
        found[f"hybrid-n{n}"] = Case(
            plan="hybrid", about=f"hybrid, k=1 in {n // 4} base steps (n={n})", settings={"n": n}
        )
    return found


def _students() -> dict[str, Case]:
    told = {
        "distilled_unguided": "DMD from an unguided teacher",
        "progressive": "regression on guided trajectories",
    }
    plans = ("distilled", "hybrid", "skip-first")
    return {
        f"{student}-{plan}": Case(plan=plan, about=f"{plan}, {what}", student=student)
        for student, what in told.items()
        for plan in plans
    }


def _base_methods() -> dict[str, Case]:
    return {
        "base-8": Case(plan="base", about="base, 8 steps, guidance 2", settings={"steps": 8}),
        "base-interval": Case(
            plan="base", about="interval guidance on the base", method="interval"
        ),
        "base-cads": Case(plan="base", about="CADS 0.25 on the base", method="cads", value=0.25),
        "base-particle": Case(
            plan="base", about="particle guidance 256 on the base", method="particle", value=256.0
        ),
    }


def _few_step_methods() -> dict[str, Case]:
    found: dict[str, Case] = {}
    grid: tuple[tuple[str, str, tuple[float, ...]], ...] = (
        ("cads", "CADS", (0.1, 0.25, 0.5)),
        ("particle", "particle guidance", (64.0, 96.0, 128.0, 192.0, 256.0, 1024.0)),
        ("pink", "pink initial noise", (0.5, 1.0)),
        ("select", "best of candidates, times", (2.0, 4.0)),
        ("global", "adapter strength, all steps", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("first", "adapter strength, first step", (0.0, 0.25, 0.5, 0.75)),
    )
    for method, about, values in grid:
        student = "lora" if method in ("global", "first") else "distilled"
        for value in values:
            found[f"{method}-{value:g}"] = Case(
                plan="distilled", about=f"{about} {value:g}", method=method, value=value,
                student=student,
            )  # fmt: skip
    found["hybrid-select-2"] = Case(
        plan="hybrid", about="hybrid, best of candidates, times 2", method="select", value=2.0
    )
    return found


def images(engine: hs.Engine, case: Case, prompt: str, seeds: Sequence[int]) -> Images:
    """All seeds of one prompt in one batch."""
    table = engine.compile(case.plan, **case.settings)  # pyright: ignore[reportArgumentType]
    return METHODS[case.method](_Asked(engine, prompt, seeds, table, case.value))


class _Asked(NamedTuple):
    engine: hs.Engine
    prompt: str
    seeds: Sequence[int]
    table: hs.StepTable
    value: float


def _plan(asked: _Asked, adapters: Any = None, diversify: Sequence[Method] = ()) -> Images:
    done = asked.engine.sample(
        asked.prompt, plan=asked.table, seeds=asked.seeds, batch=64, keep_x0=True,
        adapters=adapters, diversify=diversify,
    )  # fmt: skip
    assert done.x0 is not None
    apart = tuple(spread(pooled(x0)) for x0 in done.x0) if len(done.x0) <= 4 else ()
    return Images(_bytes(done.rgb), float(done.passes), apart)


def _global(asked: _Asked) -> Images:
    return _plan(asked, {LORA: Strength(value=asked.value, models=("distilled",))})


def _first(asked: _Asked) -> Images:
    rows = (asked.value, *(1.0 for _ in asked.table.steps[1:]))
    return _plan(asked, {LORA: Strength(models=("distilled",), rows=rows)})


def _method(kind: Callable[[float], Method]) -> Callable[[_Asked], Images]:
    return lambda asked: _plan(asked, diversify=[kind(asked.value)])


def spread(features: torch.Tensor) -> float:
    """Mean over the features [n, d] of their unbiased variance over the n seeds."""
    return float(features.double().var(0).mean())


def _bytes(rgb: torch.Tensor) -> NDArray[np.uint8]:
    return rgb.cpu().numpy()


METHODS: dict[str, Callable[[_Asked], Images]] = {
    "plan": _plan,
    "cads": _method(Cads),
    "particle": _method(Particles),
    "pink": _method(Pink),
    "interval": lambda asked: _plan(asked, diversify=[INTERVAL]),
    "select": _method(Select),
    "global": _global,
    "first": _first,
}
