"""Low-rank changes beside layers: y[b] += s[b]*scale*up(down(x[b])), from fixed buffers.

Strengths are read while the network runs, so they may differ by sample, row and adapter. An adapter
is copied into the buffers, so a captured graph that reads them works for the next adapter too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.adapters.delta import Delta, LowRank
from headstart.adapters.layers import Layer, Matrix
from headstart.networks.fusion import fused
from headstart_kernels import low_rank_add


@final
class Slot(nn.Module):
    """Buffers for a low-rank change of one layer, up to `rank`.

    down [R, i(, kh, kw)] and up [o, R] in `dtype`, scale [] float32. Unused ranks are 0.
    """

    down: Tensor
    up: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        device = weight.device
        down = torch.zeros((rank, *weight.shape[1:]), dtype=dtype, device=device)
        up = torch.zeros((len(weight), rank), dtype=dtype, device=device)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("scale", torch.zeros((), device=device), persistent=False)

    @property
    def rank(self) -> int:
        return len(self.down)

    def fill(self, delta: LowRank | None) -> None:
        """Copy `delta` in, whose rank fits; None clears the slot."""
        if delta is None:
            self.scale.zero_()
            return
        down, up, rank = self.down, self.up, delta.rank
        if rank < self.rank:
            down[rank:].zero_()
            up[:, rank:].zero_()
            down, up = down[:rank], up[:, :rank]
        down.copy_(delta.down)
        up.copy_(delta.up)
        self.scale.fill_(delta.scale)

    def copy(self) -> Slot:
        slot = Slot(self.down, 0, self.down.dtype)
        slot.down, slot.up = self.down.clone(), self.up.clone()
        slot.scale = self.scale.clone()
        return slot

    def add_to(self, y: Tensor, x: Tensor, layer: Matrix, strength: Tensor) -> None:
        """y += strength*scale*up(down(x)), in place."""
        conv = isinstance(layer, nn.Conv2d)
        if fused(y) and y.dtype == x.dtype == self.down.dtype and (rows := _rows(layer, y, x)):
            strengths = (strength * self.scale).expand(len(y))
            low_rank_add(*rows, self.down.flatten(1), self.up, strengths)
            return
        if conv:
            h = F.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation)
        else:
            h = F.linear(x, self.down)
        h *= (strength * self.scale).to(h.dtype).view(-1, *[1] * (h.ndim - 1))
        if conv:
            y += F.conv2d(h, self.up[:, :, None, None])
        elif y.is_contiguous():  # one pass over y
            y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, self.rank), self.up.t())
        else:
            y += F.linear(h, self.up)


def _rows(layer: Matrix, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """y and x with the channels last, where the layer is one matrix product on them: a linear
    layer, or a 1x1 convolution of channels-last images, without a copy. None for any other."""
    if isinstance(layer, nn.Linear):
        return y, x
    pointwise = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)
    if not pointwise or layer.groups != 1:
        return None
    rows = y.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
    return rows if all(row.is_contiguous() for row in rows) else None


@final
class Slots(nn.Module):
    """One adapter's slots in one network: layer -> Slot."""

    def __init__(self, by_path: Mapping[str, Slot]) -> None:
        super().__init__()
        self.by_path = dict(by_path)
        self.slots = nn.ModuleList(by_path.values())

    def fits(self, deltas: Mapping[str, Delta]) -> bool:
        """Whether the existing slots can hold `deltas`."""
        slots = self.by_path
        return all(
            isinstance(delta, LowRank) and path in slots and delta.rank <= slots[path].rank
            for path, delta in deltas.items()
        )

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def of(
        cls,
        layers: Mapping[str, Layer],
        dtypes: Mapping[str, torch.dtype],
        deltas: Mapping[str, Delta],
    ) -> Slots:
        """New slots with these changes, in the dtypes that the layers compute in."""
        slots: dict[str, Slot] = {}
        for path, delta in deltas.items():
            assert isinstance(delta, LowRank)
            slots[path] = Slot(layers[path].weight, delta.rank, dtypes[path])
            slots[path].fill(delta)
        return cls(slots)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fill(self, deltas: Mapping[str, Delta]) -> None:
        """Copy `deltas` in, which fit, and clear the other slots."""
        for path, slot in self.by_path.items():
            delta = deltas.get(path)
            slot.fill(delta if isinstance(delta, LowRank) else None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(self) -> Slots:
        """The same changes in memory of their own."""
        return Slots({path: slot.copy() for path, slot in self.by_path.items()})
