"""What does a live adapter cost: nothing at strength 0, how much of a step, how long is a swap?

    python bench/adapters.py [--latent 64] [--rounds 5] [--swaps 1000]

step   an SD1.5-size UNet with random weights, attached and detached in turns
swap   SDXL's kohya layers (722) at rank 64, from tensors in memory into the slots that are there
growth resident memory over swaps of the bundled pair's adapter
"""

from __future__ import annotations

import argparse
import hashlib
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn

import headstart as hs
from headstart.adapters.delta import LowRank
from headstart.adapters.slots import Host
from headstart.networks.unet import Mid, Stage, UNet, UNetParams

SD15 = UNetParams(
    down=(
        Stage(320, (1, 1), True),
        Stage(640, (1, 1), True),
        Stage(1280, (1, 1), True),
        Stage(1280, (0, 0), False),
    ),
    mid=Mid(2, 1),
    up=(
        Stage(1280, (0, 0, 0), True),
        Stage(1280, (1, 1, 1), True),
        Stage(640, (1, 1, 1), True),
        Stage(320, (1, 1, 1), False),
    ),
    context_dim=768,
    heads=8,
    linear_projection=False,
)
SDXL = UNetParams(
    down=(Stage(320, (0, 0), True), Stage(640, (2, 2), True), Stage(1280, (10, 10), False)),
    mid=Mid(2, 10),
    up=(
        Stage(1280, (10, 10, 10), True),
        Stage(640, (2, 2, 2), True),
        Stage(320, (0, 0, 0), False),
    ),
    context_dim=2048,
    added_dim=2816,
)
KOHYA_SDXL = (".attn", ".ff.net", ".proj_in", ".proj_out")


def main() -> None:
    options = _parse()
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "threads": torch.get_num_threads(),
        "command": f"python bench/adapters.py --latent {options.latent} --rounds {options.rounds}",
        "bits": _bits(),
        "step": _step(options.latent, options.rounds),
        "swap": {name: _swap(dtype, options.rounds) for name, dtype in _DTYPES.items()},
        "growth": _growth(options.swaps),
    }
    harness.write_json(options.out, report)
    for name in ("bits", "step", "swap", "growth"):
        print(name, report[name])


_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latent", type=int, default=64, help="side of the SD1.5 latent")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("bench/results/adapters.json"))
    return parser.parse_args()


def _deltas(
    host: Host, parts: tuple[str, ...], rank: int, dtype: torch.dtype = torch.float32
) -> dict[str, LowRank]:
    return {
        path: LowRank(
            torch.randn(rank, *shape[1:]).mul_(0.02).to(dtype),
            torch.randn(shape[0], rank).mul_(0.02).to(dtype),
            1.0 / rank,
        )
        for path, shape in host.shapes.items()
        if any(part in path for part in parts)
    }


def _bits() -> dict[str, bool]:
    """SHA-256 of a hybrid run: detached, attached at 0, detached again."""
    engine = hs.Engine.demo(device="cpu")
    hosts = [Host(net) for net in engine.denoisers.values() if isinstance(net, nn.Module)]
    before = _digest(engine, None)
    for host in hosts:
        host.put("slider", _deltas(host, (".attn",), 4))
        host.columns = ("slider",)
    zero, one = (_digest(engine, torch.full((4, 2, 1), value)) for value in (0.0, 1.0))
    for host in hosts:
        host.remove("slider")
    return {
        "strength 0 equals detached": zero == before,
        "strength 1 differs": one != before,
        "detached again equals before": _digest(engine, None) == before,
    }


def _digest(engine: hs.Engine, strengths: Tensor | None) -> str:
    table, cond = engine.compile("hybrid"), engine.text.encode(["a fox"] * 2)
    noise = hs.Philox([1, 2])
    states = hs.sample(table, engine.denoisers, cond, noise, shape=(4, 16, 16), strengths=strengths)
    return hashlib.sha256(list(states)[-1].x.numpy().tobytes()).hexdigest()


def _step(latent: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    unet = UNet(SD15).requires_grad_(False).eval()
    host = Host(unet)
    deltas = _deltas(host, (".attn",), 4)
    host.columns = ("slider",)
    x, context = torch.randn(1, 4, latent, latent), torch.randn(1, 77, 768)

    def step(strengths: Tensor | None) -> None:
        with torch.inference_mode():
            unet(x, torch.tensor(500), hs.Conditioning(context, strengths=strengths))

    def attached(value: float) -> None:
        host.put("slider", deltas)
        step(torch.full((1, 1), value))
        host.remove("slider")

    cases = {
        "detached": lambda: step(None),
        "strength 0": lambda: attached(0.0),
        "strength 1": lambda: attached(1.0),
    }
    taken = harness.interleaved(cases, rounds)
    base = taken["detached"]["p50"]
    return {
        "layers": len(deltas),
        "latent": latent,
        "seconds": taken,
        "overhead": {name: round(taken[name]["p50"] / base - 1, 4) for name in list(cases)[1:]},
    }


def _swap(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """The weights themselves are not needed: one number each, shown in the layer's shape."""
    with torch.device("meta"):
        unet = UNet(SDXL)
    for layer in unet.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            shown = torch.zeros(1, dtype=dtype).expand(layer.weight.shape)
            layer.weight = nn.Parameter(shown, requires_grad=False)
    host = Host(unet)
    pair = [_deltas(host, KOHYA_SDXL, 64, torch.float16) for _ in range(2)]
    host.put("lora", pair[0])
    epoch = host.epoch
    turn = [0]

    def swap() -> None:
        turn[0] += 1
        host.put("lora", pair[turn[0] % 2])

    taken = harness.interleaved({"swap": swap}, max(rounds, 9))["swap"]
    bytes_ = sum(d.down.nbytes + d.up.nbytes for d in pair[0].values())
    return {
        "layers": len(pair[0]),
        "adapter_bytes": bytes_,
        "milliseconds": {key: round(1e3 * value, 1) for key, value in taken.items()},
        "buffers moved": host.epoch != epoch,
    }


def _growth(swaps: int) -> dict[str, Any]:
    """Peak resident memory (ru_maxrss never falls) after 100 swaps and after all of them."""
    engine = hs.Engine.demo(device="cpu")
    network: Any = engine.denoisers["base"]
    host = Host(network)
    pair: list[Mapping[str, LowRank]] = [_deltas(host, (".attn",), rank) for rank in (4, 2)]
    host.put("lora", pair[0])
    pointers = [buffer.data_ptr() for buffer in network.buffers()]
    peaks: list[int] = []
    for number in range(swaps):
        host.put("lora", pair[number % 2])
        if number in (99, swaps - 1):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    same = pointers == [buffer.data_ptr() for buffer in network.buffers()]
    return {"swaps": swaps, "peak_grew_kib": peaks[-1] - peaks[0], "pointers_same": same}


if __name__ == "__main__":
    main()
