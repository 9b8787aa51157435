"""Reference kernels: plain torch, float32, one correctly rounded operation at a time.

    x0 = c_skip*x + c_out*F      x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n

No `alpha=`, `addcmul` or `lerp`: torch may contract those into fused multiply-adds, and then two
machines disagree in the last bit. The order of the operations here is the definition that every
other implementation must reproduce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from headstart_kernels import philox
from headstart_kernels.table import Row, host_row

_WORD = 0xFFFFFFFF
# Rows of this many Philox blocks stay in a 2 MiB cache: 20 ms instead of 40 ms for 16 x 65536.
_CPU_BLOCKS = 1 << 15


def fused_step(
    x: Tensor,
    f_cond: Tensor,
    table: Tensor,
    step: int | Tensor,
    f_uncond: Tensor | None,
    guidance: Tensor | None,
    noise: Tensor | None,
    x0_prev: Tensor | None,
) -> tuple[Tensor, Tensor]:
    row = _row(table, step)
    f = _guided(x, f_cond, f_uncond, row.guidance if guidance is None else guidance)
    x0 = _plus(row.c_out * f, row.c_skip, lambda: x)
    x_next = _plus(x0, row.keep, lambda: x - x0)
    if x0_prev is not None:
        x_next = _plus(x_next, row.carry, lambda: x0 - x0_prev)
    if noise is not None:
        x_next = _plus(x_next, row.add, lambda: noise)
    return (x0.clone() if x_next is x0 else x_next), x0


def scale_input(x: Tensor, table: Tensor, step: int | Tensor, dtype: torch.dtype) -> Tensor:
    return (x * _row(table, step).c_in).to(dtype)


def philox_normal(
    seeds: Tensor, samples: Tensor, step: int | Tensor, shape: Sequence[int]
) -> Tensor:
    count = prod(shape)
    rows = batch = len(seeds)
    if seeds.device.type == "cpu":
        rows = max(1, min(batch, _CPU_BLOCKS // -(-count // 4)))
    parts = [
        _normals(seeds[i : i + rows], samples[i : i + rows], step, count)
        for i in range(0, batch, rows)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(batch, *shape)


def philox4x32_10(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words for each counter; words, counters and keys are int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    # m - 2^32 keeps a*m inside int64: the low words agree, and the high word is short by a.
    m0, m1 = (m - (1 << 32) for m in philox.MULTIPLIERS)
    for _ in range(philox.ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        high0, high1 = (p0 >> 32) + c0, (p1 >> 32) + c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _WORD, high0 ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + philox.WEYL[0]) & _WORD, (k1 + philox.WEYL[1]) & _WORD
    return c0, c1, c2, c3


def preview_rgb(x0: Tensor, factors: Tensor, bias: Tensor, upscale: int) -> Tensor:
    pixels = bias.view(1, 3, 1, 1)
    for channel, weight in enumerate(factors.unbind()):
        pixels = pixels + x0[:, channel : channel + 1].float() * weight.view(1, 3, 1, 1)
    rgb = decode_u8(pixels)
    if upscale == 1:
        return rgb
    batch, height, width, _ = rgb.shape
    grid = rgb.view(batch, height, 1, width, 1, 3).expand(-1, -1, upscale, -1, upscale, -1)
    return grid.reshape(batch, height * upscale, width * upscale, 3)


def decode_u8(pixels: Tensor) -> Tensor:
    # Clamp before the cast: what a float outside 0..255 becomes as uint8 differs between devices.
    unit = pixels.float().nan_to_num(nan=-1.0).clamp(-1.0, 1.0)
    return (unit * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _row(table: Tensor, step: int | Tensor) -> Row[float] | Row[Tensor]:
    if isinstance(step, Tensor):
        # Not table[step]: indexing with a 0-d tensor reads it back to the host.
        return Row(*table.index_select(0, step.reshape(1))[0].unbind())
    if table.device.type == "cpu":
        return host_row(table, step)
    return Row(*table[step].unbind())


def _guided(x: Tensor, f_cond: Tensor, f_uncond: Tensor | None, guidance: float | Tensor) -> Tensor:
    f_cond = _float_like(x, f_cond)
    if f_uncond is None or (not isinstance(guidance, Tensor) and guidance == 1.0):
        return f_cond
    f_uncond = _float_like(x, f_uncond)
    if not isinstance(guidance, Tensor):
        return f_uncond + guidance * (f_cond - f_uncond)
    scale = guidance.view(-1, *(1,) * (x.ndim - 1))
    return torch.where(scale == 1.0, f_cond, f_uncond + scale * (f_cond - f_uncond))


def _float_like(x: Tensor, f: Tensor) -> Tensor:
    """f in float32 and in x's memory layout, so that x' and x0 have x's layout too."""
    return f.float() if f.stride() == x.stride() else torch.empty_like(x).copy_(f)


def _plus(total: Tensor, coefficient: float | Tensor, term: Callable[[], Tensor]) -> Tensor:
    """total + coefficient*term; exactly total where the coefficient is 0, whatever the term is."""
    if not isinstance(coefficient, Tensor):
        return total if coefficient == 0.0 else total + coefficient * term()
    return torch.where(coefficient == 0.0, total, total + coefficient * term())


def _normals(seeds: Tensor, samples: Tensor, step: int | Tensor, count: int) -> Tensor:
    seeds, samples = seeds.view(-1, 1), samples.view(-1, 1)
    block = torch.arange(-(-count // 4), device=seeds.device)
    zero = torch.zeros_like(seeds)
    counter = (block, zero + step + 1, samples, zero)
    words = philox4x32_10(counter, (seeds & _WORD, (seeds >> 32) & _WORD))
    radius = _sqrt(_minus_two_log(torch.stack(words[0::2])))
    cosine, sine = _cos_sin(torch.stack(words[1::2]))
    pairs = torch.stack((radius * cosine, radius * sine), -1)
    return pairs.permute(1, 2, 0, 3).flatten(1)[:, :count]


def _minus_two_log(word: Tensor) -> Tensor:
    upper = (philox.UPPER - 1 - word) >> 63
    u = ((word ^ upper) & _WORD).to(torch.float32) * 2.0**-32 + 2.0**-33
    bits, mask = u.view(torch.int32), upper.to(torch.int32)
    exponent = (bits - philox.TWO_THIRDS_BITS) >> 23
    fraction = (bits - (exponent << 23)).view(torch.float32) - 1.0
    f = _choose(mask, (-u).view(torch.int32), fraction.view(torch.int32)).view(torch.float32)
    series = f * (f * (f * _horner(philox.LOG, f) + 1.0) - 2.0)
    return series + (exponent & ~mask).to(torch.float32) * philox.MINUS_2_LN_2


def _sqrt(x: Tensor) -> Tensor:
    # torch's float32 sqrt on a CPU can be 1 ulp off (measured: 1 value in 6; its vector library is
    # not correctly rounded). Through float64 it is right: no float32 square root lies closer than
    # 2^-50 to a rounding boundary, so an error of one float64 ulp cannot cross it.
    return x.double().sqrt().float()


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    quarter = (word + (1 << 29)) >> 30
    t = (word - (quarter << 30)).to(torch.float32) * 2.0**-30
    square = t * t
    sine = (t * _horner(philox.SIN, square)).view(torch.int32)
    cosine = (square * _horner(philox.COS, square) + 1.0).view(torch.int32)
    quarter = quarter.to(torch.int32)
    odd = -(quarter & 1)
    real = _choose(odd, sine, cosine) ^ (((quarter + 1) & 2) << 30)
    imaginary = _choose(odd, cosine, sine) ^ ((quarter & 2) << 30)
    return real.view(torch.float32), imaginary.view(torch.float32)


def _choose(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Bits of `one` where the mask is all ones, else of `other`; torch.where takes 15 times longer
    on a CPU."""
    return other ^ ((one ^ other) & mask)


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    total = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total.mul_(x).add_(coefficient)
    return total
