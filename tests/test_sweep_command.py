"""`headstart sweep` with the bundled pair: one process, torchrun, and what batching changes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bundled import needs_pair
from fresh import environment
from PIL import Image

import headstart as hs
import headstart_weights
from headstart.cli import main
from headstart.sweep.ledger import read_entries

pytestmark = needs_pair
IMAGES = 12
PROMPTS = ("a fox", "an owl, glossy style", "a frog, blue background", "a heart")


def write_csv(folder: Path, count: int) -> Path:
    rows = [f'{n},x,"{PROMPTS[n % 4]}",{n // 4}\n' for n in range(count)]
    path = folder / "prompts.csv"
    path.write_text("case_number,source,prompt,evaluation_seed\n" + "".join(rows))
    return path


def images(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_batching_changes_a_pixel_by_rounding_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Latents agree to 3e-6 (tests/test_engine.py), which moves a pixel by one level at most."""
    path = write_csv(tmp_path, 6)
    for batch in (1, 4):
        out = str(tmp_path / str(batch))
        assert main(["sweep", str(path), "--out", out, "--batch", str(batch), "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[0]["written"] == 6 and printed[0]["complete"]
    alone, together = images(tmp_path / "1").astype(int), images(tmp_path / "4").astype(int)
    assert alone.shape == (6, 64, 64, 3)
    assert np.abs(alone - together).max() <= 1
    assert (alone != together).mean() < 1e-3
    assert main(["replay", str(tmp_path / "4" / "000002.png")]) == 0  # of four, and alone
    out = tmp_path / "sampled"
    assert main(["sample", PROMPTS[1], "--seeds", "1", "--out", str(out)]) == 0
    assert np.array_equal(images(out)[0], alone[5])


def test_a_sweep_with_another_plan_or_batch_does_not_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_csv(tmp_path, 2), str(tmp_path / "out")
    assert main(["sweep", str(path), "--out", out, "--plan", "distilled"]) == 0
    assert main(["sweep", str(path), "--out", out, "--plan", "hybrid", "--batch", "3"]) == 2
    message = capsys.readouterr().err
    assert "made with other settings (table: demo-distilled (sha256 " in message
    assert "batch: 16 then, 3 now" in message


def test_the_same_prompt_and_seed_twice_is_one_image_in_two_files(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("case_number,prompt,evaluation_seed\n7,a fox,1\n9,a fox,1\n")
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 0
    one, other = read_entries(tmp_path / "out")
    assert (one.file, other.file) == ("000007.png", "000009.png")
    assert one.sha256 == other.sha256


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ("0,a fox,-1\n", [], "line 2: evaluation_seed '-1'"),
        ("0,,1\n", [], "line 2: the prompt is empty"),
        ("0,a fox,1\n", ["--size", "60"], "multiples of 8"),
        ("0,a fox,1\n", ["--batch", "0"], "batch must be at least 1"),
        ("0,a fox,1\n", ["--negative", "a dog"], "negative"),
        ("0,a fox,1\n", ["--size-column", "px"], "no column 'px'"),
    ],
)
def test_a_sweep_that_cannot_be_done_is_refused_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str, options: list[str], message: str
) -> None:
    path = tmp_path / "p.csv"
    path.write_text("case_number,prompt,evaluation_seed\n" + rows)
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_of_an_environment_share_a_sweep_and_fewer_finish_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """Rank 1 never comes; the next run has a rank less. The launcher itself: test_sweep.py."""
    path = write_csv(tmp_path, 6)

    def rank_of(rank: int, count: int, out: Path) -> dict[str, object]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))
        options = ["--out", str(out), "--batch", "1", "--plan", "distilled", "--json"]
        assert main(["sweep", str(path), *options]) == 0
        return json.loads(capsys.readouterr().out)

    first = [rank_of(rank, world, tmp_path / "out") for rank in range(world) if rank != 1]
    assert not any(printed["complete"] for printed in first)
    assert len(read_entries(tmp_path / "out")) == 6 - 6 // world
    rest = [rank_of(rank, world - 1, tmp_path / "out") for rank in range(world - 1)]
    assert (
        rest[-1]["complete"] and sum(int(str(printed["written"])) for printed in rest) == 6 // world
    )
    alone = rank_of(0, 1, tmp_path / "one")
    assert (alone["rank"], alone["world"], alone["written"]) == (0, 1, 6)
    assert read_entries(tmp_path / "out") == read_entries(tmp_path / "one")


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_a_sweep_with_a_word_and_it_goes_on_to_the_same_bytes(
    number: int, status: int, word: str, tmp_path: Path, unbroken: dict[str, bytes]
) -> None:
    path, out = write_csv(tmp_path, IMAGES), tmp_path / "out"
    process = _command(path, out)
    count, deadline = random.randint(1, 6), time.monotonic() + 300
    while len(read_entries(out)) < count and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    entries = read_entries(out)
    assert count <= len(entries) < IMAGES
    rest = f"images done: {len(entries)}, in {out}; the same command goes on from there"
    assert (process.returncode, error) == (status, f"headstart: {word}: {rest}\n")
    assert all(entry.is_intact(out) for entry in entries)
    assert not [*out.rglob("*.partial"), *out.rglob(".*")]
    _finish(path, out)
    assert len(unbroken) == IMAGES + 2 and _contents(out) == unbroken


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a sweep of the same cases writes that nobody ends."""
    folder = tmp_path_factory.mktemp("unbroken")
    _finish(write_csv(folder, IMAGES), folder / "out")
    return _contents(folder / "out")


def _finish(path: Path, out: Path) -> None:
    process = _command(path, out)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.*")}


def _command(path: Path, out: Path) -> subprocess.Popen[str]:
    return _start([], path, out, "1")


def _start(launcher: list[str], path: Path, out: Path, threads: str) -> subprocess.Popen[str]:
    command = ["-m", "headstart", "sweep", str(path), "--out", str(out), "--batch", "2"]
    return subprocess.Popen(
        [sys.executable, *launcher, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(OMP_NUM_THREADS=threads),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_torchrun_ranks_share_a_sweep_and_take_over_from_a_dead_one(
    tmp_path: Path, world: int
) -> None:
    path = write_csv(tmp_path, 24)
    out = tmp_path / "out"
    first = _torchrun(world, path, out)
    deadline = time.monotonic() + 300
    while len(read_entries(out)) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    for child in _workers(first.pid)[1:2]:
        os.kill(child, signal.SIGKILL)
    first.communicate(timeout=300)
    assert first.returncode != 0
    stamps = {entry.file: (out / entry.file).stat().st_mtime_ns for entry in read_entries(out)}
    assert 4 <= len(stamps) < 24
    again = _torchrun(world - 1, path, out)
    printed, error = again.communicate(timeout=300)
    assert again.returncode == 0, error
    assert "all cases are done" in printed
    entries = read_entries(out)
    assert [entry.case_number for entry in entries] == list(range(24))
    assert all(entry.is_intact(out) for entry in entries)
    assert all((out / name).stat().st_mtime_ns == when for name, when in stamps.items())
    # alone with as many threads: another number of them rounds the networks differently
    alone = _torchrun(1, path, tmp_path / "one")
    _, error = alone.communicate(timeout=300)
    assert alone.returncode == 0, error
    names = [entry.sha256 for entry in read_entries(tmp_path / "one")]
    assert names == [entry.sha256 for entry in entries]


def _torchrun(world: int, path: Path, out: Path) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return _start(launcher, path, out, "2")


def _workers(launcher: int) -> list[int]:
    task = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    return [int(child) for child in task.split()]


def test_memory_is_planned_for_the_largest_size_of_a_column_and_for_that_of_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was planned for the model's own size, and a larger picture refused with advice that these
    commands cannot follow: they take no --size."""
    calls: list[object] = []

    def load(*files: object, **options: object) -> None:
        calls.append(options["plan_size"])
        raise hs.InputError("enough")

    path, other = tmp_path / "sizes.csv", str(headstart_weights.path("base"))
    rows = ("0,a fox,1,64x96", "1,a fox,2,128x32")
    path.write_text("\n".join(("case_number,prompt,evaluation_seed,side", *rows)))
    trajectory = hs.Engine.demo(device="cpu").sample("a fox", plan="distilled", size=(64, 32))
    (tmp_path / "record.json").write_text(json.dumps(trajectory.record()))
    monkeypatch.setattr(hs.Engine, "load", load)
    sweep = ["sweep", str(path), "--out", str(tmp_path / "out"), "--base", other, "--plan", "base"]
    for command in (
        [*sweep, "--size-column", "side"],
        [*sweep, "--size", "80"],
        sweep,
        ["replay", str(tmp_path / "record.json"), "--base", other],
    ):
        assert main(command) == 2 and "enough" in capsys.readouterr().err
    assert calls == [(64, 96), (80, 80), None, (64, 32)]
