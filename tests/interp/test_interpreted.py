"""Triton's own interpreter, another reading of the same kernels; in a process that turns it on."""

from __future__ import annotations

import os

from fresh import ROOMS, ROOT, python

SCRIPT = """
import torch
import headstart_kernels as hk
from headstart_kernels.table import host_row
from evidence.oracle import (
    STEP_ROUNDINGS, X0_ROUNDINGS, assert_within, random_latents, random_table, step_oracle,
)
from evidence.bounds import gate_bound, low_rank_bound, norm_bound, row_bound

shape, table = (2, 4, 8, 9), random_table(3)
names = ("x", "f_cond", "f_uncond", "noise", "x0_prev")
made = {name: random_latents(*shape, seed=seed) for seed, name in enumerate(names)}

for dtype in (torch.float32, torch.float16, torch.bfloat16):
    inputs = made | {name: made[name].to(dtype) for name in ("f_cond", "f_uncond")}
    results = []
    for impl in ("reference", "triton"):
        x_in = torch.empty(4, *shape[1:], dtype=dtype)
        step = torch.tensor(1)
        out = hk.fused_step(table=table, step=step, x_in=x_in, impl=impl, **inputs)
        results.append((*out, x_in))
    for expected, got in zip(*results):
        if got.dtype == torch.bfloat16:
            # The interpreter truncates where every GPU rounds: one unit in the last place.
            ulp = torch.nextafter(expected.abs(), torch.tensor(torch.inf).bfloat16())
            assert ((got - expected).abs() <= ulp - expected.abs()).all()
            assert not torch.equal(got, expected)
        else:
            assert torch.equal(got, expected), (dtype, got.dtype)

noise = hk.Draw(torch.tensor([3, 4]), torch.tensor([0, 1]))
pictures = []
for impl in ("reference", "triton"):
    rgb = torch.zeros(2, 8, 9, 3, dtype=torch.uint8)
    seen = hk.Preview(rgb, random_latents(4, 3, seed=1), random_latents(3, seed=2))
    out = hk.fused_step(made["x"], made["f_cond"], table, 0, f_uncond=made["f_uncond"],
                        noise=noise, x0_prev=made["x0_prev"], preview=seen, impl=impl)
    pictures.append((*out, rgb))
assert all(torch.equal(a, b) for a, b in zip(*pictures))

for shape in ((2, 4, 3, 5, 7), (2, 9, 16), (3, 5)):  # video, packed tokens, rows
    inputs = {name: random_latents(*shape, seed=seed) for seed, name in enumerate(names)}
    for row in range(3):
        x_in, finite = torch.empty(2 * shape[0], *shape[1:]), torch.zeros(shape[0]).bool()
        x_next, x0 = hk.fused_step(table=table, step=torch.tensor(row), x_in=x_in, finite=finite,
                                   impl="triton", **inputs)
        exact = step_oracle(row=host_row(table, row), **inputs)
        assert x_next.shape == x0.shape == shape and finite.all()
        assert_within(x0, exact.x0, exact.x0_magnitude, X0_ROUNDINGS, "x0")
        assert_within(x_next, exact.x_next, exact.x_next_magnitude, STEP_ROUNDINGS, "x_next")
        following = torch.tensor(min(row + 1, 2))
        seen = hk.scale_input(x_next, table, following, torch.float32, copies=2, impl="triton")
        assert torch.equal(x_in, seen)
    draw = hk.Draw(torch.arange(shape[0]), torch.zeros(shape[0], dtype=torch.int64))
    inputs["noise"] = hk.philox_normal(*draw[:2], 1, (inputs["x"][0].numel(),)).view(shape)
    drawn = hk.fused_step(table=table, step=1, impl="triton", **(inputs | {"noise": draw}))
    handed = hk.fused_step(table=table, step=1, impl="reference", **inputs)
    assert all(torch.equal(a, b) for a, b in zip(drawn, handed))

for shape in ((2, 4, 8, 9), (2, 9, 16)):  # a row for each sample
    inputs = {name: random_latents(*shape, seed=seed) for seed, name in enumerate(names)}
    inputs["noise"] = hk.Draw(torch.tensor([3, 4]), torch.tensor([0, 1]), torch.tensor([-1, 6]))
    rows, results = torch.tensor([2, 0]), []
    for impl in ("reference", "triton"):
        x_in = torch.empty(4, *shape[1:])
        out = hk.fused_step(table=table, step=rows, x_in=x_in, impl=impl, **inputs)
        x_first = hk.scale_input(inputs["x"], table, rows, torch.float16, impl=impl)
        drawn = hk.philox_normal(*inputs["noise"][:2], rows, (5, 5), impl=impl)
        results.append((*out, x_in, x_first, drawn))
    assert all(torch.equal(a, b) for a, b in zip(*results))

drawn = hk.philox_normal([1, 2**64 - 1], [0, 5], 3, (4, 5, 5), impl="triton")
assert torch.equal(drawn, hk.philox_normal([1, 2**64 - 1], [0, 5], 3, (4, 5, 5)))
pixels = random_latents(2, 3, 5, 8)
assert torch.equal(hk.decode_u8(pixels, impl="triton"), hk.decode_u8(pixels))
mapped = {"x0": made["x"], "factors": random_latents(4, 3, seed=1), "bias": random_latents(3)}
shown = hk.preview_rgb(**mapped, upscale=2, impl="triton")
assert torch.equal(shown, hk.preview_rgb(**mapped, upscale=2))

x, weight = random_latents(2, 16, 5, 7), random_latents(16, seed=3)
norm_bound(x, 4, weight, weight, 1e-5).check(hk.groupnorm_silu(x, 4, weight, weight, impl="triton"))
for layout in (torch.contiguous_format, torch.channels_last):
    x, inputs = x.contiguous(memory_format=layout), (4, weight, weight, 1e-5)
    shift = random_latents(2, 16, seed=4)
    moved = hk.groupnorm_silu(x, *inputs, shift=shift, silu=False, impl="triton")
    norm_bound(x, *inputs, shift, False).check(moved)
tokens, more, weight = random_latents(5, 50), random_latents(5, 50, seed=1), random_latents(50)
h, n = hk.add_layernorm(tokens, more, weight, weight, impl="triton")
assert torch.equal(h, tokens + more)
row_bound(h, weight, weight, 1e-5).check(n)
gate_bound(x.flatten(1)).check(hk.geglu(x.flatten(1), impl="triton"))
y, x = random_latents(2, 9, 10), random_latents(2, 9, 12)
down, up, strength = random_latents(4, 12), random_latents(10, 4), torch.tensor([0.5, 0.0])
bound = low_rank_bound(y, x, down, up, strength)
bound.check(hk.low_rank_add(y, x, down, up, strength, impl="triton"))
print("interpreted")
"""


def test_the_interpreted_kernels_have_the_reference_bits() -> None:
    rooms = f"{ROOMS}{os.pathsep}{ROOT / 'tests'}"
    done = python("-W", "ignore", "-c", SCRIPT, PYTHONPATH=rooms, TRITON_INTERPRET="1")
    assert done.stdout == "interpreted\n", done.stderr
