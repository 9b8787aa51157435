"""What do portable bits cost? `philox_normal` beside `torch.randn`, on one thread, in turns.

n = philox_normal(seed, sample, row): the same bits in any batch and on any device

python bench/noise.py [--rounds 41] [--device cpu] [--out bench/results/noise.json]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import harness
import torch

from headstart_kernels import philox_normal

SHAPES = ((4, 16, 16, 16), (1, 4, 128, 128), (16, 4, 128, 128))
"""[B, C, h, w]: a narrow latent, and SDXL's at 1024 pixels for one image and for sixteen."""


def main() -> None:
    options = harness.options(__doc__, "noise.json", rounds=41, device="cpu").parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    rows = [measure(shape, device, options.rounds) for shape in SHAPES]
    report = {
        "question": "seconds of one draw of unit normals [B, C, h, w]",
        "evidence": "measured",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": 1,
        "rounds": options.rounds,
        "machine": harness.machine(),
        "rows": rows,
    }
    harness.write_json(options.out, report)


def measure(shape: tuple[int, ...], device: torch.device, rounds: int) -> dict[str, object]:
    seeds, samples = list(range(shape[0])), [0] * shape[0]
    draws = {
        "philox_normal": lambda: philox_normal(seeds, samples, 0, shape[1:], device),
        "torch.randn": lambda: torch.randn(shape, device=device),
    }

    def waited_for(draw: Callable[[], object]) -> None:
        draw()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    calls = {name: partial(waited_for, draw) for name, draw in draws.items()}
    seconds = harness.interleaved(calls, rounds)
    ratio = seconds["philox_normal"]["p50"] / seconds["torch.randn"]["p50"]
    return {"shape": shape, "seconds": seconds, "ratio_of_medians": round(ratio, 2)}


if __name__ == "__main__":
    main()
