"""A decoder that works on one band of rows at a time: the same numbers in less memory.

    norm(x) = (x - mean) / sqrt(var + eps) * weight + bias      mean and var over all rows

Means and variances are computed first, from all bands. A 3x3 convolution reads one row above and
one below, so a band is computed together with the rows beside it; zeros are added only around the
image. `Vae.decode` says how exact the result is, `checkpoint.decoding` how much memory it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]


class Bands:
    """One image's activation [1, C, H, W] as bands of `rows` rows; the last may have fewer.

    A caller that goes through it from the top frees the bands behind it by `read`.
    """

    def __init__(self, parts: list[Tensor], rows: int, height: int) -> None:
        self.parts, self.rows, self.height, self.gone = parts, rows, height, 0

    @classmethod
    def of(cls, x: Tensor, rows: int) -> Bands:
        return cls([x[:, :, a:b] for _, a, b in spans(x.shape[2], rows)], rows, x.shape[2])

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(index, begin, end) of each band."""
        return spans(self.height, self.rows)

    def take(self, low: int, high: int) -> Tensor:
        """Rows low .. high - 1; a view if they are all in one band."""
        pieces = [
            self.parts[i][:, :, max(low - begin, 0) : high - begin]
            for i, begin, end in self.spans()
            if begin < high and low < end
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def apply(self, begin: int, end: int, layer: Layer) -> Tensor:
        """Rows begin .. end - 1 of layer(x), for a layer that reads one row above and one below."""
        low, high = max(0, begin - 1), min(self.height, end + 1)
        return layer(self.take(low, high))[:, :, begin - low : end - low]

    def read(self, row: int) -> None:
        """Free the bands above this row, and after the last row all of them."""
        above = len(self.parts) if row >= self.height - 1 else row // self.rows
        for i in range(self.gone, above):
            self.parts[i] = self.parts[i].new_empty(0)
        self.gone = max(self.gone, above)


def spans(height: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """(index, begin, end) of each band of a height."""
    begins = range(0, height, rows)
    return ((i, begin, min(begin + rows, height)) for i, begin in enumerate(begins))


def normed(norm: nn.GroupNorm, x: Bands) -> Layer:
    """The group norm over all rows, as a function of a band. Statistics are in float32."""
    mean, var = _moments(x, norm.num_groups)
    width = norm.num_channels // norm.num_groups  # of a group
    mean, var = mean.repeat_interleave(width), var.repeat_interleave(width)
    weight, bias = norm.weight.to(mean.dtype), norm.bias.to(mean.dtype)

    def apply(band: Tensor) -> Tensor:
        return F.batch_norm(band, mean, var, weight, bias, False, 0.0, norm.eps)

    return apply


def silu_normed(norm: nn.GroupNorm, x: Bands) -> Layer:
    apply = normed(norm, x)
    return lambda band: F.silu(apply(band), inplace=True)


def _moments(x: Bands, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [G] of all rows, merged from the bands' own (Chan et al. 1979, eq. 2.1)."""
    moments: list[tuple[Tensor, Tensor]] = []
    for part in x.parts:
        wide = part if part.dtype == torch.float64 else part.float()
        wide = wide.reshape(groups, -1, *wide.shape[2:])
        moments.append(torch.var_mean(wide, (1, 2, 3), correction=0))
    vars, means = (torch.stack(values) for values in zip(*moments, strict=True))
    last = x.height - x.rows * (len(x.parts) - 1)

    def overall(values: Tensor) -> Tensor:
        """The mean of [bands, G], each band weighted by its number of rows."""
        return (values[:-1].sum(0) * x.rows + values[-1] * last) / x.height

    mean = overall(means)
    return mean, overall(vars + (means - mean).square())
