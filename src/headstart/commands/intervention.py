"""Options that change a run from a step on, and the branches that they ask for.

--from-step 1-3 --reseed 7        the rows after, under fresh noise: a branch for each step
--switch base@2                   another model from there on
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from headstart.commands.parser import add_options
from headstart.commands.values import read_prompt, read_texts
from headstart.errors import InputError
from headstart.plan.request import parse_numbers, parse_seeds

if TYPE_CHECKING:
    from headstart.engine.engine import Engine
    from headstart.engine.trajectory import Trajectory
    from headstart.plan.table import StepTable
    from headstart.sampler import State
    from headstart.traces.branches import Branch


class Intervention(NamedTuple):
    """What is different from each of `steps` on; None where nothing was asked for."""

    steps: tuple[int, ...]
    model: str | None
    seeds: tuple[int, ...] | None
    guidance: float | None
    prompt: str | None
    negative: str | list[str] | None

    def check(self, tables: Mapping[str, StepTable], engine: Engine) -> None:
        """Raise InputError or PlanError where a plan has no such step, model or guidance."""
        from headstart.traces.branches import changed, check_heard

        for name, table in tables.items():
            for step in self.steps:
                if not 1 <= step < len(table):
                    raise InputError(
                        f"plan {name!r} has steps 0 to {len(table) - 1}, so it can change from "
                        f"step 1 to {len(table) - 1}, not from {step}: choose another step or plan"
                    )
                rows = changed(
                    table, step, engine.weights, model=self.model, guidance=self.guidance
                )
                if self.prompt is not None:
                    check_heard(self.prompt, rows, step)

    @property
    def guided(self) -> bool:
        """Whether it turns guidance on, and there is a negative prompt for it."""
        return self.guidance not in (None, 1.0) and self.negative is not None

    def images(self, count: int) -> int:
        """How many images a branch has, where the run has `count`."""
        return count if self.seeds is None else len(self.seeds)

    def branches(
        self, name: str, engine: Engine, run: Trajectory, states: Mapping[int, State]
    ) -> Iterator[tuple[str, Branch]]:
        """One a step, named after the plan: `hybrid@2 · fresh noise`.

        states  of the run, by row: that before each step is among them
        """
        from headstart.traces.branches import branch

        for step in self.steps:
            changed = branch(
                engine, run, states[step - 1], model=self.model, reseed=self.seeds,
                guidance=self.guidance, prompt=self.prompt,
                negative=self.negative if self.guided and run.negative is None else None,
            )  # fmt: skip
            yield f"{name}@{step} · {changed.change}", changed


_OPTIONS = """
    --from-step K       the first step that changes; 1-3: a branch for each
    --switch MODEL@K    this model takes over at step K, or at each of 1-3
    --reseed SEEDS      what is predicted, under fresh noise; default: none
    --guidance W        from there on; default: the plan's
    --prompt-from TEXT  another prompt from there on; default: PROMPT
"""


def add_intervention(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("go on differently from a step, shown beside the original")
    add_options(group, _OPTIONS, guidance=float)


def read_intervention(args: argparse.Namespace) -> Intervention | None:
    """What the options of `add_intervention` ask for. Raises InputError where they contradict."""
    model, steps = None, args.from_step
    if args.switch is not None:
        model, mark, rows = args.switch.partition("@")
        if not (mark and model and rows):
            raise InputError(f"--switch {args.switch!r:.40}: expected MODEL@STEP, as in base@2")
        if steps not in (None, rows):
            raise InputError(f"--switch {args.switch} and --from-step {steps} name two steps")
        steps = rows
    changes = (args.reseed, args.guidance, args.prompt_from, args.switch)
    if steps is None:
        if any(value is not None for value in changes):
            raise InputError("--reseed, --guidance and --prompt-from need --from-step K")
        return None
    if all(value is None for value in changes):
        raise InputError(
            "--from-step changes nothing by itself: give --reseed, --switch, --guidance or "
            "--prompt-from"
        )
    numbers = parse_numbers(steps, "steps")
    if len(set(numbers)) != len(numbers):
        raise InputError(f"steps {steps!r:.40}: one of them is given twice")
    return Intervention(
        steps=numbers,
        model=model,
        seeds=None if args.reseed is None else parse_seeds(args.reseed),
        guidance=args.guidance,
        prompt=None if args.prompt_from is None else read_prompt(args.prompt_from),
        negative=read_texts(args.negative),
    )
