"""The report of `bench/gpu.py`: a file that grows figure by figure, lines, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
from reporting import markdown

DONE, FAILED, LATE = "done", "failed", "out of time"
_UNENDED = "did not end"
SAME = ("evidence", "device", "torch", "files")
HEADS = ("case", "what", "ms (p20 to p80)", "times the first", "peak GB", "else")
_SHOWN = ("ms", "p20", "p80", "times_first", "peak_bytes")
"""Parts of a figure that have columns of their own."""


@dataclass
class Report:
    """cases: name -> {status, seconds, figures: {name: value}, error}."""

    path: Path
    head: dict[str, Any]
    cases: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    @classmethod
    def open(cls, path: Path, head: dict[str, Any]) -> Report:
        """With the cases that the file has already, if it is of this machine and these versions."""

        def why_not(report: Mapping[str, Any]) -> str | None:
            if all(report.get(key) == head[key] for key in SAME) or not report.get("cases"):
                return None
            return "of another machine, version or files"

        return cls(path, head, harness.read_report(path, why_not).get("cases", {}))

    def has(self, case: str) -> bool:
        """Whether it ended, well or not; one in which this program itself was ended did not."""
        return case in self.cases and self.cases[case].get("error") != _UNENDED

    def begin(self, case: str) -> None:
        self.cases[case] = {"status": FAILED, "error": _UNENDED, "figures": {}}
        self.write()

    def figure(self, case: str, name: str, value: Any) -> None:
        self.cases[case]["figures"][name] = value
        self.write()
        print(f"  {name}: {short(value)}", flush=True)

    def end(self, case: str, status: str, seconds: float, error: str | None = None) -> None:
        own: dict[str, Any] = {"status": status, "seconds": round(seconds, 1)}
        if error is not None:
            own["error"] = error
        self.cases[case] = own | {"figures": self.cases[case]["figures"]}
        self.write()
        why = "" if error is None else f": {error}"
        print(f"  {status} after {seconds:.0f} s{why}", flush=True)

    def write(self) -> None:
        harness.write_json(self.path, {**self.head, "cases": self.cases})

    def table(self) -> str:
        """Markdown, to be pasted into an issue."""
        machine = ", ".join(f"{key} {self.head[key]}" for key in ("device", "torch", "headstart"))
        rows: list[tuple[str | None, ...]] = []
        for name, case in self.cases.items():
            status = case["status"] if "error" not in case else f"{case['status']}: {case['error']}"
            seconds = f"{case.get('seconds', 0):.0f} s"
            rows.append((f"**{name}**", seconds, None, None, None, _cell(status)))
            rows += [_row(*figure) for figure in case["figures"].items()]
        lines = markdown(HEADS, rows)
        return f"### bench/gpu.py: {self.head['evidence']}\n\n{machine}\n\n{lines}"

    @property
    def sound(self) -> bool:
        """Whether every case ended, and none of its variants failed."""
        values = [v for case in self.cases.values() for v in case["figures"].values()]
        failures = [value for value in values if isinstance(value, dict) and "failed" in value]
        return not failures and all(case["status"] == DONE for case in self.cases.values())


def _row(name: str, value: Any) -> tuple[str | None, ...]:
    if not isinstance(value, dict):
        return None, _cell(name), None, None, None, _cell(short(value))
    ms = "{ms:.3f} ({p20:.3f} to {p80:.3f})".format_map(value) if "ms" in value else ""
    times = f"{value['times_first']:.2f}" if "times_first" in value else ""
    peak = f"{value['peak_bytes'] / 1e9:.2f}" if value.get("peak_bytes") else ""
    rest = {key: own for key, own in value.items() if key not in _SHOWN}
    return None, _cell(name), ms, times, peak, _cell(short(rest))


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def short(value: Any) -> str:
    """A value in one line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(own)}" for key, own in value.items())
    if isinstance(value, list):
        return "; ".join(map(short, value))
    return str(value)
