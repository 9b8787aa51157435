"""Does a hybrid of two SDXL UNets run on a 24 GB machine, with how much memory and how fast?

    python bench/sdxl.py --base sd_xl_base_1.0.safetensors --distilled lightning.safetensors

Both files F16, 512 px (64x64 latents), one image, no GPU. Each case runs in a process of its own,
one after the other: the hybrid through `Engine`, then one UNet alone in three ways, `--rounds`
times in turns: headstart with the weights kept in half precision, headstart in float32, diffusers
in float32. Memory is sampled every 50 ms: anonymous bytes are what the run takes from the system,
file bytes are mapped pages, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from harness import machine, write_json

RESULT = Path(__file__).parent / "results" / "sdxl.json"
LATENT = 64
# sd_xl_base_1.0's unet/config.json, the keys that differ from diffusers' defaults.
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


class Memory(threading.Thread):
    """The largest anonymous, file and total resident bytes while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"anonymous": 0, "file": 0, "total": 0}
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.05):
            self.look()

    def look(self) -> None:
        text = Path("/proc/self/status").read_text()
        now = {
            name: int(text.split(f"{key}:")[1].split()[0]) * 1024
            for name, key in (("anonymous", "RssAnon"), ("file", "RssFile"), ("total", "VmRSS"))
        }
        self.peak = {name: max(value, now[name]) for name, value in self.peak.items()}

    def stop(self) -> dict[str, int]:
        self._done.set()
        self.look()
        return self.peak


def hybrid(base: Path, distilled: Path) -> dict[str, Any]:
    import headstart as hs

    begin = time.perf_counter()
    engine = hs.Engine.load(base, distilled, device="cpu")
    loaded = time.perf_counter()
    done = engine.sample("a fox in the snow", size=8 * LATENT)
    passes = {m: sum(step.model == m for step in done.table) for m in ("base", "distilled")}
    return {
        "load_s": loaded - begin,
        "notes": engine.weights.notes,
        "plan": done.table.name,
        "size": done.size,
        "latency_ms": dict(done.latency_ms),
        "seconds_a_pass": {m: done.latency_ms[m] / 1e3 / n for m, n in passes.items()},
        "total_s": time.perf_counter() - begin,
        "finite": bool(done.latents.isfinite().all()),
    }


def one_unet(path: Path, kind: str) -> dict[str, Any]:
    """Seconds of each of three passes; the first also brings the pages in."""
    import torch

    torch.manual_seed(0)
    x, time_ids = torch.randn(1, 4, LATENT, LATENT), torch.tensor([[512.0, 512, 0, 0, 512, 512]])
    context, pooled, at = torch.randn(1, 77, 2048), torch.randn(1, 1280), torch.tensor([749])
    begin = time.perf_counter()
    if kind == "diffusers float32":
        unet = _diffusers_unet(path)
        added = {"text_embeds": pooled, "time_ids": time_ids}

        def run() -> torch.Tensor:
            return unet(x, at, context, added_cond_kwargs=added).sample
    else:
        from headstart.interfaces import Conditioning
        from headstart.networks.load import load_unet
        from headstart.runner.runner import EagerRunner

        dtype = "stored" if kind.endswith("stored") else torch.float32
        network, cond = load_unet(path, dtype=dtype), Conditioning(context, pooled, time_ids)  # pyright: ignore[reportArgumentType]
        runner = EagerRunner(network)

        def run() -> torch.Tensor:
            return runner(x, at, cond)

    loaded, seconds = time.perf_counter() - begin, list[float]()
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            out = run()
            seconds.append(time.perf_counter() - start)
    return {"load_s": loaded, "pass_s": seconds, "norm": float(out.double().norm())}


def _diffusers_unet(path: Path) -> Any:
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SDXL)
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    unet.load_state_dict(state, strict=True, assign=True)
    return unet.eval()


KINDS = ("headstart stored", "diffusers float32", "headstart float32")


def child(case: str, base: Path, distilled: Path) -> dict[str, Any]:
    told = subprocess.run(
        [sys.executable, __file__, "--base", base, "--distilled", distilled, "--case", case],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(told.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--distilled", type=Path, required=True, help="a bare UNet")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        memory = Memory()
        memory.start()
        found = (
            hybrid(args.base, args.distilled)
            if args.case == "hybrid"
            else one_unet(args.distilled, args.case)
        )
        print(json.dumps(found | {"peak_bytes": memory.stop()}))
        return
    report: dict[str, Any] = {
        "question": "does a hybrid of two SDXL UNets run on a 24 GB machine without a GPU?",
        "evidence": "measured; bytes hold on a busy machine, seconds only beside each other",
        "files": {p.name: p.stat().st_size for p in (args.base, args.distilled)},
        "machine": machine() | {"memory_bytes": os.sysconf("SC_PHYS_PAGES") * 4096},
        "hybrid": child("hybrid", args.base, args.distilled),
        "one_unet": {kind: [] for kind in args.kinds},
    }
    print(json.dumps(report["hybrid"], indent=1))
    for _ in range(args.rounds):
        for kind in args.kinds:
            found = child(kind, args.base, args.distilled)
            report["one_unet"][kind].append(found)
            print(kind, json.dumps(found))
    warm = {k: statistics.median(r["pass_s"][-1] for r in v) for k, v in report["one_unet"].items()}
    report["seconds_a_pass"] = warm
    if "diffusers float32" in warm:
        report["times_diffusers"] = {k: v / warm["diffusers float32"] for k, v in warm.items()}
    write_json(RESULT, report)


if __name__ == "__main__":
    main()
