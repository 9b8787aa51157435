"""One row of one case of `bench/peers.py`: a process that stays to be called in turns.

`main` has a request (case, row, threads, folder) and a pipe, where it answers ("ready", facts), or
("missing", why), or ("failed", why); then for each line that comes: "go VARIANT" -> ("turn",
seconds), "changes" -> ("changes", facts). Row "prepare" makes the files, "machine" measures what
the machine can.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import partial, reduce
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from peers_case import BY_NAME, Case
from peers_floor import machine_peaks
from peers_networks import (
    PAIR_LATENT,
    conditioning,
    prepare,
    read_inputs,
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


def main(request: Mapping[str, Any], pipe: Connection) -> int:
    def send(name: str, value: Any) -> None:
        pipe.send((name, value))

    try:
        answer(request, iter(pipe.recv, None), send)
    except EOFError:  # nobody asks any more
        return 0
    except ModuleNotFoundError as error:
        send("missing", f"not installed: {error.name}")
    except Exception as error:
        traceback.print_exc(limit=-4)
        send("failed", harness.one_line(error))
        return 1
    return 0


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
    facts: dict[str, Any] = {"build_s": round(time.perf_counter() - begin, 2)}
    begin, outputs = time.perf_counter(), {name: call() for name, call in calls.items()}
    facts["first_s"] = round(time.perf_counter() - begin, 2)
    facts["peak_bytes"] = memory.stop()["anonymous"]
    costs = reduce(together, (network.facts for network in networks), {})
    _write(request, outputs)
    send("ready", facts | costs | bytes_at_rest())
    for line in lines:
        word, _, name = line.strip().partition(" ")
        if word == "changes":
            send("changes", changes(case, folder, networks, calls[case.name]))
        else:
            send("turn", turn(calls[name]))


def built(
    case: Case, row: Row, folder: Path, threads: int
) -> tuple[dict[str, Call], list[Network]]:
    """Variant -> what is timed."""
    files, inputs = sources(case, folder), read_inputs(case, folder)
    if row.whole is not None:
        call = row.whole(_diffusers_folder(case, folder), case.size, threads)
        return {case.name: call}, []
    if case.kind == "vae":
        decoder = row.vae(files["vae"], [inputs])
        return {case.name: partial(decoder, inputs["latents"])}, [decoder]
    if case.kind == "unet":
        network = row.unet(files["base"], [inputs])
        cond = conditioning(inputs)
        return {case.name: partial(network, inputs["x"], inputs["timestep"], cond)}, [network]
    one, two = _rows(inputs["context"], 1), _rows(inputs["context"], 2)
    examples = {"base": [one, two], "distilled": [one]}
    networks = {role: row.unet(files[role], own) for role, own in examples.items()}
    decoder = row.vae(files["vae"], [{"latents": one["x"]}])
    uncond, cond = (Conditioning(inputs["context"][i : i + 1]) for i in (0, 1))

    def run(table: hs.StepTable) -> Tensor:
        states = hs.sample(table, networks, cond, Philox(0), uncond=uncond, shape=PAIR_LATENT)
        *_, last = states
        return decoder(last.x)

    calls = {name: partial(run, table) for name, table in tables().items()}
    return calls, [*networks.values(), decoder]


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
    sizes, model = sizes_of_family(case.network), folder / f"{case.network}-diffusers"
    shapes = {
        "text_encoder/model.safetensors": blueprint.clip(sizes.text[0][0]),
        "vae/diffusion_pytorch_model.safetensors": blueprint.vae(sizes.vae),
    }
    for name, table in shapes.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        if not (model / name).is_file():
            write_random(model / name, table)
    unet = model / "unet/diffusion_pytorch_model.safetensors"
    unet.parent.mkdir(exist_ok=True)
    if not unet.exists():
        unet.symlink_to(sources(case, folder)["base"].path.resolve())
    return model


def turn(call: Call) -> dict[str, float]:
    """Wall seconds, or those that the call gives; and processor seconds, of all threads."""
    begin, busy = time.perf_counter(), time.process_time()
    out = call()
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    return {"s": out} if isinstance(out, float) else {"s": seconds, "cpu_s": busy}


def bytes_at_rest() -> dict[str, int]:
    """What is free is given back first, as far as the allocator can."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    now = harness.resident_bytes()
    return {"anonymous_bytes": now["anonymous"], "mapped_bytes": now["file"]}


def _write(request: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Outputs as float64, to be compared; those of a program that gives none are not there."""
    tensors = {
        name: out.double().numpy() for name, out in outputs.items() if isinstance(out, Tensor)
    }
    np.savez(Path(request["folder"]) / request["output"], **tensors)


def changes(case: Case, folder: Path, networks: list[Network], call: Call) -> dict[str, Any]:
    """Of one UNet: does it follow other weights, as a merged adapter is; a hook, as an attached one
    is; and what does another size cost? Errors are facts, and so are seconds."""
    if not networks or networks[0].module is None:
        return {}
    network, before, facts = networks[0], call(), dict[str, Any]()

    def tried(name: str, body: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        try:
            facts[name] = body()
        except Exception as error:
            facts[name] = harness.one_line(error)
        facts[f"{name}_s"] = round(time.perf_counter() - begin, 2)

    tried("follows_weights", lambda: _follows_weights(network.module, call, before))
    tried("follows_hooks", lambda: _follows_hooks(network.module, call, before))
    inputs = read_inputs(case, folder)
    smaller = inputs["x"][..., : 3 * case.size // 4].contiguous()
    cond, at_rest = conditioning(inputs), bytes_at_rest()["anonymous_bytes"]
    tried("other_size", lambda: list(network(smaller, inputs["timestep"], cond).shape))
    facts["other_size_bytes"] = bytes_at_rest()["anonymous_bytes"] - at_rest
    return facts


def _follows_weights(module: Any, call: Call, before: Tensor) -> bool:
    layer = module.conv_out
    weight = layer.weight
    layer.weight = nn.Parameter(1.5 * weight.detach(), requires_grad=False)
    after = call()
    layer.weight = weight
    return _apart(after, before)


def _follows_hooks(module: Any, call: Call, before: Tensor) -> bool:
    hook = module.mid_block.resnets[0].conv1.register_forward_hook(lambda _, __, out: 1.5 * out)
    after = call()
    hook.remove()
    return _apart(after, before)


def _apart(a: Tensor, b: Tensor) -> bool:
    return bool((a.float() - b.float()).norm() > 1e-3 * b.float().norm())
