"""Prompts into conditioning: every distinct text once, at each strength that an adapter has on it.

cond[i] = encode(prompt of image i; strengths of image i)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from headstart.adapters.attached import Attached
from headstart.adapters.strength import Strength
from headstart.interfaces import Conditioning
from headstart.networks.text import ClipText


def encode_prompts(
    text: ClipText,
    prompts: Sequence[str],
    negative: str | None,
    size: tuple[int, int],
    adapters: Attached,
    acts: Mapping[str, Strength],
) -> tuple[Conditioning, Conditioning | None]:
    """(cond, uncond) for each image, both with the adapters and the tokens that they brought;
    uncond is None where `negative` is."""
    text = adapters.text or text
    strengths = adapters.text_strengths(len(prompts), acts)
    keys = [(prompt, _row(strengths, image)) for image, prompt in enumerate(prompts)]
    distinct = list(dict.fromkeys(keys))
    rows = torch.tensor([distinct.index(key) for key in keys], device=_device(text))
    texts = [prompt for prompt, _ in distinct]
    if strengths is None:
        own, others = None, negative
    else:  # each negative prompt at its image's strengths too
        own = strengths[[keys.index(key) for key in distinct]].to(rows.device)
        others = None if negative is None else [negative] * len(texts)
    if others is None:
        with adapters.acting(own):
            return replace(text.encode(texts, size=size)[rows], adapters=adapters), None
    with adapters.acting(None if own is None else torch.cat((own, own))):
        cond, uncond = text.encode(texts, others, size=size)
    named = partial(replace, adapters=adapters)
    return named(cond[rows]), named(uncond[rows])


def _row(strengths: Tensor | None, image: int) -> tuple[float, ...]:
    return () if strengths is None else tuple(float(value) for value in strengths[image])


def _device(text: ClipText) -> torch.device:
    return next(text.parameters()).device
