"""Changes as LyCORIS runs them: its own recorded outputs (`record_lycoris.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import lycoris_cases as cases
import pytest
import torch
import torch.nn.functional as F
from adapter_samples import merge
from safetensors.torch import save_file
from torch import Tensor

from headstart.adapters.file import read_adapter

MODULES = cases.modules()
RECORDED = json.loads((Path(__file__).with_name("lycoris.json")).read_text())
ROUNDINGS = 256
"""An output sums 108 products of a weight; a weight is a block's inverse (4 x 4: 64 operations, of
condition below 4) times 4 rows. LyCORIS has them in float32 too."""


def as_file(name: str, module: cases.Module) -> dict[str, Tensor]:
    """What LyCORIS saves: its tensors with alpha, where OFT's is its constraint, and the switch."""
    tensors = cases.tensors(name, module)
    if module.algo == "ia3":
        return tensors | {"on_input": torch.tensor(int("train_on_input" in module.options))}
    constrained = "oft_blocks" in tensors
    alpha = module.options.get("constraint", 0.0) if constrained else cases.ALPHA
    scalar = {"scalar": torch.tensor(cases.SCALAR)} if "use_scalar" in module.options else {}
    return tensors | {"alpha": torch.tensor(alpha)} | scalar


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_lycoris_is_run_as_lycoris_runs_it(name: str, tmp_path: Path) -> None:
    module = MODULES[name]
    weight, x = cases.weight_and_input(module.layer)
    path = tmp_path / "a.safetensors"
    save_file({f"lora_unet_x.{s}": t for s, t in as_file(name, module).items()}, path)
    networks = {"x": tuple(weight.shape)}
    (delta,) = read_adapter(path).resolve({"unet": networks}).require().deltas.values()
    for strength in cases.strengths(module):
        change = merge(delta, weight, strength).double() - weight.double()
        ours = (
            F.conv2d(x.double(), change, padding=1) if weight.ndim == 4 else x.double() @ change.T
        )
        size = weight.abs().double() + (weight + change).abs()
        most = F.conv2d(x.double().abs(), size, padding=1) if weight.ndim == 4 else (
            x.double().abs() @ size.T
        )  # fmt: skip
        theirs = torch.tensor(RECORDED[name][str(strength)], dtype=torch.float64)
        error = (torch.tensor(cases.sample(ours)) - theirs).abs().max()
        assert error <= ROUNDINGS * 2.0**-24 * most.max(), strength
        assert error <= 1e-2 * theirs.abs().max(), "far below what another formula would give"
