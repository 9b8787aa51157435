"""Cells are dealt to ranks, drawn once, and gone on with after any interruption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headstart.study.store import FORMAT, Arrays, open_store
from headstart.study.study import Experiment, Progress, Study, draw, jobs_of, missing, share
from headstart.sweep.ledger import Shard

SETTING = {"format": FORMAT}
PROMPTS = ("a fox", "an owl", "a cat")
ALONE = Shard()


class Counted:
    """An experiment that counts how often each cell was made."""

    def __init__(self, stop_at: int | None = None, identity: str = "one") -> None:
        self.made: list[tuple[str, int]] = []
        self._stop_at, self._identity = stop_at, identity

    def measure(self, name: str, number: int) -> Arrays:
        if self._stop_at == len(self.made):
            raise KeyboardInterrupt
        self.made.append((name, number))
        return {"value": np.array([number])}

    def numbers(self, cells: Sequence[Arrays]) -> dict[str, object]:
        return {"values": [int(cell["value"][0]) for cell in cells]}

    def study(self) -> Study:
        experiment = Experiment(
            "curve", ("a", "b"), (0, 1, 2), lambda *_: self._identity, lambda *_: 2.0, self.measure,
            self.numbers,
        )  # fmt: skip

        no_lab: Any = None  # an experiment brings its own engine
        return Study(no_lab, {}, PROMPTS, (experiment,))


def run(folder: Path, counted: Counted, shard: Shard = ALONE) -> tuple[int, int]:
    with open_store(folder, SETTING, shard) as store:
        cells = share(counted.study(), store)
        draw(cells, store)
        return len(cells), len(missing(counted.study(), store))


def test_every_cell_is_made_once_and_never_again(tmp_path: Path) -> None:
    counted = Counted()
    assert run(tmp_path, counted) == (6, 0)
    assert sorted(counted.made) == [(name, n) for name in "ab" for n in range(3)]
    assert run(tmp_path, counted) == (0, 0) and len(counted.made) == 6


@pytest.mark.parametrize("stop_at", range(6))
def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path, stop_at: int) -> None:
    first, second = Counted(stop_at), Counted()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first)
    assert run(tmp_path, second) == (6 - stop_at, 0)
    assert not set(first.made) & set(second.made)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_the_cells_and_the_last_one_finds_them_all(tmp_path: Path, world: int) -> None:
    cells: list[tuple[str, int]] = []
    left: list[int] = []
    for rank in range(world):
        counted = Counted()
        left.append(run(tmp_path, counted, Shard(rank, world))[1])
        cells += counted.made
    assert sorted(cells) == [(name, n) for name in "ab" for n in range(3)]
    assert left[-1] == 0 and all(count > 0 for count in left[: min(world, 6) - 1])


def test_a_cell_of_another_identity_is_made_again(tmp_path: Path) -> None:
    run(tmp_path, Counted())
    other = Counted(identity="two")
    assert run(tmp_path, other) == (6, 0)


def test_the_cells_of_one_prompt_are_beside_each_other() -> None:
    numbers = [job.key.number for job in jobs_of(Counted().study())]
    assert numbers == sorted(numbers)


def test_time_left_is_the_passes_left_at_the_pace_so_far(tmp_path: Path) -> None:
    progress: list[Progress] = []
    with open_store(tmp_path, SETTING, Shard()) as store:
        draw(share(Counted().study(), store), store, lambda job, left: progress.append(left))
    assert [left.done for left in progress] == [1, 2, 3, 4, 5, 6]
    assert progress[-1].seconds == 0.0
    assert all(left.seconds is not None and left.seconds > 0 for left in progress[:-1])
