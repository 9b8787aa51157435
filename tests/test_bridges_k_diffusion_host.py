"""Our plans and networks beside k-diffusion itself, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from k_diffusion_runs import EXACT, HIGH, LOW, SCHEDULE, SHAPE, budget, network, noise, toy
from torch import Tensor

import headstart as hs
from headstart.bridges.k_diffusion import denoiser, sample_plan


@pytest.fixture
def host() -> Any:
    """k-diffusion's samplers and denoisers."""
    reason = "needs k-diffusion: its own samplers are the oracle"
    pytest.importorskip("k_diffusion.external", reason=reason)
    return pytest.importorskip("k_diffusion")


# ------------------------------------------------------------------ beside k-diffusion itself


def theirs(host: Any, prediction: str, quantize: bool = False) -> Any:
    """Its own denoiser of the same network, in float64."""
    kinds = {"eps": "DiscreteEpsDDPMDenoiser", "v": "DiscreteVDDPMDenoiser"}
    table = torch.from_numpy(SCHEDULE.alphas_cumprod.copy())
    return getattr(host.external, kinds[prediction])(network, table, quantize)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_our_denoiser_is_its_discrete_denoiser(host: Any, prediction: str, quantize: bool) -> None:
    ours = denoiser(network, SCHEDULE, prediction, quantize=quantize)
    wrapper = theirs(host, prediction, quantize)
    assert torch.equal(ours.sigmas, wrapper.sigmas.float())
    assert (
        ours.sigma_max == wrapper.sigma_max.float() and ours.sigma_min == wrapper.sigma_min.float()
    )
    assert (ours.get_sigmas(12) - wrapper.get_sigmas(12)).abs().max() <= 8 * 2.0**-24 * HIGH
    for level in (LOW, 0.0517, 0.77, 2.0, 9.1, HIGH):
        sigma = torch.full((3,), level, dtype=torch.float64)
        actual, expected = (
            ours(level * noise(), sigma, EXACT),
            wrapper(level * noise(), sigma, cond=EXACT),
        )
        # A timestep is told in float32, a rounding of at most 1 in the network's 0.5*t/1000.
        assert (actual - expected).abs().max() <= (2.0**-24 + 2.0**-45) * max(level, 1.0)


@pytest.mark.parametrize(
    "sampler", ["euler", "dpmpp_2m", "heun", "dpm_2", "lms", "euler_ancestral"]
)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_its_samplers_take_our_denoiser_for_theirs(
    host: Any, sampler: str, prediction: str
) -> None:
    run = getattr(host.sampling, f"sample_{sampler}")
    sigmas = host.sampling.get_sigmas_karras(9, LOW, HIGH * (1 - 1e-6)).double()
    ends: list[Tensor] = []
    for d in (denoiser(network, SCHEDULE, prediction), theirs(host, prediction)):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            ends.append(run(d, HIGH * noise(), sigmas, {"cond": EXACT}, disable=True))
    # Timesteps in float32: 2^-24 of a network of size 1, times sigma, in each of at most 18 calls.
    assert (ends[0] - ends[1]).abs().max() <= 18 * 2.0**-24 * HIGH


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("update", ["euler", "ancestral", "dpmpp_2m", "dpmpp_2m_sde"])
def test_our_rows_are_its_samplers_on_its_own_levels(host: Any, update: str, spacing: str) -> None:
    """Every x that a row starts from, and the end. DPM++ looks back: a row makes an error at most
    q + (1 - q)*2*0.8/(1 + sigma) times as large, which over these levels is less than 3."""
    sigmas_of = getattr(host.sampling, f"get_sigmas_{spacing}")
    levels = sigmas_of(9, torch.tensor(LOW).double(), torch.tensor(HIGH).double()).double()
    names = {"ancestral": "euler_ancestral"}
    run = getattr(host.sampling, f"sample_{names.get(update, update)}")
    stochastic = {} if update in ("euler", "dpmpp_2m") else {"noise_sampler": _noise()}
    x, states = HIGH * noise(), [list[dict[str, Any]](), list[dict[str, Any]]()]
    expected = run(toy, x, levels, None, states[0].append, True, **stochastic)
    again = {} if not stochastic else {"noise_sampler": _noise()}
    latents = sample_plan(
        toy, x.float(), levels, None, states[1].append, True, update=update, **again
    )
    limit = budget(9, x.abs().max()) * (3 if "dpmpp" in update else 1)
    for one, other in zip(*states, strict=True):
        assert one["i"] == other["i"] and np.float32(one["sigma"]) == other["sigma"]
        assert (one["x"] - other["x"]).abs().max() <= limit
        assert (one["denoised"] - other["denoised"]).abs().max() <= limit
    assert (latents - expected).abs().max() <= limit


def _noise() -> Callable[[Tensor, Tensor], Tensor]:
    """The same draws for whoever asks first."""
    generator = torch.Generator().manual_seed(8)
    return lambda *_: torch.randn(3, *SHAPE, generator=generator).double()


@pytest.mark.parametrize("steps", [1, 2, 10, 30])
def test_our_named_spacings_are_its_levels(host: Any, steps: int) -> None:
    """Its ramps are float32: seven powers of a few roundings."""
    for name in ("karras", "exponential"):
        sigmas = getattr(host.sampling, f"get_sigmas_{name}")(steps, LOW, HIGH)[:-1].numpy()
        ours = SCHEDULE.points(steps, hs.Spacing(name)).sigmas
        assert np.abs(sigmas / ours - 1).max() <= 40 * 2.0**-24
