"""A sweep can be ended at any moment, by anyone, and goes on: nothing lost, nothing twice."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from crashes import BATCH, CASES, SETTINGS, contents, draw, run
from fresh import ROOT, python
from PIL import Image

from headstart.errors import InputError
from headstart.pictures.png import encode_png
from headstart.sweep.jobs import Case
from headstart.sweep.ledger import Entry, Shard, open_ledger, read_entries
from headstart.sweep.sweep import share, sweep


def crashes(what: str, folder: Path, *more: str) -> dict[str, object]:
    done = python(str(ROOT / "tests/crashes.py"), what, str(folder), *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kill_at_any_write_of_a_sweep_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    outcome = crashes("points", tmp_path)
    # each image is opened, flushed and renamed, and each batch's lines flushed
    assert outcome["killed"] >= 3 * len(CASES) + len(CASES) // BATCH


def test_kills_at_random_moments_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    outcome = crashes("moments", tmp_path)
    assert outcome["killed"] >= 24
    assert outcome["some"] >= 12  # came when some images were done and some were not


@pytest.mark.parametrize("world", [2, 3])
def test_torchrun_gives_out_the_shares_and_fewer_ranks_take_over_a_dead_one(
    tmp_path: Path, world: int
) -> None:
    """The real launcher, and workers that load no torch; the pair itself is swept by
    test_sweep_command.py."""
    first = torchrun(tmp_path / "out", world, "1")
    assert first.returncode != 0 and "Signal 9 (SIGKILL)" in first.stderr
    done = read_entries(tmp_path / "out")
    assert 0 < len(done) <= world  # a batch of one image each, then one died
    when = {entry.file: (tmp_path / "out" / entry.file).stat().st_mtime_ns for entry in done}
    again = torchrun(tmp_path / "out", world - 1)
    assert again.returncode == 0, again.stderr
    assert {f: (tmp_path / "out" / f).stat().st_mtime_ns for f in when} == when
    with open_ledger(tmp_path / "one", SETTINGS, Shard()) as ledger:
        sweep(CASES, draw, ledger, batch=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def torchrun(folder: Path, world: int, *dies: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    program = [str(ROOT / "tests/crashes.py"), "rank", str(folder), *dies]
    return python(*launcher, *program, OMP_NUM_THREADS="1")


@pytest.mark.parametrize("world", [2, 3])
def test_the_share_of_a_rank_that_died_is_done_by_fewer_ranks(tmp_path: Path, world: int) -> None:
    outcome = crashes("ranks", tmp_path, str(world))
    count = len(CASES) - sum(len(part) for part in [CASES[b * 3 : b * 3 + 3] for b in (1,)])
    assert 0 < outcome.pop("done_before") <= count
    assert outcome == {"partly": True, "kept": True, "recorded_twice": 0, "equal": True}


def test_a_finished_sweep_draws_nothing_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first == (len(CASES), 0, True)
    assert run(tmp_path) == (0, len(CASES), True)
    lines = (tmp_path / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["case_number"] for line in lines] == list(range(len(CASES)))
    pixels = np.asarray(Image.open(tmp_path / "000004.png"))
    assert encode_png(pixels) == draw(CASES[3:6])[1]


@pytest.mark.parametrize("damage", ["changed", "cut", "removed"])
def test_an_image_that_is_not_as_recorded_is_drawn_again(tmp_path: Path, damage: str) -> None:
    run(tmp_path)
    expected = contents(tmp_path)
    image = tmp_path / "000004.png"
    data = image.read_bytes()
    image.unlink()
    if damage != "removed":
        image.write_bytes(data[:-4] if damage == "cut" else data[:-4] + b"\0\0\0\0")
    assert run(tmp_path) == (1, len(CASES) - 1, True)
    assert contents(tmp_path) == expected


def test_a_torn_or_foreign_line_finishes_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    expected = contents(tmp_path)
    journal = tmp_path / "shards/0000.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    outside = json.loads(lines[2]) | {"file": "../../etc/passwd"}
    wrong = [b"[]\n", b"{}\n", b"\xff\n", json.dumps(outside).encode() + b"\n"]
    journal.write_bytes(b"".join([*lines[:2], *wrong, lines[3][:-9]]))
    (tmp_path / "manifest.jsonl").unlink()
    assert [entry.case_number for entry in read_entries(tmp_path)] == [0, 1]
    assert run(tmp_path) == (len(CASES) - 2, 2, True)
    assert contents(tmp_path) == expected
    assert journal.read_bytes().endswith(b"}\n")


def test_any_number_of_ranks_gives_the_same_bits_and_shares_nothing(tmp_path: Path) -> None:
    run(tmp_path / "one")
    for world in (2, 3, 7):
        folder = tmp_path / str(world)
        counts: list[int] = []
        for rank in range(world):
            done = run(folder, Shard(rank, world))
            assert done.complete == (rank == min(world, 4) - 1 or rank > 3)
            counts += [done.written]
        assert sum(counts) == len(CASES)
        assert contents(folder) == contents(tmp_path / "one")


def test_a_folder_of_other_settings_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    other = {**SETTINGS, "cases": 12, "weights": {"base": {"file": "b", "sha256": "12"}}}
    with (
        pytest.raises(InputError, match=r"cases: 11 then, 12 now; weights: \{\} then"),
        open_ledger(tmp_path, other, Shard()),
    ):
        pass
    assert contents(tmp_path) == before


def test_the_same_weights_under_another_path_go_on(tmp_path: Path) -> None:
    for file in ("here", "there"):
        settings = {**SETTINGS, "weights": {"base": {"file": file, "sha256": "12"}}}
        with open_ledger(tmp_path, settings, Shard()) as ledger:
            sweep(CASES[:2], draw, ledger, batch=1)
    assert len(read_entries(tmp_path)) == 2


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "000000.png").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"holds '000000.png' and no sweep.json"):
        run(tmp_path)
    run(tmp_path / "own")
    (tmp_path / "own/sweep.json").unlink()
    with pytest.raises(InputError, match=r"holds 'shards' and no sweep.json"):
        run(tmp_path / "own")
    (tmp_path / "own/sweep.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        run(tmp_path / "own")


def test_two_processes_of_one_rank_are_refused(tmp_path: Path) -> None:
    with open_ledger(tmp_path, SETTINGS, Shard()):
        with pytest.raises(InputError, match=r"another process .* rank 0"):
            run(tmp_path)
        run(tmp_path, Shard(1, 2))


def test_a_full_disk_is_one_error_and_what_was_finished_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart import output

    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(output.os, "fsync", full)
        with pytest.raises(InputError, match="No space left"):
            run(tmp_path)
    files = {entry.file for entry in read_entries(tmp_path)}
    assert len(files) == BATCH
    assert run(tmp_path) == (len(CASES) - BATCH, BATCH, True)


def test_a_line_of_another_prompt_or_seed_is_not_this_case(tmp_path: Path) -> None:
    run(tmp_path)
    with open_ledger(tmp_path, SETTINGS, Shard()) as ledger:
        assert ledger.intact(CASES[0])
        assert not ledger.intact(Case(0, "prompt 0", 7))
        assert not ledger.intact(Case(1, "another", 101))
        work = share([Case(0, "prompt 0", 7), *CASES[1:3]], ledger, BATCH)
    assert work.pending == {0}


def test_where_two_lines_disagree_the_file_decides(tmp_path: Path) -> None:
    run(tmp_path)
    true = read_entries(tmp_path)
    stale = true[0]._replace(sha256="0" * 64)
    (tmp_path / "shards/0009.jsonl").write_bytes(Entry.line(stale))
    (tmp_path / "manifest.jsonl").unlink()
    assert run(tmp_path) == (0, len(CASES), True)
    assert read_entries(tmp_path) == true


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "a", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
    ],
)
def test_a_rank_that_is_none_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match="0 <= RANK < WORLD_SIZE"):
        Shard.of_environment(environment)


def test_without_torchrun_there_is_one_rank() -> None:
    assert Shard.of_environment({}) == (0, 1)
    assert Shard.of_environment({"RANK": "2", "WORLD_SIZE": "3"}) == (2, 3)
