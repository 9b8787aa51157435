"""Whether Triton can launch is tried on an emulated GPU by the code that tries it on a real one."""

from __future__ import annotations

import warnings
from unittest import mock

import pytest
import torch
from no_triton import error_of, failing
from torch import Tensor

from evidence.ptx.on_gpu import launched
from evidence.torch_cuda import EmulatedCuda
from headstart.errors import CaptureError
from headstart.runner.capture import Program, Site
from headstart_kernels import geglu, trial
from headstart_kernels.trial import SIGNS, Sign

TRIAL = ("trial_kernel", (1, 1, 1))
GEGLU = Program("geglu", lambda inputs: (geglu(inputs["x"]),), ())


def products(count: int = 2) -> tuple[Tensor, list[Tensor]]:
    """What torch's own operators give on the host, and what is chosen on GPUs."""
    x = torch.linspace(-2, 2, 32).view(2, 16)
    return geglu(x), [geglu(x.to(f"cuda:{number}")) for number in range(count)]


def test_each_gpu_is_tried_once_with_a_kernel_that_runs(cuda: EmulatedCuda) -> None:
    with launched(cuda) as gpu, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            _, got = products()
    names = [name for name, _ in gpu.launches]
    assert names == ["trial_kernel", "geglu_kernel"] * 2 + ["geglu_kernel"] * 2
    assert all(own.is_cuda for own in got) and not trial._reasons, "nothing of it stays"


def test_it_is_tried_once_and_before_the_first_capture(cuda: EmulatedCuda) -> None:
    """A capture would refuse it, because it waits for the device."""
    tried: list[int] = []
    why_not = trial._why_not

    def seen(device: torch.device) -> str | None:
        tried.append(len(cuda.happened("capture")))
        return why_not(device)

    x = torch.ones(2, 16, device="cuda")
    with launched(cuda) as gpu, mock.patch.object(trial, "_why_not", seen):
        for _ in range(2):
            Site.of(x.device).run(GEGLU, {"x": x})
    assert tried == [0] and gpu.launches.count(TRIAL) == 1 and cuda.happened("capture")


def test_nothing_is_tried_in_a_capture_and_what_fails_there_is_raised(cuda: EmulatedCuda) -> None:
    """A graph without warm-up: torch's operators must not be recorded for good by chance."""
    x, site = torch.ones(2, 16, device="cuda"), Site.of("cuda")
    site.warmups = 0
    with launched(cuda) as gpu, failing(gpu, RuntimeError("Failed to find C compiler")):
        with pytest.raises(CaptureError, match="Failed to find C compiler"):
            site.run(GEGLU, {"x": x})
        assert not trial._reasons
        with pytest.warns(RuntimeWarning, match="Triton cannot launch"):
            geglu(x)
        (got,) = site.run(GEGLU, {"x": x})
    assert torch.equal(got.cpu(), geglu(x.cpu())) and not gpu.launches


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: sign.reason[:40])
def test_what_a_machine_lacks_is_told_in_one_warning_and_torch_computes(
    cuda: EmulatedCuda, sign: Sign
) -> None:
    with (
        launched(cuda) as gpu,
        failing(gpu, error_of(sign)),
        pytest.warns(RuntimeWarning, match="Triton cannot launch on cuda:0") as warned,
    ):
        for _ in range(2):
            want, (got,) = products(1)
            assert torch.equal(got.cpu(), want)
    assert len(warned) == 1 and f"{sign.reason} (" in str(warned[0].message)
    assert str(warned[0].message).endswith(sign.fix) and not gpu.launches


def test_one_gpu_may_be_too_old_and_the_other_not(cuda: EmulatedCuda) -> None:
    ages = {torch.device("cuda", 0): (6, 1), torch.device("cuda", 1): (9, 0)}
    with (
        launched(cuda) as gpu,
        mock.patch("torch.cuda.get_device_capability", ages.get),
        pytest.warns(RuntimeWarning, match=r"cuda:0.*is 6\.1, and Triton needs 7\.0") as warned,
    ):
        want, got = products()
    assert len(warned) == 1 and [name for name, _ in gpu.launches] == [
        "trial_kernel",
        "geglu_kernel",
    ]
    assert torch.equal(got[0].cpu(), want)


@pytest.mark.parametrize("text", ["an illegal memory access was encountered", "out of memory"])
def test_a_fault_of_ours_is_raised_and_not_remembered(cuda: EmulatedCuda, text: str) -> None:
    with launched(cuda) as gpu:
        error = RuntimeError(f"Triton Error [CUDA]: {text}")
        with failing(gpu, error), pytest.raises(RuntimeError, match=text):
            products(1)
        products(1)
    assert gpu.launches[0] == TRIAL
