"""When Python's cycle collector runs during a command."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import warnings

import pytest

from headstart.commands.console import (
    MOST_LINES,
    RowBar,
    fail,
    loading,
    note,
    plain_warnings,
    progress,
    warning,
)

ALONE = """
import gc
import os
from headstart.commands.console import alone, loading
with alone():
    with loading():
        assert not gc.isenabled() and not gc.get_freeze_count()
    assert gc.isenabled() and gc.get_freeze_count()
    gc.unfreeze()
assert gc.isenabled() and gc.get_freeze_count()
gc.unfreeze()
with loading():
    pass
assert not gc.get_freeze_count()
"""


def test_a_process_of_its_own_never_looks_at_what_it_loaded() -> None:
    """In a process, because what is frozen here would stay to the end of all tests."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("running", [True, False])
def test_a_command_in_a_host_s_process_leaves_the_collector_as_it_was(running: bool) -> None:
    was, frozen = gc.isenabled(), gc.get_freeze_count()
    (gc.enable if running else gc.disable)()
    try:
        with pytest.raises(ValueError, match="loading"), loading():
            assert not gc.isenabled()
            raise ValueError("loading")
        assert gc.isenabled() == running
        assert gc.get_freeze_count() == frozen
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_of_any_encoding_is_no_traceback(encoding: str) -> None:
    program = "from headstart.commands.console import any_encoding as own; own(); print('· → 狐')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    dot = "·" if encoding == "latin-1" else "-"
    assert done.stdout.decode(encoding) == f"{dot} -> \\u72d0\n"


def test_an_error_has_at_most_ten_lines_and_the_words_of_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fail("give preset='turbo'\n" + "a line\n" * 50 + "x" * 30_000) == 2
    output = capsys.readouterr().err
    assert output.startswith("headstart: error: give --preset turbo\n")
    assert len(output.splitlines()) == MOST_LINES and "43 lines more (--debug)" in output
    assert fail("x" * 30_000) == 2
    assert len(capsys.readouterr().err) < 2000


def test_a_line_of_a_command_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    with plain_warnings():
        for _ in range(2):
            warning("odd")
            note("odd")
            warnings.warn("odd", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "headstart: warning: odd\n"


def test_without_a_terminal_a_long_stage_prints_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("headstart.commands.console.LINE_AFTER_S", 0.05)
    with progress(None, "loading weights"), progress(3, "sampling") as bar:
        RowBar(bar).rows(2)
        time.sleep(0.5)
        RowBar(bar)(None)
        assert bar.desc == "decoding: "
    output = capsys.readouterr().err
    assert "headstart: loading weights, 00:00\n" in output
    assert "headstart: sampling 2 of 3, 00:00\n" in output
    assert output.count("\n") < 12


def test_a_stage_that_is_short_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(None, "loading weights"):
        pass
    assert capsys.readouterr().err == ""
