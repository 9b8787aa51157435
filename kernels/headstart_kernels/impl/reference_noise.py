"""Reference noise: Philox 4x32-10 and Box-Muller in plain torch, the same bits on every device.

n = philox_normal(seeds, samples, row), one correctly rounded operation at a time; the constants,
the polynomials and their errors are in `headstart_kernels.philox`. This is the definition; for
tensors on a CPU and a row that is a number, `host_noise` gives its bits in a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from headstart_kernels import philox
from headstart_kernels.host_noise import normals
from headstart_kernels.observers import on_host

_WORD = 0xFFFFFFFF


def philox_normal(
    seeds: Tensor, samples: Tensor, step: int | Tensor, shape: Sequence[int]
) -> Tensor:
    if on_host(seeds, samples) and not isinstance(step, Tensor):
        return normals(seeds, samples, step, prod(shape)).view(-1, *shape)
    return by_definition(seeds, samples, step, prod(shape)).contiguous().view(-1, *shape)


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


def by_definition(seeds: Tensor, samples: Tensor, step: int | Tensor, count: int) -> Tensor:
    """[B, count]."""
    seeds, samples = seeds.view(-1, 1), samples.view(-1, 1)
    step = step.reshape(-1, 1) if isinstance(step, Tensor) else step
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


def _choose(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Bits of `a` where the mask is all ones, else of `b`; torch.where takes 15 times longer on a
    CPU."""
    return b ^ ((a ^ b) & mask)


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    total = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total.mul_(x).add_(coefficient)
    return total
