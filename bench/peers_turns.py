"""Processes of `bench/peers.py` that are asked in turns, A B A B ..., each with a limit of time.

A process that fails, hangs or is killed by the system costs its own row and nothing else.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import harness

WORKER = "peers_worker"
DONE, FAILED, LATE, MISSING = "done", "failed", "out of time", "missing"
REST_S = 0.2
"""Between turns with more than one thread: idle threads of OpenMP spin for that long."""


class WorkerError(Exception):
    """status: FAILED, LATE or MISSING; the message is why, in one line."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


class Worker:
    """One process; `facts` came with its answer that it is ready."""

    def __init__(self, request: Mapping[str, Any], limit_s: float) -> None:
        """Raises WorkerError for one that did not become ready."""
        self.name, self.limit_s = request["row"], limit_s
        threads = str(request["threads"])
        caches = Path(request["folder"]) / f"inductor-{self.name.replace(' ', '-')}"
        variables = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TORCHINDUCTOR_CACHE_DIR": str(caches),
        }
        spawn = get_context("spawn")
        self._pipe, far_end = spawn.Pipe()
        self._child = spawn.Process(target=_serve, args=(WORKER, request, far_end))
        with mock.patch.dict(os.environ, variables):
            self._child.start()
        far_end.close()
        try:
            self.facts: dict[str, Any] = self._answer("ready")
        except BaseException:
            self.end()
            raise

    def ask(self, line: str, expected: str) -> Any:
        with suppress(BrokenPipeError):  # of one that has ended, which _answer tells
            self._pipe.send(line)
        return self._answer(expected)

    def anonymous_bytes(self) -> int:
        """What it holds now; 0 of a process that has ended."""
        try:
            return harness.resident_bytes(self._child.ident or 0).get("anonymous", 0)
        except OSError:
            return 0

    def _answer(self, expected: str) -> Any:
        try:
            if not self._pipe.poll(self.limit_s):
                raise WorkerError(LATE, f"no answer in {self.limit_s:g} s")
            answer, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._child.join()
            code = self._child.exitcode
            killed = " (the system may have been out of memory)" if code == -signal.SIGKILL else ""
            raise WorkerError(FAILED, f"its process ended with {code}{killed}") from None
        if answer != expected:
            raise WorkerError(MISSING if answer == "missing" else FAILED, str(value))
        return value

    def end(self) -> None:
        """It, and the compilers that it may have started."""
        if self._child.is_alive():
            with suppress(ProcessLookupError):  # it has no group yet
                os.killpg(self._child.ident or 0, signal.SIGKILL)
            self._child.kill()
        self._child.join()
        self._pipe.close()


def _serve(module: str, request: Mapping[str, Any], pipe: Connection) -> None:
    """In the child: a process group of its own, which prints where that is wanted."""
    os.setsid()
    if not request.get("verbose"):
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
    sys.exit(import_module(module).main(request, pipe))


def in_turns(
    workers: Sequence[Worker],
    variants: Sequence[str],
    rounds: int,
    on_failure: Callable[[str, WorkerError], None],
    rest_s: float = 0,
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Row -> variant -> what each round took. A row that fails is ended, and has no times."""
    taken = {w.name: {name: list[dict[str, float]]() for name in variants} for w in workers}
    for _, variant, worker in product(range(rounds), variants, workers):
        if worker.name not in taken:
            continue
        time.sleep(rest_s)
        try:
            taken[worker.name][variant].append(worker.ask(f"go {variant}", "turn"))
        except WorkerError as error:
            on_failure(worker.name, error)
            del taken[worker.name]
            worker.end()
    return taken
