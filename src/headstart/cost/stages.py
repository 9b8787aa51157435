"""The stages of a run as operators: the real modules at full size, without memory for a weight.

text -> passes of each model -> steps -> decode
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from headstart.checkpoint.params import UNetParams, VaeParams
from headstart.cost.operators import Operator, count
from headstart.cost.sizes import Encoder, Sizes
from headstart.interfaces import Conditioning
from headstart.networks.tower import Tower
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae
from headstart.plan.table import StepTable
from headstart_kernels import decode_u8, fused_step_into, philox_normal, scale_input

_CARD = torch.device("meta")
M = TypeVar("M", bound=nn.Module)


class Stage(NamedTuple):
    """What a run does so many `times`, and the operators of one of them.

    rows   samples in the network at once, 0 where there is no network
    """

    name: str
    times: int
    rows: int
    operators: tuple[Operator, ...]


def stages_of(
    models: Mapping[str, Sizes],
    table: StepTable,
    *,
    pixels: tuple[int, int],
    batch: int = 1,
    dtype: torch.dtype = torch.float16,
) -> tuple[Stage, ...]:
    """The stages of one run of `table`: `batch` images of one prompt, in the network at once.

    models   "base" and "distilled" -> sizes, those that the table names; text and VAE are of the
             first of `models`
    pixels   (height, width)
    dtype    of the networks; the decoder's is `decode_dtype`
    """
    first = next(iter(models.values()))
    side = first.vae.downscale
    latent = (first.vae.latent_channels, pixels[0] // side, pixels[1] // side)
    guided = any(step.passes == 2 for step in table)
    found = [Stage("text", 1, 1 + guided, text_pass(first.text, 1 + guided, dtype))]
    passes = Counter((step.model, batch * step.passes) for step in table)
    known: dict[tuple[UNetParams, int], tuple[Operator, ...]] = {}
    for (model, rows), times in passes.items():
        key = (models[model].unet, rows)
        if key not in known:
            known[key] = unet_pass(models[model].unet, latent, rows, dtype)
        found.append(Stage(f"{model} pass", times, rows, known[key]))
    found.append(Stage("step", 1, 0, steps(table, latent, batch, dtype)))
    found.append(Stage("decode", 1, batch, decode(first.vae, latent, batch, dtype)))
    return tuple(found)


def unet_pass(
    params: UNetParams,
    latent: tuple[int, int, int],
    rows: int = 1,
    dtype: torch.dtype = torch.float16,
    tokens: int = 77,
) -> tuple[Operator, ...]:
    """One call of a UNet on `rows` samples of `latent` [C, h, w], told `tokens` of text each."""
    network = _built(lambda: UNet(params), dtype)
    network.lay_out(torch.device("cuda"))
    pooled = time_ids = guidance = None
    if params.added_dim is not None:
        pooled, time_ids = _pooled(params, rows, dtype), _empty(rows, 6)
    if params.guidance_dim is not None:
        guidance = _empty(rows, params.guidance_dim, dtype=dtype)
    context = _empty(rows, tokens, params.context_dim, dtype=dtype)
    cond = Conditioning(context, pooled, time_ids, guidance)
    x_in, timestep = _empty(rows, *latent, dtype=dtype), _empty(rows, dtype=torch.int64)
    with torch.no_grad():
        read = network.read_prompt(cond)  # once a prompt, before the first row
    cond = replace(cond, extra=dict(read))
    return count(lambda: network(x_in, timestep, cond))


def text_pass(
    encoders: tuple[Encoder, ...], texts: int = 1, dtype: torch.dtype = torch.float16
) -> tuple[Operator, ...]:
    """Every encoder on `texts` of one piece each."""
    found: list[Operator] = []
    for params, rule in encoders:
        tower = _built(lambda p=params, r=rule: Tower(p, r), dtype)
        tower.reset_positions(_CARD)
        ids = _empty(texts, params.positions, dtype=torch.int64)
        found += count(lambda t=tower, i=ids: t(i))
    return tuple(found)


def steps(
    table: StepTable, latent: tuple[int, int, int], batch: int, dtype: torch.dtype
) -> tuple[Operator, ...]:
    """Everything of a run's rows besides their networks: the start, and a fused step a row."""
    x, row = _empty(batch, *latent), _empty(dtype=torch.int64)
    rows = _empty(len(table), 8)
    seeds = _empty(batch, dtype=torch.int64)

    def run() -> None:
        start = philox_normal(seeds, seeds, row, latent) * table.init_scale
        scale_input(start, rows, row, dtype, copies=table.steps[0].passes)
        for index, step in enumerate(table):
            noise = philox_normal(seeds, seeds, row, latent) if step.add else None
            following = table.steps[index + 1 :][:1]
            fused_step_into(
                *(x, _empty(batch * step.passes, *latent, dtype=dtype), rows, row, x),
                x0=x,
                noise=noise,
                x0_prev=x if step.carry else None,
                x_in=_empty(batch * following[0].passes, *latent, dtype=dtype)
                if following
                else None,
                finite=_empty(batch, dtype=torch.bool),
            )

    return count(run)


def decode(
    params: VaeParams, latent: tuple[int, int, int], batch: int, dtype: torch.dtype
) -> tuple[Operator, ...]:
    """Latents -> uint8, as `engine.pixels` does: decoded, looked at for NaN, cast to bytes."""
    own = decode_dtype(params, dtype)
    vae = _built(lambda: Vae(params), own)
    nn.Module.to(vae, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    latents = _empty(batch, *latent)

    def run() -> None:
        pixels = vae.decode(latents.to(own))
        torch.isfinite(pixels).flatten(1).all(1)
        decode_u8(pixels, check=False)

    return count(run)


def decode_dtype(params: VaeParams, dtype: torch.dtype) -> torch.dtype:
    """What `Engine.load` decodes in: float32 where networks are float16 and this is SDXL's decoder,
    which overflows there (`networks.load.load_vae`)."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def _pooled(params: UNetParams, rows: int, dtype: torch.dtype) -> Tensor:
    """Beside six sizes, embedded as 256 values each in SDXL; smaller relatives keep its share."""
    assert params.added_dim is not None
    pooled = 1280 * params.added_dim // (1280 + 6 * 256)
    pooled += (params.added_dim - pooled) % 12  # each of six sizes is embedded as cosines and sines
    return _empty(rows, pooled, dtype=dtype)


def _built(build: Callable[[], M], dtype: torch.dtype) -> M:
    with _CARD:
        module = build()
    return module.to(dtype).requires_grad_(False).eval()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_CARD)
