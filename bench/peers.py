"""What does a network cost on a CPU, ours beside OpenVINO, onnxruntime, diffusers and others?

    python bench/peers.py                      every case, one and two threads; some hours
    python bench/peers.py --quick              a UNet pass, a decode, one thread; some minutes
    python bench/peers.py --list               the cases and the rows
    python bench/peers.py --cases sd15-32,vae-256 --rows ours,OpenVINO --threads 1 --rounds 5

Needs the extras `peers` and `bench`; a peer that is not installed is a row that says how it is.
Each row of a case runs in a process of its own, all with the same weights, and the processes take
turns, A B A B ..., as many at once as memory allows (--memory); `ours float32` is in every group,
and ratios are to it, round by round. Outputs are compared with its output, and where float64 fits
with that. Figures go into bench/results/peers.json as they come; the same command goes on where it
was ended, --again runs what is there already. At the end: a Markdown table, and beside the JSON a
picture of cost over batch, size and steps with the floor that the machine's measured peak sets.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peers_chart
from peers_case import BY_NAME, EXACT, QUICK, QUICK_ROUNDS, SLOW_LIMITS, Case
from peers_report import Report, conclude
from peers_rows import ROWS
from peers_turns import DONE, REST_S, Worker, WorkerError, in_turns

ROOT = Path(__file__).parents[1]
OVERHEAD_GB = 0.5
"""Of a process that has imported torch and a peer."""
Json = dict[str, Any]


class Bench(NamedTuple):
    """folder: what is made for this run, weights and outputs; memory_gb: None for what is free."""

    report: Report
    folder: Path
    rows: tuple[str, ...]
    rounds: int
    memory_gb: float | None
    again: bool
    verbose: bool


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    if options.list:
        print("\n".join(f"{case.name:<12}{case.about}" for case in BY_NAME.values()))
        print(f"\nrows: {', '.join(ROWS)}")
        return 0
    try:  # before minutes are spent on what cannot be kept
        report = Report.open(options.out)
        report.write()
    except OSError as error:
        print(f"bench/peers.py: {options.out} cannot be written ({error}): give another --out")
        return 2
    with _folder(options.folder) as folder:
        bench = Bench(
            report, folder, options.rows, options.rounds, options.memory, options.again,
            options.verbose,
        )  # fmt: skip
        for threads in options.threads:
            for name in options.cases:
                run_case(BY_NAME[name], threads, bench)
    print(f"\n{report.table()}\n\nwrote {report.path}")
    if picture := peers_chart.draw(report, options.out.with_suffix(".png")):
        print(f"wrote {picture}")
    return 0


def run_case(case: Case, threads: int, bench: Bench) -> None:
    """Every row of it that the report has not, in groups that fit into memory."""
    todo = [
        row for row in case.rows
        if row in bench.rows and (bench.again or not bench.report.has(case.name, threads, row))
    ]  # fmt: skip
    print(f"{case.name}, {threads} thread(s): {case.about}", flush=True)
    if not todo:
        print("  in the report already")
        return
    try:
        prepared = _prepared(case, threads, bench)
    except WorkerError as error:
        for row in todo:
            bench.report.put(case.name, threads, row, _ended(error.status, f"files: {error}"))
        return
    exact = _outputs_of_exact(case, threads, bench) if case.exact else None
    while todo:
        before = set(todo)
        with ExitStack() as ends:
            group = _group(case, threads, bench, todo, prepared, ends)
            _measure(case, threads, bench, group, before - set(todo), exact)


def _prepared(case: Case, threads: int, bench: Bench) -> Json:
    """The machine's peaks, now; the case's files and FLOPs."""
    bench.report.peaks(threads, _told(case, threads, bench, "machine"))
    prepared = _told(case, threads, bench, "prepare")
    bench.report.flops[case.name] = prepared["flops"]
    return prepared


def _told(case: Case, threads: int, bench: Bench, row: str) -> Json:
    worker = Worker(_request(case, threads, bench, row), 3 * case.limit_s)
    worker.end()
    return worker.facts


def _request(case: Case, threads: int, bench: Bench, row: str) -> Json:
    output = f"{case.name}-{threads}-{row.replace(' ', '-')}.npz"
    return {
        "case": case.name, "row": row, "threads": threads, "folder": str(bench.folder),
        "output": output, "verbose": bench.verbose,
    }  # fmt: skip


def _outputs_of_exact(case: Case, threads: int, bench: Bench) -> Mapping[str, np.ndarray] | None:
    try:
        _told(case, threads, bench, EXACT)
    except WorkerError as error:
        print(f"  {EXACT}: {error.status}: {error}")
        return None
    return _outputs(case, threads, bench, EXACT)


def _outputs(case: Case, threads: int, bench: Bench, row: str) -> Mapping[str, np.ndarray]:
    with np.load(bench.folder / _request(case, threads, bench, row)["output"]) as held:
        return {name: held[name] for name in held.files}


def _group(
    case: Case, threads: int, bench: Bench, todo: list[str], prepared: Json, ends: ExitStack
) -> list[Worker]:
    """The anchor, and rows taken from `todo` while there is memory for them, at least one."""
    group: list[Worker] = []
    order = [case.anchor, *(row for row in todo if row != case.anchor)]
    for place, row in enumerate(order):
        need = ROWS[row].copies * 4 * prepared["weights"] + (case.room_gb + OVERHEAD_GB) * 1e9
        others = any(own.name != case.anchor for own in group)
        if others and need > _free_bytes(bench, group, prepared["file_bytes"]):
            break
        if row in todo:
            todo.remove(row)
        limit = case.limit_s * (SLOW_LIMITS if ROWS[row].slow else 1)
        try:
            worker = Worker(_request(case, threads, bench, row), limit)
        except WorkerError as error:
            if place or not bench.report.has(case.name, threads, row):
                bench.report.put(case.name, threads, row, _ended(error.status, str(error)))
            continue
        ends.callback(worker.end)
        group.append(worker)
        print(f"  ready: {row}", flush=True)
    return group


def _free_bytes(bench: Bench, group: Sequence[Worker], file_bytes: int) -> float:
    """What may still be taken: the weights' file should stay in memory too."""
    told = Path("/proc/meminfo").read_text()
    free = int(told.split("MemAvailable:")[1].split()[0]) * 1024 - file_bytes
    if bench.memory_gb is None:
        return free
    return min(free, bench.memory_gb * 1e9 - sum(own.anonymous_bytes() for own in group))


def _measure(
    case: Case, threads: int, bench: Bench, group: Sequence[Worker], wanted: set[str],
    exact: Mapping[str, np.ndarray] | None,
) -> None:  # fmt: skip
    """Times of a group; the anchor is in every group, and is reported once."""

    def told(row: str, status: str, why: str) -> None:
        bench.report.put(case.name, threads, row, _ended(status, why))

    if not bench.report.has(case.name, threads, case.anchor):
        wanted = wanted | {case.anchor}
    rounds, rest = min(case.rounds, bench.rounds), REST_S if threads > 1 else 0.0
    taken = in_turns(group, case.variants, rounds, told, rest)
    against = taken.get(case.anchor)
    ours = _outputs(case, threads, bench, case.anchor) if against is not None else {}
    for worker in group:
        if worker.name not in taken or worker.name not in wanted:
            continue
        outputs = _outputs(case, threads, bench, worker.name)
        variants: Json = {}
        for name, turns in taken[worker.name].items():
            if worker.name == case.anchor:
                variants[name] = conclude(turns, None)
            else:
                variants[name] = conclude(turns, None if against is None else against[name])
                variants[name] |= _error("error", outputs.get(name), ours.get(name))
            if exact is not None:
                variants[name] |= _error("error_float64", outputs.get(name), exact.get(name))
        facts = worker.facts | _changed(case, worker)
        value = {"status": DONE, "facts": facts, "variants": variants}
        bench.report.put(case.name, threads, worker.name, value)


def _changed(case: Case, worker: Worker) -> Json:
    if not case.changes:
        return {}
    worker.limit_s *= SLOW_LIMITS  # what is compiled may be compiled again
    try:
        return worker.ask("changes", "changes")
    except WorkerError as error:
        return {"changes": f"{error.status}: {error}"}


def _error(name: str, found: np.ndarray | None, right: np.ndarray | None) -> Json:
    """Relative, in the 2-norm; another shape is as wrong as it can be."""
    if found is None or right is None:
        return {}
    if found.shape != right.shape:
        return {name: float("inf")}
    return {name: float(np.linalg.norm(found - right) / np.linalg.norm(right))}


def _ended(status: str, why: str) -> Json:
    return {"status": status, "why": why}


@contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    if path is None:
        with tempfile.TemporaryDirectory(prefix="headstart-peers-") as made:
            yield Path(made)
    else:
        path.mkdir(parents=True, exist_ok=True)
        yield path


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="the cases and rows, and end")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; one thread")
    parser.add_argument("--cases", type=_names("case", BY_NAME), metavar="A,B")
    parser.add_argument("--rows", type=_rows, metavar="A,B", help="their names, or how these begin")
    parser.add_argument("--threads", type=_counts, metavar="1,2", help="default: 1,2")
    parser.add_argument("--rounds", type=int, help="times each row runs, at most; default 9")
    parser.add_argument("--memory", type=float, metavar="GB", help="for all rows at once")
    parser.add_argument("--again", action="store_true", help="those too that the file has")
    parser.add_argument("--verbose", action="store_true", help="with all that the peers print")
    parser.add_argument("--folder", type=Path, help="where weights are made, and stay")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/peers.json")
    options = parser.parse_args(argv)
    quick = options.quick
    options.cases = options.cases or (list(QUICK) if quick else list(BY_NAME))
    options.rows = options.rows or tuple(r for r, row in ROWS.items() if not (quick and row.slow))
    options.threads = options.threads or ([1] if quick else [1, 2])
    options.rounds = options.rounds or (QUICK_ROUNDS if quick else 9)
    if options.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {options.rounds}")
    return options


def _names(what: str, known: Mapping[str, object]) -> Any:
    def listed(text: str) -> list[str]:
        found = text.split(",")
        if unknown := sorted(set(found) - set(known)):
            raise argparse.ArgumentTypeError(f"no {what} {unknown}; there is {', '.join(known)}")
        return found

    return listed


def _rows(text: str) -> tuple[str, ...]:
    begins = text.split(",")
    for begin in begins:
        if not any(row.startswith(begin) for row in ROWS):
            raise argparse.ArgumentTypeError(f"no row {begin!r}; there is {', '.join(ROWS)}")
    return tuple(row for row in ROWS if row.startswith(tuple(begins)))


def _counts(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected counts of threads such as 1,2, got {text!r}")
    return found


if __name__ == "__main__":
    sys.exit(main())
