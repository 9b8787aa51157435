"""What does a step cost outside the network on a CPU? Our loop, diffusers' loops and one pass in C.

    python bench/step.py [--processes 7] [--rounds 5] [--threads 1 2] [--batches 1 4 16]
                         [--out bench/results/step.json]

The network is null: it hands back tensors that exist. So a row is what remains: the network's
input (scaled, twice for a guided pair), the guidance, the update, its noise, and, for ours, x0 as
well as x' in tensors of their own and the look for NaN. Theirs is the body of the pipeline's loop:
torch.cat, scale_model_input, guidance, scheduler.step. What happens once a run (set_timesteps; the
start, and the checks of hs.sample) is outside the clock for both.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import harness
import torch
from reporting import markdown
from torch import Tensor

import headstart as hs

LATENT = (4, 128, 128)
"""SDXL's at 1024 pixels."""
BATCHES = (1, 4, 16)
STEPS = 50
"""What the pipelines of diffusers take by default."""
GUIDANCE = 5.0
BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}

CLOCK = time.perf_counter

C_SOURCE = r"""
#include <stddef.h>
void step(size_t n, float *restrict x, const float *restrict u, const float *restrict c,
          float *restrict x0, float *restrict in0, float *restrict in1,
          float guidance, float c_out, float keep, float c_in) {
  for (size_t i = 0; i < n; i++) {
    float f = u[i] + guidance * (c[i] - u[i]);
    float d = x[i] + c_out * f;
    float y = d + keep * (x[i] - d);
    x0[i] = d;
    x[i] = y;
    in0[i] = in1[i] = c_in * y;
  }
}
"""
C_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")

RATIOS = (
    ("Euler", "diffusers Euler", 0.30),
    ("DDIM", "diffusers DDIM", 0.30),
    ("LCM", "diffusers LCM", 0.15),
    ("LCM, noise given", "diffusers LCM", 0.15),
    ("Euler, no guidance", "diffusers Euler, no guidance", None),
    ("Euler", "C", 2.50),
)
"""(ours, beside what, the target of the ratio or None)."""


Run = Callable[[], float]
"""Seconds a step of one run, which makes what it needs outside the clock."""
Taken = dict[tuple[int, int], dict[str, list[float]]]
"""For (batch, threads): what every case took, in seconds a step, a number for each round."""


def main() -> None:
    parser = harness.options(__doc__, "step.json", processes=7, rounds=5)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--cpu", action="store_true", help="the thread's CPU time: a busy machine")
    options = parser.parse_args()
    missing = _compiled()[1]
    taken: Taken = {}
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(options.processes):
            for setup, cases in pool.apply(measured, (options,)).items():
                for name, seconds in cases.items():
                    taken.setdefault(setup, {}).setdefault(name, []).extend(seconds)
    results = [_result(*setup, cases) for setup, cases in taken.items()]
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "evidence": "measured",
        "clock": "the thread's CPU time" if options.cpu else "wall",
        "machine": harness.machine(),
        "state": ["B", *LATENT],
        "steps": STEPS,
        "guidance": GUIDANCE,
        "processes": options.processes,
        "rounds": options.rounds,
        "c": missing or " ".join(("cc", *C_FLAGS)),
        "results": results,
    }
    harness.write_json(options.out, report)
    print("\n\n".join(_table(result) for result in results))
    if missing:
        print(f"\nno pass in C: {missing}")


def measured(options: argparse.Namespace) -> Taken:
    """Every setup, in a process of its own: part of it depends on where the system puts pages."""
    logging.disable(logging.WARNING)
    global CLOCK
    CLOCK = time.thread_time if options.cpu else time.perf_counter
    _settle_the_allocator()
    return {
        (batch, threads): _rounds(batch, threads, options.rounds)
        for threads in options.threads
        for batch in options.batches
    }


def _rounds(batch: int, threads: int, rounds: int) -> dict[str, list[float]]:
    torch.set_num_threads(threads)
    return harness.in_turns(_cases(batch, _compiled()[0]), rounds, untimed=2)


def _result(batch: int, threads: int, taken: Mapping[str, list[float]]) -> dict[str, Any]:
    """Ratios are medians of the rounds' own ratios."""
    return {
        "batch": batch,
        "threads": threads,
        "us_a_step": {
            name: harness.rounded(harness.spread(seconds), 1e6, 1)
            for name, seconds in taken.items()
        },
        "ratios": [
            {"of": of, "to": to, **_ratio(taken[of], taken[to]), "target": target}
            for of, to, target in RATIOS
            if to in taken
        ],
    }


def _settle_the_allocator() -> None:
    """Free 31 MiB, as every network does that runs before a step.

    glibc keeps a freed block for the next of its size, rather than giving it back to the system,
    up to twice the largest that was mapped and freed so far (mallopt(3), M_MMAP_THRESHOLD). With a
    null network nothing large ever was: pages would be fetched anew, or not, by the order of cases.
    """
    torch.empty(31 << 20, dtype=torch.uint8).fill_(1)


def _cases(batch: int, floor: Callable[..., None] | None) -> dict[str, Run]:
    """Ours and theirs, which look at the same tensors."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler

    generator = torch.Generator().manual_seed(0)
    n, f = (torch.randn(copies * batch, *LATENT, generator=generator) for copies in (1, 2))
    euler, ddim = hs.Update.EULER, hs.Update.DDIM
    lcm = {"update": hs.Update.RENOISE, "boundary": True}
    philox = hs.Philox(range(batch))
    cases = {
        "Euler": _ours(n, f, philox, update=euler),
        "diffusers Euler": _theirs(EulerDiscreteScheduler(**BETAS), n, f),
        "DDIM": _ours(n, f, philox, update=ddim),
        "diffusers DDIM": _theirs(DDIMScheduler(**BETAS, clip_sample=False), n, f),
        "LCM": _ours(n, f, philox, **lcm),
        "LCM, noise given": _ours(n, f, hs.Given(n, [n] * STEPS), **lcm),
        "diffusers LCM": _theirs(LCMScheduler(**BETAS), n, f),
        "Euler, no guidance": _ours(n, f, philox, update=euler, guidance=1.0),
        "diffusers Euler, no guidance": _theirs(EulerDiscreteScheduler(**BETAS), n, f, None),
        "philox_normal alone": _drawn(lambda: philox.step(0, LATENT, n.device)),
        "torch.randn alone": _drawn(lambda: torch.randn(n.shape)),
    }
    return cases if floor is None else cases | {"C": _floor(floor, n, f)}


def _ours(
    n: Tensor, f: Tensor, noise: hs.NoiseSource, *, guidance: float = GUIDANCE, **rule: Any
) -> Run:
    leg = hs.Leg(model="null", steps=STEPS, guidance=guidance, **rule)
    table = hs.Plan((leg,)).compile(hs.NoiseSchedule.scaled_linear())
    cond = hs.Conditioning(torch.zeros(len(n), 1, 1))
    x = n * table.init_scale
    predicted = f if guidance != 1.0 else f[: len(n)]

    def network(x_in: Tensor, timestep: Tensor, cond: hs.Conditioning) -> Tensor:
        return predicted

    @torch.no_grad()
    def run() -> float:
        start = hs.State(-1, x, x)
        states = hs.sample(table, {"null": network}, cond, noise, uncond=cond, resume=start)
        begin = CLOCK()
        for _ in states:
            pass
        return (CLOCK() - begin) / STEPS

    return run


def _theirs(scheduler: Any, n: Tensor, f: Tensor, guidance: float | None = GUIDANCE) -> Run:
    """The loop of diffusers' StableDiffusionXLPipeline, without its callbacks and progress bar."""
    generator = torch.Generator().manual_seed(0)
    draws = "generator" in scheduler.step.__code__.co_varnames
    extra = {"generator": generator} if draws else {}
    output = f if guidance is not None else f[: len(n)]

    def network(x_in: Tensor) -> Tensor:
        return output

    @torch.no_grad()
    def run() -> float:
        scheduler.set_timesteps(STEPS)
        x = n * scheduler.init_noise_sigma
        begin = CLOCK()
        for t in scheduler.timesteps:
            x_in = x if guidance is None else torch.cat([x] * 2)
            x_in = scheduler.scale_model_input(x_in, t)
            predicted = network(x_in)
            if guidance is not None:
                uncond, text = predicted.chunk(2)
                predicted = uncond + guidance * (text - uncond)
            x = scheduler.step(predicted, t, x, **extra, return_dict=False)[0]
        return (CLOCK() - begin) / STEPS

    return run


def _drawn(draw: Callable[[], Tensor]) -> Run:
    def run() -> float:
        begin = CLOCK()
        for _ in range(STEPS):
            draw()
        return (CLOCK() - begin) / STEPS

    return run


def _floor(step: Callable[..., None], n: Tensor, f: Tensor) -> Run:
    """One fused pass a row, guided: in place, with every buffer kept, on one thread."""
    x, x0, x_in = n.clone(), torch.empty_like(n), torch.empty_like(f)
    uncond, text = f.chunk(2)
    in0, in1 = x_in.chunk(2)
    tensors = (x, uncond, text, x0, in0, in1)

    def run() -> float:
        x.copy_(n)
        begin = CLOCK()
        for _ in range(STEPS):
            step(n.numel(), *(t.data_ptr() for t in tensors), GUIDANCE, -1.0, 0.9, 0.7)
        return (CLOCK() - begin) / STEPS

    return run


@functools.cache
def _compiled() -> tuple[Callable[..., None] | None, str | None]:
    """The pass in C, or why there is none."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None, "there is no C compiler `cc` on the path"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "step.c"), Path(folder, "step.so")
        source.write_text(C_SOURCE, encoding="utf-8")
        command = [compiler, *C_FLAGS, "-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return None, f"cc failed: {done.stderr.strip()}"
        step = ctypes.CDLL(str(library)).step
    step.argtypes = [ctypes.c_size_t, *[ctypes.c_void_p] * 6, *[ctypes.c_float] * 4]
    step.restype = None
    return step, None


def _ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    ratios = harness.rounded(harness.spread([a / b for a, b in zip(of, to, strict=True)]), 1, 3)
    return {"ratio": ratios["p50"], "p20": ratios["p20"], "p80": ratios["p80"]}


def _table(result: Mapping[str, Any]) -> str:
    times = [(name, f"{value['p50']:.0f}") for name, value in result["us_a_step"].items()]
    ratios: list[tuple[str, ...]] = []
    for row in result["ratios"]:
        target = "" if row["target"] is None else f"{row['target']:.2f}"
        span = f"{row['p20']:.2f} to {row['p80']:.2f}"
        ratios.append((f"{row['of']} / {row['to']}", f"{row['ratio']:.3f}", span, target))
    blocks = (
        f"B = {result['batch']}, {result['threads']} thread(s)",
        markdown(("loop", "us a step"), times),
        markdown(("ratio", "median", "20 to 80 %", "target"), ratios),
    )
    return "\n\n".join(blocks)


if __name__ == "__main__":
    main()
