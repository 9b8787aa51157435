"""Weights and inputs of a case of `bench/peers.py`: made once from a seed, read by every process.

Files are mapped, so processes that compute with the weights as they are share one copy of them.
Each weight is normal with variance 1/fan-in, biases are 0 and norms 1: activations keep their size
through the layers, as those of a trained network do, and an error shows as large as it is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers_case import GUIDANCE, STEPS, Case
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headstart_weights
from headstart.checkpoint import blueprint
from headstart.checkpoint.network_info import Overrides
from headstart.checkpoint.params import Mid, Stage, UNetParams, VaeParams
from headstart.checkpoint.tensors import Checkpoint
from headstart.checkpoint.verdict import judge
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

TINY = UNetParams(
    down=(Stage(32, (0,), True), Stage(64, (1,), False)),
    mid=Mid(2, 1),
    up=(Stage(64, (1, 1), True), Stage(32, (0, 0), False)),
    context_dim=128,
)
POOLED = 1280
PROMPT = "a fox"
PAIR_LATENT = (4, 16, 16)


class Source(NamedTuple):
    """A network in a file."""

    path: Path
    part: str  # "unet" or "vae"
    given: Overrides = Overrides()

    def params(self) -> Any:
        judged = self._judged()
        return judged.unet if self.part == "unet" else judged.vae

    def plain(self, dtype: torch.dtype) -> Any:
        """A module of ours with the file's tensors and nothing done to them, for others' use."""
        judged, params = self._judged(), self.params()
        with torch.device("meta"):
            module: Any = UNet(params) if self.part == "unet" else Vae(params)
        state = {name: judged.part.tensor(name).to(dtype) for name in module.state_dict()}
        return filled(module, state)

    def _judged(self) -> Any:
        checkpoint = Checkpoint.open(self.path, self.part)  # pyright: ignore[reportArgumentType]
        return judge(self.path, checkpoint, self.given).require(self.part)  # pyright: ignore


def filled(module: nn.Module, state: Mapping[str, Tensor]) -> Any:
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()


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
    given = Overrides(head_dim=TINY.head_dim) if case.network == "tiny" else Overrides()
    return {"base": Source(folder / f"{case.network}-unet.safetensors", "unet", given)}


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
    found = sources(case, folder)
    for source in found.values():
        if not source.path.is_file():
            _write_weights(case, source.path)
    with torch.inference_mode():
        save_file(_inputs(case, found), folder / f"{case.name}-inputs.safetensors")
    size = sum(source.path.stat().st_size for source in found.values())
    return {"flops": flops(case, found), "file_bytes": size, "weights": _count(found)}


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
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    partial = path.with_suffix(".partial")
    generator = torch.Generator().manual_seed(0)
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = _random(name, shape, generator).to(dtype).contiguous()
            file.write(tensor.view(torch.uint8).numpy().data)
    partial.rename(path)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight")))
    return torch.randn(shape, generator=generator).mul_(math.prod(shape[1:]) ** -0.5)


def _inputs(case: Case, found: Mapping[str, Source]) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))

    if case.kind == "vae":
        latents = normal(case.batch, 4, case.size // 8, case.size // 8)
        return {"latents": latents * found["vae"].given.scale_factor}  # pyright: ignore
    if case.kind == "runs":
        size = (case.size, case.size)
        encoded = load_text(found["base"].path).encode(["", PROMPT], size=size)
        return {"context": encoded.context.contiguous()}
    params, batch = found["base"].params(), case.batch
    made = {
        "x": normal(batch, 4, case.size, case.size),
        "timestep": torch.full((batch,), 749),
        "context": normal(batch, 77, params.context_dim),
    }
    if params.added_dim is not None:
        made["pooled"] = normal(batch, POOLED)
        made["time_ids"] = torch.full((batch, 6), 8.0 * case.size)
    return made


def inputs(case: Case, folder: Path) -> dict[str, Tensor]:
    return load_file(folder / f"{case.name}-inputs.safetensors")


def conditioning(held: Mapping[str, Tensor]) -> Conditioning:
    return Conditioning(held["context"], held.get("pooled"), held.get("time_ids"))


def flops(case: Case, found: Mapping[str, Source]) -> dict[str, int]:
    """Variant -> FLOPs by torch's formulas (`headstart.cost.operators`)."""
    if case.kind == "vae":
        side = case.size // 8
        return {case.name: _decode(found["vae"].params(), (4, side, side), case.batch)}
    if case.kind == "unet":
        latent = (4, case.size, case.size)
        return {case.name: _pass(found["base"].params(), latent, case.batch)}
    last = _decode(found["vae"].params(), PAIR_LATENT, 1)
    told: dict[str, int] = {}
    for name, table in tables().items():
        each = {p: _pass(found["base"].params(), PAIR_LATENT, p) for p in (1, 2)}
        told[name] = last + sum(each[step.passes] for step in table)
    return told


def _pass(params: UNetParams, latent: tuple[int, int, int], rows: int) -> int:
    read, row = unet_pass(params, latent, rows, torch.float32)
    return Tally.of((*read, *row)).flops


def _decode(params: VaeParams, latent: tuple[int, int, int], batch: int) -> int:
    return Tally.of(decode(params, latent, batch, torch.float32)).flops


def _count(found: Mapping[str, Source]) -> int:
    """Numbers in the largest network's weights."""
    tables = [getattr(blueprint, source.part)(source.params()) for source in found.values()]
    return max(sum(math.prod(shape) for shape in table.values()) for table in tables)


def diffusers_unet(params: UNetParams) -> Any:
    """On the meta device."""
    from diffusers import UNet2DConditionModel

    crossed = [any(stage.depths) for stage in params.down]
    added: dict[str, Any] = {}
    if params.added_dim is not None:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (params.added_dim - POOLED) // 6,
            "projection_class_embeddings_input_dim": params.added_dim,
        }
    with torch.device("meta"):
        return UNet2DConditionModel(
            attention_head_dim=[params.heads_of(stage.channels) for stage in params.down],  # pyright: ignore
            block_out_channels=[stage.channels for stage in params.down],  # pyright: ignore
            layers_per_block=len(params.down[0].depths),
            cross_attention_dim=params.context_dim,
            down_block_types=["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossed],  # pyright: ignore
            up_block_types=["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in crossed[::-1]],  # pyright: ignore
            transformer_layers_per_block=[max(1, *stage.depths) for stage in params.down],  # pyright: ignore
            use_linear_projection=params.linear_projection,
            norm_num_groups=params.norm_groups,
            **added,
        )


def diffusers_vae(params: VaeParams) -> Any:
    """On the meta device."""
    from diffusers import AutoencoderKL

    levels = len(params.channels)
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=list(params.channels),  # pyright: ignore
            down_block_types=["DownEncoderBlock2D"] * levels,  # pyright: ignore
            up_block_types=["UpDecoderBlock2D"] * levels,  # pyright: ignore
            layers_per_block=params.layers,
            norm_num_groups=params.norm_groups,
            latent_channels=params.latent_channels,
        )
