"""The report of `bench/peers.py`: a file that grows row by row, and a Markdown table.

cases: name -> threads -> row -> {status, why, facts, variants: {name: {s, min, max, ratio, ...}}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import numpy as np
from gpu_report import _aside as put_aside
from peers_turns import DONE, MISSING

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
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return cls(path, machine)
        except ValueError:
            found = None
        if not isinstance(found, dict) or "machine" not in found:
            put_aside(path, "no report, or a damaged one")
            return cls(path, machine)
        if any(found["machine"].get(key) != machine[key] for key in SAME):
            put_aside(path, "of another machine or version")
            return cls(path, machine)
        return cls(
            path, found["machine"], *(found.get(k, {}) for k in ("floors", "flops", "cases"))
        )

    def rows(self, case: str, threads: int) -> Json:
        return self.cases.setdefault(case, {}).setdefault(str(threads), {})

    def has(self, case: str, threads: int, row: str) -> bool:
        """Whether it ended, well or not; what was not installed is looked for again."""
        return self.rows(case, threads).get(row, {"status": MISSING})["status"] != MISSING

    def put(self, case: str, threads: int, row: str, value: Json) -> None:
        self.rows(case, threads)[row] = value
        self.write()
        print(f"  {row}: {line_of(value)}", flush=True)

    def peaks(self, threads: int, found: Mapping[str, float]) -> None:
        """Of a machine that others use the best of all looks counts."""
        before = self.floors.get(str(threads), {})
        self.floors[str(threads)] = {n: max(v, before.get(n, 0.0)) for n, v in found.items()}

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
        lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
        for case, by_threads in self.cases.items():
            for threads, rows in by_threads.items():
                for row, value in rows.items():
                    for cells in self._cells(case, threads, row, value):
                        lines.append("| " + " | ".join(cells) + " |")
        peaks = (
            f"{threads} thread(s): float32 {own['float32']:.0f} GFLOP/s, bfloat16 "
            f"{own['bfloat16']:.0f} GFLOP/s, copy {own['copy']:.1f} GB/s"
            for threads, own in self.floors.items()
        )
        load = f"{self.machine['processor']}, load {self.machine['load_1min']} at its begin"
        return "\n".join([*lines, "", f"{load}. Peaks measured: {'; '.join(peaks)}."])

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
                case if name == case else f"{case}: {name}", threads, row, _seconds(own),
                _ratio(own.get("ratio")), _number(own.get("cpu_s")), _ratio(own.get("cpu_ratio")),
                _number(own["s"] / floor if floor else None),
                _number(facts.get("anonymous_bytes"), 1e9), _number(facts.get("peak_bytes"), 1e9),
                _number(facts.get("build_s", 0) + facts.get("first_s", 0)),
                _small(own.get("error")), _small(own.get("error_float64")), besides,
            )  # fmt: skip
            besides = ""


def conclude(
    mine: Sequence[Mapping[str, float]], anchor: Sequence[Mapping[str, float]] | None
) -> Json:
    """One variant of a row: seconds, and the ratio to the anchor, round by round."""
    seconds = [turn["s"] for turn in mine]
    told: Json = spread(seconds) | {"rounds": len(seconds)}
    busy = [turn["cpu_s"] for turn in mine if "cpu_s" in turn]
    if busy:
        told["cpu_s"] = float(np.median(busy))
    if anchor is not None:
        told["ratio"] = _by_rounds(seconds, [turn["s"] for turn in anchor])
        if busy:
            told["cpu_ratio"] = _by_rounds(busy, [turn["cpu_s"] for turn in anchor])
    return told


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
    shown = [f"{name} {_seconds(own)}{_times(own)}" for name, own in value["variants"].items()]
    at_rest = value["facts"].get("anonymous_bytes", 0) / 1e9
    return f"{'; '.join(shown)}; {at_rest:.2f} GB"


_SHOWN = ("anonymous_bytes", "peak_bytes", "build_s", "first_s", "mapped_bytes")


def _fact(key: str, value: Any) -> str:
    return f"{value / 1e9:.2f} GB" if key.endswith("_bytes") else str(value)


def _seconds(own: Json) -> str:
    return f"{own['s']:.3g} ({own['min']:.3g} to {own['max']:.3g})"


def _times(own: Json) -> str:
    return f", {own['ratio']['s']:.2f} of ours" if "ratio" in own else ""


def _ratio(found: Json | None) -> str:
    return "" if found is None else f"{found['s']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def _number(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.3g}"


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
