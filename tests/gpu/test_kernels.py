"""Every kernel on the machine it is written for: the reference's bits, or its budget.

On a GPU the operands are there and Triton compiles for it; the reference computes on the CPU. The
same tests run emulated, with `-m slow`, so that they are known to work before a GPU is met.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from evidence.bounds import gate_bound, low_rank_bound, norm_bound, row_bound
from evidence.oracle import assert_bits, random_latents, random_table
from evidence.ptx import emulated
from headstart_kernels import (
    COLUMNS,
    INITIAL,
    Draw,
    Preview,
    add_layernorm,
    decode_u8,
    finite_flags,
    fused_step,
    fused_step_into,
    geglu,
    groupnorm_silu,
    low_rank_add,
    philox_normal,
    preview_rgb,
    scale_input,
)

LAST = torch.channels_last
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((2, 4, 16, 20), (3, 4, 7, 5))
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=ON_A_GPU),
        pytest.param("emulated", marks=pytest.mark.slow),
    ]
)
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device that the operands are on while Triton's kernels run."""
    if request.param == "cuda":
        yield "cuda"
        return
    with emulated(90):
        yield "cpu"


def there(value: Any, place: str) -> Any:
    """A tensor, or each in a tuple or dict, copied to the device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.clone().to(place)
    if isinstance(value, dict):
        return {name: there(item, place) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [there(item, place) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    names = ("x", "f_cond", "f_uncond", "noise", "x0_prev")
    inputs = {name: random_latents(*shape, seed=seed) for seed, name in enumerate(names)}
    return inputs | {name: inputs[name].to(dtype) for name in ("f_cond", "f_uncond")}


def check(
    place: str, inputs: dict[str, Any], table: Tensor, row: int, dtype: torch.dtype, **options: Any
) -> None:
    """One row, its number on the host, on the device, and on it with other samples' rows before:
    everything that it fills."""
    shape = inputs["x"].shape
    rows = torch.tensor([*range(shape[0] - 1), row]) % len(table)
    picture = len(shape) == 4 and options.pop("picture", False)
    for where, step in {"host": row, "device": torch.tensor(row), "each": rows}.items():
        outputs: list[dict[str, Tensor]] = []
        for impl, device in (("reference", "cpu"), ("triton", place)):
            moved = there(inputs | options, device)
            filled = {
                "x_in": torch.zeros((2 * shape[0], *shape[1:]), dtype=dtype, device=device),
                "finite": torch.zeros(shape[0], dtype=torch.bool, device=device),
            }
            if picture:
                rgb = torch.zeros((shape[0], *shape[2:], 3), dtype=torch.uint8, device=device)
                maps = random_latents(shape[1], 3, seed=8), random_latents(3, seed=9)
                moved["preview"] = Preview(rgb, *there(maps, device))
                filled["rgb"] = rgb
            x_next, x0 = fused_step(
                table=there(table, device),
                step=there(step, device),
                impl=impl,
                **moved,
                **{name: filled[name] for name in ("x_in", "finite")},
            )
            outputs.append({"x_next": x_next, "x0": x0, **filled})
        for name, expected in outputs[0].items():
            assert_bits(outputs[1][name], expected, f"{name}, row {row}, {where}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES)
def test_steps(place: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs, table = operands(shape, dtype), random_table(4)
    last = {name: inputs[name].contiguous(memory_format=LAST) for name in ("f_cond", "f_uncond")}
    scales = torch.linspace(1.0, 9.0, shape[0])
    for row in (0, 3):
        check(place, inputs, table, row, dtype, picture=True)
        check(place, inputs | last, table, row, dtype, picture=True)
        check(place, inputs, table, row, dtype, guidance=scales)


@pytest.mark.parametrize("shape", [*SIZES, (16, 4, 128, 128)])
def test_steps_that_draw_their_noise(place: str, shape: tuple[int, ...]) -> None:
    if place == "cpu" and shape[0] > 3:
        pytest.skip("as large a state as this takes an emulator minutes")
    batch = shape[0]
    draw = Draw(torch.arange(batch) - 2**62, torch.arange(batch) + 2**31, first_row=3)
    check(place, operands(shape, torch.float16) | {"noise": draw}, random_table(2), 1, DTYPES[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_terms_left_out_samples_gone_wrong_and_a_step_in_place(place: str, bad: float) -> None:
    inputs = operands(SIZES[0], torch.float16)
    inputs["f_cond"][1, 3, -1, -1] = bad
    columns = {"c_in": 0.5, "c_skip": 1.0, "c_out": -2.0, "keep": 0.25, "guidance": 1.0}
    table = torch.tensor([[columns.get(column, 0.0) for column in COLUMNS]])
    unused = {name: torch.full_like(inputs[name], bad) for name in ("noise", "x0_prev", "f_uncond")}
    check(place, inputs | unused, table, 0, torch.float32)
    expected = fused_step(table=table, step=0, impl="reference", **inputs)
    moved = there(inputs, place)
    x = moved.pop("x")
    fused_step_into(
        *(x, moved.pop("f_cond"), there(table, place), 0, x),
        x0=moved["x0_prev"],
        impl="triton",
        **moved,
    )
    assert_bits(x, expected[0], "x")
    assert_bits(moved["x0_prev"], expected[1], "x0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_network_inputs(place: str, dtype: torch.dtype) -> None:
    table = random_table(3)
    for shape in SIZES:
        x = random_latents(*shape, scale=14.6)
        for step in (1, torch.tensor(1), torch.tensor([2, 0, 1])[: shape[0]]):
            got = scale_input(
                there(x, place), there(table, place), there(step, place), dtype, impl="triton"
            )
            assert_bits(got, scale_input(x, table, step, dtype, impl="reference"), "x_in")


def test_normals(place: str) -> None:
    seeds, samples = [0, 2**63 + 5, 2**64 - 1], [0, 2**31, 2**32 - 1]
    for step, shape in ((INITIAL, (4, 16, 16)), (2**32 - 2, (3, 5)), (7, (1 << 15,))):
        expected = philox_normal(seeds, samples, step, shape, impl="reference")
        got = philox_normal(seeds, samples, step, shape, place, impl="triton")
        assert_bits(got, expected, f"normals {shape}")
        row = torch.tensor(step, device=place)
        assert_bits(philox_normal(seeds, samples, row, shape, place, impl="triton"), expected, "")
        rows = torch.tensor([step, 0, step])
        got = philox_normal(seeds, samples, there(rows, place), shape, place, impl="triton")
        expected = philox_normal(seeds, samples, rows, shape, impl="reference")
        assert_bits(got, expected, "normals of a row an image")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_pictures(place: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    maps = random_latents(4, 3, scale=0.4, seed=1), random_latents(3, seed=2)
    for size in ((8, 12), (5, 7)):
        x0 = random_latents(2, 4, *size, scale=2.0).to(dtype).contiguous(memory_format=layout)
        x0[1, :3, 1, 2] = torch.tensor([float("nan"), float("inf"), -1e30]).to(dtype)
        moved = there(x0, place)
        for upscale in (1, 3):
            got = preview_rgb(moved, *there(maps, place), upscale=upscale, impl="triton")
            expected = preview_rgb(x0, *maps, upscale=upscale, impl="reference")
            assert_bits(got, expected, "preview")
        pixels, moved = (t[:, :3].contiguous(memory_format=layout) for t in (x0, moved))
        got = decode_u8(moved, check=False, impl="triton")
        assert_bits(got, decode_u8(pixels, check=False, impl="reference"), "decoded")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_are_within_their_budgets(place: str, dtype: torch.dtype) -> None:
    for layout in (torch.contiguous_format, LAST):
        x = (random_latents(2, 64, 16, 16) + 4).to(dtype).contiguous(memory_format=layout)
        weight, bias = (random_latents(64, seed=seed).to(dtype) for seed in (1, 2))
        y = groupnorm_silu(*there((x,), place), 32, *there((weight, bias), place), impl="triton")
        assert y.stride() == x.stride()
        norm_bound(x, 32, weight, bias, 1e-5).check(y.cpu())
        shift, form = random_latents(2, 64, seed=3).to(dtype), (32, weight, bias, 1e-5)
        moved = there((x, *form, shift), place)
        y = groupnorm_silu(*moved[:-1], shift=moved[-1], silu=False, impl="triton")
        norm_bound(x, *form, shift, False).check(y.cpu())
    x, y = (random_latents(2, 7, 640, seed=seed).to(dtype) for seed in (4, 5))
    affine = tuple(random_latents(640, seed=seed).to(dtype) for seed in (6, 7))
    h, n = add_layernorm(*there((x, y, *affine), place), impl="triton")
    assert_bits(h, x + y, "sum")
    row_bound(x + y, *affine, 1e-5).check(n.cpu())
    pair = random_latents(2, 7, 128, scale=3.0, dtype=dtype)
    gate_bound(pair).check(geglu(there(pair, place), impl="triton").cpu())
    for tokens, inner, outer, rank in ((40, 64, 80, 16), (9, 37, 21, 4)):
        x, y = (random_latents(3, tokens, width, dtype=dtype) for width in (inner, outer))
        down = random_latents(rank, inner, seed=1, dtype=dtype)
        up = random_latents(outer, rank, seed=2, dtype=dtype)
        strength = torch.tensor([0.8, 0.0, -1.5])
        bound, moved = low_rank_bound(y, x, down, up, strength), there(y, place)
        low_rank_add(moved, *(there(t, place) for t in (x, down, up, strength)), impl="triton")
        bound.check(moved.cpu())
        assert torch.equal(moved[1].cpu(), y[1])


def test_flags_of_parts_say_which_samples_are_finite(place: str) -> None:
    x, table = random_latents(3, 4, 40, 40), random_table(2)
    f = random_latents(3, 4, 40, 40, seed=1)
    f[1, 3, -1, -1], f[2, 0, 0, 0] = float("nan"), float("inf")
    moved, flags = there((x, f, table), place), finite_flags(x.shape, "meta")
    finite = torch.empty_like(flags, device=moved[0].device)
    options = dict.fromkeys(("f_uncond", "noise", "x0_prev"), moved[0])
    fused_step(*moved, 0, finite=finite, **options, impl="triton")
    assert finite.all(1).tolist() == [True, False, False]
