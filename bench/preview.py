"""What does looking cost? Each decoder's time and fidelity, and a preview beside a step.

    python bench/preview.py [--rounds 21] [--out bench/results/preview.json]

PSNR of a decoder's picture to the full decode of the same x0, pixels in [-1, 1], nearest-enlarged
where it is smaller; over every row of the base and the hybrid, and over finished latents alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import harness
import torch
from reporting import markdown
from torch import Tensor
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.traces.decoders import Decoder
from headstart_kernels import Preview, fused_step, preview_rgb, scale_input

NAMES = ("linear", "tiny", "full")
PROMPTS = ("a fox", "a ghost", "an owl", "a cactus", "a doughnut", "a tulip", "a pig", "a star")
SEEDS = range(8000, 8004)
STATE = (1, 4, 128, 128)
"""A latent of SDXL at 1024 px, or of the bundled pair at 512 px."""


def main() -> None:
    options = harness.options(__doc__, "preview.json", rounds=21).parse_args()
    engine = hs.Engine.demo()
    decoders = {name: hs.decoder(engine, name) for name in NAMES}
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "threads": torch.get_num_threads(),
        "command": f"python bench/preview.py --rounds {options.rounds}",
        "weights": {f.file: f.sha256 for f in headstart_weights.manifest().files},
        "fidelity": _fidelity(engine, decoders),
        "decoders": _decoder_times(decoders, options.rounds),
        "beside_a_step": _beside_a_step(engine, decoders["linear"], options.rounds),
    }
    harness.write_json(options.out, report)
    print(_table(report))


def _fidelity(engine: hs.Engine, decoders: dict[str, Decoder]) -> dict[str, Any]:
    rows: dict[str, list[float]] = {name: [] for name in NAMES[:-1]}
    last: dict[str, list[float]] = {name: [] for name in NAMES[:-1]}
    for prompt in tqdm(PROMPTS, desc="fidelity"):
        for plan in ("base", "hybrid"):
            run = engine.sample(prompt, plan=plan, seeds=SEEDS, keep_x0=True)
            assert run.x0 is not None
            full = _pixels(decoders["full"], run.x0.flatten(0, 1))
            for name in rows:
                errors = _psnr(_pixels(decoders[name], run.x0.flatten(0, 1)), full)
                rows[name] += errors
                last[name] += errors[-len(SEEDS) :]
    return {
        name: {"psnr_db": _mean(rows[name]), "psnr_finished_db": _mean(last[name])} for name in rows
    }


def _pixels(decoder: Decoder, x0: Tensor) -> Tensor:
    rgb = decoder(x0).rgb.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return torch.nn.functional.interpolate(rgb, (64, 64), mode="nearest")


def _psnr(pixels: Tensor, full: Tensor) -> list[float]:
    """Of each picture; the peak is 2, the range of a pixel."""
    error = (pixels - full).square().flatten(1).mean(1)
    return (10.0 * torch.log10(4.0 / error)).tolist()


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 2)


def _decoder_times(decoders: dict[str, Decoder], rounds: int) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for batch in (1, 8):
        x0 = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        cases = {name: partial(decoder, x0) for name, decoder in decoders.items()}
        spread = harness.interleaved(cases, rounds)
        report[f"[{batch}, 4, 16, 16]"] = {
            name: harness.rounded(spread[name], 1e3, 4) for name in cases
        }
    return report


def _beside_a_step(engine: hs.Engine, linear: Decoder, rounds: int) -> dict[str, Any]:
    """A linear preview of 1 x 4 x 128 x 128 beside one row: its network, and its arithmetic."""
    table = torch.from_numpy(engine.compile("distilled").coefficients())
    network = engine.denoisers["distilled"]
    cond = engine.text.encode(["a fox"])
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(STATE, generator=generator) for _ in range(2))
    timestep = torch.tensor([749])
    factors = torch.tensor(headstart_weights.manifest().linear_rgb.factors)
    bias = torch.tensor(headstart_weights.manifest().linear_rgb.bias)
    silent = hs.Preview(linear, lambda _: None, slots=rounds + 2)
    shown = Preview(torch.empty(1, *STATE[2:], 3, dtype=torch.uint8), factors, bias)

    def step() -> Tensor:
        with torch.inference_mode():
            f = network(scale_input(x, table, 1, torch.float32), timestep, cond)
            return fused_step(x, f, table, 1, noise=noise)[1]

    def arithmetic(preview: Preview | None) -> Tensor:
        x_in = scale_input(x, table, 1, torch.float32)
        return fused_step(x, x_in, table, 1, noise=noise, preview=preview)[1]

    cases = {
        "step": step,
        "arithmetic": lambda: arithmetic(None),
        "drawn": lambda: arithmetic(shown),
        "linear": lambda: preview_rgb(x, factors, bias),
        "observer": lambda: silent(hs.State(0, x, x)),
    }
    spread = harness.interleaved(cases, rounds)
    silent.close()
    ratio = spread["linear"]["p50"] / spread["step"]["p50"]
    beside = spread["drawn"]["p50"] / spread["arithmetic"]["p50"] - 1.0
    return {
        "state": list(STATE),
        "ms": {name: harness.rounded(spread[name], 1e3, 4) for name in cases},
        "share_of_the_step": round(ratio, 4),
        "share_of_its_arithmetic": round(beside, 2),
        "meaning": "step: the bundled UNet and one fused step; arithmetic: scale_input and "
        "fused_step alone; drawn: these with preview=; linear: preview_rgb; observer: what Preview "
        "takes of the run's thread",
    }


def _table(report: dict[str, Any]) -> str:
    heads = ("decoder", "ms, 1 image", "ms, 8 images", "PSNR of all x0", "PSNR of finished")
    one, eight = report["decoders"].values()
    rows: list[tuple[str, ...]] = []
    for name in NAMES:
        fidelity = report["fidelity"].get(name, {}).values()
        psnr = [f"{value:.1f} dB" for value in fidelity] or ["-", "-"]
        rows.append((name, f"{one[name]['p50']:.2f}", f"{eight[name]['p50']:.2f}", *psnr))
    beside = report["beside_a_step"]
    times = ", ".join(f"{name} {value['p50']:.3f} ms" for name, value in beside["ms"].items())
    return (
        f"{markdown(heads, rows)}\n\n"
        f"{beside['state']}: {times}; linear is {beside['share_of_the_step']:.2%} of the step, "
        f"drawing adds {beside['share_of_its_arithmetic']:.0%} to its arithmetic"
    )


if __name__ == "__main__":
    main()
