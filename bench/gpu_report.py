"""The report of `bench/gpu.py`: a file that grows figure by figure, lines, and a table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness

DONE, FAILED, LATE = "done", "failed", "out of time"
_UNENDED = "did not end"


@dataclass
class Report:
    """cases: name -> {status, seconds, figures: {name: value}, error}."""

    path: Path
    head: dict[str, Any]
    cases: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    @classmethod
    def open(cls, path: Path, head: dict[str, Any]) -> Report:
        """With the cases that the file has already, if it is of this machine and these versions."""
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return cls(path, head)
        except ValueError:  # no JSON, or no text at all
            found = None
        if not isinstance(found, dict):
            _aside(path, "no report, or a damaged one")
            return cls(path, head)
        same = all(found.get(key) == head[key] for key in ("evidence", "device", "torch", "files"))
        if found.get("cases") and not same:
            _aside(path, "of another machine, version or files")
        return cls(path, head, found.get("cases", {}) if same else {})

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
        kept = {"status": status, "seconds": round(seconds, 1)}
        kept |= {} if error is None else {"error": error}
        self.cases[case] = kept | {"figures": self.cases[case]["figures"]}
        self.write()
        why = "" if error is None else f": {error}"
        print(f"  {status} after {seconds:.0f} s{why}", flush=True)

    def write(self) -> None:
        harness.write_json(self.path, {**self.head, "cases": self.cases})

    def table(self) -> str:
        """Markdown, to be pasted into an issue."""
        machine = ", ".join(f"{key} {self.head[key]}" for key in ("device", "torch", "headstart"))
        lines = [
            f"### bench/gpu.py: {self.head['evidence']}",
            "",
            machine,
            "",
            "| case | what | ms (p20 to p80) | times the first | peak GB | else |",
            "|---|---|---|---|---|---|",
        ]
        for name, case in self.cases.items():
            status = case["status"] if "error" not in case else f"{case['status']}: {case['error']}"
            lines.append(f"| **{name}** | {case.get('seconds', 0):.0f} s | | | | {_cell(status)} |")
            lines += [_row(*figure) for figure in case["figures"].items()]
        return "\n".join(lines)

    @property
    def sound(self) -> bool:
        """Whether every case ended, and none of its variants failed."""
        values = [v for case in self.cases.values() for v in case["figures"].values()]
        failures = [value for value in values if isinstance(value, dict) and "failed" in value]
        return not failures and all(case["status"] == DONE for case in self.cases.values())


def _aside(path: Path, what: str) -> None:
    other = path.with_suffix(".other.json")
    os.replace(path, other)
    print(f"{path}: was {what}; it is {other.name}")


_SHOWN = ("ms", "p20", "p80", "times_first", "peak_bytes")


def _row(name: str, value: Any) -> str:
    if not isinstance(value, dict):
        return f"| | {_cell(name)} | | | | {_cell(short(value))} |"
    found: Mapping[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
    ms = f"{found['ms']:.3f} ({found['p20']:.3f} to {found['p80']:.3f})" if "ms" in found else ""
    times = f"{found['times_first']:.2f}" if "times_first" in found else ""
    peak = f"{found['peak_bytes'] / 1e9:.2f}" if found.get("peak_bytes") else ""
    rest = ", ".join(f"{k} {short(v)}" for k, v in found.items() if k not in _SHOWN)
    return f"| | {_cell(name)} | {ms} | {times} | {peak} | {_cell(rest)} |"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def short(value: Any) -> str:
    """A value in one line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        found: Mapping[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
        return ", ".join(f"{key} {short(one)}" for key, one in found.items())
    if isinstance(value, list):
        return "; ".join(_shorts(value))  # pyright: ignore[reportUnknownArgumentType]
    return str(value)


def _shorts(values: list[Any]) -> Iterator[str]:
    yield from (short(value) for value in values)
