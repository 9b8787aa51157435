"""The stages of a run as operators: the real modules at full size, without memory for a weight.

text -> prompt and passes of each model -> steps -> decode
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
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
from headstart.prompt_cache import PromptCache
from headstart_kernels import decode_u8, fused_step_into, philox_normal, scale_input

_CARD = torch.device("meta")
M = TypeVar("M", bound=nn.Module)


class Stage(NamedTuple):
    """A part of a run that runs `times` times, and the operators of one time.

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
    chunks: tuple[int | None, int | None, int] = (None, None, 1),
    dtype: torch.dtype = torch.float16,
    vae_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Stage, ...]:
    """The stages of one run of `table`: `batch` images of one prompt.

    models   "base" and "distilled" -> sizes, those that the table names; text and VAE are of the
             first of `models`
    pixels   (height, width)
    chunks   images in a network at once, None: all; in the decoder, None: as many; its bands
    """
    first = next(iter(models.values()))
    side = first.vae.downscale
    latent = (first.vae.latent_channels, pixels[0] // side, pixels[1] // side)
    guided = any(step.passes == 2 for step in table)
    stages = [Stage("text", 1, 1 + guided, text_pass(first.text, 1 + guided, dtype))]
    network_chunks = _chunked(batch, chunks[0])
    passes: dict[tuple[UNetParams, int], Pass] = {}
    for (name, copies), (reads, times) in _calls(table).items():
        for images, parts in network_chunks.items():
            key = unet, rows = models[name].unet, images * copies
            if key not in passes:
                passes[key] = unet_pass(unet, latent, rows, dtype)
            prompt, row = passes[key]
            if prompt:
                stages.append(Stage(f"{name} prompt", parts * reads, rows, prompt))
            stages.append(Stage(f"{name} pass", parts * times, rows, row))
    fused = [steps(table, latent, images, dtype) * n for images, n in network_chunks.items()]
    stages.append(Stage("step", 1, 0, tuple(chain.from_iterable(fused))))
    for images, parts in _chunked(batch, chunks[1] or chunks[0]).items():
        rgb = decode(first.vae, latent, images, vae_dtype, chunks[2])
        stages.append(Stage("decode", parts, images, rgb))
    return _with_distinct_names(stages)


class Pass(NamedTuple):
    """A UNet's operators on some samples: those of reading their prompt, once, and of a row."""

    prompt: tuple[Operator, ...]
    row: tuple[Operator, ...]


def unet_pass(
    params: UNetParams,
    latent: tuple[int, int, int],
    rows: int = 1,
    dtype: torch.dtype = torch.float16,
) -> Pass:
    """A UNet's calls on `rows` samples of `latent` [C, h, w] with 77 tokens of text each."""
    network = _on_meta(lambda: UNet(params), dtype)
    network.lay_out(torch.device("cuda"))
    pooled = time_ids = guidance = None
    if params.added_dim is not None:
        pooled, time_ids = _pooled(params, rows, dtype), _empty(rows, 6)
    if params.guidance_dim is not None:
        guidance = _empty(rows, params.guidance_dim, dtype=dtype)
    context = _empty(rows, 77, params.context_dim, dtype=dtype)
    cond = Conditioning(context, pooled, time_ids, guidance)
    x_in, timestep = _empty(rows, *latent, dtype=dtype), _empty(rows, dtype=torch.int64)
    cached: list[Conditioning] = []
    prompt = count(lambda: cached.append(PromptCache().of(network, cond)))
    return Pass(prompt, count(lambda: network(x_in, timestep, cached[0])))


def _calls(table: StepTable) -> dict[tuple[str, int], tuple[int, int]]:
    """(model, passes) -> how often it reads its prompt, and its rows: `headstart.prompt_cache`
    keeps what the last row's network read."""
    calls: dict[tuple[str, int], tuple[int, int]] = {}
    last = None
    for step in table:
        key = (step.model, step.passes)
        reads, times = calls.get(key, (0, 0))
        calls[key] = (reads + (key != last), times + 1)
        last = key
    return calls


def _chunked(batch: int, most: int | None) -> dict[int, int]:
    """Images at once -> how often."""
    size = min(batch, most or batch)
    return {size: batch // size} | ({rest: 1} if (rest := batch % size) else {})


def _with_distinct_names(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Stages that share a name get their number of samples in it."""
    names = Counter(stage.name for stage in stages)
    return tuple(
        stage._replace(name=f"{stage.name} of {stage.rows}") if names[stage.name] > 1 else stage
        for stage in stages
    )


def text_pass(
    encoders: tuple[Encoder, ...], texts: int = 1, dtype: torch.dtype = torch.float16
) -> tuple[Operator, ...]:
    """Every encoder on `texts` of one piece each."""
    operators: list[Operator] = []
    for params, rule in encoders:
        tower = _on_meta(lambda p=params, r=rule: Tower(p, r), dtype)
        ids = _empty(texts, params.positions, dtype=torch.int64)
        operators += count(lambda t=tower, i=ids: t(i))
    return tuple(operators)


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
    params: VaeParams,
    latent: tuple[int, int, int],
    batch: int,
    dtype: torch.dtype,
    bands: int = 1,
) -> tuple[Operator, ...]:
    """Latents -> uint8, as `engine.pixels` does: decoded in `dtype`, looked at for NaN, cast to
    bytes."""
    vae = _on_meta(lambda: Vae(params), dtype)
    nn.Module.to(vae, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    latents = _empty(batch, *latent)

    def run() -> None:
        pixels = vae.decode(latents.to(dtype), bands)
        torch.isfinite(pixels).flatten(1).all(1)
        decode_u8(pixels, check=False)

    return count(run)


def _pooled(params: UNetParams, rows: int, dtype: torch.dtype) -> Tensor:
    """The pooled text, as wide as added_dim leaves it: six sizes take 256 values each in SDXL, and
    the same share in smaller relatives."""
    assert params.added_dim is not None
    pooled = 1280 * params.added_dim // (1280 + 6 * 256)
    pooled += (params.added_dim - pooled) % 12  # each of six sizes is embedded as cosines and sines
    return _empty(rows, pooled, dtype=dtype)


def _on_meta(build: Callable[[], M], dtype: torch.dtype) -> M:
    with _CARD:
        module = build()
    return module.to(dtype).requires_grad_(False).eval()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_CARD)
