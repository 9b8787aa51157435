"""Shapes, dtypes and strides that a tracer expects of an operator are what every run gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from evidence.oracle import random_latents, random_table
from evidence.ptx import emulated
from headstart_kernels import Impl, api, layers, ops, winograd
from headstart_kernels.dispatch import FOR_CPUS, NATIVE, has_c

LAST = torch.channels_last


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    """Implementations are named here, so once is enough."""


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=LAST),
    "turned": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: torch.stack((x, x), -1)[..., 0],
    "a part": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "a part, channels-last": lambda x: torch.cat((x, x), 1).contiguous(memory_format=LAST)[
        :, : x.shape[1]
    ],
    "one sample, repeated": lambda x: x[:1].expand_as(x),
}


def calls(turn: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every operator that makes its results, and the arguments."""
    x, table, step = turn(random_latents(2, 4, 5, 6)), random_table(3), torch.tensor(1)
    f, keys = turn(random_latents(2, 4, 5, 6, dtype=torch.float16, seed=1)), torch.tensor([3, 4])
    yield "fused_step", (x, f, table, step)
    yield "scale_input", (x, table, step, torch.float16)
    for shape in ((4, 5, 6), (3, 5)):
        yield "philox_normal", (keys, keys, step, shape)
    yield "preview_rgb", (x, random_latents(4, 3), random_latents(3))
    yield "decode_u8", (turn(random_latents(2, 3, 4, 5)),)
    weight = random_latents(4)
    for more in ((), (random_latents(2, 4), False)):
        yield "groupnorm_silu", (x, 2, weight, weight, 1e-5, *more)
    yield "geglu", (x,)
    heads = [turn(random_latents(2, 3, tokens, 8)) for tokens in (5, 7, 7)]
    yield "attention", tuple(heads)
    rows = random_latents(6), random_latents(6)
    yield "add_layernorm", (x, x + 1, *rows, 1e-5)
    filter = winograd.Filter.of(random_latents(3, 4, 3, 3))
    yield "winograd_conv", (x, filter.places, filter.outputs, random_latents(3))


def placed(results: Any) -> list[tuple[Any, ...]]:
    return [(t.shape, t.dtype, t.stride(), t.storage_offset()) for t in tree_leaves(results)]


def fake_results(name: str, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    mode = FakeTensorMode()
    inputs = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
    with mode:
        return placed(getattr(torch.ops.headstart_kernels, name)(*inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", Impl, ids=lambda impl: impl.value)
def test_results_lie_as_a_tracer_is_told(layout: str, impl: Impl) -> None:
    if impl is Impl.NATIVE and not has_c():
        pytest.skip("no C kernels here")
    chosen = mock.Mock(return_value=impl)
    absent = {Impl.TRITON: FOR_CPUS, Impl.NATIVE: set(ops.BODIES) - NATIVE}
    for name, arguments in calls(LAYOUTS[layout]):
        if name not in absent.get(impl, ()):
            with (
                emulated(90),
                mock.patch.object(api, "choose", chosen),
                mock.patch.object(layers, "choose", chosen),
                mock.patch.object(winograd, "choose", chosen),
            ):
                got = placed(ops.BODIES[name](*arguments))
            assert got == fake_results(name, arguments), name


def test_every_operator_is_above_or_makes_nothing() -> None:
    names = {name for name, _ in calls(LAYOUTS["contiguous"])}
    assert names == set(ops.BODIES) - {
        "fused_step_into",
        "low_rank_add",
        "direct_convolution_into",
        "groupnorm_silu_into",
        "geglu_into",
    }
