"""A case of `bench/gpu.py`: what it runs on, how it times, and the figures it yields.

A case is a generator of (name, value): each is printed and written when it comes, so that whatever
fails later takes nothing with it. So is a variant of one case: it fails alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import harness
import numpy as np
import torch
from torch import Tensor
from untrained import POOLED, TINY

from headstart.checkpoint.params import ClipParams, UNetParams, VaeParams
from headstart.cost.sizes import sizes_of_family

if TYPE_CHECKING:
    from evidence.torch_cuda import EmulatedCuda

Figure = tuple[str, Any]
Call = Callable[[], Any]


class Networks(NamedTuple):
    """Shapes: SDXL's, or small ones of the same build for a dry run."""

    unet: UNetParams
    vae: VaeParams
    text: tuple[ClipParams, ...]
    pooled: int
    latent: tuple[int, int, int]

    @property
    def pixels(self) -> int:
        return self.latent[1] * self.vae.downscale


_SIZES = sizes_of_family("sdxl")
_CLIPS = tuple(params for params, _ in _SIZES.text)
_SMALL = {"width": 64, "heads": 1, "mlp_width": 64}
SDXL = Networks(_SIZES.unet, _SIZES.vae, _CLIPS, POOLED, (4, 128, 128))
SMALL = Networks(
    replace(TINY, added_dim=64 + 6 * 16),
    VaeParams(channels=(32, 32), layers=1, scale_factor=0.5),
    (replace(_CLIPS[0], layers=1, **_SMALL),
     replace(_CLIPS[1], layers=2, projection=64, **_SMALL)),
    64,
    (4, 8, 8),
)  # fmt: skip


class Bench(NamedTuple):
    """What every case runs on.

    emulated  the GPU of a dry run, with a small pair, whose figures mean nothing; else None
    rounds    of everything that is timed in turns
    folder    for what a case writes
    files     "base" and "distilled" of a user's own, if any
    """

    emulated: EmulatedCuda | None
    rounds: int
    folder: Path
    files: Mapping[str, Path]

    @property
    def dry(self) -> bool:
        return self.emulated is not None

    @property
    def networks(self) -> Networks:
        return SMALL if self.dry else SDXL

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(len(shape))
        return torch.randn(shape, generator=generator).to(self.device, dtype or torch.float32)


class Case(NamedTuple):
    """name, the question it answers, the most seconds it may take, and the generator."""

    name: str
    about: str
    limit_s: int
    figures: Callable[[Bench], Iterator[Figure]]


class TooOldError(Exception):
    """The headstart that is installed has not what a case needs."""


def failed(error: BaseException) -> dict[str, str]:
    if isinstance(error, TooOldError):
        return {"skipped": f"not in this version: {error}"}
    if isinstance(error, ModuleNotFoundError):
        return {"skipped": f"not installed: {error.name}"}
    return {"failed": harness.one_line(error)}


def in_turns(
    bench: Bench,
    variants: Mapping[str, Callable[[], Call]],
    judge: Callable[[Any], dict[str, float]] | None = None,
) -> Iterator[Figure]:
    """Milliseconds of each variant, A B A B ..., with the ratio to the first that works.

    A variant is built, then called once, which may compile and capture: `first_s`. A timed call
    ends when the device is done. What raises has its error as its figure, and the others go on.
    `difference` is the largest one to the first variant's output, relative to the largest value;
    `judge` says something else of an output.
    """
    calls: dict[str, Call] = {}
    facts: dict[str, dict[str, Any]] = {}
    expected: Tensor | None = None
    for name, build in variants.items():
        begin = time.perf_counter()
        try:
            torch.cuda.reset_peak_memory_stats()
            call = build()
            output = call()
            wait()
            own: dict[str, Any] = {"first_s": round(time.perf_counter() - begin, 2)}
            own["peak_bytes"] = torch.cuda.max_memory_allocated()
            expected = output if expected is None else expected
            own |= judge(output) if judge else _difference(output, expected)
        except Exception as error:
            yield name, failed(error)
            continue
        calls[name], facts[name] = call, own
        yield name, own
    yield from _timed(calls, facts, bench.rounds)


def _timed(
    calls: dict[str, Call], facts: Mapping[str, dict[str, Any]], rounds: int
) -> Iterator[Figure]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in list(calls):
            try:
                taken[name].append(milliseconds(calls[name]))
            except Exception as error:
                yield name, facts[name] | failed(error)
                del calls[name]
    first = next(iter(calls), None)
    for name in calls:
        ratios = np.array(taken[first or name]) / np.maximum(taken[name], 1e-9)
        yield name, facts[name] | spread(taken[name]) | {"times_first": float(np.median(ratios))}


def milliseconds(call: Call) -> float:
    """Wall time of a call that is waited for."""
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return (time.perf_counter() - begin) * 1e3


def wait() -> None:
    torch.cuda.synchronize()


def spread(ms: list[float]) -> dict[str, float]:
    quantiles = harness.spread(ms)
    return {"ms": quantiles["p50"], "p20": quantiles["p20"], "p80": quantiles["p80"]}


def _difference(output: Any, expected: Any) -> dict[str, float]:
    tensors = isinstance(output, Tensor) and isinstance(expected, Tensor)
    if output is expected or not tensors or output.shape != expected.shape:
        return {}
    largest = float(expected.float().abs().max())
    apart = float((output.float() - expected.float()).abs().max())
    return {"difference": apart / largest if largest else apart}
