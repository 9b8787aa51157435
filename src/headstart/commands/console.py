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
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from io import TextIOWrapper
from typing import NoReturn, final

from headstart.commands.option_names import in_options

MOST_LINES, MOST_LETTERS = 10, 1200
"""Of an error: its lines, and of a line its letters. --debug has the rest."""


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


_PLAIN = {"·": "-", "…": "...", "→": "->", "“": '"', "”": '"', "×": "x"}


def any_encoding() -> None:
    """Let stdout and stderr write what their encoding lacks in signs that every one has.

    A stderr that was closed is open again, to nowhere: else a file would get its number, and what
    libraries say there.
    """
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
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


_PRINTED: ContextVar[set[str] | None] = ContextVar("headstart_printed", default=None)


@contextmanager
def plain_warnings() -> Generator[None]:
    """Warnings as one line without a source line; each line of a command once: what its files are
    is said before they are loaded, and known again when they are."""

    def show(message: Warning | str, *_: object) -> None:
        warning(str(message))

    token = _PRINTED.set(set())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = show
            yield
    finally:
        _PRINTED.reset(token)


def note(message: str) -> None:
    """Print what was decided for the user, who can decide otherwise."""
    _once("note", message)


def warning(message: str) -> None:
    """Print what may not be what the user wants."""
    _once("warning", message)


def _once(what: str, message: str) -> None:
    printed = _PRINTED.get()
    if printed is not None:
        if message in printed:
            return
        printed.add(message)
    tell(f"headstart: {what}: {in_options(message)}")


def tell(line: str) -> None:
    """Print it on stderr; where that is full, the results go on without it."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def dropping_output() -> Generator[None]:
    """After it nothing is held that cannot be written to stdout or stderr: the interpreter would
    try again at its exit, and exit 120."""
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(message: str, status: int = 2) -> int:
    """Print an error, at most MOST_LINES of it; the exit status it means."""
    lines = [_cut(line) for line in in_options(message).splitlines()] or [""]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES - 1 :] = [f"... {len(lines) - MOST_LINES + 1} lines more (--debug)"]
    tell("headstart: error: " + "\n".join(lines))
    return status


def _cut(line: str) -> str:
    half = MOST_LETTERS // 2
    return line if len(line) <= MOST_LETTERS else f"{line[:half]} [...] {line[-half:]}"
