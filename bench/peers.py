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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import peers_chart
from peers_case import BY_NAME, EXACT, QUICK, QUICK_ROUNDS, SLOW_LIMITS, Case
from peers_report import Report, conclude
from peers_rows import ROWS
from peers_turns import DONE, REST_S, Worker, WorkerError, in_turns

OVERHEAD_GB = 0.5
"""Of a process that has imported torch and a peer."""
Json = dict[str, Any]
Outputs = Mapping[str, np.ndarray]


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
    with tempfile.TemporaryDirectory(prefix="headstart-peers-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for threads in options.threads:
            for name in options.cases:
                Bench(BY_NAME[name], threads, report, folder, options).run()
    print(f"\n{report.table()}\n\nwrote {report.path}")
    if picture := peers_chart.draw(report, options.out.with_suffix(".png")):
        print(f"wrote {picture}")
    return 0


class Bench(NamedTuple):
    """A case on so many threads; folder: what is made for this run, weights and outputs."""

    case: Case
    threads: int
    report: Report
    folder: Path
    options: argparse.Namespace

    def run(self) -> None:
        """Every row of it that the report has not, in groups that fit into memory."""
        case, options = self.case, self.options
        todo = [
            row for row in case.rows if row in options.rows and (options.again or not self.has(row))
        ]
        print(f"{case.name}, {self.threads} thread(s): {case.about}", flush=True)
        if not todo:
            print("  in the report already")
            return
        try:
            prepared = self.prepare()
        except WorkerError as error:
            for row in todo:
                self.put_failure(row, WorkerError(error.status, f"files: {error}"))
            return
        exact = self.exact_outputs() if case.exact else None
        while todo:
            before = set(todo)
            with ExitStack() as ends:
                group = self.start_group(todo, prepared, ends)
                self.measure(group, before - set(todo), exact)

    def has(self, row: str) -> bool:
        return self.report.has(self.case.name, self.threads, row)

    def put(self, row: str, value: Json) -> None:
        self.report.put(self.case.name, self.threads, row, value)

    def put_failure(self, row: str, error: WorkerError) -> None:
        self.put(row, {"status": error.status, "why": str(error)})

    def prepare(self) -> Json:
        """The machine's peaks, now; the case's files and FLOPs."""
        self.report.peaks(self.threads, self.facts_of("machine"))
        prepared = self.facts_of("prepare")
        self.report.flops[self.case.name] = prepared["flops"]
        return prepared

    def facts_of(self, row: str) -> Json:
        worker = Worker(self.request(row), 3 * self.case.limit_s)
        worker.end()
        return worker.facts

    def request(self, row: str) -> Json:
        output = f"{self.case.name}-{self.threads}-{row.replace(' ', '-')}.npz"
        return {
            "case": self.case.name, "row": row, "threads": self.threads, "folder": str(self.folder),
            "output": output, "verbose": self.options.verbose,
        }  # fmt: skip

    def exact_outputs(self) -> Outputs | None:
        try:
            self.facts_of(EXACT)
        except WorkerError as error:
            print(f"  {EXACT}: {error.status}: {error}")
            return None
        return self.outputs(EXACT)

    def outputs(self, row: str) -> Outputs:
        with np.load(self.folder / self.request(row)["output"]) as arrays:
            return dict(arrays)

    def start_group(self, todo: list[str], prepared: Json, ends: ExitStack) -> list[Worker]:
        """The anchor, and rows taken from `todo` while there is memory for them, at least one."""
        case, group = self.case, list[Worker]()
        for number, row in enumerate((case.anchor, *(r for r in todo if r != case.anchor))):
            need = ROWS[row].copies * 4 * prepared["weights"] + (case.room_gb + OVERHEAD_GB) * 1e9
            others = any(worker.name != case.anchor for worker in group)
            if others and need > self.free_bytes(group, prepared["file_bytes"]):
                break
            if row in todo:
                todo.remove(row)
            try:
                limit = case.limit_s * (SLOW_LIMITS if ROWS[row].slow else 1)
                worker = Worker(self.request(row), limit)
            except WorkerError as error:
                if number or not self.has(row):
                    self.put_failure(row, error)
                continue
            ends.callback(worker.end)
            group.append(worker)
            print(f"  ready: {row}", flush=True)
        return group

    def free_bytes(self, group: Sequence[Worker], file_bytes: int) -> float:
        """What may still be taken: the weights' file should stay in memory too."""
        text = Path("/proc/meminfo").read_text()
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024 - file_bytes
        if self.options.memory is None:
            return free
        taken = sum(worker.anonymous_bytes() for worker in group)
        return min(free, self.options.memory * 1e9 - taken)

    def measure(self, group: Sequence[Worker], wanted: set[str], exact: Outputs | None) -> None:
        """Times of a group; the anchor is in every group, and is reported once."""
        case = self.case
        if not self.has(case.anchor):
            wanted = wanted | {case.anchor}
        rounds, rest = min(case.rounds, self.options.rounds), REST_S if self.threads > 1 else 0.0
        taken = in_turns(group, case.variants, rounds, self.put_failure, rest)
        anchor = taken.get(case.anchor, {})
        ours = self.outputs(case.anchor) if anchor else {}
        for worker in group:
            if worker.name not in taken or worker.name not in wanted:
                continue
            outputs = self.outputs(worker.name)
            others = {} if worker.name == case.anchor else anchor
            variants: Json = {}
            for name, turns in taken[worker.name].items():
                variants[name] = conclude(turns, others.get(name))
                if worker.name != case.anchor:
                    variants[name] |= _error("error", outputs.get(name), ours.get(name))
                if exact is not None:
                    variants[name] |= _error("error_float64", outputs.get(name), exact.get(name))
            facts = worker.facts | self.changes(worker)
            self.put(worker.name, {"status": DONE, "facts": facts, "variants": variants})

    def changes(self, worker: Worker) -> Json:
        """Whether it follows a change of its module, where the case asks."""
        if not self.case.changes:
            return {}
        worker.limit_s *= SLOW_LIMITS  # what is compiled may be compiled again
        try:
            return worker.ask("changes", "changes")
        except WorkerError as error:
            return {"changes": f"{error.status}: {error}"}


def _error(name: str, output: np.ndarray | None, right: np.ndarray | None) -> Json:
    """Relative, in the 2-norm; another shape is as wrong as it can be."""
    if output is None or right is None:
        return {}
    if output.shape != right.shape:
        return {name: float("inf")}
    return {name: float(np.linalg.norm(output - right) / np.linalg.norm(right))}


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.options(__doc__, "peers.json")
    parser.add_argument("--list", action="store_true", help="the cases and rows, and end")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; one thread")
    parser.add_argument("--cases", type=harness.names("case", BY_NAME), metavar="A,B")
    parser.add_argument("--rows", type=_rows, metavar="A,B", help="their names, or how these begin")
    parser.add_argument("--threads", type=_counts, metavar="1,2", help="default: 1,2")
    parser.add_argument("--rounds", type=int, help="times each row runs, at most; default 9")
    parser.add_argument("--memory", type=float, metavar="GB", help="for all rows at once")
    parser.add_argument("--again", action="store_true", help="those too that the file has")
    parser.add_argument("--verbose", action="store_true", help="with all that the peers print")
    parser.add_argument("--folder", type=Path, help="where weights are made, and stay")
    options = parser.parse_args(argv)
    quick = options.quick
    options.cases = options.cases or (list(QUICK) if quick else list(BY_NAME))
    options.rows = options.rows or tuple(r for r, row in ROWS.items() if not (quick and row.slow))
    options.threads = options.threads or ([1] if quick else [1, 2])
    options.rounds = options.rounds or (QUICK_ROUNDS if quick else 9)
    if options.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {options.rounds}")
    return options


def _rows(text: str) -> tuple[str, ...]:
    begins = text.split(",")
    for begin in begins:
        if not any(row.startswith(begin) for row in ROWS):
            raise argparse.ArgumentTypeError(f"no row {begin!r}; there is {', '.join(ROWS)}")
    return tuple(row for row in ROWS if row.startswith(tuple(begins)))


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected counts of threads such as 1,2, got {text!r}")
    return counts


if __name__ == "__main__":
    sys.exit(main())
