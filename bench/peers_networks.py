"""Weights and inputs of a case of `bench/peers.py`: made once from a seed, read by every process.

Files are mapped, so processes that compute with the weights as they are share one copy of them.
Each weight is normal with variance 1/fan-in, biases are 0 and norms 1: activations keep their size
through the layers, as those of a trained network do, and an error shows as large as it is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers_case import GUIDANCE, STEPS, Case
from safetensors.torch import load_file, save_file
from torch import Tensor
from untrained import POOLED, TINY, filled, in_dtype

import headstart_weights
from headstart.checkpoint import blueprint
from headstart.checkpoint.network_info import Overrides
from headstart.checkpoint.params import UNetParams, VaeParams
from headstart.checkpoint.tensors import Checkpoint
from headstart.checkpoint.verdict import judge
from headstart.convert.container import compose
from headstart.cost.operators import Tally
from headstart.cost.sizes import sizes_of_family
from headstart.cost.stages import decode, unet_pass
from headstart.interfaces import Conditioning
from headstart.networks.load import load_text
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae
from headstart.plan.pairs import DEMO_SCHEDULE
from headstart.plan.prediction import Prediction
from headstart.plan.preset import preset
from headstart.plan.table import StepTable

PROMPT = "a fox"
PAIR_LATENT = (4, 16, 16)


class Source(NamedTuple):
    """A network in a file."""

    path: Path
    part: str  # "unet" or "vae"
    overrides: Overrides = Overrides()

    def params(self) -> Any:
        return getattr(self._judged(), self.part)

    def plain(self, dtype: torch.dtype) -> Any:
        """A module of ours with the file's tensors and nothing done to them, for others' use."""
        judged, params = self._judged(), self.params()
        with torch.device("meta"):
            module: Any = UNet(params) if self.part == "unet" else Vae(params)
        state = {name: judged.part.tensor(name).to(dtype) for name in module.state_dict()}
        return filled(module, state)

    def _judged(self) -> Any:
        checkpoint = Checkpoint.open(self.path, self.part)  # pyright: ignore[reportArgumentType]
        return judge(self.path, checkpoint, self.overrides).require(self.part)  # pyright: ignore


def sources(case: Case, folder: Path) -> dict[str, Source]:
    """Role -> file."""
    if case.kind == "runs":
        base, distilled = (headstart_weights.path(role) for role in ("base", "distilled"))
        return {"base": Source(base, "unet"), "distilled": Source(distilled, "unet"),
                "vae": Source(base, "vae")}  # fmt: skip
    if case.kind == "vae":
        scale = sizes_of_family(case.network).family.scale_factor
        file = folder / f"{case.network}-vae.safetensors"
        return {"vae": Source(file, "vae", Overrides(scale_factor=scale))}
    overrides = Overrides(head_dim=TINY.head_dim) if case.network == "tiny" else Overrides()
    return {"base": Source(folder / f"{case.network}-unet.safetensors", "unet", overrides)}


def tables() -> dict[str, StepTable]:
    """Of the case "pair": by variant."""
    plans = {"hybrid": preset("demo")}
    for name, scale in (("plain", 1.0), ("guided", GUIDANCE)):
        for steps in STEPS:
            plans[f"{steps} {name}"] = preset("demo", steps=steps, mode="base", base_guidance=scale)
    return {
        name: plan.compile(DEMO_SCHEDULE, prediction=Prediction.V) for name, plan in plans.items()
    }


def prepare(case: Case, folder: Path) -> dict[str, Any]:
    """Write what the case's processes read, unless it is there; what the case takes by theory."""
    files = sources(case, folder)
    for source in files.values():
        if not source.path.is_file():
            _write_weights(case, source.path)
    with torch.inference_mode():
        save_file(_inputs(case, files), folder / f"{case.name}-inputs.safetensors")
    size = sum(source.path.stat().st_size for source in files.values())
    return {"flops": flops(case, files), "file_bytes": size, "weights": _count(files)}


def _write_weights(case: Case, path: Path) -> None:
    if case.kind == "vae":
        shapes = blueprint.vae(sizes_of_family(case.network).vae)
    else:
        tiny = case.network == "tiny"
        shapes = blueprint.unet(TINY if tiny else sizes_of_family(case.network).unet)
    write_random(path, shapes, torch.bfloat16 if case.network == "sdxl" else torch.float32)


_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_random(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> None:
    """A safetensors file of weights as the module says, of one seed. One tensor is in memory at a
    time: SDXL's are 5 GB."""
    partial = path.with_suffix(".partial")
    generator = torch.Generator().manual_seed(0)
    with partial.open("wb") as file:
        file.write(compose(in_dtype(shapes, _NAMES[dtype]), {}))
        for name, shape in shapes.items():
            tensor = _random(name, shape, generator).to(dtype).contiguous()
            file.write(tensor.view(torch.uint8).numpy().data)
    partial.rename(path)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight")))
    return torch.randn(shape, generator=generator).mul_(math.prod(shape[1:]) ** -0.5)


def _inputs(case: Case, files: Mapping[str, Source]) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))

    if case.kind == "vae":
        latents = normal(case.batch, 4, case.size // 8, case.size // 8)
        return {"latents": latents * files["vae"].overrides.scale_factor}  # pyright: ignore
    if case.kind == "runs":
        size = (case.size, case.size)
        encoded = load_text(files["base"].path).encode(["", PROMPT], size=size)
        return {"context": encoded.context.contiguous()}
    params, batch = files["base"].params(), case.batch
    tensors = {
        "x": normal(batch, 4, case.size, case.size),
        "timestep": torch.full((batch,), 749),
        "context": normal(batch, 77, params.context_dim),
    }
    if params.added_dim is not None:
        tensors["pooled"] = normal(batch, POOLED)
        tensors["time_ids"] = torch.full((batch, 6), 8.0 * case.size)
    return tensors


def read_inputs(case: Case, folder: Path) -> dict[str, Tensor]:
    return load_file(folder / f"{case.name}-inputs.safetensors")


def conditioning(tensors: Mapping[str, Tensor]) -> Conditioning:
    return Conditioning(tensors["context"], tensors.get("pooled"), tensors.get("time_ids"))


def flops(case: Case, files: Mapping[str, Source]) -> dict[str, int]:
    """Variant -> FLOPs by torch's formulas (`headstart.cost.operators`)."""
    if case.kind == "vae":
        side = case.size // 8
        return {case.name: _decode(files["vae"].params(), (4, side, side), case.batch)}
    if case.kind == "unet":
        latent = (4, case.size, case.size)
        return {case.name: _pass(files["base"].params(), latent, case.batch)}
    last = _decode(files["vae"].params(), PAIR_LATENT, 1)
    each = {passes: _pass(files["base"].params(), PAIR_LATENT, passes) for passes in (1, 2)}
    return {
        name: last + sum(each[step.passes] for step in table) for name, table in tables().items()
    }


def _pass(params: UNetParams, latent: tuple[int, int, int], rows: int) -> int:
    read, row = unet_pass(params, latent, rows, torch.float32)
    return Tally.of((*read, *row)).flops


def _decode(params: VaeParams, latent: tuple[int, int, int], batch: int) -> int:
    return Tally.of(decode(params, latent, batch, torch.float32)).flops


def _count(files: Mapping[str, Source]) -> int:
    """Numbers in the largest network's weights."""
    tables = [getattr(blueprint, source.part)(source.params()) for source in files.values()]
    return max(sum(math.prod(shape) for shape in table.values()) for table in tables)
