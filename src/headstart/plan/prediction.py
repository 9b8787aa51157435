"""What a network's raw output F means:  x0 = c_skip*x + c_out*F,  F = network(c_in*x)."""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

from headstart.errors import PlanError


class Scalings(NamedTuple):
    """Coefficients at one noise level of a state x = x0 + sigma*eps.

    c_in is 1/sqrt(1 + sigma^2), but for FLOW, whose networks see z = x/(1 + sigma).
    """

    c_in: float
    c_skip: float
    c_out: float


class Prediction(Enum):
    """The training target; the names in model files (epsilon, v_prediction, sample) are read too.

    EPS  F = eps                          x0 = x - sigma*F               arXiv:2006.11239, eq. 11
    V    F = (eps - sigma*x0)*c_in        x0 = c_in^2*x - sigma*c_in*F   arXiv:2202.00512, section 4
    X0   F = x0                           x0 = F
    FLOW F = eps - x0                     x0 = (x - sigma*F)/(1 + sigma)   arXiv:2209.03003, eq. 1
    """

    EPS = "eps"
    V = "v"
    X0 = "x0"
    FLOW = "flow"

    @classmethod
    def _missing_(cls, value: object) -> Prediction:
        if isinstance(value, str) and value in _NAMES:
            return cls[_NAMES[value]]
        known = ", ".join(repr(name) for name in (*(member.value for member in cls), *_NAMES))
        raise PlanError(f"unknown prediction {value!r}: expected one of {known}")

    def scalings(self, sigma: float) -> Scalings:
        """The coefficients at a finite level sigma >= 0. Raises PlanError for another level."""
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
                kept = 1.0 / (1.0 + sigma)
                return Scalings(kept, kept, -sigma * kept)


_NAMES = {"epsilon": "EPS", "v_prediction": "V", "sample": "X0", "flow_prediction": "FLOW"}
