"""A program that the tests of forks run: forks at chosen moments, and says how each child ended.

    python tests/forks.py warm    after the bundled pair has sampled here with two threads
    python tests/forks.py cold    before anything was computed here
    python tests/forks.py alone   after it has sampled with one thread

It prints one JSON object: name -> "done", an error, or "hangs".
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader

import headstart as hs
from headstart.metrics.features import open_features

PATIENCE_S = 120  # a child that hangs is ended by its alarm


def outcome(work: Callable[[], object]) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE_S)
        try:
            work()
            outcome = "done"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        os.write(write, outcome.encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        outcome = pipe.read().decode()
    os.waitpid(child, 0)
    return outcome or "hangs"


def in_a_thread(work: Callable[[], object]) -> None:
    replies: list[object] = []
    thread = threading.Thread(target=lambda: replies.append(work()))
    thread.start()
    thread.join()
    assert replies, "the thread raised"


def images(engine: hs.Engine) -> torch.Tensor:
    return engine.sample("a fox", seeds=range(4)).rgb


def with_one_thread(engine: hs.Engine) -> None:
    torch.set_num_threads(1)
    images(engine)


def serve(engine: hs.Engine, run: hs.Run) -> None:
    batch = hs.Batch(engine.denoisers)
    batch.add(run)
    for _, _, error in batch.step():
        if error is not None:
            raise error


def warm() -> dict[str, str]:
    engine = hs.Engine.demo(device="cpu")
    images(engine)
    run, states = engine.begin("a fox"), engine.iterate("a fox")
    next(states)
    judge, rgb = open_features("scorer"), np.zeros((8, 64, 64, 3), np.uint8)
    latents = torch.zeros(1, 4, 16, 16)
    loader = DataLoader(range(2), num_workers=1, multiprocessing_context="fork", timeout=PATIENCE_S,
                        collate_fn=lambda _: images(engine).shape)  # fmt: skip
    with multiprocessing.get_context("fork").Pool(2) as pool:
        squares = pool.starmap(pow, [(3, 2), (4, 2)])
    return {
        "sample": outcome(lambda: images(engine)),
        "begin": outcome(lambda: engine.begin("a fox")),
        "go on iterating": outcome(lambda: next(states)),
        "go on with a run": outcome(lambda: run.call),
        "serve a batch": outcome(lambda: serve(engine, run)),
        "load": outcome(lambda: hs.Engine.demo(device="cpu")),
        "read a prompt": outcome(lambda: engine.text.encode(["a fox"])),
        "draw a preview": outcome(lambda: hs.decoder(engine, "tiny")(latents)),
        "judge": outcome(lambda: judge.extractor.features(rgb)),
        "one thread": outcome(lambda: with_one_thread(engine)),
        "a new thread": outcome(lambda: in_a_thread(lambda: images(engine))),
        "a plan": outcome(lambda: engine.compile("hybrid")),
        "a pool without us": "done" if squares == [9, 16] else str(squares),
        "a loader's worker": "done" if len(list(loader)) == 2 else "nothing",
        "this process": "done" if len(images(engine)) == 4 else "nothing",
    }


def cold() -> dict[str, str]:
    return {"sample": outcome(lambda: images(hs.Engine.demo(device="cpu")))}


def alone() -> dict[str, str]:
    torch.set_num_threads(1)
    engine = hs.Engine.demo(device="cpu")
    images(engine)
    return {"sample": outcome(lambda: images(engine))}


if __name__ == "__main__":
    print(json.dumps({"warm": warm, "cold": cold, "alone": alone}[sys.argv[1]]()))
