"""The claims of tests/dry once more, on a real GPU: Engine by every runner, dtype and device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_gpu import gpu_engine
from tiny_pair import PLAN, tiny_engine

import headstart as hs
from headstart.errors import HeadstartError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REQUEST: Any = {"plan": PLAN, "seeds": [3, 4]}


def close(got: hs.Trajectory, expected: hs.Trajectory, share: float) -> None:
    scale = float(expected.latents.abs().max())
    apart = float((got.latents.cpu() - expected.latents.cpu()).abs().max())
    assert apart <= share * scale, f"{apart / scale:.2e} of the largest latent"


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("runner", ["eager", "graph", "trajectory", "compiled"])
def test_every_runner_is_near_the_cpu(family: str, runner: str) -> None:
    """float32 throughout; a GPU may take TF32 for convolutions, of 2^-11, through six passes."""
    engine = gpu_engine(family, runner=runner)
    expected = tiny_engine(family).sample(["ab", "cd"], **REQUEST)
    for _ in range(2):
        close(engine.sample(["ab", "cd"], **REQUEST), expected, 6 * 2.0**-8)


@pytest.mark.parametrize("runner", ["graph", "trajectory"])
def test_captured_runs_have_the_bits_of_eager(runner: str) -> None:
    """Also where algorithms are chosen by timing: here they may not be."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        runs = [
            gpu_engine("sdxl", runner=name).sample("ab", **REQUEST) for name in ("eager", runner)
        ]
    finally:
        torch.backends.cudnn.deterministic = before
    assert torch.equal(runs[0].latents, runs[1].latents)


def test_compiled_then_captured_is_near_eager() -> None:
    """The compiler contracts and reorders: float32 roundings, not more."""
    eager, compiled = (
        gpu_engine("sdxl", runner=name).sample("ab", **REQUEST) for name in ("eager", "compiled")
    )
    close(compiled, eager, 2.0**-10)


def test_a_decoder_in_bfloat16_is_near_float32() -> None:
    """8 bits of a value each layer: more than 30 dB, and nothing that overflows."""
    vae: Any = gpu_engine("sdxl").vae
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        exact = vae.decode(latents).float()
        got = vae.to(torch.bfloat16).decode(latents.bfloat16()).float()
    square = float((got - exact).square().mean())
    peak = float(exact.max() - exact.min())
    assert got.isfinite().all() and square < peak**2 * 1e-3


def test_the_bundled_pair_with_float8_weights() -> None:
    try:
        engine = hs.Engine.demo(device="cuda", dtype="float8")
    except HeadstartError as error:
        pytest.skip(f"not in this version: {error}")
    expected = hs.Engine.demo(device="cuda").sample("a fox", seeds=[0, 1])
    got = engine.sample("a fox", seeds=[0, 1])
    # float8_e4m3 keeps 4 bits of a weight, and errors of a sum's terms average out.
    close(got, expected, 0.25)
    assert not torch.equal(got.latents, expected.latents)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_pair_on_two_gpus_has_the_bits_of_one() -> None:
    device: Any = {"base": "cuda:0", "distilled": "cuda:1"}
    try:
        engine = hs.Engine.demo(device=device, runner="eager")
    except (HeadstartError, TypeError) as error:
        pytest.skip(f"not in this version: {error}")
    expected = hs.Engine.demo(device="cuda:0", runner="eager").sample("a fox", seeds=[0, 1])
    assert torch.equal(engine.sample("a fox", seeds=[0, 1]).latents.cpu(), expected.latents.cpu())
