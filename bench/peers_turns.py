"""Processes of `bench/peers.py` that are asked in turns, A B A B ..., each with a limit of time.

A process that fails, hangs or is killed by the system costs its own row and nothing else.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

WORKER = Path(__file__).with_name("peers_worker.py")
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
        self.name, self.limit_s, self._tail = request["row"], limit_s, b""
        reading, writing = os.pipe()
        threads = str(request["threads"])
        caches = Path(request["folder"]) / f"inductor-{self.name.replace(' ', '-')}"
        self._reading = reading
        errors = None if request.get("verbose") else subprocess.DEVNULL
        self._child = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(request), str(writing)],
            stdin=subprocess.PIPE, stdout=errors, stderr=errors,
            pass_fds=[writing], start_new_session=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
                 "TORCHINDUCTOR_CACHE_DIR": str(caches)},
        )  # fmt: skip
        os.close(writing)
        try:
            self.facts: dict[str, Any] = self._answer("ready")
        except BaseException:
            self.end()
            raise

    def ask(self, line: str, expected: str) -> Any:
        try:
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(FAILED, self._ended()) from error
        return self._answer(expected)

    def anonymous_bytes(self) -> int:
        """What it holds now; 0 of a process that has ended."""
        try:
            return harness.resident_bytes(self._child.pid).get("anonymous", 0)
        except OSError:
            return 0

    def _answer(self, expected: str) -> Any:
        answer, value = json.loads(self._line())
        if answer != expected:
            raise WorkerError(MISSING if answer == "missing" else FAILED, str(value))
        return value

    def _line(self) -> bytes:
        until = time.monotonic() + self.limit_s
        while b"\n" not in self._tail:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._reading], [], [], left)[0]:
                raise WorkerError(LATE, f"no answer in {self.limit_s:g} s")
            read = os.read(self._reading, 65536)
            if not read:
                raise WorkerError(FAILED, self._ended())
            self._tail += read
        line, _, self._tail = self._tail.partition(b"\n")
        return line

    def _ended(self) -> str:
        code = self._child.wait()
        killed = " (the system may have been out of memory)" if code == -signal.SIGKILL else ""
        return f"its process ended with {code}{killed}"

    def end(self) -> None:
        """It, and the compilers that it may have started."""
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        if self._child.stdin is not None:
            self._child.stdin.close()
        if self._reading >= 0:
            os.close(self._reading)
            self._reading = -1


def in_turns(
    workers: Sequence[Worker],
    variants: Sequence[str],
    rounds: int,
    on_failure: Callable[[str, WorkerError], None],
    rest_s: float = 0,
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Row -> variant -> what each round took. A row that fails is ended, and has no times."""
    taken = {own.name: {name: list[dict[str, float]]() for name in variants} for own in workers}
    left = list(workers)
    for _ in range(rounds):
        for variant in variants:
            for own in tuple(left):
                time.sleep(rest_s)
                try:
                    taken[own.name][variant].append(own.ask(f"go {variant}", "turn"))
                except WorkerError as error:
                    on_failure(own.name, error)
                    left.remove(own)
                    del taken[own.name]
                    own.end()
    return taken
