"""Does a hybrid of two SDXL UNets run on a 24 GB machine, with how much memory and how fast?

    python bench/sdxl.py --base sd_xl_base_1.0.safetensors --distilled lightning_4step.safetensors
    python bench/sdxl.py --base ... --distilled ... --part diffusers --part stored

Both files F16, 512 px (64x64 latents), one image, no GPU. Each part runs in a process of its own,
one after the other: the hybrid through `Engine`, then one UNet alone in three ways, three passes
each: headstart with the weights kept in half precision, headstart in float32, diffusers in float32.
The result is written after every part, and parts that it holds of these files already are not run
again; `--part` runs the ones named, again if need be. Memory is sampled every 50 ms: anonymous
bytes are what the run takes from the system, file bytes are mapped pages, which the system takes
back when it needs them. Seconds are the least of the passes after the first, which brings pages in.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, machine, options, read_json, resident_bytes, write_json

RESULT = RESULTS / "sdxl.json"
LATENT = 64
SCRATCH = Path(tempfile.gettempdir())


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
        now = resident_bytes()
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


def one_unet(path: Path, part: str, keep: Path) -> dict[str, Any]:
    """Seconds of each of three passes; the output goes to `keep`."""
    import torch

    torch.manual_seed(0)
    x, time_ids = torch.randn(1, 4, LATENT, LATENT), torch.tensor([[512.0, 512, 0, 0, 512, 512]])
    context, pooled, at = torch.randn(1, 77, 2048), torch.randn(1, 1280), torch.tensor([749])
    begin = time.perf_counter()
    if part == "diffusers":
        unet = _diffusers_unet(path)
        added = {"text_embeds": pooled, "time_ids": time_ids}

        def run() -> torch.Tensor:
            return unet(x, at, context, added_cond_kwargs=added).sample
    else:
        from headstart.interfaces import Conditioning
        from headstart.networks.load import load_unet
        from headstart.runner.runner import EagerRunner

        cond = Conditioning(context, pooled, time_ids)
        runner = EagerRunner(load_unet(path, dtype="stored" if part == "stored" else torch.float32))

        def run() -> torch.Tensor:
            return runner(x, at, cond)

    loaded, seconds, out = time.perf_counter() - begin, list[float](), x
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            out = run()
            seconds.append(time.perf_counter() - start)
    np.save(keep, out.numpy())
    finite = bool(out.isfinite().all())
    return {"load_s": loaded, "pass_s": seconds, "finite": finite, "norm": float(out.norm())}


def _diffusers_unet(path: Path) -> Any:
    from safetensors.torch import load_file
    from untrained import diffusers_unet, filled

    from headstart.cost.sizes import sizes_of_family

    unet = diffusers_unet(sizes_of_family("sdxl").unet)
    return filled(unet, {name: tensor.float() for name, tensor in load_file(path).items()})


PARTS = ("hybrid", "stored", "diffusers", "float32")


def run_part(part: str, base: Path, distilled: Path, keep: Path) -> dict[str, Any]:
    """For a process of its own, which has nothing of the other parts in its memory."""
    memory, where = Memory(), machine()
    memory.start()
    facts = hybrid(base, distilled) if part == "hybrid" else one_unet(distilled, part, keep)
    return facts | {"peak_bytes": memory.stop(), "machine": where}


def conclude(parts: dict[str, Any], outputs: dict[str, Path]) -> dict[str, Any]:
    """Seconds a pass, the ratio to diffusers, and how far the outputs are from its output."""
    alone = {name: part for name, part in parts.items() if name != "hybrid"}
    seconds = {name: min(part["pass_s"][1:]) for name, part in alone.items()}
    summary: dict[str, Any] = {"seconds_a_pass": seconds}
    if (theirs := seconds.get("diffusers")) is not None:
        summary["times_diffusers"] = {name: value / theirs for name, value in seconds.items()}
    outs = {name: np.load(path) for name, path in outputs.items() if path.is_file()}
    if (exact := outs.pop("diffusers", None)) is not None:
        summary["relative_l2_to_diffusers"] = {
            name: float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
            for name, out in outs.items()
        }
    return summary


def main() -> None:
    parser = options(__doc__, None)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--distilled", type=Path, required=True, help="a bare UNet")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: what is missing")
    args = parser.parse_args()
    files = {p.name: p.stat().st_size for p in (args.base, args.distilled)}
    before = read_json(RESULT)
    parts = before["parts"] if before.get("files") == files else {}
    outputs = {part: SCRATCH / f"headstart-sdxl-{part}.npy" for part in PARTS[1:]}
    for part in args.part or [part for part in PARTS if part not in parts]:
        arguments = (part, args.base, args.distilled, outputs.get(part, SCRATCH))
        with get_context("spawn").Pool(1) as pool:
            parts[part] = pool.apply(run_part, arguments)
        report = {
            "question": "does a hybrid of two SDXL UNets run on a 24 GB machine without a GPU?",
            "evidence": "measured",
            "files": files,
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "parts": parts,
            **conclude(parts, outputs),
        }
        write_json(RESULT, report)
        print(part, json.dumps({k: v for k, v in parts[part].items() if k != "machine"}))
    print(json.dumps(conclude(parts, outputs), indent=1))


if __name__ == "__main__":
    main()
