"""Whether this thread can compute after a fork: torch's helper threads do not come along.

OpenMP on Linux (libgomp) keeps what it knows of a thread's helpers in that thread's memory. A fork
copies the memory and not the helpers, so the child would wait for them for ever. It can compute all
the same with one thread, in a thread of its own, or where the parent's thread had no helpers yet.
"""

from __future__ import annotations

import os
import sys
import threading

import torch

from headstart.errors import InputError

_here = threading.local()
"""`process`: where this thread first computed with helpers."""
forked = False
"""Whether this process was forked by a thread that had helpers: only then is a look needed."""


def check_threads() -> None:
    """Called before networks are loaded or run. Raises InputError where that would never end."""
    if (threads := torch.get_num_threads()) > 1:
        own = os.getpid()
        if getattr(_here, "process", own) != own and sys.platform == "linux":
            raise InputError(
                "this process was forked from one that had computed with torch's threads, which a "
                f"fork does not copy: computing with {threads} threads here would wait for ever. "
                'Start it with multiprocessing.get_context("spawn"), or call '
                "torch.set_num_threads(1) in it first"
            )
        _here.process = own


def _after_fork() -> None:
    global forked
    forked = hasattr(_here, "process")


os.register_at_fork(after_in_child=_after_fork)
