"""Whether Triton can launch on a GPU: tried once, before a capture, and torch's operators else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from evidence.audit import audit
from evidence.fake_tensors import DEVICE, fake_tensors
from evidence.ptx import emulated
from headstart_kernels import (
    Draw,
    Impl,
    Preview,
    add_layernorm,
    api,
    decode_u8,
    fused_step_into,
    geglu,
    groupnorm_silu,
    layers,
    low_rank_add,
    philox_normal,
    preview_rgb,
    scale_input,
    trial,
)
from headstart_kernels.dispatch import choose

ROOT = Path(__file__).parents[2]
HERE = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    """Nothing here depends on kernels in C, so once is enough."""


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    with mock.patch.dict(trial._reasons, clear=True):
        yield


SLIM = """
import os, subprocess, warnings
from unittest import mock
import torch
from torch import Tensor
import headstart_kernels as hk
from headstart_kernels import trial

x, table = torch.randn(2, 4, 8, 8), torch.ones(2, 8)
x_norm = torch.randn(2, 8, 4, 4), 4, torch.randn(8), torch.randn(8)
here = torch.device("cpu")

def outcomes():
    step = dict(f_uncond=x, noise=x, x0_prev=x)
    drawn = hk.philox_normal(torch.tensor([3]), torch.tensor([0]), 2, (4, 8, 8))
    return (*hk.fused_step(x, x, table, 0, **step), hk.scale_input(x, table, 0, torch.float16),
            drawn, hk.groupnorm_silu(*x_norm), hk.geglu(x), *hk.add_layernorm(x, x, *x_norm[2:]))

plain = outcomes()
assert trial._why_not(here).startswith("Triton finds no driver")
with mock.patch("torch.cuda.is_available", lambda: True):  # Triton asks whether there is a GPU
    with mock.patch.object(Tensor, "is_cuda", True), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert all(torch.equal(a, b) for a, b in zip(outcomes(), plain))
        try:
            hk.geglu(x, impl="triton")
        except RuntimeError as error:
            assert "Failed to find C compiler" in str(error), error
        else:
            raise AssertionError("ran")
    print(*(str(w.message) for w in seen), sep="\\n")
    for compiler in ("/no/such/compiler", "/bin/false"):
        os.environ["CC"] = compiler
        print(trial._why_not(here))
    del os.environ["TRITON_LIBCUDA_PATH"]
    from triton.backends.nvidia import driver
    driver.library_dirs.cache_clear(), driver.libcuda_dirs.cache_clear()
    with mock.patch("subprocess.check_output", lambda *_: b""):  # ldconfig of a machine without it
        print(trial._why_not(here))
"""


def test_without_a_c_compiler_torchs_operators_run_and_the_user_is_told_once(
    tmp_path: Path,
) -> None:
    """Triton's own code, from the search for a driver to the search for a compiler."""
    rooms = os.pathsep.join(str(ROOT / room) for room in ("src", "kernels", "weights"))
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "PYTHONPATH": rooms,
        "HEADSTART_NATIVE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", SLIM],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", **environment},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warned, missing, failed, no_driver = done.stdout.splitlines()
    assert warned.startswith("headstart_kernels: Triton cannot launch on cpu, running on torch's")
    assert "Failed to find C compiler" in warned and warned.endswith("or set CC to a C compiler")
    assert "'/no/such/compiler'" in missing and "install gcc" in missing
    assert "CalledProcessError" in failed and "a C compiler that works" in failed
    assert "AssertionError: libcuda.so cannot found" in no_driver and "ldconfig" in no_driver


class PTXASError(Exception):
    """Of Triton's name: `triton.runtime.errors` is not loaded to compare with it."""


class CompilationError(Exception):
    """Of Triton's name, for a fault in a kernel's source."""


MACHINES = [
    (RuntimeError("Failed to find C compiler. Please specify"), "set CC"),
    (FileNotFoundError(2, "No such file", "ptxas"), "install gcc"),
    (subprocess.CalledProcessError(1, ["gcc", *["-I/a"] * 99]), "python3-dev"),
    (PermissionError(13, "Permission denied", "/root/.triton"), "TRITON_CACHE_DIR"),
    (ModuleNotFoundError("No module named 'triton'"), "install the package triton"),
    (ImportError("cuda_utils.so: failed to map segment"), "TRITON_CACHE_DIR"),
    (AssertionError("libcuda.so cannot found!"), "ldconfig"),
    (RuntimeError("0 active drivers ([]). There should only be one."), "update the GPU's driver"),
    (RuntimeError("Failed to retrieve cuLaunchKernelEx from libcuda.so.1"), "update the GPU's"),
    (RuntimeError("Triton Error [CUDA]: no kernel image is available for execution"), "update the"),
    (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "update the GPU's"),
    (
        RuntimeError("the provided PTX was compiled with an unsupported toolchain."),
        "update the GPU",
    ),
    (RuntimeError("CUDA driver version is insufficient for CUDA runtime"), "update the GPU's"),
    (PTXASError("ptxas fatal: Value 'sm_61' is not defined"), "update triton and torch"),
]


def failing(error: Exception) -> Callable[..., None]:
    def launch(*_: object) -> None:
        raise error

    return launch


@pytest.mark.parametrize(("error", "fix"), MACHINES, ids=lambda v: type(v).__name__)
def test_what_a_machine_cannot_is_told_in_a_line_with_its_fix(error: Exception, fix: str) -> None:
    with mock.patch.object(trial, "launch", failing(error)):
        with pytest.warns(RuntimeWarning, match=fix) as caught:
            assert not trial.launches(HERE)
        assert not trial.launches(HERE)
    assert len(caught) == 1 and len(str(caught[0].message)) < 400
    assert "\n" not in str(caught[0].message)


OURS = [
    CompilationError("at 3:4: unknown name"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("CUDA error: out of memory"),
    AssertionError("len(names) == 1"),
    TypeError("missing a required argument"),
    ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)"),
]


@pytest.mark.parametrize("error", OURS, ids=lambda error: type(error).__name__)
def test_a_fault_that_is_not_the_machines_is_raised(error: Exception) -> None:
    with mock.patch.object(trial, "launch", failing(error)), pytest.raises(type(error)) as caught:
        trial.launches(HERE)
    assert caught.value is error and not trial._reasons


def test_every_sign_has_its_error_above() -> None:
    signs = [trial._sign(error) for error, _ in MACHINES]
    assert signs == list(trial.SIGNS)


def test_triton_asked_for_by_name_is_not_tried_first_and_raises() -> None:
    error = RuntimeError("Failed to find C compiler.")
    with (
        mock.patch.object(trial, "launch", failing(error)),
        mock.patch.object(Tensor, "is_cuda", True),
    ):
        assert choose("geglu", "triton", torch.ones(2)) is Impl.TRITON
        with pytest.warns(RuntimeWarning, match="there is no C compiler"):
            assert choose("geglu", None, torch.ones(2)) is Impl.REFERENCE


def test_nothing_is_tried_inside_a_capture_and_what_fails_there_raises() -> None:
    tried: list[object] = []
    with (
        mock.patch.object(trial, "launch", lambda *inputs: tried.append(inputs)),
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: True),
    ):
        assert trial.launches(torch.device("cuda", 0))
    assert not tried and not trial._reasons


def test_a_gpu_that_is_too_old_for_triton_is_not_launched_on() -> None:
    capabilities = {torch.device("cuda", 0): (6, 1), torch.device("cuda", 1): (7, 5)}
    with (
        mock.patch.object(trial, "launch", failing(RuntimeError("tried"))),
        mock.patch("torch.cuda.get_device_capability", capabilities.get),
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
        mock.patch("torch.zeros", lambda *_, **__: torch.empty(1)),
    ):
        with pytest.warns(RuntimeWarning, match=r"capability is 6\.1, and Triton needs 7\.0"):
            assert not trial.launches(torch.device("cuda", 0))
        with pytest.raises(RuntimeError, match="tried"):
            trial.launches(torch.device("cuda", 1))


def test_a_gpu_that_launches_is_asked_once() -> None:
    with emulated(90) as gpu:
        assert trial.launches(HERE) and trial.launches(HERE)
        assert gpu.launches == [("trial_kernel", (1, 1, 1))]
        with mock.patch.object(trial, "launch", lambda *_: None):
            trial._reasons.clear()
            with pytest.raises(RuntimeError, match="launched a kernel on cpu, and it did nothing"):
                trial.launches(HERE)


def calls() -> dict[str, Callable[[dict[str, Any]], object]]:
    """Every kernel as a captured run calls it."""
    norm = ("image", "weight", "weight")

    def step(t: dict[str, Any]) -> None:
        draw, picture = Draw(t["keys"], t["keys"], t["keys"]), t["factors"]
        preview = Preview(t["rgb"], picture, picture[0])
        fused_step_into(
            *(t["x"], t["pair"], t["table"], t["row"], t["x"]),
            **{"noise": draw, "x0_prev": t["x0"], "x0": t["x0"], "x_in": t["pair"]},
            **{"preview": preview, "finite": t["finite"]},
        )

    def normed(t: dict[str, Any]) -> Tensor:
        image, weight, bias = (t[name] for name in norm)
        return groupnorm_silu(image, 4, weight, bias, shift=t["shift"])

    return {
        "fused_step": step,
        "scale_input": lambda t: scale_input(t["x"], t["table"], t["row"], torch.float16, copies=2),
        "philox_normal": lambda t: philox_normal(t["keys"], t["keys"], t["row"], (4, 3)),
        "preview_rgb": lambda t: preview_rgb(t["x"], t["factors"], t["factors"][0], upscale=2),
        "decode_u8": lambda t: decode_u8(t["x"][:, :3], check=False),
        "groupnorm_silu": normed,
        "add_layernorm": lambda t: add_layernorm(t["down"], t["down"], t["weight"], t["weight"]),
        "geglu": lambda t: geglu(t["down"]),
        "low_rank_add": lambda t: low_rank_add(*(t[n] for n in ("y", "y", "down", "up", "scale"))),
    }


@pytest.mark.parametrize("kernel", calls())
def test_torchs_own_operators_may_be_captured(kernel: str) -> None:
    """Where Triton cannot launch, a graph has the reference in it."""
    fake = fake_tensors()
    half = {"dtype": torch.float16, "device": DEVICE}
    with fake:
        tensors = {
            **{name: torch.empty(2, 4, 8, 8, device=DEVICE) for name in ("x", "x0")},
            "pair": torch.empty(4, 4, 8, 8, **half),
            "table": torch.empty(3, 8, device=DEVICE),
            "row": torch.empty((), dtype=torch.int64, device=DEVICE),
            "keys": torch.empty(2, dtype=torch.int64, device=DEVICE),
            "rgb": torch.empty(2, 8, 8, 3, dtype=torch.uint8, device=DEVICE),
            "factors": torch.empty(4, 3, device=DEVICE),
            "finite": torch.empty(2, dtype=torch.bool, device=DEVICE),
            "image": torch.empty(2, 8, 4, 4, **half),
            "weight": torch.empty(8, **half),
            "shift": torch.empty(2, 8, **half),
            "y": torch.empty(2, 5, 8, **half),
            "down": torch.empty(4, 8, **half),
            "up": torch.empty(8, 4, **half),
            "scale": torch.empty(2, device=DEVICE),
        }
    with (
        mock.patch.object(api, "stands_in", lambda tensor: False),
        mock.patch.object(layers, "stands_in", lambda tensor: False),
    ):
        report = audit(calls()[kernel], [tensors], fake=fake)
    assert len(report.operators) > 1 and not report.findings
