"""Sequences of levels from the highest to the lowest, with the names that other samplers use."""

from __future__ import annotations

import math
from collections.abc import Mapping

from headstart.errors import PlanError
from headstart.lazy import FloatArray, np

RHO = 7.0
"""Karras et al.'s choice for sampling (arXiv:2206.00364, table 1)."""

AYS: Mapping[str, tuple[float, ...]] = {
    "ays-sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays-sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
"""Levels optimised for ten steps (arXiv:2404.14507; the numbers are those of its project page)."""


def karras(steps: int, highest: float, lowest: float, rho: float = RHO) -> FloatArray:
    """(s_max^(1/rho) + i/(n - 1) (s_min^(1/rho) - s_max^(1/rho)))^rho (arXiv:2206.00364, eq. 5)."""
    top, bottom = highest ** (1.0 / rho), lowest ** (1.0 / rho)
    return (top + np.linspace(0.0, 1.0, steps) * (bottom - top)) ** rho


def exponential(steps: int, highest: float, lowest: float) -> FloatArray:
    """Levels at equal distances in log sigma, from `highest` to `lowest`."""
    return np.exp(np.linspace(math.log(highest), math.log(lowest), steps))


def align_your_steps(steps: int, table: str) -> FloatArray:
    """The first `steps` of steps + 1 levels, interpolated in log sigma between the table's."""
    logs = np.log(np.array(AYS[table]))
    positions = np.linspace(0.0, len(logs) - 1.0, steps + 1)[:-1]
    return np.exp(np.interp(positions, np.arange(len(logs)), logs))


def beta_quantile(share: FloatArray) -> FloatArray:
    """x with I_x(a, a) = share, for the Beta distribution of arXiv:2407.12173 (a = 0.6).

    By bisection on the regularised incomplete beta function, to the last bit of float64.
    """
    return np.array([_quantile(float(value)) for value in share])


def _quantile(share: float) -> float:
    if not 0.0 <= share <= 1.0:
        raise PlanError(f"a share of a distribution lies in 0 .. 1, not {share!r}")
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _incomplete(middle) < share else (low, middle)
    return high if share > 0.0 else 0.0


def _incomplete(x: float, a: float = 0.6) -> float:
    """I_x(a, a) = x^a (1 - x)^a / (a B(a, a)) * sum_n prod_k (2 a + k)/(a + 1 + k) x^n.

    The series converges fast below 1/2 (DLMF 8.17.8); above it, I_x(a, a) = 1 - I_(1-x)(a, a).
    """
    if x > 0.5:
        return 1.0 - _incomplete(1.0 - x)
    term = total = 1.0
    for n in range(200):
        term *= x * (2.0 * a + n) / (a + 1.0 + n)
        total += term
        if term < 1e-17 * total:
            break
    log_beta = 2.0 * math.lgamma(a) - math.lgamma(2.0 * a)
    return x**a * (1.0 - x) ** a / (a * math.exp(log_beta)) * total
