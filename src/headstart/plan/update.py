"""The update rules, one function each:  x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple, NoReturn

from headstart.errors import PlanError
from headstart.plan.prediction import Scalings
from headstart.plan.spacing import Process


class Coefficients(NamedTuple):
    """keep of (x - x0), add of fresh unit noise, carry of (x0 - previous x0)."""

    keep: float
    add: float
    carry: float = 0.0


class Transition(NamedTuple):
    """The inputs of a rule: the step from `sigma` down to `sigma_next`.

    On the last row `sigma_next` is the plan's end, 0 by default. `timestep_next` is set only for
    TCD, the only rule that reads it. `sigma_before` is the level of the row before, if the same
    model and rule ran it, else None: then there is no x0 to look back to. `eta` and `gamma` are the
    leg's; `position` is the row's index among the `length` rows of the same model and rule.
    """

    schedule: Process
    sigma: float
    sigma_next: float
    timestep_next: float
    sigma_before: float | None
    eta: float
    gamma: float
    position: int
    length: int


class Update(Enum):
    """How a row goes from sigma to sigma_next; s = sigma, s' = sigma_next, q = s'/s.

    EULER     keep q. One Euler step of dx/dsigma = (x - x0)/sigma (arXiv:2206.00364, eq. 4), which
              is DDIM with eta 0.
    DDIM      keep q*sqrt(1 - eta^2 (1 - q^2)), add eta*s'*sqrt(1 - q^2) (arXiv:2010.02502, eq. 12
              and 16, divided by sqrt(a')).
    ANCESTRAL keep q^2, add s'*sqrt(1 - q^2): DDIM with eta 1, the DDPM posterior. SDXL-Turbo.
    RENOISE   keep 0, add s': x0 under fresh noise (arXiv:2303.01469, alg. 1). LCM, DMD2.
    TCD       keep r/s, add sqrt(s'^2 - r^2), with r the level of timestep floor((1 - gamma)*t')
              (arXiv:2402.19159, strategic stochastic sampling). TCD, Hyper-SD.
    DPMPP_2M  keep q, carry (1 - q)*log(s/s')/(2*log(s_prev/s)) (arXiv:2211.01095, alg. 2). First
              order where there is no previous x0 and where s' = 0, as diffusers'
              `lower_order_final` has it.
    DPMPP_2M_SDE  keep q^2, carry (1 - q^2)*log(s/s')/(2*log(s_prev/s)), add s'*sqrt(1 - q^2): the
              same with fresh noise (arXiv:2211.01095 as an SDE, midpoint; k-diffusion's eta 1).
    DPMPP_2S  steps in twos: keep q, then keep q, carry q (1 - q0) - (1 - q q0)(1 - 1/(2 r)), with
              q0 = s/s_prev and r = log(1/q0)/log(1/(q q0)), which is DPM-Solver++ 2S from s_prev
              (arXiv:2211.01095, alg. 1) written for the x in between. The last is of first order.
    """

    EULER = "euler"
    DDIM = "ddim"
    ANCESTRAL = "ancestral"
    RENOISE = "renoise"
    TCD = "tcd"
    DPMPP_2M = "dpmpp_2m"
    DPMPP_2M_SDE = "dpmpp_2m_sde"
    DPMPP_2S = "dpmpp_2s"

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        names = ", ".join(repr(member.value) for member in cls)
        raise PlanError(f"unknown update {value!r}: expected one of {names}")

    def coefficients(self, transition: Transition) -> Coefficients:
        """The coefficients of one transition, in float64."""
        return _RULES[self](transition)


def consistency_boundary(scalings: Scalings, timestep: float) -> Scalings:
    """Fold the boundary condition x0' = b_out*x0 + b_skip*c_in*x into the row (arXiv:2310.04378).

    b_skip = d^2/((10 t)^2 + d^2), b_out = 10 t/sqrt((10 t)^2 + d^2), d = 0.5: the numbers LCM's
    networks were distilled with. b_skip is 2.5e-9 at t = 999 and 3.7e-8 at t = 259.
    """
    data, scaled = 0.5, 10.0 * timestep
    b_skip = data**2 / (scaled**2 + data**2)
    b_out = scaled / math.sqrt(scaled**2 + data**2)
    c_in, c_skip, c_out = scalings
    return Scalings(c_in, b_out * c_skip + b_skip * c_in, b_out * c_out)


def _euler(step: Transition) -> Coefficients:
    return Coefficients(keep=step.sigma_next / step.sigma, add=0.0)


def _ddim(step: Transition) -> Coefficients:
    return _ancestral(step, step.eta)


def _ancestral(step: Transition, eta: float = 1.0) -> Coefficients:
    q = step.sigma_next / step.sigma
    share = 1.0 - q * q
    add = eta * step.sigma_next * math.sqrt(share)
    return Coefficients(q * math.sqrt(1.0 - eta**2 * share), add)


def _renoise(step: Transition) -> Coefficients:
    return Coefficients(keep=0.0, add=step.sigma_next)


def _tcd(step: Transition) -> Coefficients:
    if step.sigma_next == 0.0:
        return Coefficients(keep=0.0, add=0.0)
    # For products that are exactly whole: (1 - 0.3) * 90 is 62.99999999999999 in float64.
    target = math.floor((1.0 - step.gamma) * step.timestep_next + 1e-6)
    # A leg with its own sigmas can have that level above the row's end.
    target_sigma = min(step.schedule.sigma(target), step.sigma_next)
    add = math.sqrt(step.sigma_next**2 - target_sigma**2)
    return Coefficients(target_sigma / step.sigma, add)


def _dpmpp_2m(step: Transition) -> Coefficients:
    q = step.sigma_next / step.sigma
    return Coefficients(keep=q, add=0.0, carry=_second_order(step, 1.0 - q))


def _dpmpp_2m_sde(step: Transition) -> Coefficients:
    q = step.sigma_next / step.sigma
    add = step.sigma_next * math.sqrt(1.0 - q * q)
    return Coefficients(keep=q * q, add=add, carry=_second_order(step, 1.0 - q * q))


def _dpmpp_2s(step: Transition) -> Coefficients:
    q = step.sigma_next / step.sigma
    is_second = step.position % 2 == 1 and step.position < step.length - 1
    if step.sigma_before is None or not is_second:
        return Coefficients(keep=q, add=0.0)
    q0 = step.sigma / step.sigma_before
    ratio = math.log(q0) / math.log(q * q0)
    carry = q * (1.0 - q0) - (1.0 - q * q0) * (1.0 - 1.0 / (2.0 * ratio))
    return Coefficients(keep=q, add=0.0, carry=carry)


def _second_order(step: Transition, share: float) -> float:
    """share/(2r), r = log(s_prev/s)/log(s/s'), of the slope between the last two x0."""
    if step.sigma_before is None or step.sigma_next == 0.0:
        return 0.0
    ratio = math.log(step.sigma_before / step.sigma) / -math.log(step.sigma_next / step.sigma)
    return share / (2.0 * ratio)


_RULES: Mapping[Update, Callable[[Transition], Coefficients]] = {
    Update.EULER: _euler,
    Update.DDIM: _ddim,
    Update.ANCESTRAL: _ancestral,
    Update.RENOISE: _renoise,
    Update.TCD: _tcd,
    Update.DPMPP_2M: _dpmpp_2m,
    Update.DPMPP_2M_SDE: _dpmpp_2m_sde,
    Update.DPMPP_2S: _dpmpp_2s,
}
