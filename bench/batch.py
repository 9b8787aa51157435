"""What do shared network calls give a server? Requests that arrive at random, served three ways.

    OMP_NUM_THREADS=1 python bench/batch.py [--network pair] [--loads 0.3 0.6 0.8 0.95]
        [--requests 200] [--rounds 3] [--threads 1] [--out bench/results/batch.json]
    OMP_NUM_THREADS=1 python bench/batch.py --network sd15 [--latent 16] [--requests 6 12 16 19]

pair: the bundled one. sd15: one UNet of SD1.5's size with random weights stands for both models, on
a Lightning plan and latents of 16 x 16. Two thirds of the requests are hybrids, one third distilled
runs, each of one image with a prompt and seed of its own. They arrive as a Poisson process
(exponential gaps, seeded); load 1 is what one request after the other can just serve, measured
before every load. `alone`: one after the other. `static`: those that wait when the engine is free
and have the same plan, at most 8, sampled together to their end. `batch`: `headstart.Batch`, runs
that come and go between rows. Latency is from arrival to the last row; text is encoded beforehand
and nothing is decoded. The ways take turns at every load, with the same arrivals. The file is
written after each load, and loads that it holds are not run again; delete it to start over.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch

import headstart as hs
from headstart.interfaces import Conditioning, Denoiser

MOST = 8
PROMPTS = ("a fox", "an owl", "a cactus", "a rocket", "a mushroom", "a crab")


class Service(NamedTuple):
    """denoisers: the networks; tables: the plans of requests; conds: the texts; shape: of a latent;
    warm, timed: requests that run alone before the others, to know how long one takes."""

    denoisers: Mapping[str, Denoiser]
    tables: Sequence[hs.StepTable]
    conds: Sequence[Conditioning]
    shape: tuple[int, int, int]
    warm: int
    timed: int


class Setting(NamedTuple):
    """A network's service by the side of a latent, and the defaults of options."""

    service: Callable[[int], Service]
    latent: int
    requests: tuple[int, ...]
    rounds: int
    out: str


def pair(side: int) -> Service:
    engine = hs.Engine.demo(device="cpu")
    tables = [engine.compile(name) for name in ("hybrid", "hybrid", "distilled")]
    conds = [engine.text.encode([prompt]) for prompt in PROMPTS]
    return Service(engine.denoisers, tables, conds, (4, side, side), 10, 30)


def sd15(side: int) -> Service:
    from adapters import SD15

    from headstart.networks.unet import UNet

    torch.manual_seed(0)
    unet = UNet(SD15).requires_grad_(False).eval()
    modes = ("hybrid", "hybrid", "distilled")
    process = hs.NoiseSchedule.scaled_linear()
    tables = [hs.preset("lightning", mode=mode).compile(process) for mode in modes]
    conds = [Conditioning(torch.randn(1, 77, 768)) for _ in PROMPTS]
    return Service({"base": unet, "distilled": unet}, tables, conds, (4, side, side), 1, 3)


NETWORKS = {
    "pair": Setting(pair, 16, (200,), 3, "batch.json"),
    "sd15": Setting(sd15, 16, (6, 12, 16, 19), 1, "batch_sd15.json"),
}


class Request(NamedTuple):
    """at: seconds after the start; table: its plan; cond: its text; seed: its noise."""

    at: float
    table: hs.StepTable
    cond: Conditioning
    seed: int


Serve = Callable[[Request], Awaitable[None]]


def requests_of(service: Service, count: int, rate: float, seed: int) -> list[Request]:
    draw, at = random.Random(seed), 0.0
    requests: list[Request] = []
    for number in range(count):
        at += draw.expovariate(rate)
        table, cond = draw.choice(service.tables), draw.choice(service.conds)
        requests.append(Request(at, table, cond, number))
    return requests


def finish(service: Service, requests: Sequence[Request]) -> None:
    """Requests of one plan, sampled together to their end."""
    cond = Conditioning.cat([request.cond for request in requests])
    noise = hs.Philox([request.seed for request in requests])
    table = requests[0].table
    for _ in hs.sample(table, service.denoisers, cond, noise, shape=service.shape):
        pass


async def arrive(
    requests: Sequence[Request], service: Service, way: Callable[[Service], Serve]
) -> dict[str, float]:
    """Every request at its time -> latency and how many were served a second."""
    serve, begin, latencies = way(service), time.perf_counter(), [0.0] * len(requests)

    async def one(number: int, request: Request) -> None:
        await asyncio.sleep(max(0.0, request.at - (time.perf_counter() - begin)))
        await serve(request)
        latencies[number] = time.perf_counter() - begin - request.at

    await asyncio.gather(*(one(n, request) for n, request in enumerate(requests)))
    spent = time.perf_counter() - begin
    ordered = sorted(latencies)
    return {
        "p50_ms": 1e3 * statistics.median(ordered),
        "p99_ms": 1e3 * ordered[math.ceil(0.99 * len(ordered)) - 1],  # of up to 100, the slowest
        "per_second": len(requests) / spent,
        "last_came_s": requests[-1].at,
    }


def gathered(service: Service, most: int) -> Serve:
    """Those that wait when the engine is free and have the plan of the first, at most so many."""
    free, waiting = asyncio.Lock(), list[tuple[Request, asyncio.Future[None]]]()

    async def serve(request: Request) -> None:
        done = asyncio.get_running_loop().create_future()
        waiting.append((request, done))
        async with free:
            if done.done():
                return
            plan = waiting[0][0].table.name
            taken = [item for item in waiting if item[0].table.name == plan][:most]
            waiting[:] = [item for item in waiting if item not in taken]
            await asyncio.to_thread(finish, service, [request for request, _ in taken])
            for _, other in taken:
                other.set_result(None)
        await done

    return serve


def shared(service: Service) -> Serve:
    batch = hs.Batch(service.denoisers, most=MOST)

    async def serve(request: Request) -> None:
        noise = hs.Philox([request.seed])
        run = hs.Run(request.table, request.cond, noise, shape=service.shape)
        async for _ in batch.run(run):
            pass

    return serve


WAYS: Mapping[str, Callable[[Service], Serve]] = {
    "alone": partial(gathered, most=1),
    "static": partial(gathered, most=MOST),
    "batch": shared,
}


def main() -> None:
    parser = harness.options(__doc__, None, threads=1)
    parser.add_argument("--network", choices=NETWORKS, default="pair")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6, 0.8, 0.95])
    parser.add_argument("--requests", type=int, nargs="+", help="one number, or one a load")
    parser.add_argument("--latent", type=int, help="its side")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    default = NETWORKS[args.network]
    counts = args.requests or default.requests
    counts = [*counts] * (len(args.loads) if len(counts) == 1 else 1)
    if len(counts) != len(args.loads):
        parser.error(f"--requests: give one number, or {len(args.loads)}, one a load")
    settings = {
        "network": args.network,
        "latent": args.latent or default.latent,
        "threads": args.threads,
        "rounds": args.rounds or default.rounds,
        "most": MOST,
    }
    torch.set_num_threads(args.threads)
    out = args.out or harness.RESULTS / default.out
    report, service = harness.read_json(out), default.service(settings["latent"])
    if any(report.get(key) != value for key, value in settings.items()):
        calls = call_costs(service)
        report = {**settings, "machine": harness.machine(), "calls": calls, "rows": []}
        print({size: round(cost["p50"], 3) for size, cost in calls.items()}, flush=True)
    for load, count in zip(args.loads, counts, strict=True):
        if any(row["load"] == load for row in report["rows"]):
            print(f"load {load} is in {out}")
            continue
        report["rows"] += loaded(service, load, count, settings["rounds"])
        harness.write_json(out, report)


def loaded(service: Service, load: float, count: int, rounds: int) -> list[dict[str, Any]]:
    """Every way's row at a load; the ways have the same arrivals."""
    busy, once = round(os.getloadavg()[0], 2), seconds_alone(service)
    turns: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(rounds):
        requests = requests_of(service, count, load / once, turn)
        for way, serving in WAYS.items():
            turns[way].append(asyncio.run(arrive(requests, service, serving)))
    alone_s = {"seconds_alone": once, "seconds_alone_after": seconds_alone(service)}
    rows: list[dict[str, Any]] = []
    for way, own in turns.items():
        middle = {key: statistics.median(turn[key] for turn in own) for key in own[0]}
        row: dict[str, Any] = {"load": load, "way": way, "requests": count, **alone_s}
        rows.append(row | {"load_1min": busy, **middle, "turns": own})
        print(load, way, {key: round(value, 3) for key, value in middle.items()}, flush=True)
    return rows


def seconds_alone(service: Service) -> float:
    """The median of a request's time where nothing else runs."""
    requests = requests_of(service, service.warm + service.timed, 1.0, 99)
    seconds = [harness.seconds_of(partial(finish, service, [own])) for own in requests]
    return statistics.median(seconds[service.warm :])


def call_costs(service: Service) -> dict[str, dict[str, float]]:
    """Seconds of one call of the distilled network, by its samples."""
    network = service.denoisers["distilled"]

    def call(size: int) -> None:
        cond, at = service.conds[0].expand(size), torch.full((size,), 500)
        with torch.no_grad():
            network(torch.randn(size, *service.shape), at, cond)

    sizes = {str(size): partial(call, size) for size in (1, 2, 4, 8)}
    return harness.interleaved(sizes, 3)


if __name__ == "__main__":
    main()
