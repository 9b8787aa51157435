"""What a person at a terminal sees besides the results: progress, warnings, errors, on stderr."""

from __future__ import annotations

import codecs
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from io import TextIOWrapper
from typing import TYPE_CHECKING, NamedTuple, NoReturn, final

if TYPE_CHECKING:
    from tqdm import tqdm

BAR_AFTER_S = 1.0
"""A progress bar appears on a terminal once a command has run this long."""


@final
class Terminated(KeyboardInterrupt):
    """SIGTERM, as `kill`, a container or a cluster ends a command."""


@contextmanager
def ended_by_sigterm() -> Generator[None]:
    """SIGTERM raises Terminated here, as Ctrl-C raises KeyboardInterrupt; a second ends at once.

    Only where nobody has decided otherwise, and in the main thread, as Python wants it.
    """
    taken = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    if taken or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


_ALONE: ContextVar[bool] = ContextVar("headstart_alone", default=False)


@contextmanager
def alone() -> Generator[None]:
    """Inside, a command is all that this process does; then it ends.

    Python's cycle collector walks through all that torch and the networks are when it is imported,
    afterwards and once more at the end: 0.5 of the 1.6 s of CPU that `import torch` takes (one
    Zen 4 core). What was loaded stays to the end, so here it looks at it never.
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)
        gc.freeze()


@contextmanager
def loading() -> Generator[None]:
    """Inside, modules are imported and networks made, which stay: no cycle collector runs."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _ALONE.get():
            gc.freeze()
        if running:
            gc.enable()


@contextmanager
def progress(total: int | None, what: str, unit: str = "it") -> Generator[tqdm[NoReturn]]:
    from tqdm import tqdm

    form = "{desc} {elapsed}" if total is None else None
    with tqdm(
        total=total,
        desc=what,
        delay=BAR_AFTER_S,
        disable=None,
        leave=False,
        bar_format=form,
        unit=unit,
        unit_scale=unit == "B",
    ) as bar:
        yield bar


class RowBar(NamedTuple):
    """What a run tells of its rows, where nothing but their number is shown."""

    bar: tqdm[NoReturn]

    def __call__(self, state: object) -> None:
        self.bar.update()

    def rows(self, count: int) -> None:
        """Those of one launch, after it."""
        self.bar.update(count)


_PLAIN = {"·": "-", "…": "...", "→": "->", "“": '"', "”": '"', "×": "x"}


def any_encoding() -> None:
    """Let stdout and stderr write what their encoding lacks in signs that every one has."""
    codecs.register_error("headstart", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="headstart")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    escaped = (_PLAIN.get(sign) or ascii(sign)[1:-1] for sign in signs)
    return "".join(escaped), error.end


@contextmanager
def plain_warnings() -> Generator[None]:
    """Warnings as one line without a source line, each once: a command checks what it then runs."""
    said = set[str]()

    def warn(message: Warning | str, *_: object) -> None:
        if (text := str(message)) not in said:
            said.add(text)
            print(f"headstart: warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = warn
        yield


def note(message: str) -> None:
    """Print what was decided for the user, who can decide otherwise."""
    print(f"headstart: note: {message}", file=sys.stderr)


def drop_output() -> None:
    """What stdout still holds cannot be written; without this the interpreter tries at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, status: int = 2) -> int:
    """Print an error; the exit status it means."""
    print(f"headstart: error: {message}", file=sys.stderr)
    return status
