"""A program that the sweep's tests run: forks sweeps that are killed, and looks at what they leave.

    python tests/crashes.py points FOLDER    SIGKILL at every single write, fsync and rename in turn
    python tests/crashes.py moments FOLDER   SIGKILL at 24 moments, random over a whole sweep
    python tests/crashes.py ranks FOLDER N   N ranks, one killed; gone on with by another number
    torchrun ... tests/crashes.py rank FOLDER [DIES]    one rank, as torchrun's environment says;
                                             rank DIES is killed when its first batch is in place

It loads no torch, so a fork is a few milliseconds, and prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from headstart.pictures.png import encode_png
from headstart.sweep.jobs import Case
from headstart.sweep.ledger import FORMAT, Shard, open_ledger, read_entries
from headstart.sweep.sweep import SweepResult, sweep

CASES = tuple(Case(n, f"prompt {n % 5}", 100 + n) for n in range(11))
SETTINGS = {"format": FORMAT, "cases": len(CASES), "weights": {}}
BATCH = 3
ALONE = Shard()


def draw(cases: Sequence[Case]) -> list[bytes]:
    """Pixels that depend on the case and, as rounding does, on what shares its batch."""
    salt = sum(case.number for case in cases)
    return [
        encode_png(np.random.default_rng([case.seed, salt]).integers(0, 256, (8, 8, 3), np.uint8))
        for case in cases
    ]


def run(folder: Path, shard: Shard = ALONE, slow_s: float = 0.0) -> SweepResult:
    def slowly(cases: Sequence[Case]) -> list[bytes]:
        time.sleep(slow_s)
        return draw(cases)

    with open_ledger(folder, SETTINGS, shard) as ledger:
        return sweep(CASES, slowly, ledger, batch=BATCH)


def kill_at(point: int) -> None:
    """SIGKILL just before the point-th call that changes the disk, of those that a sweep makes."""
    left = [point]

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def before(*arguments: object, **named: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return before

    for name in ("fsync", "replace", "mkdir", "unlink", "rename"):
        setattr(os, name, counted(getattr(os, name)))
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]
    Path.open = counted(Path.open)  # type: ignore[method-assign]


def fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def wait(child: int) -> bool:
    """Whether it ended by itself, and well."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert os.waitstatus_to_exitcode(status) == 0, status
    return True


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but the shards, which say who did what; and no file left aside."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """What the lines say is in place: inode and time of each file. Every line must be true."""
    stamps: dict[str, tuple[int, int]] = {}
    for entry in read_entries(folder):
        assert entry.is_intact(folder), f"{entry.file} is recorded and not there"
        stat = (folder / entry.file).stat()
        stamps[entry.file] = (stat.st_ino, stat.st_mtime_ns)
    return stamps


def recorded_twice(folder: Path) -> int:
    lines = b"".join(path.read_bytes() for path in (folder / "shards").glob("*.jsonl"))
    counts = Counter(json.loads(line)["case_number"] for line in lines.splitlines())
    return sum(count > 1 for count in counts.values())


def points(folder: Path) -> dict[str, object]:
    """One sweep a point: killed there, then gone on with; all must equal the one never killed."""
    run(folder / "whole")
    expected, killed = contents(folder / "whole"), 0
    while True:
        target = folder / f"{killed:03d}"

        def crash(target: Path = target, point: int = killed) -> None:
            kill_at(point)
            run(target)

        if wait(fork(crash)):
            break
        before = finished(target) if target.exists() else {}
        assert wait(fork(lambda target=target: run(target)))
        after = finished(target)
        assert all(after[name] == file for name, file in before.items()), "written twice"
        assert contents(target) == expected, f"differs after a kill at point {killed}"
        assert recorded_twice(target) == 0
        killed += 1
    return {"killed": killed, "images": len(CASES)}


def moments(folder: Path) -> dict[str, object]:
    """Kills at moments uniform over the time that a whole sweep takes here, each gone on with.

    Every second one is killed again as it goes on. What a kill found done is counted: a test of
    kills that all come before the first image, or after the last, would say nothing.
    """
    rng, slow_s = random.Random(20250310), 0.004
    begin = time.perf_counter()
    assert wait(fork(lambda: run(folder / "whole", slow_s=slow_s)))
    lasts_s = time.perf_counter() - begin
    expected = contents(folder / "whole")
    outcomes: Counter[str] = Counter()
    for number in range(240):
        target, stamps = folder / f"{number:03d}", dict[str, tuple[int, int]]()
        for _ in range(1 + number % 2):
            child = fork(lambda target=target: run(target, slow_s=slow_s))
            time.sleep(rng.uniform(0.0, lasts_s))
            os.kill(child, signal.SIGKILL)
            ended = wait(child)
            now = finished(target) if target.exists() else {}
            assert all(now[name] == file for name, file in stamps.items()), "lost or written twice"
            if not ended:
                outcomes["nothing" if not now else "all" if len(now) == len(CASES) else "some"] += 1
            stamps = now
        run(target)
        after = finished(target)
        assert all(after[name] == file for name, file in stamps.items()), "written twice"
        assert contents(target) == expected and recorded_twice(target) == 0
        if outcomes.total() >= 24 and outcomes["some"] >= 12:
            break
    return {"killed": outcomes.total(), **outcomes}


def rank(folder: Path, dies: int | None) -> None:
    """This process's share of a sweep; rank `dies` is killed, the others are slow after a batch."""
    shard = Shard.of_environment(os.environ)
    batches = 0

    def work(cases: Sequence[Case]) -> list[bytes]:
        nonlocal batches
        batches += 1
        if batches > 1 and dies == shard.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        if batches > 1 and dies is not None:
            time.sleep(60.0)  # until torchrun, which sees that one has died, ends all
        return draw(cases)

    with open_ledger(folder, SETTINGS, shard) as ledger:
        sweep(CASES, work, ledger, batch=1)


def ranks(folder: Path, world: int) -> dict[str, object]:
    """The second of `world` ranks is killed; the rest of its share is done by world - 1 ranks."""
    run(folder / "whole")
    target = folder / "ranks"
    children = [
        fork(lambda r=r: run(target, Shard(r, world), slow_s=10.0 if r == 1 else 0.0))
        for r in range(world)
    ]
    assert all(wait(child) for r, child in enumerate(children) if r != 1)
    os.kill(children[1], signal.SIGKILL)
    assert not wait(children[1])
    before = finished(target)
    partly = not (target / "manifest.jsonl").exists()
    survivors = [fork(lambda r=r: run(target, Shard(r, world - 1))) for r in range(world - 1)]
    assert all([wait(child) for child in survivors])
    after = finished(target)
    return {
        "done_before": len(before),
        "partly": partly,
        "kept": all(after[name] == file for name, file in before.items()),
        "recorded_twice": recorded_twice(target),
        "equal": contents(target) == contents(folder / "whole"),
    }


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "rank":
        rank(where, int(sys.argv[3]) if len(sys.argv) > 3 else None)
        sys.exit()
    outcome = {"points": points, "moments": moments}.get(what)
    print(json.dumps(outcome(where) if outcome else ranks(where, int(sys.argv[3]))))
