"""Encoded prompts of diffusers' pipelines as Conditioning; public in `bridges.diffusers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.plan.spacing import real

MASK, GUIDANCE, CHANNELS, IMAGE = "mask", "guidance", "channels", "image_context"
"""Names in `Conditioning.extra` that the networks of `bridges.diffusers` read."""


def conditioning(
    prompt_embeds: Tensor | Sequence[Tensor],
    pooled_prompt_embeds: Tensor | None = None,
    *,
    prompt_embeds_mask: Tensor | None = None,
    original_size: tuple[int, int] | None = None,
    crops_coords_top_left: tuple[int, int] = (0, 0),
    target_size: tuple[int, int] | None = None,
    guidance: float | None = None,
) -> Conditioning:
    """The result of a pipeline's `encode_prompt` as Conditioning: cond, or uncond.

    prompt_embeds         [B, L, D], or a list with one [L, D] a sample, of any lengths (Z-Image):
                          padded with zeros, with a mask
    pooled_prompt_embeds  [B, P] (SDXL, SD 3, Flux)
    prompt_embeds_mask    [B, L], 1 for text and 0 for padding (Qwen-Image)
    original_size         (height, width) in pixels; with the crop's corner and the target size (by
                          default the original one) it makes `time_ids` (SDXL)
    guidance              the input of a guidance-distilled network (Flux dev), for all samples

    For texts of different lengths see `same_length`. Raises InputError for other shapes.
    """
    _check_pooled(pooled_prompt_embeds)
    context, mask = _padded(prompt_embeds)
    mask = mask if prompt_embeds_mask is None else prompt_embeds_mask
    batch, extra = len(context), dict[str, Tensor]()
    if mask is not None:
        if mask.shape != context.shape[:2]:
            raise InputError(
                f"prompt_embeds_mask: expected {list(context.shape[:2])}, one number a token, got "
                f"{list(mask.shape)}"
            )
        extra[MASK] = mask.bool()
    if pooled_prompt_embeds is not None and len(pooled_prompt_embeds) != batch:
        raise InputError(
            f"pooled_prompt_embeds are of {len(pooled_prompt_embeds)} prompts, prompt_embeds of "
            f"{batch}: give both of the same ones"
        )
    if guidance is not None:
        value = real("guidance", guidance)
        extra[GUIDANCE] = torch.full((batch,), value, device=context.device)
    time_ids = None
    if original_size is not None:
        sizes = (*original_size, *crops_coords_top_left, *(target_size or original_size))
        time_ids = torch.tensor([sizes] * batch, dtype=torch.float32, device=context.device)
    return Conditioning(context, pooled_prompt_embeds, time_ids, extra=extra)


def same_length(*parts: Conditioning) -> tuple[Conditioning, ...]:
    """Conditionings with texts of one length, for guidance and batches.

    Shorter ones are padded with zeros; if one is padded, all get a mask.
    """
    length = max(part.context.shape[1] for part in parts)
    masked = any(MASK in part.extra or part.context.shape[1] < length for part in parts)
    results: list[Conditioning] = []
    for part in parts:
        batch, tokens, _ = part.context.shape
        extra = dict(part.extra)
        if masked:
            mask = extra.get(MASK, part.context.new_ones((batch, tokens), dtype=torch.bool))
            extra[MASK] = F.pad(mask, (0, length - tokens))
        context = F.pad(part.context, (0, 0, 0, length - tokens))
        results.append(replace(part, context=context, extra=extra))
    return tuple(results)


def _check_pooled(pooled: object) -> None:
    if pooled is None:
        return
    if isinstance(pooled, Tensor) and pooled.ndim == 2 and pooled.is_floating_point():
        return
    actual = f"{pooled.dtype} {list(pooled.shape)}" if isinstance(pooled, Tensor) else type(pooled)
    raise InputError(
        f"pooled_prompt_embeds: expected floats [B, P], got {actual}: encode_prompt returns (text, "
        "negative) of SD, Wan and Z-Image, (text, negative, pooled, negative pooled) of SDXL and "
        "SD 3, (text, pooled, ids) of Flux and (text, mask) of Qwen-Image, and each half of a "
        "guided pair is a conditioning of its own"
    )


def _padded(embeds: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[B, L, D], and a mask where lengths differ."""
    if isinstance(embeds, Tensor):
        if embeds.ndim != 3:
            raise InputError(f"prompt_embeds: expected [B, L, D], got {list(embeds.shape)}")
        return embeds, None
    value = cast("object", embeds)
    parts = cast("Sequence[object]", value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(part, Tensor) for part in parts):
        raise InputError(
            "prompt_embeds: expected [B, L, D], or one [L, D] a prompt, got "
            f"{[type(part).__name__ for part in parts]}: give what encode_prompt returned; without "
            "guidance its negative half is None"
        )
    if not embeds or any(e.ndim != 2 or e.shape[1] != embeds[0].shape[1] for e in embeds):
        raise InputError(
            "prompt_embeds: expected one [L, D] a prompt, of one width, got "
            f"{[list(e.shape) for e in embeds]}; of what encode_prompt returns give the parts"
        )
    lengths = torch.tensor([len(e) for e in embeds], device=embeds[0].device)
    context = nn.utils.rnn.pad_sequence(list(embeds), batch_first=True)
    return context, torch.arange(context.shape[1], device=context.device) < lengths[:, None]
