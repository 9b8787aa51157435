"""The report of `bench/peers.py`: a file that grows row by row, and a Markdown table.

cases: name -> threads -> row -> {status, why, facts, variants: {name: {s, min, max, ratio, ...}}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import numpy as np
from peers_turns import DONE, MISSING
from reporting import markdown

Json = dict[str, Any]
SAME = ("processor", "cores", "versions")
HEADS = (
    *("case", "threads", "row", "seconds: median (min to max)", "times ours"),
    *("CPU s", "times ours", "times floor", "GB at rest", "GB at most"),
    *("ready after s", "error", "error to float64", "besides"),
)


@dataclass
class Report:
    """floors: threads -> peaks; flops: case -> variant -> FLOPs."""

    path: Path
    machine: Json
    floors: Json = field(default_factory=Json)
    flops: Json = field(default_factory=Json)
    cases: Json = field(default_factory=Json)

    @classmethod
    def open(cls, path: Path) -> Report:
        """With what the file has already, if it is of this machine and these versions."""
        machine = harness.machine()

        def why_not(report: Json) -> str | None:
            if "machine" not in report:
                return "no report, or a damaged one"
            same = all(report["machine"].get(key) == machine[key] for key in SAME)
            return None if same else "of another machine or version"

        report = harness.read_report(path, why_not)
        parts = (report.get(key, {}) for key in ("floors", "flops", "cases"))
        return cls(path, report.get("machine", machine), *parts)

    def rows(self, case: str, threads: int) -> Json:
        return self.cases.setdefault(case, {}).setdefault(str(threads), {})

    def has(self, case: str, threads: int, row: str) -> bool:
        """Whether it ended, well or not; what was not installed is looked for again."""
        return self.rows(case, threads).get(row, {"status": MISSING})["status"] != MISSING

    def put(self, case: str, threads: int, row: str, value: Json) -> None:
        self.rows(case, threads)[row] = value
        self.write()
        print(f"  {row}: {line_of(value)}", flush=True)

    def peaks(self, threads: int, measured: Mapping[str, float]) -> None:
        """Of a machine that others use the best of all looks counts."""
        before = self.floors.get(str(threads), {})
        self.floors[str(threads)] = {n: max(v, before.get(n, 0.0)) for n, v in measured.items()}

    def floor_s(self, case: str, variant: str, threads: str, dtype: str) -> float | None:
        """Seconds of its FLOPs at the peak that was measured; None where either is not known."""
        flops = self.flops.get(case, {}).get(variant)
        peak = self.floors.get(threads, {}).get(dtype)
        return flops / (peak * 1e9) if flops and peak else None

    def write(self) -> None:
        harness.write_json(
            self.path,
            {
                "question": "what does a network cost on a CPU, ours beside other engines'?",
                "evidence": "measured",
                "machine": self.machine,
                "floors": self.floors,
                "flops": self.flops,
                "cases": self.cases,
            },
        )

    def table(self) -> str:
        rows = (
            cells
            for case, by_threads in self.cases.items()
            for threads, of_case in by_threads.items()
            for row, value in of_case.items()
            for cells in self._cells(case, threads, row, value)
        )
        peaks = (
            f"{threads} thread(s): float32 {own['float32']:.0f} GFLOP/s, bfloat16 "
            f"{own['bfloat16']:.0f} GFLOP/s, copy {own['copy']:.1f} GB/s"
            for threads, own in self.floors.items()
        )
        load = f"{self.machine['processor']}, load {self.machine['load_1min']} at its begin"
        return f"{markdown(HEADS, rows)}\n\n{load}. Peaks measured: {'; '.join(peaks)}."

    def _cells(self, case: str, threads: str, row: str, value: Json) -> Iterator[tuple[str, ...]]:
        if value["status"] != DONE:
            why = f"{value['status']}: {value['why']}".replace("|", "/")
            yield (case, threads, row, *[""] * (len(HEADS) - 4), why)
            return
        facts = value["facts"]
        besides = ", ".join(f"{k} {_fact(k, facts[k])}" for k in sorted(facts) if k not in _SHOWN)
        for name, own in value["variants"].items():
            floor = self.floor_s(case, name, threads, dtype_of(row))
            yield (
                case if name == case else f"{case}: {name}", threads, row, _span(own),
                _span(own.get("ratio"), ".2f"), _number(own.get("cpu_s")),
                _span(own.get("cpu_ratio"), ".2f"), _number(own["s"] / floor if floor else None),
                _number(facts.get("anonymous_bytes"), 1e9), _number(facts.get("peak_bytes"), 1e9),
                _number(facts.get("build_s", 0) + facts.get("first_s", 0)),
                *(_number(own.get(key), form=".1e") for key in ("error", "error_float64")),
                besides,
            )  # fmt: skip
            besides = ""


def conclude(
    mine: Sequence[Mapping[str, float]], anchor: Sequence[Mapping[str, float]] | None
) -> Json:
    """One variant of a row: seconds, and the ratio to the anchor, round by round."""
    seconds = [turn["s"] for turn in mine]
    numbers: Json = spread(seconds) | {"rounds": len(seconds)}
    busy = [turn["cpu_s"] for turn in mine if "cpu_s" in turn]
    if busy:
        numbers["cpu_s"] = float(np.median(busy))
    if anchor is not None:
        numbers["ratio"] = _by_rounds(seconds, [turn["s"] for turn in anchor])
        if busy:
            numbers["cpu_ratio"] = _by_rounds(busy, [turn["cpu_s"] for turn in anchor])
    return numbers


def _by_rounds(mine: Sequence[float], other: Sequence[float]) -> Json:
    return spread([a / b for a, b in zip(mine, other, strict=True)])


def spread(values: Sequence[float]) -> Json:
    return {"s": float(np.median(values)), "min": min(values), "max": max(values)}


def dtype_of(row: str) -> str:
    """Whose peak is a row's floor: float16 has none of its own here."""
    return "bfloat16" if "bfloat16" in row else "float32"


def line_of(value: Json) -> str:
    """A row in one line."""
    if value["status"] != DONE:
        return f"{value['status']}: {value['why']}"
    shown = [f"{name} {_span(own)}{_times(own)}" for name, own in value["variants"].items()]
    at_rest = value["facts"].get("anonymous_bytes", 0) / 1e9
    return f"{'; '.join(shown)}; {at_rest:.2f} GB"


_SHOWN = ("anonymous_bytes", "peak_bytes", "build_s", "first_s", "mapped_bytes")


def _fact(key: str, value: Any) -> str:
    return f"{value / 1e9:.2f} GB" if key.endswith("_bytes") else str(value)


def _times(own: Json) -> str:
    return f", {own['ratio']['s']:.2f} of ours" if "ratio" in own else ""


def _span(numbers: Json | None, form: str = ".3g") -> str:
    if numbers is None:
        return ""
    middle, least, most = (format(numbers[key], form) for key in ("s", "min", "max"))
    return f"{middle} ({least} to {most})"


def _number(value: float | None, unit: float = 1.0, form: str = ".3g") -> str:
    return "" if value is None else format(value / unit, form)
