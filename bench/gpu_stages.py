"""The stages beside the UNet for `bench/gpu.py`: decoder, text, and the kernels of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from gpu_case import Bench, Call, Figure, failed, in_turns, milliseconds
from gpu_networks import PLAN, load_engine, twin, vae
from torch import Tensor
from torch.nn import functional
from untrained import diffusers_vae

import headstart_kernels as hk
from headstart.networks.fusion import fusion
from headstart.networks.vae import Vae
from headstart.plan.schedule import NoiseSchedule

NHWC = torch.channels_last
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": NHWC}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def decoders(bench: Bench) -> Iterator[Figure]:
    """Every dtype, layout and norm, with PSNR to float32; then diffusers' decoder."""
    network, latents = vae(bench), bench.normal(1, *bench.networks.latent)
    exact = _decoded(network, latents, torch.float32, torch.contiguous_format, False)()
    variants: dict[str, Callable[[], Call]] = {
        f"{dtype} {layout}{', fused norm' * fused}": partial(
            _decoded, network, latents, DTYPES[dtype], LAYOUTS[layout], fused
        )
        for dtype, layout, fused in product(DTYPES, LAYOUTS, (False, True))
    }
    for dtype in ("bfloat16", "float32"):
        theirs = partial(_theirs, bench, network, latents, DTYPES[dtype])
        variants[f"diffusers {dtype} NHWC"] = theirs
    yield from in_turns(bench, variants, lambda pixels: {"PSNR_dB": psnr(pixels, exact)})


def psnr(pixels: Tensor, exact: Tensor) -> float:
    """10 log10(2^2 / mean square) of pixels in [-1, 1], in which they are cut."""
    apart = pixels.float().clamp(-1, 1) - exact.float().clamp(-1, 1)
    square = float(apart.square().mean())
    return 10 * math.log10(4 / square) if square > 0 else 200.0


def _decoded(
    network: Vae, latents: Tensor, dtype: torch.dtype, layout: torch.memory_format, fused: bool
) -> Call:
    with torch.device("meta"):
        copy = Vae(network.params)
    copy = twin(network, copy).to(dtype=dtype, memory_format=layout)
    x = latents.to(dtype).contiguous(memory_format=layout)

    def run() -> Tensor:
        with torch.inference_mode(), fusion(fused):
            return copy.decode(x)

    return run


def _theirs(bench: Bench, network: Vae, latents: Tensor, dtype: torch.dtype) -> Call:
    params = bench.networks.vae
    copy = twin(network, diffusers_vae(params)).to(dtype=dtype, memory_format=NHWC)
    scaled = (latents / params.scale_factor).to(dtype).contiguous(memory_format=NHWC)

    def run() -> Tensor:
        with torch.inference_mode():
            return copy.decode(scaled, return_dict=False)[0]

    return run


def texts(bench: Bench) -> Iterator[Figure]:
    """Both encoders, as a run calls them: a prompt, four, and with a negative one."""
    text = load_engine(bench).text

    def encoded(count: int, negative: str | None) -> Tensor:
        with torch.inference_mode():
            conds = text.encode(["a fox in the snow"] * count, negative=negative)
        return (conds[0] if isinstance(conds, tuple) else conds).context

    variants: dict[str, Callable[[], Call]] = {
        "1 prompt": lambda: partial(encoded, 1, None),
        "4 prompts": lambda: partial(encoded, 4, None),
        "1 prompt and a negative": lambda: partial(encoded, 1, "a frog"),
    }
    yield from in_turns(bench, variants)


class Work(NamedTuple):
    """A kernel's call, and the bytes that it has to read and write at the least."""

    call: Callable[[], object]
    size_bytes: int


def kernels(bench: Bench) -> Iterator[Figure]:
    """Time of one launch among 100 that are queued, and the bandwidth that this is.

    `alone_ms` is a call that is waited for: what Python and the launch cost is in it.
    """
    many = 2 if bench.dry else 100
    works = {
        f"{name}, {batch}": partial(work, bench, batch)
        for batch in (1, 16)
        for name, work in _OF_LATENTS.items()
    }
    for layout, form in LAYOUTS.items():
        works[f"groupnorm_silu {layout}"] = partial(_norm, bench, form, hk.groupnorm_silu)
        works[f"torch's {layout}"] = partial(_norm, bench, form, _torch_norm)
    works |= {
        "geglu": partial(_gate, bench, hk.geglu),
        "torch's geglu": partial(_gate, bench, _glu),
    }
    for name, build in works.items():
        try:
            yield name, _bandwidth(build(), many)
        except Exception as error:
            yield name, failed(error)


def _bandwidth(work: Work, many: int) -> dict[str, float]:
    def queued() -> None:
        for _ in range(many):
            work.call()

    work.call()
    seconds = min(milliseconds(queued) for _ in range(3)) / many / 1e3
    return {
        "us": seconds * 1e6,
        "GB/s": work.size_bytes / seconds / 1e9,
        "bytes": work.size_bytes,
        "alone_ms": min(milliseconds(work.call) for _ in range(3)),
    }


def _table(bench: Bench) -> tuple[Tensor, Tensor]:
    table = PLAN.compile(NoiseSchedule.scaled_linear()).coefficients()
    row = torch.ones((), dtype=torch.int64, device=bench.device)
    return torch.tensor(table, device=bench.device), row


def _step(bench: Bench, batch: int, *, drawn: bool) -> Work:
    table, row = _table(bench)
    x, f = (bench.normal(batch, *bench.networks.latent) for _ in range(2))
    f, before, after = f.to(bench.dtype), x.clone(), 2 * x.nbytes
    keys = torch.arange(batch, device=bench.device)
    noise: Any = hk.Draw(keys, keys) if drawn else before
    read = x.nbytes + f.nbytes + (0 if drawn else noise.nbytes)
    return Work(lambda: hk.fused_step(x, f, table, row, noise=noise), read + after)


def _scaled(bench: Bench, batch: int) -> Work:
    table, row = _table(bench)
    x = bench.normal(batch, *bench.networks.latent)
    return Work(lambda: hk.scale_input(x, table, row, bench.dtype), x.nbytes + x.nbytes // 2)


def _preview(bench: Bench, batch: int) -> Work:
    x = bench.normal(batch, *bench.networks.latent)
    factors, bias = bench.normal(4, 3), bench.normal(3)
    return Work(lambda: hk.preview_rgb(x, factors, bias), x.nbytes + x.numel() * 3 // 4)


def _bytes(bench: Bench, batch: int) -> Work:
    side = bench.networks.pixels
    pixels = bench.normal(batch, 3, side, side)
    return Work(lambda: hk.decode_u8(pixels, check=False), pixels.nbytes + pixels.numel())


_OF_LATENTS: dict[str, Callable[[Bench, int], Work]] = {
    "fused_step": partial(_step, drawn=False),
    "fused_step that draws": partial(_step, drawn=True),
    "scale_input": _scaled,
    "preview_rgb": _preview,
    "decode_u8": _bytes,
}


def _norm(bench: Bench, layout: torch.memory_format, norm: Callable[..., Tensor]) -> Work:
    width, side = bench.networks.unet.channels, bench.networks.latent[1]
    x = bench.normal(2, width, side, side, dtype=bench.dtype).contiguous(memory_format=layout)
    weight, bias = (torch.ones(width, device=bench.device, dtype=bench.dtype) for _ in range(2))
    # It has to be read for its mean, and again.
    return Work(lambda: norm(x, 32, weight, bias, 1e-5), 3 * x.nbytes)


def _torch_norm(*arguments: Any) -> Tensor:
    return functional.silu(functional.group_norm(*arguments))


def _gate(bench: Bench, gate: Callable[[Tensor], Tensor]) -> Work:
    width, side = bench.networks.unet.down[1].channels, bench.networks.latent[1] // 2
    x = bench.normal(2, side * side, 8 * width, dtype=bench.dtype)
    return Work(lambda: gate(x), x.nbytes + x.nbytes // 2)


def _glu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * functional.gelu(gate)
