"""One row of one case of `bench/peers.py`: a process that stays to be called in turns.

    python bench/peers_worker.py REQUEST FD      FD: where it answers, in lines of JSON

REQUEST is JSON: case, row, threads, folder. It answers ["ready", facts], or ["missing", why], or
["failed", why]; then for each line on its input: "go VARIANT" -> ["turn", seconds], "changes" ->
["changes", facts]. Row "prepare" makes the files, "machine" measures what the machine can.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_case import BY_NAME, Case
from peers_floor import machine_peaks
from peers_networks import (
    PAIR_LATENT,
    conditioning,
    inputs,
    prepare,
    sources,
    tables,
    write_random,
)
from peers_rows import ROWS, Network, Row, together
from sdxl import Memory
from torch import Tensor, nn

import headstart as hs
from headstart.checkpoint import blueprint
from headstart.cost.sizes import sizes_of_family
from headstart.interfaces import Conditioning
from headstart.noise import Philox

Call = Callable[[], Any]
Send = Callable[[str, Any], None]


def main() -> int:
    request = json.loads(sys.argv[1])
    with os.fdopen(int(sys.argv[2]), "w") as pipe:

        def send(kind: str, value: Any) -> None:
            print(json.dumps([kind, value]), file=pipe, flush=True)

        try:
            answer(request, sys.stdin, send)
        except ModuleNotFoundError as error:
            send("missing", f"not installed: {error.name}")
        except Exception as error:
            traceback.print_exc(limit=-4)
            send("failed", said(error))
            return 1
    return 0


def said(error: BaseException) -> str:
    """An error in one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def answer(request: Mapping[str, Any], lines: Iterable[str], send: Send) -> None:
    torch.set_num_threads(request["threads"])
    if request["row"] == "machine":
        return send("ready", machine_peaks())
    case, folder = BY_NAME[request["case"]], Path(request["folder"])
    if request["row"] == "prepare":
        return send("ready", prepare(case, folder))
    row = ROWS[request["row"]]
    if row.package is not None and importlib.util.find_spec(row.package) is None:
        return send("missing", f"not installed: {row.install}")
    memory, begin = Memory(), time.perf_counter()
    memory.start()
    calls, networks = built(case, row, folder, request["threads"])
    told: dict[str, Any] = {"build_s": round(time.perf_counter() - begin, 2)}
    begin, outputs = time.perf_counter(), {name: call() for name, call in calls.items()}
    told["first_s"] = round(time.perf_counter() - begin, 2)
    told["peak_bytes"] = memory.stop()["anonymous"]
    costs: dict[str, Any] = {}
    for network in networks:
        costs = together(costs, network.facts)
    _keep(request, outputs)
    send("ready", told | costs | held())
    for line in lines:
        what, _, name = line.strip().partition(" ")
        if what == "changes":
            send("changes", changes(case, folder, networks, calls[case.name]))
        else:
            send("turn", turn(calls[name]))


def built(
    case: Case, row: Row, folder: Path, threads: int
) -> tuple[dict[str, Call], list[Network]]:
    """Variant -> what is timed."""
    files, given = sources(case, folder), inputs(case, folder)
    if row.whole is not None:
        call = row.whole(_diffusers_folder(case, folder), case.size, threads)
        return {case.name: call}, []
    unet, vae = row.unet, row.vae
    if case.kind == "vae":
        assert vae is not None
        decoder = vae(files["vae"], [given])
        return {case.name: lambda: decoder(given["latents"])}, [decoder]
    assert unet is not None
    if case.kind == "unet":
        network = unet(files["base"], [given])
        call = (given["x"], given["timestep"], conditioning(given))
        return {case.name: lambda: network(*call)}, [network]
    assert vae is not None
    one, two = _rows(given["context"], 1), _rows(given["context"], 2)
    networks = {
        "base": unet(files["base"], [one, two]), "distilled": unet(files["distilled"], [one]),
    }  # fmt: skip
    decoder = vae(files["vae"], [{"latents": one["x"]}])
    empty, told = (Conditioning(given["context"][i : i + 1]) for i in (0, 1))

    def run(table: hs.StepTable) -> Tensor:
        states = hs.sample(table, networks, told, Philox(0), uncond=empty, shape=PAIR_LATENT)
        *_, last = states
        return decoder(last.x)

    return {name: lambda t=table: run(t) for name, table in tables().items()}, [
        *networks.values(), decoder,
    ]  # fmt: skip


def _rows(context: Tensor, rows: int) -> dict[str, Tensor]:
    """An example of a pass of the pair on so many samples."""
    return {
        "x": torch.zeros(rows, *PAIR_LATENT),
        "timestep": torch.full((rows,), 999),
        "context": context[-1:].repeat(rows, 1, 1),
    }


def _diffusers_folder(case: Case, folder: Path) -> Path:
    """The case's UNet with a text encoder and a VAE of random weights beside it, for programs that
    run whole prompts."""
    sizes, made = sizes_of_family(case.network), folder / f"{case.network}-diffusers"
    shapes = {
        "text_encoder/model.safetensors": blueprint.clip(sizes.text[0][0]),
        "vae/diffusion_pytorch_model.safetensors": blueprint.vae(sizes.vae),
    }
    for name, table in shapes.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        if not (made / name).is_file():
            write_random(made / name, table)
    unet = made / "unet/diffusion_pytorch_model.safetensors"
    unet.parent.mkdir(exist_ok=True)
    if not unet.exists():
        unet.symlink_to(sources(case, folder)["base"].path.resolve())
    return made


def turn(call: Call) -> dict[str, float]:
    """Wall seconds, or those that the call tells; and processor seconds, of all threads."""
    begin, busy = time.perf_counter(), time.process_time()
    out = call()
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    return {"s": out} if isinstance(out, float) else {"s": seconds, "cpu_s": busy}


def held() -> dict[str, int]:
    """Bytes at rest: what is free is given back first, as far as the allocator can."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory = Memory()
    memory.look()
    return {"anonymous_bytes": memory.peak["anonymous"], "mapped_bytes": memory.peak["file"]}


def _keep(request: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Outputs as float64, for whoever compares them; those of a program that gives none are not."""
    tensors = {
        name: out.double().numpy() for name, out in outputs.items() if isinstance(out, Tensor)
    }
    np.savez(Path(request["folder"]) / request["output"], **tensors)


def changes(case: Case, folder: Path, networks: list[Network], call: Call) -> dict[str, Any]:
    """Of one UNet: does it follow other weights, as a merged adapter is; a hook, as an attached one
    is; and what does another size cost? Errors are facts, and so are seconds."""
    if not networks or networks[0].module is None:
        return {}
    network, before, told = networks[0], call(), dict[str, Any]()

    def tried(name: str, body: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        try:
            told[name] = body()
        except Exception as error:
            told[name] = said(error)
        told[f"{name}_s"] = round(time.perf_counter() - begin, 2)

    tried("follows_weights", lambda: _follows_weights(network.module, call, before))
    tried("follows_hooks", lambda: _follows_hooks(network.module, call, before))
    given = inputs(case, folder)
    smaller = given["x"][..., : 3 * case.size // 4].contiguous()
    call_smaller = (smaller, given["timestep"], conditioning(given))
    held_before = held()["anonymous_bytes"]
    tried("other_size", lambda: list(network(*call_smaller).shape))
    told["other_size_bytes"] = held()["anonymous_bytes"] - held_before
    return told


def _follows_weights(module: Any, call: Call, before: Tensor) -> bool:
    layer = module.conv_out
    kept = layer.weight
    layer.weight = nn.Parameter(1.5 * kept.detach(), requires_grad=False)
    after = call()
    layer.weight = kept
    return _apart(after, before)


def _follows_hooks(module: Any, call: Call, before: Tensor) -> bool:
    hook = module.mid_block.resnets[0].conv1.register_forward_hook(lambda _, __, out: 1.5 * out)
    after = call()
    hook.remove()
    return _apart(after, before)


def _apart(a: Tensor, b: Tensor) -> bool:
    return bool((a.float() - b.float()).norm() > 1e-3 * b.float().norm())


if __name__ == "__main__":
    sys.exit(main())
