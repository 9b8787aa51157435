"""How far a command is: a bar on a terminal, now and then a line in a file or a pipe."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from headstart.commands.console import tell

if TYPE_CHECKING:
    from tqdm import tqdm

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
    done = threading.Event()
    thread = threading.Thread(target=_tick, args=(bar, terminal, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tick(bar: tqdm[Any], terminal: bool, done: threading.Event) -> None:
    wait = BAR_AFTER_S if terminal else LINE_AFTER_S
    while not done.wait(wait):
        if terminal:
            bar.refresh()
        else:
            tell(f"headstart: {bar}")
            wait = min(2 * wait, LINES_APART_S)


class RowBar(NamedTuple):
    """What a run tells of its rows, where nothing but their number is shown."""

    bar: tqdm[Any]

    def __call__(self, state: object) -> None:
        self.rows(1)

    def rows(self, count: int) -> None:
        """Those of one launch, after it. Behind the last row an image is decoded."""
        self.bar.update(count)
        if self.bar.total is not None and self.bar.n >= self.bar.total:
            self.bar.set_description("decoding")
