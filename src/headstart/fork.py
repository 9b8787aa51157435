"""The check that this thread can compute after a fork, which does not copy torch's worker threads.

OpenMP on Linux (libgomp) stores its list of a thread's workers in that thread's memory. A fork
copies the memory but not the workers, so the child would wait for them for ever. The child can
still compute with one thread, in a new thread, or if the parent's thread had no workers yet.
"""

from __future__ import annotations

import os
import sys
import threading

import torch

from headstart.errors import InputError

_thread = threading.local()
"""`process`: the id of the process in which this thread first computed with workers."""
forked = False
"""Whether this process was forked by a thread with workers: only then is a check needed."""


def check_threads() -> None:
    """Raise InputError if computing would never end. Called before networks are loaded or run."""
    if (threads := torch.get_num_threads()) > 1:
        process = os.getpid()
        if getattr(_thread, "process", process) != process and sys.platform == "linux":
            raise InputError(
                "this process was forked from one that had computed with torch's threads, which a "
                f"fork does not copy: computing with {threads} threads here would wait for ever. "
                'Start it with multiprocessing.get_context("spawn"), or call '
                "torch.set_num_threads(1) in it first"
            )
        _thread.process = process


def _after_fork() -> None:
    global forked
    forked = hasattr(_thread, "process")


os.register_at_fork(after_in_child=_after_fork)
