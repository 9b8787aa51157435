"""When Python's cycle collector runs during a command."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from headstart.commands.console import loading

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
