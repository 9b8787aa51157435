"""What does each kernel cost a GPU? Bytes moved, registers, spills and vector width, compiled.

moved bytes / least bytes: 32-byte sectors that the emulated sm_90 code touches, against every input
read once and every output written once.

python bench/aot.py [--targets sm_80 sm_90 gfx942 ...] [--out bench/results/aot.json]

Nothing is measured: traffic is emulated, everything else is read from compiled machine code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor

import headstart_kernels as kernels
from evidence.aot import AMD, NVIDIA, cases, compiled
from evidence.oracle import random_latents
from evidence.ptx import emulated

HALF = torch.float16
LATENT = (2, 4, 64, 64)
HIDDEN = (1, 320, 32, 32)
_ALIGNMENT = 256
"""Bytes; what a GPU's allocator gives at least."""


class Run(NamedTuple):
    """One call of a kernel, and the tensors that it must read and write at least once."""

    call: Callable[[], object]
    read: tuple[Tensor, ...]
    written: tuple[Tensor, ...]


def main() -> None:
    parser = harness.options(__doc__, "aot.json")
    parser.add_argument("--targets", nargs="+", default=(*NVIDIA, *AMD))
    options = parser.parse_args()
    report = {
        "question": "bytes moved against the least, registers, spills and vector width",
        "evidence": {"traffic": "emulated (PTX for sm_90)", "compiled": "compiled"},
        "machine": harness.machine(),
        "traffic": {name: traffic(run) for name, run in runs().items()},
        "compiled": {
            name: {target: compiled(case, target).as_dict() for target in options.targets}
            for name, case in cases().items()
        },
    }
    harness.write_json(options.out, report)
    for name, row in report["traffic"].items():
        print(f"{name:32} moved / least {row['moved_over_least']}")


def traffic(run: Run) -> dict[str, float | int]:
    with emulated(90) as gpu:
        run.call()
    least = sum(t.numel() * t.element_size() for t in (*run.read, *run.written))
    return {
        "moved_bytes": gpu.traffic.moved_bytes,
        "least_bytes": least,
        "moved_over_least": round(gpu.traffic.moved_bytes / least, 3),
        "loaded_bytes": 32 * gpu.traffic.load_sectors,
        "stored_bytes": 32 * gpu.traffic.store_sectors,
        "launches": len(gpu.launches),
    }


def runs() -> dict[str, Run]:
    """Aligned tensors as an allocator of a GPU gives them."""
    return _steps() | _pictures() | _layers()


def triton(kernel: Callable[..., Any], *inputs: Any, **options: Any) -> Callable[[], Any]:
    """A call of Triton's kernel by name, so that nothing stands in for it."""
    return partial(kernel, *inputs, impl="triton", **options)


def _aligned(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normals that begin on a sector, which a CPU's allocator does not promise."""
    values = random_latents(*shape, dtype=dtype, seed=seed)
    space = torch.empty(values.numel() + _ALIGNMENT, dtype=dtype)
    skip = -space.data_ptr() % _ALIGNMENT // space.element_size()
    return space[skip : skip + values.numel()].view(shape).copy_(values)


def _last(tensor: Tensor) -> Tensor:
    """The same storage, read as channels-last."""
    batch, channels, height, width = tensor.shape
    return tensor.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _rgb() -> Tensor:
    return torch.empty(LATENT[0], *LATENT[2:], 3, dtype=torch.uint8)


def _steps() -> dict[str, Run]:
    x, table = _aligned(*LATENT), _aligned(2, 8).abs()
    scale = triton(kernels.scale_input, x, table, torch.tensor(0), HALF)
    return {
        "fused_step fp32": _step(table, torch.float32),
        "fused_step fp16": _step(table, HALF),
        "fused_step bf16": _step(table, torch.bfloat16),
        "fused_step drawn": _step(table, HALF, drawn=True),
        "fused_step drawn + preview": _step(table, HALF, drawn=True, shown=True),
        "fused_step channels-last": _step(table, HALF, last=True),
        "scale_input": Run(scale, (x,), (x.half(),)),
    }


def _step(
    table: Tensor, dtype: torch.dtype, drawn: bool = False, shown: bool = False, last: bool = False
) -> Run:
    """A guided step with noise and a doubled next input."""
    x, noise, x_next, x0 = (_aligned(*LATENT, seed=seed) for seed in range(4))
    f, u = (_aligned(*LATENT, dtype=dtype, seed=seed) for seed in (4, 5))
    x_in = _aligned(2 * LATENT[0], *LATENT[1:], dtype=dtype)
    if last:
        f, u, x_in = _last(f), _last(u), _last(x_in)
    read, written, options = (x, f, u, noise), (x_next, x0, x_in), {"noise": noise}
    if drawn:
        draw = kernels.Draw(torch.tensor([1, 2]), torch.tensor([0, 0]))
        options = {"noise": draw, "finite": torch.empty(LATENT[0], dtype=torch.bool)}
        read = (x, f, u)
    if shown:
        rgb = _rgb()
        options["preview"] = kernels.Preview(rgb, _aligned(4, 3), _aligned(3))
        written = (*written, rgb)
    step = (kernels.fused_step_into, x, f, table, torch.tensor(0), x_next)
    return Run(triton(*step, x0=x0, f_uncond=u, x_in=x_in, **options), read, written)


def _pictures() -> dict[str, Run]:
    x0, colours = _aligned(*LATENT), (_aligned(4, 3), _aligned(3))
    pixels = _aligned(1, 3, 128, 128, dtype=HALF)
    normals = triton(kernels.philox_normal, [1, 2], [0, 0], 0, LATENT[1:])

    def decoded(image: Tensor) -> Run:
        rgb = torch.empty(1, 128, 128, 3, dtype=torch.uint8)
        return Run(triton(kernels.decode_u8, image, check=False), (image,), (rgb,))

    return {
        "preview_rgb": Run(triton(kernels.preview_rgb, x0, *colours), (x0,), (_rgb(),)),
        "decode_u8": decoded(pixels),
        "decode_u8 channels-last": decoded(_last(pixels)),
        "philox_normal": Run(normals, (), (x0,)),
    }


def _layers() -> dict[str, Run]:
    hidden, weight = _aligned(*HIDDEN, dtype=HALF), _aligned(HIDDEN[1], dtype=HALF)
    pair, shift = _aligned(1, 256, 2 * 1280, dtype=HALF), _aligned(1, HIDDEN[1], dtype=HALF)
    y, x = _aligned(2, 256, 640, dtype=HALF), _aligned(2, 256, 640, dtype=HALF)
    down, up = _aligned(16, 640, dtype=HALF), _aligned(640, 16, dtype=HALF)
    added = triton(kernels.low_rank_add, y, x, down, up, torch.ones(2))
    summed = triton(kernels.add_layernorm, y, x, down[0], down[1])

    def normed(image: Tensor, *more: Tensor, **form: Any) -> Run:
        call = triton(kernels.groupnorm_silu, image, 32, weight, weight, **form)
        return Run(call, (image, *more), (image,))

    return {
        "groupnorm_silu": normed(hidden),
        "groupnorm_silu channels-last": normed(_last(hidden)),
        "groupnorm_silu shifted": normed(hidden, shift, shift=shift),
        "groupnorm channels-last": normed(_last(hidden), silu=False),
        "add_layernorm": Run(summed, (y, x), (y, x)),
        "geglu": Run(triton(kernels.geglu, pair), (pair,), (pair[..., :1280],)),
        "low_rank_add": Run(added, (x, y), (y,)),
    }


if __name__ == "__main__":
    main()
