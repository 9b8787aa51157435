"""Which implementation runs: Triton where there is a GPU, and no driver is touched before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from fresh import python
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evidence.fake_tensors import DEVICE, fake_tensors
from evidence.oracle import random_latents, random_table
from headstart_kernels import (
    Draw,
    Impl,
    attention,
    decode_u8,
    dispatch,
    fused_step,
    geglu,
    low_rank_add,
    philox_normal,
    preview_rgb,
    scale_input,
)
from headstart_kernels.dispatch import FOR_CPUS, NATIVE, choose, load
from headstart_kernels.native import library
from headstart_kernels.observers import stands_in

WITHOUT_TRITON = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
importlib.util.find_spec = (
    lambda find: lambda name, package=None: None if name == "triton" else find(name, package)
)(importlib.util.find_spec)
"""
USE = """
import torch
import headstart_kernels as hk
table = torch.ones(2, 8)
x = torch.zeros(1, 4, 8, 8)
hk.fused_step(x, x, table, 0, f_uncond=x, noise=x, x0_prev=x)
hk.geglu(torch.ones(2, 8))
hk.groupnorm_silu(x, 2, torch.ones(4), torch.zeros(4))
"""


def run(script: str) -> str:
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_triton_the_reference_runs_and_triton_by_name_says_what_is_missing() -> None:
    code = "\ntry:\n    hk.geglu(x, impl='triton')\nexcept ValueError as error:\n    print(error)\n"
    assert "needs the package triton, which is not installed" in run(WITHOUT_TRITON + USE + code)


def test_without_a_gpu_no_driver_is_made_and_triton_is_not_even_loaded() -> None:
    assert run(USE + "import sys; print('triton.runtime' in sys.modules)") == "False\n"
    code = """
from triton.runtime import driver
for call in (lambda: hk.geglu(x, impl='triton'), lambda: hk.decode_u8(x[:, :3], impl='triton')):
    try:
        call()
    except ValueError as error:
        assert "runs on a GPU, and the tensors are on cpu" in str(error), error
    else:
        raise AssertionError("ran")
hk.fused_step(x, x, table, 0, f_uncond=x, noise=x, x0_prev=x)
import headstart_kernels.impl.triton_step, headstart_kernels.impl.triton_adapter
import headstart_kernels.ops
assert driver._active is None and driver._default is None
"""
    run(USE + code)


LAYERS = ("add_layernorm", "low_rank_add")


@pytest.mark.parametrize("kernel", [*sorted(NATIVE), *LAYERS])
def test_every_implementation_has_every_kernel_but_what_is_torchs(kernel: str) -> None:
    absent = {Impl.NATIVE: kernel not in NATIVE, Impl.TRITON: kernel in FOR_CPUS}
    for impl in Impl:
        if not absent.get(impl):
            assert callable(load(kernel, impl))
    ones = torch.ones(1, 8)
    with pytest.raises(ValueError, match="'native' has no low_rank_add, which is torch's own on a"):
        low_rank_add(ones, ones, ones, ones.T, torch.ones(1), impl="native")
    heads = [torch.ones(1, 1, 4, 8)] * 3
    with pytest.raises(ValueError, match="'triton' has no attention, which is for CPUs"):
        attention(*heads, impl="triton")


def test_there_are_c_kernels_wherever_there_is_a_compiler() -> None:
    """Elsewhere tests of C are skipped, so what does not compile, or has other bits, fails here."""
    if os.environ.get(library.SWITCH) == "0" or not shutil.which(os.environ.get("CC", "cc")):
        pytest.skip("no compiler here")
    assert library.why_not() is None


def test_a_gpu_takes_triton_a_cpu_c_and_float64_the_reference() -> None:
    on_cpu = torch.zeros(1)
    with (
        mock.patch.object(Tensor, "is_cuda", True),
        mock.patch.object(dispatch, "launches", lambda device: True),
    ):
        assert choose("decode_u8", None, on_cpu) is Impl.TRITON
        assert choose("decode_u8", None, on_cpu.double()) is Impl.REFERENCE
    here = Impl.REFERENCE if dispatch.why_not() else Impl.NATIVE
    assert choose("decode_u8", None, on_cpu) is here
    assert choose("low_rank_add", None, on_cpu) is Impl.REFERENCE
    assert choose("decode_u8", "reference", on_cpu) is Impl.REFERENCE
    double = torch.zeros(1, dtype=torch.float64)
    assert choose("decode_u8", None, double) is Impl.REFERENCE
    for name in ("triton", "native"):
        with pytest.raises(ValueError, match="computes in float32, got float64"):
            choose("decode_u8", name, double)


def test_c_is_not_chosen_where_a_gradient_is_asked_for() -> None:
    leaf = torch.zeros(2, requires_grad=True)
    assert choose("fused_step", None, leaf) is Impl.REFERENCE
    assert choose("fused_step", None, torch.zeros(2), leaf) is Impl.REFERENCE
    with torch.no_grad():
        assert choose("fused_step", None, leaf) is choose("fused_step", None, torch.zeros(2))


def test_a_fake_gpu_tensor_meets_one_operator_and_no_kernel() -> None:
    with fake_tensors():
        x = torch.empty(2, 4, 8, 8, device=DEVICE)
        assert stands_in(x) and choose("geglu", None, x) is Impl.REFERENCE
        assert geglu(torch.empty(3, 8, device=DEVICE)).shape == (3, 4)
        assert decode_u8(x[:, :3], check=False).shape == (2, 8, 8, 3)
        step = torch.empty((), dtype=torch.int64, device=DEVICE)
        table = torch.empty(3, 8, device=DEVICE)
        x_next, x0 = fused_step(x, x, table, step, noise=x)
        assert x_next.device == x0.device == x.device
        rows = torch.empty(2, dtype=torch.int64, device=DEVICE)
        x_next, x0 = fused_step(x, x, table, rows, noise=Draw(rows, rows, rows))
        assert x_next.device == x0.device == x.device
        assert scale_input(x, table, rows, torch.float16, copies=2).shape == (4, 4, 8, 8)
        assert philox_normal(rows, rows, rows, (4, 3)).shape == (2, 4, 3)
    assert not stands_in(torch.zeros(1))


def test_an_implementation_asked_for_by_name_never_falls_back() -> None:
    x, table = random_latents(1, 4, 8, 8), random_table(1)
    for call in (
        lambda: fused_step(x, x, table, 0, f_uncond=x, noise=x, x0_prev=x, impl="triton"),
        lambda: philox_normal([0], [0], 0, (4,), impl=Impl.TRITON),
    ):
        with pytest.raises(ValueError, match="'triton' runs on a GPU"):
            call()


@pytest.mark.parametrize("kernel", ["decode_u8", "preview_rgb", "philox_normal"])
def test_what_a_recorder_watches_is_done_by_operators_it_sees(kernel: str) -> None:
    """numpy on a tensor's memory is faster on a CPU, and a replay would not repeat it."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            operators.append(str(func))
            return func(*args, **(kwargs or {}))

    pixels = torch.linspace(-1.0, 1.0, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    calls: dict[str, Callable[[], Tensor]] = {
        "decode_u8": lambda: decode_u8(pixels, check=False),
        "preview_rgb": lambda: preview_rgb(pixels, torch.eye(3), torch.zeros(3)),
        "philox_normal": lambda: philox_normal(keys, keys, 2, (4, 2, 3)),
    }
    keys, operators = torch.tensor([3, 9]), list[str]()
    plain = calls[kernel]()
    with Recorder():
        watched = calls[kernel]()
    expected = {"philox_normal": "aten.bitwise_xor"}.get(kernel, "aten.round")
    assert any(name.startswith(expected) for name in operators), operators
    assert torch.equal(watched, plain)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, and what converters use
def test_c_is_not_chosen_for_memory_of_the_other_sign_nor_while_torch_traces() -> None:
    x, chosen = torch.randn(1, 4, 8, 8), list[Impl]()
    assert choose("fused_step", None, torch._neg_view(x)) is Impl.REFERENCE

    def of(x: Tensor) -> Tensor:
        chosen.append(choose("fused_step", None, x))
        return x + 1

    torch.jit.trace(of, (x,), check_trace=False)
    assert {*chosen} == {Impl.REFERENCE}
