"""What do shared network calls give a server? Requests that arrive at random, served three ways.

    python bench/batch.py [--loads 0.3 0.6 0.8 0.95] [--requests 200] [--threads 1]
                          [--out bench/results/batch.json]

The bundled pair; two thirds of the requests are hybrids, one third distilled runs, each of one
image with a prompt and seed of its own. They arrive as a Poisson process (exponential gaps,
seeded); load 1 is what one request after the other can just serve. `alone`: one after the other.
`static`: those that wait when the engine is free and have the same plan, at most 8, sampled
together to their end. `batch`: `headstart.Batch`, runs that come and go between rows. Latency is
from arrival to the last row; text is encoded beforehand and nothing is decoded. The ways take turns
at every load.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch

import headstart as hs
from headstart.interfaces import Conditioning

ROOT = Path(__file__).parents[1]
SHAPE = (4, 16, 16)
MOST = 8
PROMPTS = ("a fox", "an owl", "a cactus", "a rocket", "a mushroom", "a crab")


class Request(NamedTuple):
    """at: seconds after the start; table: its plan; cond: its text; seed: its noise."""

    at: float
    table: hs.StepTable
    cond: Conditioning
    seed: int


def requests_of(engine: hs.Engine, count: int, rate: float, seed: int) -> list[Request]:
    draw, at = random.Random(seed), 0.0
    tables = [engine.compile(name) for name in ("hybrid", "hybrid", "distilled")]
    told = [engine.text.encode([prompt]) for prompt in PROMPTS]
    found: list[Request] = []
    for number in range(count):
        at += draw.expovariate(rate)
        found.append(Request(at, draw.choice(tables), draw.choice(told), number))
    return found


def run_of(request: Request) -> hs.Run:
    return hs.Run(request.table, request.cond, hs.Philox([request.seed]), shape=SHAPE)


def finish(engine: hs.Engine, requests: Sequence[Request]) -> None:
    """Requests of one plan, sampled together to their end."""
    cond = Conditioning.cat([request.cond for request in requests])
    noise = hs.Philox([request.seed for request in requests])
    for _ in hs.sample(requests[0].table, engine.denoisers, cond, noise, shape=SHAPE):
        pass


async def arrive(
    requests: Sequence[Request], serve: Callable[[Request], Awaitable[None]]
) -> dict[str, float]:
    """Every request at its time -> latency and how many were served a second."""
    begin, latencies = time.perf_counter(), [0.0] * len(requests)

    async def one(number: int, request: Request) -> None:
        await asyncio.sleep(max(0.0, request.at - (time.perf_counter() - begin)))
        await serve(request)
        latencies[number] = time.perf_counter() - begin - request.at

    await asyncio.gather(*(one(n, request) for n, request in enumerate(requests)))
    spent = time.perf_counter() - begin
    ordered = sorted(latencies)
    return {
        "p50_ms": 1e3 * statistics.median(ordered),
        "p99_ms": 1e3 * ordered[int(0.99 * (len(ordered) - 1))],
        "per_second": len(requests) / spent,
    }


def alone(engine: hs.Engine) -> Callable[[Request], Awaitable[None]]:
    free = asyncio.Lock()

    async def serve(request: Request) -> None:
        async with free:
            await asyncio.to_thread(finish, engine, [request])

    return serve


def static(engine: hs.Engine) -> Callable[[Request], Awaitable[None]]:
    free, waiting = asyncio.Lock(), list[tuple[Request, asyncio.Future[None]]]()

    async def serve(request: Request) -> None:
        done = asyncio.get_running_loop().create_future()
        waiting.append((request, done))
        async with free:
            if done.done():
                return
            plan = waiting[0][0].table.name
            taken = [item for item in waiting if item[0].table.name == plan][:MOST]
            waiting[:] = [item for item in waiting if item not in taken]
            await asyncio.to_thread(finish, engine, [request for request, _ in taken])
            for _, other in taken:
                other.set_result(None)
        await done

    return serve


def shared(engine: hs.Engine) -> Callable[[Request], Awaitable[None]]:
    batch = hs.Batch(engine.denoisers, most=MOST)

    async def serve(request: Request) -> None:
        async for _ in batch.run(run_of(request)):
            pass

    return serve


WAYS = {"alone": alone, "static": static, "batch": shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6, 0.8, 0.95])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "batch.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = hs.Engine.demo(device="cpu")
    once = _seconds_alone(engine)
    rows: list[dict[str, Any]] = []
    for load in args.loads:
        turns: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for turn in range(args.rounds):
            requests = requests_of(engine, args.requests, load / once, turn)
            for way, serving in WAYS.items():
                turns[way].append(asyncio.run(_measured(requests, engine, serving)))
        for way, found in turns.items():
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            rows.append({"load": load, "way": way, **middle, "turns": found})
            print(load, way, {key: round(value, 1) for key, value in middle.items()}, flush=True)
    harness.write_json(
        args.out,
        {
            "machine": harness.machine(),
            "threads": args.threads,
            "requests": args.requests,
            "seconds_alone": once,
            "most": MOST,
            "rows": rows,
        },
    )


async def _measured(requests: Sequence[Request], engine: hs.Engine, serving: Any) -> Any:
    return await arrive(requests, serving(engine))


def _seconds_alone(engine: hs.Engine) -> float:
    """The median of a request's time where nothing else runs."""
    spent: list[float] = []
    for request in requests_of(engine, 40, 1.0, 99):
        begin = time.perf_counter()
        finish(engine, [request])
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent[10:])


if __name__ == "__main__":
    main()
