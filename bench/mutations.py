"""Mistakes made one at a time in a copy of the sources; each must turn one of its tests red.

A row names a file, a text that is in it once, what becomes of it, and the tests that should notice.
The report is written after every row, and a row whose sources are as they were is not run again, so
a run may be ended at any moment. The checkout itself is never changed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
from harness import ROOT

_COPIED = ("src", "kernels", "weights", "tests", "bench", "pyproject.toml", "CONTRIBUTING.md")


class Mutation(NamedTuple):
    """A mistake: `old` becomes `new` in `file`, and one of `tests` must fail.

    equivalent  why no test can notice it, where that is so; then it must survive
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def source(self, root: Path) -> tuple[str, str]:
        """The file, and the file with the mistake. Raises SystemExit where the row is stale."""
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise SystemExit(
                f"{self.name}: expected its text once in {self.file}, found it "
                f"{text.count(self.old)} times: rewrite the row"
            )
        return text, text.replace(self.old, self.new)

    def fingerprint(self, root: Path) -> str:
        """Of the mistake and of the tests that should notice it."""
        files = sorted({test.partition("::")[0] for test in self.tests})
        parts = [self.source(root)[1], *self.tests, *((root / f).read_text() for f in files)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def main(question: str, mutations: Sequence[Mutation], out: str) -> int:
    """Run what is not known yet and write the report; 0 where every mistake was noticed."""
    parser = harness.options("Make mistakes; the tests must notice each.", out)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no row after this long")
    options = parser.parse_args()
    rows = harness.read_json(options.out).get("rows", [])
    known = {row["mutation"]: row for row in rows}
    pending = [m for m in mutations if known.get(m.name, {}).get("key") != m.fingerprint(ROOT)]
    until = time.monotonic() + options.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in _COPIED:
            copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copied(ROOT / name, copy / name)
        clean = _run(copy, dict.fromkeys(t for m in pending for t in m.tests)) if pending else 0
        if clean:
            raise SystemExit(f"the tests fail without a mistake (pytest {clean}); nothing tried")
        for mutation in pending:
            if time.monotonic() > until:
                break
            known[mutation.name] = try_out(copy, mutation)
            print(f"{mutation.name}: {known[mutation.name]['killed']}", flush=True)
            harness.write_json(options.out, _report(question, mutations, known))
    report = _report(question, mutations, known)
    harness.write_json(options.out, report)
    print(f"{report['killed']} of {report['of']} killed")
    for group in ("survivors", "equivalent", "not_tried"):
        print(f"{group}: {report[group]}")
    return 1 if report["survivors"] or report["not_tried"] else 0


def try_out(copy: Path, mutation: Mutation) -> dict[str, Any]:
    """Make the mistake, run its tests, and undo it."""
    key, path = mutation.fingerprint(copy), copy / mutation.file
    source, wrong = mutation.source(copy)
    path.write_text(wrong)
    try:
        status = _run(copy, mutation.tests)
    finally:
        path.write_text(source)
    if status > 1:  # below 0 it was ended by a signal: a wrong address in C
        raise SystemExit(f"{mutation.name}: {mutation.tests} did not run (pytest {status})")
    row: dict[str, Any] = {
        "mutation": mutation.name,
        "file": mutation.file,
        "tests": mutation.tests,
        "killed": status != 0,
        "key": key,
    }
    return row | ({"equivalent": mutation.equivalent} if mutation.equivalent else {})


def _report(question: str, mutations: Sequence[Mutation], known: dict[str, Any]) -> dict[str, Any]:
    tried = [m for m in mutations if m.name in known]
    alive = [m for m in tried if not known[m.name]["killed"]]
    return {
        "question": question,
        "evidence": "measured on a CPU: kernels emulated, torch.cuda emulated",
        "machine": harness.machine(),
        "killed": len(tried) - len(alive),
        "of": len(mutations),
        "survivors": [m.name for m in alive if not m.equivalent],
        "equivalent": [m.name for m in alive if m.equivalent],
        "not_tried": [m.name for m in mutations if m.name not in known],
        "rows": [known[m.name] for m in tried],
    }


def _run(copy: Path, tests: Iterable[str]) -> int:
    """pytest's exit status."""
    environment = harness.environment(copy) | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False)
    return done.returncode


def tests(file: str, *names: str) -> tuple[str, ...]:
    """Functions of one file, as pytest names them."""
    return tuple(f"tests/{file}::test_{name}" for name in names)
