"""All cells of a study, distributed over ranks and computed once; then its report.

cell i belongs to rank i % world        cells that exist already are never computed again
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from headstart.study.cases import EXPERIMENTS, Case
from headstart.study.lab import Lab
from headstart.study.numbers import by_prompt, rows_of
from headstart.study.store import FORMAT, Arrays, CellKey, Store
from headstart.sweep.gallery_features import Reference

Json = dict[str, Any]


class Experiment(NamedTuple):
    """Cells besides the pictures of plans and methods: the curve, controls, timelines.

    cases     names of what is measured for each prompt
    prompts   numbers of the prompts that it is measured on
    identity  (case, prompt number) -> what decides the cell
    passes    (case, prompt number) -> network passes of the cell
    measure   (case, prompt number) -> the cell's arrays
    numbers   cells of all cases and prompts -> its entry in the report
    """

    part: str
    cases: Sequence[str]
    prompts: Sequence[int]
    identity: Callable[[str, int], str]
    passes: Callable[[str, int], float]
    measure: Callable[[str, int], Arrays]
    numbers: Callable[[Sequence[Arrays]], Json]

    def read(self, store: Store, name: str, number: int) -> Arrays | None:
        return store.read(CellKey(self.part, name, number), self.identity(name, number))

    def run(self, store: Store, name: str, number: int) -> None:
        arrays = self.measure(name, number)
        store.write(CellKey(self.part, name, number), self.identity(name, number), arrays)


class Job(NamedTuple):
    """One cell: its cost in network passes, and how to read it and to compute it."""

    key: CellKey
    passes: float
    read: Callable[[Store], Arrays | None]
    run: Callable[[Store], object]

    def is_done(self, store: Store) -> bool:
        return (store.folder / self.key.file).is_file() and self.read(store) is not None


class Study(NamedTuple):
    """What is to be measured; `references` by the name of their feature space."""

    lab: Lab
    cases: Mapping[str, Case]
    prompts: Sequence[str]
    experiments: Sequence[Experiment] = ()
    references: Mapping[str, Reference] = {}


class Progress(NamedTuple):
    """Cells of a rank that are done, all its cells, and the seconds that the others will take."""

    done: int
    total: int
    seconds: float | None


def jobs_of(study: Study) -> Iterator[Job]:
    """Every cell, prompt by prompt, so that an early report has whole rows."""
    lab = study.lab
    for number in range(len(study.prompts)):
        for case in study.cases.values():
            cell = {"case": case, "number": number}
            read, run = partial(lab.read, **cell), partial(lab.measure, **cell)
            yield Job(CellKey(case.part, case.name, number), lab.passes(case), read, run)
        for exp in study.experiments:
            for name in exp.cases if number in exp.prompts else ():
                cell = {"name": name, "number": number}
                read, run = partial(exp.read, **cell), partial(exp.run, **cell)
                yield Job(CellKey(exp.part, name, number), exp.passes(name, number), read, run)


def share(study: Study, store: Store) -> list[Job]:
    """This rank's cells that are missing."""
    rank, world = store.shard
    return [job for job in list(jobs_of(study))[rank::world] if not job.is_done(store)]


def draw(
    jobs: Sequence[Job], store: Store, on_cell: Callable[[Job, Progress], object] | None = None
) -> None:
    """Compute these cells.

    on_cell  called after each cell. The seconds that are left assume that every network takes as
             long for a pass as those before
    """
    total, done, begin = sum(job.passes for job in jobs), 0.0, time.monotonic()
    for count, job in enumerate(jobs, 1):
        job.run(store)
        done += job.passes
        seconds = (total - done) * (time.monotonic() - begin) / done if done else None
        if on_cell is not None:
            on_cell(job, Progress(count, len(jobs), seconds))


def missing(study: Study, store: Store) -> list[Job]:
    """The missing cells of all ranks; a report needs every cell."""
    return [job for job in jobs_of(study) if not job.is_done(store)]


def report_of(study: Study, store: Store) -> tuple[Json, list[Json]]:
    """Numbers of all cells, none of which may be missing, and the rows by prompt."""
    cells_by_case: dict[tuple[str, str], list[Arrays]] = {}
    for job in jobs_of(study):
        cell = job.read(store)
        assert cell is not None, job.key
        cells_by_case.setdefault((job.key.part, job.key.case), []).append(cell)
    cells = {name: cells_by_case[case.part, name] for name, case in study.cases.items()}
    judge = study.lab.judge
    report: Json = {
        "format": FORMAT,
        "prompts": list(study.prompts),
        "spaces": [{"name": space.name, "distance": space.distance} for space in judge.spaces],
        "scored_by": judge.scored_by,
        "rows": rows_of(study.cases, cells, judge.spaces, study.references),
        **dict.fromkeys(EXPERIMENTS),
    }
    for exp in study.experiments:
        report[exp.part] = exp.numbers(
            [cell for name in exp.cases for cell in cells_by_case[exp.part, name]]
        )
    return report, by_prompt(study.cases, cells, study.prompts, judge.spaces)
