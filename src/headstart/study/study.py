"""All cells of a study, dealt to ranks and drawn once; then its report.

cell i belongs to rank i % world        what is there already is read and never drawn again
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from headstart.study.cases import EXPERIMENTS, Case
from headstart.study.lab import Lab
from headstart.study.numbers import by_prompt, rows_of
from headstart.study.store import FORMAT, Arrays, Place, Store
from headstart.sweep.seen import Reference

Json = dict[str, Any]


class Experiment(NamedTuple):
    """Cells that are not the pictures of one case: the curve, controls, timelines.

    cases     names of what is measured for each prompt
    prompts   the numbers of those that it is measured on
    identity  of a case and the number of a prompt: what its cell is of
    passes    network passes of that cell
    measure   its arrays
    numbers   cells of all cases and prompts -> what the report says
    """

    part: str
    cases: Sequence[str]
    prompts: Sequence[int]
    identity: Callable[[str, int], str]
    passes: Callable[[str, int], float]
    measure: Callable[[str, int], Arrays]
    numbers: Callable[[Sequence[Arrays]], Json]

    def read(self, store: Store, name: str, number: int) -> Arrays | None:
        return store.read(Place(self.part, name, number), self.identity(name, number))

    def run(self, store: Store, name: str, number: int) -> None:
        arrays = self.measure(name, number)
        store.write(Place(self.part, name, number), self.identity(name, number), arrays)


class Job(NamedTuple):
    """One cell: its cost in network passes, how to read it where it is there, and to make it."""

    place: Place
    passes: float
    read: Callable[[Store], Arrays | None]
    run: Callable[[Store], object]

    def done(self, store: Store) -> bool:
        return (store.folder / self.place.file).is_file() and self.read(store) is not None


class Study(NamedTuple):
    """What is to be measured; `references` by the name of the space that they are features of."""

    lab: Lab
    cases: Mapping[str, Case]
    prompts: Sequence[str]
    experiments: Sequence[Experiment] = ()
    references: Mapping[str, Reference] = {}


class Left(NamedTuple):
    """How far a rank is: cells done of its own, and the seconds that the others will take."""

    done: int
    total: int
    seconds: float | None


def jobs_of(study: Study) -> Iterator[Job]:
    """Every cell; those of one prompt beside each other, so that an early report has whole rows."""
    lab = study.lab
    for number in range(len(study.prompts)):
        for case in study.cases.values():
            cell = {"case": case, "number": number}
            read, run = partial(lab.read, **cell), partial(lab.measure, **cell)
            yield Job(Place(case.part, case.name, number), lab.passes(case), read, run)
        for own in study.experiments:
            for name in own.cases if number in own.prompts else ():
                cell = {"name": name, "number": number}
                read, run = partial(own.read, **cell), partial(own.run, **cell)
                yield Job(Place(own.part, name, number), own.passes(name, number), read, run)


def share(study: Study, store: Store) -> list[Job]:
    """This rank's cells that are not there."""
    rank, world = store.shard
    return [job for job in list(jobs_of(study))[rank::world] if not job.done(store)]


def draw(
    jobs: Sequence[Job], store: Store, on_cell: Callable[[Job, Left], object] | None = None
) -> None:
    """Make these cells.

    on_cell  called after each cell. Seconds left are those of the passes so far, so they hold as
             far as a pass of one network takes as long as one of another
    """
    left, done, begin = sum(job.passes for job in jobs), 0.0, time.monotonic()
    for count, job in enumerate(jobs, 1):
        job.run(store)
        done, left = done + job.passes, left - job.passes
        pace = (time.monotonic() - begin) / done if done else None
        if on_cell is not None:
            on_cell(job, Left(count, len(jobs), None if pace is None else pace * left))


def missing(study: Study, store: Store) -> list[Job]:
    """The cells of any rank that are not there; a report needs all of them."""
    return [job for job in jobs_of(study) if not job.done(store)]


def report_of(study: Study, store: Store) -> tuple[Json, list[Json]]:
    """Numbers of all cells, and the rows by prompt. Every cell must be there."""
    every: dict[tuple[str, str], list[Arrays]] = {}
    for job in jobs_of(study):
        cell = job.read(store)
        assert cell is not None, job.place
        every.setdefault((job.place.part, job.place.case), []).append(cell)
    cells = {name: every[case.part, name] for name, case in study.cases.items()}
    judge = study.lab.judge
    report: Json = {
        "format": FORMAT,
        "prompts": list(study.prompts),
        "spaces": [{"name": own.name, "distance": own.distance} for own in judge.spaces],
        "scored_by": judge.scored_by,
        "rows": rows_of(study.cases, cells, judge.spaces, study.references),
        **dict.fromkeys(EXPERIMENTS),
    }
    for own in study.experiments:
        report[own.part] = own.numbers([c for name in own.cases for c in every[own.part, name]])
    return report, by_prompt(study.cases, cells, study.prompts, judge.spaces)
