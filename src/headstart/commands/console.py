"""What a person at a terminal sees besides the results: progress, warnings, errors, on stderr.

Messages of the library name options as they are typed: `preset='turbo'` is `--preset turbo`.
"""

from __future__ import annotations

import codecs
import gc
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, final

if TYPE_CHECKING:
    from tqdm import tqdm

MOST_LINES, MOST_LETTERS = 10, 1200
"""Of an error: its lines, and of a line its letters. --debug has the rest."""


@final
class Terminated(KeyboardInterrupt):
    """SIGTERM, as `kill`, a container or a cluster ends a command."""


@contextmanager
def ended_by_sigterm() -> Generator[None]:
    """SIGTERM raises Terminated here, as Ctrl-C raises KeyboardInterrupt; a second ends at once.

    Only where the signal has no other handler, and in the main thread, as Python demands.
    """
    has_handler = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    if has_handler or threading.current_thread() is not threading.main_thread():
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

    Python's cycle collector goes through all objects of torch and the networks while they are
    loaded, later, and at the end: 0.5 of the 1.6 s of CPU that `import torch` takes (one Zen 4
    core). They stay to the end, so here it skips them.
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

    A closed stderr is opened again, to nowhere: else the next file would get its number, and with
    it the messages of libraries.
    """
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    codecs.register_error("headstart", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="headstart")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    escaped = (_PLAIN.get(sign) or ascii(sign)[1:-1] for sign in signs)
    return "".join(escaped), error.end


_SAME_NAME = (
    *("preset", "steps", "handoff", "base_guidance", "distilled_guidance", "timesteps", "sigmas"),
    *("update", "embedded_guidance", "ema", "dtype", "vae_dtype", "memory", "packed", "runner"),
    *("seeds", "negative", "head_dim", "text_head_dim", "batch", "size", "clip_skip", "literal"),
    *("prediction", "original_size", "target_size", "crop", "plan", "exclamation", "prompt_style"),
    *("base", "distilled", "distilled_lora", "vae", "text", "tokenizer", "preview", "device"),
)
_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in _SAME_NAME} | {
    "k": "--base-steps",
    "n": "--base-grid",
    "mode": "--plan",
    "style": "--prompt-style",
    "second": "--second-prompt",
    "negative_second": "--second-negative",
}
"""A keyword of `Engine.load`, `Engine.sample` or `preset`, and the option that sets it."""
_ROLES = ("base", "distilled")
_KEYWORD = re.compile(
    rf"(?<![\w./=,-])(?P<name>{'|'.join(sorted(_OPTIONS, key=len, reverse=True))})="
    r"(?:'(?P<quoted>[^']*)'|\"(?P<double>[^\"]*)\"|(?P<bare>[\w.+-]*[\w]))?"
)
_PYTHON = "Leg("
"""In a line with a whole plan, which no option is."""
_REPEATED = re.compile(r"(--[\w-]+)(?: \(\1\)| or \1| \1)(?![\w-])")
_SEPARATOR = re.compile(r"(--[\w-]+ [\w.-]+), (?=--)")


def in_options(message: str) -> str:
    """The message, its keyword arguments spelled as options."""
    lines = message.split("\n")
    return "\n".join(line if _PYTHON in line else _in_options(line) for line in lines)


def _in_options(line: str) -> str:
    return _SEPARATOR.sub(r"\1 ", _REPEATED.sub(r"\1", _KEYWORD.sub(_option, line)))


def _option(match: re.Match[str]) -> str:
    name, option = match["name"], _OPTIONS[match["name"]]
    value = match["quoted"] or match["double"] or match["bare"] or ""
    if name in _ROLES and value:  # `base=cuda:0,distilled=cpu` is typed so
        return match[0]
    if value in ("True", "False"):
        return option if value == "True" else option.replace("--", "--no-", 1)
    return f"{option} {value}".rstrip()


_PRINTED: ContextVar[set[str] | None] = ContextVar("headstart_printed", default=None)


@contextmanager
def plain_warnings() -> Generator[None]:
    """Warnings as one line without a source line, and each line once in a command: its files are
    described before they are loaded and again when they are."""

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
    """Drop what cannot be written to stdout or stderr at the end: the interpreter would try again
    at its exit, and exit 120."""
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
    lines = [_shortened(line) for line in in_options(message).splitlines()] or [""]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES - 1 :] = [f"... {len(lines) - MOST_LINES + 1} lines more (--debug)"]
    tell("headstart: error: " + "\n".join(lines))
    return status


def _shortened(line: str) -> str:
    half = MOST_LETTERS // 2
    return line if len(line) <= MOST_LETTERS else f"{line[:half]} [...] {line[-half:]}"


BAR_AFTER_S = 1.0
"""A progress bar appears on a terminal once a command has run this long."""
LINE_AFTER_S, LINES_APART_S = 30.0, 600.0
"""Without a terminal: the first line; then in twice the time, at most so many seconds apart."""


@contextmanager
def progress(total: int | None, what: str, unit: str = "it") -> Generator[tqdm[Any]]:
    """A bar of `total` units, or without a total the time that passes."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    counted = "{desc}" if total is None else "{desc} {n_fmt} of {total_fmt}"
    with (
        tqdm(
            total=total,
            desc=what,
            delay=BAR_AFTER_S,
            file=sys.stderr if terminal else io.StringIO(),
            leave=False,
            bar_format=None if terminal and total is not None else f"{counted}, {{elapsed}}",
            unit=unit,
            unit_scale=unit == "B",
        ) as bar,
        _ticking(bar, terminal),
    ):
        yield bar


@contextmanager
def _ticking(bar: tqdm[Any], terminal: bool) -> Generator[None]:
    """Show the bar although nothing moves it: a long step, or weights that load."""
    stop = threading.Event()
    thread = threading.Thread(target=_tick, args=(bar, terminal, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _tick(bar: tqdm[Any], terminal: bool, stop: threading.Event) -> None:
    wait = BAR_AFTER_S if terminal else LINE_AFTER_S
    while not stop.wait(wait):
        if terminal:
            bar.refresh()
        else:
            tell(f"headstart: {bar}")
            wait = min(2 * wait, LINES_APART_S)


class RowBar(NamedTuple):
    """An `on_step` that counts the rows of a run on a bar."""

    bar: tqdm[Any]

    def __call__(self, state: object) -> None:
        self.rows(1)

    def rows(self, count: int) -> None:
        """Those of one launch, after it. After the last row an image is decoded."""
        self.bar.update(count)
        if self.bar.total is not None and self.bar.n >= self.bar.total:
            self.bar.set_description("decoding")
