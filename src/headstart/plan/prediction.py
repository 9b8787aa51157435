"""What a network's raw output F means:  x0 = c_skip*x + c_out*F,  F = network(c_in*x)."""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

from headstart.errors import PlanError


class Scalings(NamedTuple):
    """Coefficients at one noise level of a state x = x0 + sigma*eps.

    c_in is 1/sqrt(1 + sigma^2), but for FLOW, whose networks see z = x/(1 + sigma), and for EDM.
    """

    c_in: float
    c_skip: float
    c_out: float


class Prediction(Enum):
    """The training target. The names in model files (epsilon, v_prediction, sample) work too.

    d is the standard deviation of the latents that an EDM network was trained for.

    EPS  F = eps                          x0 = x - sigma*F               arXiv:2006.11239, eq. 11
    V    F = (eps - sigma*x0)*c_in        x0 = c_in^2*x - sigma*c_in*F   arXiv:2202.00512, section 4
    X0   F = x0                           x0 = F
    FLOW F = eps - x0                     x0 = (x - sigma*F)/(1 + sigma)   arXiv:2209.03003, eq. 1
    EDM  F = (x0 - d^2 r^2 x)/(d r sigma) x0 = d^2 r^2 x + sigma d r F, r = 1/sqrt(sigma^2 + d^2) =
         c_in                             arXiv:2206.00364, table 1
    EDM_V  the same with -F: CosXL, and diffusers' EDM schedulers with v_prediction
    """

    EPS = "eps"
    V = "v"
    X0 = "x0"
    FLOW = "flow"
    EDM = "edm"
    EDM_V = "edm_v"

    @classmethod
    def _missing_(cls, value: object) -> Prediction:
        if isinstance(value, str) and value in _NAMES:
            return cls[_NAMES[value]]
        names = ", ".join(map(repr, [*(member.value for member in cls), *_NAMES]))
        raise PlanError(f"unknown prediction {value!r}: expected one of {names}")

    def scalings(self, sigma: float, sigma_data: float = 1.0) -> Scalings:
        """The coefficients at a finite level sigma >= 0; `sigma_data` is EDM's d.

        Raises PlanError for another level.
        """
        if not (math.isfinite(sigma) and sigma >= 0):
            raise PlanError(f"sigma must be finite and not negative, not {sigma!r}")
        c_in = 1.0 / math.sqrt(1.0 + sigma * sigma)
        match self:
            case Prediction.EPS:
                return Scalings(c_in, 1.0, -sigma)
            case Prediction.V:
                return Scalings(c_in, 1.0 / (1.0 + sigma * sigma), -sigma * c_in)
            case Prediction.X0:
                return Scalings(c_in, 0.0, 1.0)
            case Prediction.FLOW:
                share = 1.0 / (1.0 + sigma)
                return Scalings(share, share, -sigma * share)
            case Prediction.EDM | Prediction.EDM_V:
                c_in = 1.0 / math.hypot(sigma, sigma_data)
                c_out = sigma * sigma_data * c_in
                sign = 1.0 if self is Prediction.EDM else -1.0
                return Scalings(c_in, (sigma_data * c_in) ** 2, sign * c_out)


_NAMES = {"epsilon": "EPS", "v_prediction": "V", "sample": "X0", "flow_prediction": "FLOW"}
