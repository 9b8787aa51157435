"""A low-rank change beside a layer: which layers are one kernel, and that it is the same change."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from evidence.bounds import low_rank_bound
from evidence.oracle import random_latents
from evidence.ptx import emulated
from headstart.adapters import slots
from headstart.adapters.delta import LowRank
from headstart.adapters.slots import Slot
from headstart.networks.fusion import fusion

LAST = torch.channels_last
STRENGTHS = torch.tensor([0.8, 0.0, -1.5])
RANK = 4


def slot_of(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype = torch.float32) -> Slot:
    shape = tuple(layer.weight.shape)
    down = random_latents(RANK, *shape[1:], seed=1, scale=0.3)
    up = random_latents(shape[0], RANK, seed=2, scale=0.3)
    slot = Slot(layer.weight, RANK + 2, dtype)  # ranks that are not used
    slot.fill(LowRank(down, up, 0.5))
    return slot


CASES: list[tuple[str, Any, bool, Any]] = [
    ("linear", lambda: nn.Linear(24, 40), True, lambda: random_latents(3, 10, 24)),
    ("1x1", lambda: nn.Conv2d(24, 40, 1), True, lambda: random_latents(3, 24, 5, 7)),
    ("strided", lambda: nn.Conv2d(24, 40, 1, 2), False, lambda: random_latents(3, 24, 6, 8)),
    ("padded", lambda: nn.Conv2d(24, 40, 1, 1, 1), False, lambda: random_latents(3, 24, 5, 7)),
    ("3x3", lambda: nn.Conv2d(24, 40, 3, 1, 1), False, lambda: random_latents(3, 24, 5, 7)),
]


@pytest.mark.parametrize(
    ("make", "one_kernel", "inputs"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "planes"])
def test_one_kernel_where_the_layer_is_one_matrix_product_and_always_the_same_change(
    make: Any, one_kernel: bool, inputs: Any, last: bool
) -> None:
    layer, x = make(), inputs()
    if x.ndim == 4 and last:
        x = x.contiguous(memory_format=LAST)
    slot = slot_of(layer)
    y = layer(x).detach()
    if x.ndim == 4 and last:
        y = y.contiguous(memory_format=LAST)
    plain, fused = y.clone(), y.clone()
    slot.add_to(plain, x, layer, STRENGTHS)
    with fusion(True), mock.patch.object(slots, "low_rank_add", wraps=slots.low_rank_add) as kernel:
        slot.add_to(fused, x, layer, STRENGTHS)
    assert kernel.called == (one_kernel and (last or x.ndim == 3))
    assert fused.stride() == y.stride()
    assert not torch.equal(plain[0], y[0]) and torch.equal(fused[1], y[1])
    assert torch.allclose(fused, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_1x1_convolution_on_a_gpu_is_within_the_kernels_budget(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(24, 40, 1).to(dtype)
    x = random_latents(3, 24, 5, 7, dtype=dtype).contiguous(memory_format=LAST)
    y = random_latents(3, 40, 5, 7, seed=3, dtype=dtype).contiguous(memory_format=LAST)
    slot = slot_of(layer, dtype)

    def rows(image: Tensor) -> Tensor:
        return image.permute(0, 2, 3, 1)

    bound = low_rank_bound(rows(y), rows(x), slot.down.flatten(1), slot.up, STRENGTHS * 0.5)
    with emulated(90, by_default=True) as gpu, fusion(True):
        slot.add_to(y, x, layer, STRENGTHS)
    assert [name for name, _ in gpu.launches] == ["down_kernel", "up_kernel"]
    bound.check(rows(y))
