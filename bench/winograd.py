"""What do Winograd's convolutions save on a CPU? Every 3x3 convolution of stride 1 of a network,
beside oneDNN's direct one with its weight packed once, in turns.

y = winograd_conv(x, Filter.of(weight), bias), where it pays; channels-last, as oneDNN's results are

python bench/winograd.py [--threads 1] [--rounds 5] [--only sd15]
    [--out bench/results/winograd.json]
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import torch
from torch import nn

from headstart.cost.sizes import sizes_of_family
from headstart.cost.stages import decode, unet_pass
from headstart_kernels import winograd_conv
from headstart_kernels.winograd import Filter, pays

LAST = torch.channels_last
NETWORKS = {
    "sd15 512 px": ("sd15", "unet", 64),
    "sd15 256 px": ("sd15", "unet", 32),
    "sdxl 512 px": ("sdxl", "unet", 64),
    "sdxl 1024 px": ("sdxl", "unet", 128),
    "vae 512 px": ("sd15", "vae", 64),
}


class Layer(NamedTuple):
    outputs: int
    inputs: int
    size: tuple[int, int]


def main() -> None:
    parser = harness.options(__doc__, "winograd.json", threads=1, rounds=5)
    parser.add_argument("--only", default="", help="the beginning of a network's name")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name, network in NETWORKS.items():
        if name.startswith(options.only):
            rows.append(measure(name, layers_of(*network), options))
            print(rows[-1]["network"], rows[-1]["sum"], flush=True)
    report = {
        "question": "seconds of a network's 3x3 convolutions of stride 1, float32, batch 1",
        "evidence": "measured",
        "clock": "CPU seconds" if options.threads == 1 else "wall seconds",
        "threads": options.threads,
        "rounds": options.rounds,
        "machine": harness.machine(),
        "rows": rows,
    }
    harness.write_json(options.out, report)


def layers_of(family: str, part: str, size: int) -> Counter[Layer]:
    """How often each occurs: seen on tensors without memory."""
    counts: Counter[Layer] = Counter()

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not isinstance(module, nn.Conv2d):
            return
        if module.kernel_size == (3, 3) and module.stride == (1, 1):
            counts[Layer(module.out_channels, module.in_channels, tuple(inputs[0].shape[2:]))] += 1

    sizes = sizes_of_family(family)
    hook = nn.modules.module.register_module_forward_pre_hook(count)
    if part == "unet":
        unet_pass(sizes.unet, (4, size, size), dtype=torch.float32)
    else:
        decode(sizes.vae, (4, size, size), 1, torch.float32)
    hook.remove()
    return counts


def measure(name: str, layers: Counter[Layer], options: argparse.Namespace) -> dict[str, Any]:
    rows = [{"count": layers[layer], **measured(layer, options)} for layer in layers]
    direct = sum(row["count"] * row["seconds"]["direct"]["p50"] for row in rows)
    ways = ("direct", "winograd")
    ours = sum(row["count"] * row["seconds"][ways[row["pays"]]]["p50"] for row in rows)
    mib = {
        way: round(sum(row["count"] * row["mib"][way] for row in rows if row["pays"]))
        for way in ways
    }
    sums = {
        "direct_s": round(direct, 3),
        "where_it_pays_s": round(ours, 3),
        "saved": round(1 - ours / direct, 3),
        "mib_of_the_weights_that_pay": mib,
    }
    return {"network": name, "sum": sums, "layers": rows}


def measured(layer: Layer, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    outputs, inputs, size = layer
    x = nn.functional.silu(torch.randn(1, inputs, *size)).contiguous(memory_format=LAST)
    weight = torch.randn(outputs, inputs, 3, 3) * (9 * inputs) ** -0.5
    bias = torch.randn(outputs)
    filter = Filter.of(weight)

    def cases(x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
        return {
            "direct": direct(weight, bias, x),
            "winograd": lambda: winograd_conv(x, filter, bias),
        }

    clock = time.process_time if options.threads == 1 else time.perf_counter
    seconds = harness.interleaved(cases(x), options.rounds, clock)
    products = 18 * outputs * inputs * x[0, 0].numel()
    part = x[..., :32, :32].contiguous(memory_format=LAST)
    exact = nn.functional.conv2d(part.double(), weight.double(), bias.double(), padding=1)
    errors = {k: float((f() - exact).norm() / exact.norm()) for k, f in cases(part).items()}
    return {
        "layer": f"{inputs} -> {outputs}, {size[0]}x{size[1]}",
        "pays": pays(weight.shape, x.shape),
        "seconds": seconds,
        "gflops": {k: round(products / spread["p50"] / 1e9) for k, spread in seconds.items()},
        "relative_error": {k: f"{error:.1e}" for k, error in errors.items()},
        "mib": {"direct": weight.numel() / 2**18, "winograd": filter.nbytes / 2**20},
    }


def direct(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """oneDNN's, as inductor emits it for frozen weights."""
    ones, ops = [1, 1], torch.ops.mkldnn
    packed = ops._reorder_convolution_weight(weight, ones, ones, ones, 1, list(x.shape))
    return lambda: ops._convolution_pointwise(x, packed, bias, ones, ones, ones, 1, "none", [], "")


if __name__ == "__main__":
    main()
