"""The library of C kernels: compiled once, proven, kept where nobody else writes, or absent."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from fresh import python

from headstart_kernels.native import library, proof

pytestmark = pytest.mark.skipif(
    library.why_not() is not None, reason=f"no C kernels here: {library.why_not()}"
)


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    """What `impl=None` means is no question here."""


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """A machine that has not compiled anything yet; the folder where it will be kept. -O1 compiles
    in a third of the time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", tuple("-O1" if f == "-O3" else f for f in library.FLAGS))
    library._outcome.cache_clear()
    yield tmp_path / "headstart"
    library._outcome.cache_clear()


def test_it_is_compiled_once_and_kept(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert library.why_not() is None
    (kept,) = fresh.iterdir()
    assert kept.name.startswith("kernels-") and fresh.stat().st_mode & 0o777 == 0o700
    assert f"compiled {kept}" in caplog.text
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    library._outcome.cache_clear()
    assert library.why_not() is None


def test_a_damaged_one_is_made_anew(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    key = library._fingerprint(library._texts(), library._compiler())
    damaged = library._folder() / f"kernels-{key}.so"
    damaged.write_bytes(b"\x7fELF and no more")
    assert library.why_not() is None and damaged.stat().st_size > 10_000
    assert "compiled again, because it is damaged" in caplog.text


def test_old_ones_are_forgotten_and_so_is_what_was_left_half_made(fresh: Path) -> None:
    folder = library._folder()
    for age in range(1, 21):
        path = folder / (f"kernels-{age:02}.so" if age < 20 else "making-old")
        path.mkdir() if age == 20 else path.touch()
        os.utime(path, (when := time.time() - 3600 * age, when))
    (folder / "making-now").mkdir()
    (folder / "notes.txt").touch()
    assert library.why_not() is None
    left = {path.name for path in folder.iterdir()}
    numbered = {f"kernels-{age:02}.so" for age in range(1, 16)}
    assert left - numbered - {"making-now", "notes.txt"} == {
        f"kernels-{library._fingerprint(library._texts(), library._compiler())}.so"
    }
    assert numbered <= left


def test_other_sources_or_flags_have_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, compiler = library._texts(), library._compiler()
    names = [library._fingerprint(sources, compiler)]
    names.append(library._fingerprint(sources | {"kernels.c": "int x;"}, compiler))
    names.append(library._fingerprint(sources, [*compiler, "-m64"]))
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g"))
    names.append(library._fingerprint(sources, compiler))
    assert len(set(names)) == 4


@pytest.mark.parametrize(
    ("changed", "wrong"), [("MINUS_2_LN_2", "-0x1.62e432p+0f"), ("WEYL_1", "0xbb67ae84u")]
)
def test_a_library_whose_bits_differ_is_refused(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, changed: str, wrong: str
) -> None:
    right = library.constants()
    line = next(line for line in right.splitlines() if line.startswith(f"#define {changed} "))
    other = right.replace(line, f"#define {changed} {wrong}")
    monkeypatch.setattr(library, "constants", lambda: other)
    assert "bits differ: philox_normal" in (library.why_not() or "")
    assert not list(fresh.iterdir())


def test_a_compiler_that_contracts_is_refused(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {"-ffp-contract=off": "-ffp-contract=fast", "-O1": "-O3"}
    flags = tuple(changed.get(flag, flag) for flag in library.FLAGS)
    monkeypatch.setattr(library, "FLAGS", flags)
    reason = library.why_not()
    fma = any(word in library._processor() for word in (" fma ", "asimd"))
    assert not fma or "fused_step" in (reason or "")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HEADSTART_NATIVE": "0"}, "HEADSTART_NATIVE=0 is set"),
        ({"CC": "no-such-compiler -m64"}, "there is no C compiler 'no-such-compiler' on the path"),
        ({"CC": "false"}, f"{shutil.which('false')} failed (1): "),
    ],
)
def test_without_one_the_reference_runs_and_says_why(
    fresh: Path, environment: dict[str, str], reason: str
) -> None:
    script = """
import logging, torch, headstart_kernels as hk
logging.basicConfig(level=logging.INFO)
x = torch.ones(1, 4, 2, 2)
hk.fused_step(x, x, torch.tensor([[1.0, 1, 1, 0, 0, 0, 1, 0]]), 0)
try:
    hk.decode_u8(x[:, :3], impl="native")
except ValueError as error:
    print(error)
"""
    done = python("-c", script, **environment)
    assert done.returncode == 0, done.stderr
    assert f"impl: 'native' is not available: {reason}" in done.stdout
    assert f"run in torch and numpy, not in C: {reason}" in done.stderr


def test_nothing_is_loaded_from_a_folder_that_others_may_write_to(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh.mkdir(mode=0o777)
    fresh.chmod(0o777)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(library.tempfile, "gettempdir", lambda: str(elsewhere))
    assert library.why_not() is None
    assert not list(fresh.iterdir())
    (own,) = elsewhere.iterdir()
    assert own.name == f"headstart-{os.getuid()}" and len(list(own.glob("kernels-*.so"))) == 1
    own.chmod(0o777)
    library._outcome.cache_clear()
    reason = library.why_not() or ""
    assert "nowhere to keep it" in reason and reason.count("others may write to it") == 2


def test_the_proof_looks_at_every_loop_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that does nothing at all is found out in every one."""
    right = library.calls()
    monkeypatch.setattr(proof, "bound", lambda made: right._replace(step=lambda packed: None))
    names = [f"fused_step ({case.name})" for case in proof.CASES]
    assert proof.differences(library.library()) == names
    assert {case.dtype for case in proof.CASES} == {torch.float32, torch.float16, torch.bfloat16}


def test_the_proof_looks_at_every_size_of_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    right = library.calls()
    monkeypatch.setattr(proof, "bound", lambda made: right._replace(winograd=lambda packed: None))
    names = [f"winograd_conv {shape}" for shape in proof.CONVOLUTIONS]
    assert proof.differences(library.library()) == names


def test_a_compiler_that_knows_the_processor_compiles_for_it(tmp_path: Path) -> None:
    """Else the next target is taken, whose products are several times slower, without an error."""
    command, (target, *_) = library._compiler(), library._TARGETS[0]
    (tmp_path / "nothing.c").write_text("int nothing;\n", "utf-8")
    for name, text in library._texts().items():
        (tmp_path / name).write_text(text, "utf-8")

    def check(file: str) -> subprocess.CompletedProcess[str]:
        compile_it = [*command, *library.FLAGS, target, "-fsyntax-only", str(tmp_path / file)]
        return subprocess.run(compile_it, capture_output=True, text=True, check=False, timeout=120)

    if check("nothing.c").returncode:
        pytest.skip(f"{command[0]} does not know {target}")
    done = check("kernels.c")
    assert done.returncode == 0, done.stderr
