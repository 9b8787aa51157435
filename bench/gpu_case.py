"""A case of `bench/gpu.py`: what it runs on, how it times, and the figures it yields.

A case is a generator of (name, value): each is printed and written when it comes, so that whatever
fails later takes nothing with it. So is a variant of one case: it fails alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headstart.cost.sizes import sizes_of_family
from headstart.networks.unet import Mid, Stage, UNetParams
from headstart.networks.vae import VaeParams

if TYPE_CHECKING:
    from evidence.torch_cuda import EmulatedCuda

Figure = tuple[str, Any]
Call = Callable[[], Any]


class Networks(NamedTuple):
    """Shapes: SDXL's (unet/config.json, vae/config.json of stable-diffusion-xl-base-1.0), or small
    ones of the same build for a dry run. `text` is (width, layers, heads, MLP) of both encoders."""

    unet: UNetParams
    vae: VaeParams
    text: tuple[tuple[int, int, int, int], tuple[int, int, int, int]]
    pooled: int
    latent: tuple[int, int, int]

    @property
    def pixels(self) -> int:
        return self.latent[1] * self.vae.downscale


SDXL = Networks(
    sizes_of_family("sdxl").unet,
    sizes_of_family("sdxl").vae,
    ((768, 12, 12, 3072), (1280, 32, 20, 5120)),
    1280,
    (4, 128, 128),
)
SMALL = Networks(
    UNetParams(
        down=(Stage(32, (0,), True), Stage(64, (1,), False)),
        mid=Mid(2, 1),
        up=(Stage(64, (1, 1), True), Stage(32, (0, 0), False)),
        context_dim=128,
        added_dim=64 + 6 * 16,
    ),
    VaeParams(channels=(32, 32), layers=1, scale_factor=0.5),
    ((64, 1, 1, 64), (64, 2, 1, 64)),
    64,
    (4, 8, 8),
)


class Bench(NamedTuple):
    """What every case is given.

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


class NotInThisVersionError(Exception):
    """The headstart that is installed has not what a case asks for."""


def said(error: BaseException) -> str:
    """An error in one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def failed(error: BaseException) -> dict[str, str]:
    if isinstance(error, NotInThisVersionError):
        return {"skipped": f"not in this version: {error}"}
    if isinstance(error, ModuleNotFoundError):
        return {"skipped": f"not installed: {error.name}"}
    return {"failed": said(error)}


def in_turns(
    bench: Bench,
    variants: Mapping[str, Callable[[], Call]],
    judge: Callable[[Any], dict[str, float]] | None = None,
) -> Iterator[Figure]:
    """Milliseconds of each variant, A B A B ..., with the ratio to the first that works.

    A variant is built, then called once, which may compile and capture; that is `first_s`, told
    when it is done. Each timed call is waited for, as whoever wants its picture does. What raises
    has its error as its figure, and the others go on. `difference` is that of what a call gives
    from what the first variant gave, at most, relative to the largest value; or `judge` says
    something else of it.
    """
    calls: dict[str, Call] = {}
    facts: dict[str, dict[str, Any]] = {}
    expected: Tensor | None = None
    for name, build in variants.items():
        begin = time.perf_counter()
        try:
            torch.cuda.reset_peak_memory_stats()
            call = build()
            got = call()
            wait()
            told: dict[str, Any] = {"first_s": round(time.perf_counter() - begin, 2)}
            told |= {"peak_bytes": torch.cuda.max_memory_allocated()}
            expected = got if expected is None else expected
            told |= judge(got) if judge else _difference(got, expected)
        except Exception as error:
            yield name, failed(error)
            continue
        calls[name], facts[name] = call, told
        yield name, facts[name]
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
    low, middle, high = np.percentile(ms, [20, 50, 80])
    return {"ms": float(middle), "p20": float(low), "p80": float(high)}


def _difference(got: Any, expected: Any) -> dict[str, float]:
    tensors = isinstance(got, Tensor) and isinstance(expected, Tensor)
    if got is expected or not tensors or got.shape != expected.shape:
        return {}
    largest = float(expected.float().abs().max())
    apart = float((got.float() - expected.float()).abs().max())
    return {"difference": apart / largest if largest else apart}
