"""States, a decoder that needs no weights, and its pictures, for the tests of previews."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import headstart as hs
from headstart.traces.decoders import Decoder, Picture


def state(step: int, value: float = 0.0, batch: int = 2) -> hs.State:
    x = torch.full((batch, 4, 3, 2), value)
    return hs.State(step, x, x)


def decoder(draw: Callable[[Tensor], Picture]) -> Decoder:
    return Decoder(name="tiny", space=None, channels=4, scale=1, draw=draw)


def grey(x0: Tensor) -> Picture:
    """One level a sample: its first value."""
    level = x0[:, 0, 0, 0].to(torch.uint8).view(-1, 1, 1, 1)
    rgb = level.expand(-1, *x0.shape[2:], 3).contiguous()
    return Picture(rgb, torch.isfinite(x0).flatten(1).all(1))
