"""The bundled files -> a work folder, so that training goes on from what ships.

The inverse of `export`, up to the rounding to float16, with the tokenizer that is inside the base.
The pictures are not in the files: the `data` stage draws them again, byte for byte.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from torch import Tensor

import headstart_weights
from headstart.checkpoint.tensors import Checkpoint, PartName
from headstart.metrics.scorer import TOKENIZER_KEY
from headstart.networks.load import load_unet, load_vae
from headstart_weights.recipe import StageOptions
from headstart_weights.recipe.artwork import write_text
from headstart_weights.recipe.training import write_tensors

_path = headstart_weights.path
_NETWORKS = {"base": "base", "student": "distilled", "control": "distilled_unguided"}
_PARTS: dict[str, tuple[str, PartName]] = {
    "text": ("base", "text"),
    "tiny": ("tiny_decoder", "tiny"),
}
_FILES = ("scorer", "reference")
_NUMBERS = ("linear_rgb", "scorer_top1")

log = logging.getLogger(__name__)


def restore(work: Path) -> None:
    """Write what the trained stages would have written. Never over a file that is there."""
    for name, role in _NETWORKS.items():
        _write(work / f"{name}.safetensors", load_unet(_path(role)).state_dict())
    _write(work / "codec.safetensors", load_vae(_path("base")).state_dict())
    for name, (role, part) in _PARTS.items():
        network = Checkpoint.open(_path(role), part).parts()[part]
        tensors = {key: network.tensor(key).float() for key in network.shapes}
        _write(work / f"{name}.safetensors", tensors)
    _write_text(work / "tokenizer.json", Checkpoint((_path("base"),)).metadata[TOKENIZER_KEY])
    for name in (*_FILES, *headstart_weights.manifest().controls):
        file = Checkpoint((_path(name),))
        _write(work / f"{name}.safetensors", {k: file.tensor(k).float() for k in file.names})
    manifest = json.loads((_path("base").parent / "manifest.json").read_text(encoding="utf-8"))
    for name in _NUMBERS:
        text = json.dumps(manifest[name], indent=1) + "\n"
        _write_text(work / f"{name.removesuffix('_top1')}.json", text)


def main(options: StageOptions) -> None:
    """The `restore` stage."""
    restore(options.work)
    log.info("restored the bundled files to %s", options.work)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    if not path.exists():
        write_tensors(tensors, path, {})


def _write_text(path: Path, text: str) -> None:
    if not path.exists():
        write_text(path, text)
