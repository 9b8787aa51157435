"""The runner of OpenVINO: the network's numbers up to rounding; what it cannot do is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import write_lora
from networks import PARAMS, random_unet
from test_runner import Small, call
from tiny_pair import PLAN, tiny_engine
from torch import Tensor, nn

import headstart as hs
from headstart.errors import CaptureError
from headstart.interfaces import Conditioning
from headstart.networks.packed import pack, unpackable
from headstart.runner import openvino
from headstart.runner.runner import EagerRunner, choose_runner, open_runner

pytest.importorskip("openvino", reason="needs pip install 'headstart[openvino]'")


def inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(batch)
    x, context = (
        torch.randn(batch, *shape, generator=generator)
        for shape in ((4, 8, 8), (9, PARAMS.context_dim))
    )
    timesteps = torch.linspace(900, 40, batch).to(dtype)
    return x.to(dtype), timesteps, Conditioning(context.to(dtype))


def error(run: Callable[..., Tensor], exact: nn.Module, batch: int = 2) -> float:
    """Relative, in the 2-norm, to the network in float64."""
    expected = exact(*inputs(batch, torch.float64))
    got = run(*inputs(batch))
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("packed", [False, True])
def test_a_pass_is_the_networks(packed: bool) -> None:
    """Within 8 float32 errors of eager: another order of sums, and no more."""
    unet = random_unet()
    if packed and unpackable(torch.float32) is None:
        pack(unet)
    exact = copy.deepcopy(unet).double()
    assert error(open_runner("openvino", unet), exact) < 8 * error(EagerRunner(unet), exact)


def test_another_batch_and_changed_weights_are_noticed() -> None:
    """Written to in place, by another runner too, and replaced."""
    network = Small()
    run, eager = open_runner("openvino", network), EagerRunner(network)

    def check(batch: int) -> None:
        torch.testing.assert_close(run(*call(batch)), eager(*call(batch)), rtol=1e-5, atol=1e-6)

    for batch in (2, 1, 2):
        check(batch)
    with torch.no_grad():
        network.weight.neg_()
    check(2)
    with torch.no_grad():
        network.weight.mul_(0.5)
    open_runner("openvino", network)(*call(1))
    check(2)
    network.weight = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    check(2)


def test_bfloat16_is_computed_in_bfloat16() -> None:
    exact = copy.deepcopy(random_unet()).double()
    unet = random_unet().bfloat16()
    run = open_runner("openvino", unet)
    assert run.dtype is torch.bfloat16 and run(*inputs()).dtype is torch.bfloat16
    assert error(run, exact) < 8 * error(EagerRunner(unet), exact)


def test_the_programs_of_a_network_are_kept_for_its_runners_and_go_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = list[int]()
    make = openvino._program
    monkeypatch.setattr(
        openvino, "_program", lambda *args: batches.append(len(args[-1]["x_in"])) or make(*args)
    )
    network = Small()
    for batch in (1, 1, 2, 1):
        open_runner("openvino", network)(*call(batch))
    assert batches == [1, 2]
    alive = weakref.ref(network)
    del network
    gc.collect()
    assert alive() is None


def test_an_engine_draws_by_openvino_what_it_draws_by_torch() -> None:
    eager = tiny_engine("sdxl")
    run = eager.with_runner("openvino")
    done, expected = (e.sample("a fox", seeds=(1, 2), plan=PLAN) for e in (run, eager))
    torch.testing.assert_close(done.latents, expected.latents, rtol=1e-4, atol=1e-4)
    assert done.record()["machine"]["runner"] == "openvino"


def test_adapters_are_refused(tmp_path: Path) -> None:
    engine = tiny_engine("sd15").with_runner("openvino")
    engine.attach(write_lora(tmp_path, engine))
    with pytest.raises(CaptureError, match=r"adapters are attached to this UNet.*OpenVINO.*eager"):
        engine.sample("a fox", seeds=1, plan=PLAN)


class Counts(nn.Module):
    """What it does depends on values, which no exported program can have."""

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return x_in * 2 if bool(x_in.sum() > 0) else x_in


def test_a_network_that_openvino_cannot_run_is_an_error() -> None:
    with pytest.raises(CaptureError, match=r"Counts could not be converted.*runner='eager'"):
        open_runner("openvino", Counts())(*inputs())
    with pytest.raises(CaptureError, match=r"float32 or bfloat16.*torch\.float16"):
        open_runner("openvino", random_unet().half())


def test_without_the_package_the_runner_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_runner("openvino", "cpu").name == "openvino"
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(CaptureError, match=r"pip install 'headstart\[openvino\]'"):
        choose_runner("openvino", "cpu")
    with pytest.raises(hs.HeadstartError, match=r"pip install 'headstart\[openvino\]'"):
        tiny_engine("sd15").with_runner("openvino")


def test_a_gpu_has_no_runner_of_openvino() -> None:
    with pytest.raises(CaptureError, match=r"'openvino' exists on cpu alone.*'graph'"):
        choose_runner("openvino", "cuda")
