"""What does a live adapter cost: nothing at strength 0, how much of a step, how long is a swap?

    python bench/adapters.py [--parts bits,step,swap,growth,memory] [--latent 64] [--rounds 5]

bits    SHA-256 of a run of the bundled pair: detached, attached at strength 0 and 1, detached again
step    one step of an SD1.5-size UNet with random weights, with and without a rank-4 slider on its
        attention layers, in turns; the median of the rounds' ratios
swap    SDXL's kohya layers (722) at rank 64, between tensors in memory and the slots that are
        there, beside one copy of as many bytes; and `attach` as a whole, from the page cache
growth  memory over 1,000 swaps of two files on the bundled pair
memory  resident bytes of one SDXL UNet in float16, and of the slots of a rank-64 LoRA on it: what a
        pair takes whose distilled model is a LoRA, where two UNets take twice the first number
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from untrained import filled

import headstart as hs
from headstart.adapters.adapters import AdapterSet
from headstart.adapters.delta import LowRank
from headstart.adapters.file import layer_shapes
from headstart.adapters.snapshot import Snapshot, from_deltas
from headstart.cost.sizes import sizes_of_family
from headstart.networks.unet import UNet

SD15, SDXL = (sizes_of_family(name).unet for name in ("sd15", "sdxl"))
KOHYA_SDXL = (".attn", ".ff.net", ".proj_in", ".proj_out")
RANK = 64


_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def main() -> None:
    parser = harness.options(__doc__, "adapters.json", rounds=5, swaps=1000)
    parser.add_argument("--parts", default="bits,step,swap,growth,memory")
    parser.add_argument("--latent", type=int, default=64, help="side of the SD1.5 latent")
    options = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "bits": _bits,
        "step": lambda: _step(options.latent, options.rounds),
        "swap": lambda: {name: _swap(dtype, options.rounds) for name, dtype in _DTYPES.items()},
        "growth": lambda: _growth(options.swaps),
        "memory": _memory,
    }
    report = {"question": (__doc__ or "").splitlines()[0], **harness.read_json(options.out)}
    for name in options.parts.split(","):
        report[name] = {"machine": harness.machine(), "threads": torch.get_num_threads()}
        report[name] |= parts[name]()
        print(name, json.dumps(report[name], indent=1))
        harness.write_json(options.out, report)


def _deltas(
    network: nn.Module, parts: tuple[str, ...], rank: int, dtype: torch.dtype = torch.float32
) -> dict[str, LowRank]:
    return {
        path: LowRank(
            torch.randn(rank, *shape[1:]).mul_(0.02).to(dtype),
            torch.randn(shape[0], rank).mul_(0.02).to(dtype),
            1.0 / rank,
        )
        for path, shape in layer_shapes(network).items()
        if len(shape) > 1 and any(part in path for part in parts)
    }


@contextmanager
def _files(*changes: Mapping[str, LowRank]) -> Iterator[list[Path]]:
    """As kohya writes them, in memory where it can be, so that no disk is timed."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        paths = [Path(folder) / f"{number}.safetensors" for number in range(len(changes))]
        for deltas, path in zip(changes, paths, strict=True):
            tensors: dict[str, Tensor] = {}
            for module, delta in deltas.items():
                name = "lora_unet_" + module.replace(".", "_")
                up = delta.up[(..., *[None] * (delta.down.ndim - 2))]
                tensors |= {f"{name}.lora_down.weight": delta.down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = torch.tensor(delta.scale * delta.rank)
            save_file(tensors, path)
        yield paths


def _bits() -> dict[str, bool]:
    engine = hs.Engine.demo(device="cpu")
    with _files(_deltas(engine.denoisers["base"], (".attn",), 4)) as (path,):
        before = _digest(engine)
        engine.attach(path, name="slider")
        zero, one = (_digest(engine, {"slider": value}) for value in (0.0, 1.0))
        engine.detach("slider")
    return {
        "strength 0 equals detached": zero == before,
        "strength 1 differs": one != before,
        "detached again equals before": _digest(engine) == before,
    }


def _digest(engine: hs.Engine, adapters: Any = None) -> str:
    done = engine.sample("a fox", seeds=[1, 2], adapters=adapters)
    return hashlib.sha256(done.latents.numpy().tobytes()).hexdigest()


def _step(latent: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = UNet(SD15).requires_grad_(False).eval()
    with torch.device("meta"):
        steered = UNet(SD15)
    filled(steered, plain.state_dict())
    deltas = _deltas(steered, (".attn",), 4)
    slider = from_deltas(steered, "slider", deltas)
    x, context = torch.randn(1, 4, latent, latent), torch.randn(1, 77, 768)

    def step(unet: UNet, **options: Any) -> Tensor:
        with torch.inference_mode():
            return unet(x, torch.tensor([500]), hs.Conditioning(context, **options))

    cases = {
        f"strength {number}": partial(
            step, steered, strengths=torch.full((1, 1), float(number)), adapters=slider
        )
        for number in (0, 1)
    }
    detached = partial(step, plain)
    same = torch.equal(detached(), cases["strength 0"]())
    calls = {name: partial(harness.seconds_of, c) for name, c in (("", detached), *cases.items())}
    seconds = {name: np.array(taken) for name, taken in harness.in_turns(calls, rounds, 0).items()}
    ratios = {name: seconds[name] / seconds[""] - 1 for name in cases}
    return {
        "layers": len(deltas),
        "latent": latent,
        "strength 0 equals detached": same,
        "detached_s": round(float(np.median(seconds[""])), 3),
        "overhead": {name: round(float(np.median(each)), 4) for name, each in ratios.items()},
        "overhead_of_rounds": {name: each.round(4).tolist() for name, each in ratios.items()},
    }


def _swap(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """The weights themselves are not needed: one number each, shown in the layer's shape."""
    with torch.device("meta"):
        unet = UNet(SDXL)
    for layer in unet.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            shown = torch.zeros(1, dtype=dtype).expand(layer.weight.shape)
            layer.weight = nn.Parameter(shown, requires_grad=False)
    adapters = AdapterSet({"base": unet})
    pair = [_deltas(unet, KOHYA_SDXL, RANK, torch.float16) for _ in range(2)]
    numbers = sum(d.down.numel() + d.up.numel() for d in pair[0].values())
    target, source = torch.ones(numbers, dtype=dtype), torch.ones(numbers, dtype=torch.float16)
    turn = cycle((1, 0))

    def swap() -> None:
        (slots,) = adapters.look().parts(unet)
        slots.fill(pair[next(turn)])

    with _files(*pair) as files:
        adapters.attach(files[0], name="lora")
        where = _buffers(adapters.look(), unet)
        taken = harness.interleaved(
            {
                "one copy": lambda: target.copy_(source),
                "swap": swap,
                "attach": lambda: adapters.attach(files[next(turn)], name="lora", replace=True),
            },
            max(rounds, 7),
        )
    return {
        "layers": len(pair[0]),
        "numbers": numbers,
        "milliseconds": {n: harness.rounded(spread, 1e3, 1) for n, spread in taken.items()},
        "buffers moved": where != _buffers(adapters.look(), unet),
    }


def _memory() -> dict[str, Any]:
    before = _resident_kib()
    with torch.device("meta"):
        unet = UNet(SDXL).to(torch.float16)
    unet = unet.to_empty(device="cpu").requires_grad_(False)
    for tensor in unet.state_dict().values():
        tensor.zero_()
    alone = _resident_kib()
    unet_kib, adapters = alone - before, AdapterSet({"base": unet})
    with _files(_deltas(unet, KOHYA_SDXL, RANK, torch.float16)) as (file,):
        adapters.attach(file, name="lora")
    slots_kib = sum(b.nbytes for part in adapters.look().parts(unet) for b in part.buffers()) / 1024
    return {
        "unet_kib": unet_kib,
        "slots_kib": int(slots_kib),
        "of_two_unets": round((unet_kib + slots_kib) / (2 * unet_kib), 3),
    }


def _buffers(attached: Snapshot, network: nn.Module) -> list[int]:
    return [b.data_ptr() for part in attached.parts(network) for b in part.buffers()]


def _growth(swaps: int) -> dict[str, Any]:
    """Resident memory, now and at its peak, after 100 swaps and after all of them."""
    engine = hs.Engine.demo(device="cpu")
    network = engine.denoisers["base"]
    resident: list[tuple[int, int]] = []
    with _files(*(_deltas(network, (".attn",), rank) for rank in (4, 2))) as files:
        engine.attach(files[0], name="lora")
        pointers = _buffers(engine.adapters.look(), network)
        for number in range(1, swaps + 1):
            engine.attach(files[number % 2], name="lora", replace=True)
            if number in (100, swaps):
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                resident.append((_resident_kib(), peak))
    (now, peak), (later, last) = resident[0], resident[-1]
    return {
        "swaps": swaps,
        "resident_grew_kib": later - now,
        "peak_grew_kib": last - peak,
        "pointers_same": pointers == _buffers(engine.adapters.look(), network),
    }


def _resident_kib() -> int:
    return harness.resident_bytes()["total"] // 1024


if __name__ == "__main__":
    main()
