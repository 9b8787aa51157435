"""Trained parts -> the bundled files: same numbers in, same bytes out, renamed into place.

The base is one file in the original (LDM) layout, as most checkpoints are; the distilled UNet is
a bare file in diffusers' names, as SDXL-Lightning's is. So the pair exercises both readers.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart.checkpoint.checkpoint import Checkpoint
from headstart.checkpoint.keymap import unet_to_ldm, vae_to_ldm
from headstart.errors import InputError
from headstart.metrics.scorer import TOKENIZER_KEY
from headstart.plan.pairs import DEMO_SCHEDULE
from headstart.plan.schedule import NoiseSchedule
from headstart_weights.recipe import StageOptions, codec
from headstart_weights.recipe.artwork import ICON_SETS, write_atomically, write_text
from headstart_weights.recipe.concepts import PAIR_CONCEPTS
from headstart_weights.recipe.control import CONTROLS, SHIPPED
from headstart_weights.recipe.dataset import IMAGE_SIZE, PALETTE, STYLES
from headstart_weights.recipe.diffusion import GRID, PARAMS
from headstart_weights.recipe.readme import weights_readme
from headstart_weights.recipe.stages import STAGES
from headstart_weights.recipe.tokenizer import load_tokenizer

LICENCE = "Apache-2.0"
MADE_BY = "python -m headstart_weights.recipe"
TEXT_HEADS = 4
_MAX_TOTAL_BYTES = 32 * 2**20

_DTYPES = {torch.float32: "F32", torch.float16: "F16"}

log = logging.getLogger(__name__)


def pair_metadata() -> dict[str, str]:
    """What the tensors of both files cannot say."""
    return {
        "format": "pt",
        "headstart.family": "demo",
        "headstart.head_dim": str(PARAMS.head_dim),
        "headstart.image_size": str(IMAGE_SIZE),
        "headstart.norm_groups": str(PARAMS.norm_groups),
        "headstart.prediction": "v",
        "headstart.scale_factor": str(codec.PARAMS.scale_factor),
        "headstart.text_act": "quick_gelu",
        "headstart.text_heads": str(TEXT_HEADS),
        "headstart.vae_norm_groups": str(codec.PARAMS.norm_groups),
    }


def base_tensors(
    unet: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
    text: Mapping[str, Tensor],
    schedule: NoiseSchedule,
) -> dict[str, Tensor]:
    """One LDM file's tensors: F16 weights, and the schedule in F32."""
    names, vae_names = unet_to_ldm(unet), vae_to_ldm(vae)
    unnamed = sorted({*unet, *vae} - {*names, *vae_names})
    if unnamed:
        raise InputError(f"tensors without an LDM name: {unnamed[:3]}: extend headstart.keymap")
    tensors = {f"model.diffusion_model.{names[k]}": v for k, v in unet.items()}
    tensors |= {f"first_stage_model.{vae_names[k]}": _ldm_matrix(k, v) for k, v in vae.items()}
    tensors |= {f"cond_stage_model.transformer.{k}": v for k, v in text.items()}
    alphas = schedule.alphas_cumprod
    betas = 1.0 - alphas / np.concatenate([[1.0], alphas[:-1]])
    return half(tensors) | {
        "alphas_cumprod": torch.as_tensor(alphas.astype(np.float32)),
        "betas": torch.as_tensor(betas.astype(np.float32)),
    }


def half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float16 copies. Raises InputError for a number that float16 cannot hold."""
    halves = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    for name, tensor in halves.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name} does not fit float16: its training diverged")
    return halves


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with everything in a fixed order.

    The library's own writer orders the metadata by a randomly seeded hash map.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    data = bytearray()
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].contiguous()
        begin = len(data)
        data += tensor.numpy().tobytes()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(data)


def export(work: Path, folder: Path) -> None:
    """Write the weight files, manifest.json and README.md into `folder`."""
    tokenizer = load_tokenizer(work).to_str()
    pair = pair_metadata()
    grid = ",".join(str(t) for t in GRID)
    distilled = pair | {"headstart.timesteps": grid, "headstart.update": "euler"}
    scorer = {"format": "pt", TOKENIZER_KEY: tokenizer}
    base = base_tensors(
        _tensors(work, "base"), _tensors(work, "codec"), _tensors(work, "text"), DEMO_SCHEDULE
    )
    blobs = {
        "base": serialise(base, pair | {TOKENIZER_KEY: tokenizer}),
        "distilled": serialise(half(_tensors(work, "student")), distilled),
        "distilled_unguided": serialise(half(_tensors(work, "control")), distilled),
        "tiny_decoder": serialise(half(_tensors(work, "tiny")), {"format": "pt"}),
        "scorer": serialise(half(_tensors(work, "scorer")), scorer),
        "reference": serialise(_tensors(work, "reference"), {"format": "pt"}),
    }
    for name in SHIPPED:
        metadata = {"format": "pt", "headstart.trained_on": CONTROLS[name].model}
        blobs[name] = serialise(half(_tensors(work, name)), metadata)
    total = sum(map(len, blobs.values()))
    if total > _MAX_TOTAL_BYTES:
        raise InputError(f"the files have {total} bytes, expected at most {_MAX_TOTAL_BYTES}")
    record = manifest_record(blobs, _json(work, "linear_rgb"), _json(work, "scorer"))
    for role, blob in blobs.items():
        write_atomically(folder / _file_name(role), lambda part, blob=blob: part.write_bytes(blob))
    write_text(folder / "manifest.json", json.dumps(record, indent=1) + "\n")
    write_text(folder / "README.md", weights_readme(record, STAGES))
    log.info("wrote %d files, %.1f MB, to %s", len(blobs), total / 1e6, folder)


def manifest_record(
    blobs: Mapping[str, bytes], linear_rgb: Any, scorer_top1: Any
) -> dict[str, Any]:
    """manifest.json as `headstart_weights.manifest()` reads it."""
    return {
        "files": [
            {
                "role": role, "file": _file_name(role), "sha256": hashlib.sha256(blob).hexdigest(),
                "size_bytes": len(blob), "licence": LICENCE, "made_by": MADE_BY,
            }
            for role, blob in blobs.items()
        ],
        "artwork": [
            {"name": i.vendor, "version": i.version, "licence": i.licence, "attribution": i.author}
            for i in ICON_SETS
        ],
        "concepts": list(PAIR_CONCEPTS),
        "styles": list(STYLES.values()),
        "backgrounds": list(PALETTE),
        "controls": list(SHIPPED),
        "linear_rgb": linear_rgb,
        "scorer_top1": scorer_top1,
    }  # fmt: skip


def main(options: StageOptions) -> None:
    """The `export` stage: writes into the installed package."""
    export(options.work, Path(__file__).parents[1])


def _tensors(work: Path, name: str) -> dict[str, Tensor]:
    file = Checkpoint((_existing(work / f"{name}.safetensors"),))
    return {name: file.tensor(name) for name in file.names}


def _json(work: Path, name: str) -> Any:
    return json.loads(_existing(work / f"{name}.json").read_text())


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"no {path}: run the stages of the recipe in order first")
    return path


def _file_name(role: str) -> str:
    return f"{role}.safetensors"


def _ldm_matrix(name: str, tensor: Tensor) -> Tensor:
    """LDM keeps the attention's projections as 1x1 convolutions."""
    is_projection = ".attentions." in name and tensor.ndim == 2
    return tensor[:, :, None, None] if is_projection else tensor
