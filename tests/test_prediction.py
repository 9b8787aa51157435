"""What a network's output means: three parametrisations of one x0."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.errors import PlanError
from headstart.plan.prediction import Prediction

patient = settings(deadline=None)  # a loaded machine is not a failure
SIGMAS = st.floats(1e-3, 5e3)
VALUES = st.floats(-3.0, 3.0)


@given(sigma=SIGMAS, x0=VALUES, eps=VALUES)
@patient
def test_every_prediction_recovers_the_same_x0(sigma: float, x0: float, eps: float) -> None:
    x = x0 + sigma * eps
    alpha = 1 / (1 + sigma**2)  # alphas_cumprod, from which v is defined
    outputs = {
        Prediction.EPS: eps,
        Prediction.V: math.sqrt(alpha) * eps - math.sqrt(1 - alpha) * x0,
        Prediction.X0: x0,
    }
    for prediction, output in outputs.items():
        c_in, c_skip, c_out = prediction.scalings(sigma)
        assert c_in == pytest.approx(math.sqrt(alpha), rel=1e-15)
        # eps subtracts two numbers of size sigma*eps; 4 roundings of 1.1e-16 each
        assert c_skip * x + c_out * output == pytest.approx(x0, abs=1e-15 * (4 + 16 * sigma))


@given(sigma=SIGMAS, x0=VALUES, eps=VALUES)
@patient
def test_a_flows_network_sees_the_mixture_and_gives_its_velocity(
    sigma: float, x0: float, eps: float
) -> None:
    t = sigma / (1 + sigma)
    c_in, c_skip, c_out = Prediction.FLOW.scalings(sigma)
    x = x0 + sigma * eps
    assert c_in * x == pytest.approx((1 - t) * x0 + t * eps, abs=1e-14)
    assert c_skip * x + c_out * (eps - x0) == pytest.approx(x0, abs=1e-14)


def test_without_noise_x_is_x0_whatever_the_network_says() -> None:
    for prediction in (Prediction.EPS, Prediction.V):
        assert prediction.scalings(0.0) == (1.0, 1.0, 0.0)
    assert Prediction.X0.scalings(0.0) == (1.0, 0.0, 1.0)


@given(sigma=SIGMAS)
@patient
def test_v_keeps_unit_variance_at_every_level(sigma: float) -> None:
    """c_skip^2 (1 + sigma^2) + c_out^2 = 1: neither part blows up, unlike eps at a high level."""
    _, c_skip, c_out = Prediction.V.scalings(sigma)
    assert c_skip**2 * (1 + sigma**2) + c_out**2 == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eps", Prediction.EPS),
        ("epsilon", Prediction.EPS),
        ("v", Prediction.V),
        ("v_prediction", Prediction.V),
        ("x0", Prediction.X0),
        ("sample", Prediction.X0),
        ("flow", Prediction.FLOW),
        ("flow_prediction", Prediction.FLOW),
    ],
)
def test_names_in_model_files_are_understood(name: str, expected: Prediction) -> None:
    assert Prediction(name) is expected


@pytest.mark.parametrize("name", ["score", "", None, 1, ["v"]])
def test_an_unknown_prediction_is_refused_with_the_known_ones(name: object) -> None:
    with pytest.raises(PlanError, match=r"unknown prediction .*'flow', 'edm', 'edm_v', 'eps"):
        Prediction(name)


@pytest.mark.parametrize("sigma", [math.nan, math.inf, -1.0])
def test_a_level_that_is_no_level_is_refused(sigma: float) -> None:
    with pytest.raises(PlanError, match="sigma must be finite"):
        Prediction.V.scalings(sigma)
