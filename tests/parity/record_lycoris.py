"""What LyCORIS computes for the modules of `lycoris_cases.py`, written to lycoris.json.

    PYTHONPATH=src:tests python tests/parity/record_lycoris.py

Run where lycoris-lora 4.1.3 and toml are. It is not in the test extra, because importing it takes
longer than all comparisons. Its forward is what is recorded: the `get_diff_weight` of LoHa and LoKr
multiplies by alpha/rank twice.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import lycoris_cases as cases
import torch
from torch import nn

FILE = Path(__file__).with_name("lycoris.json")
CLASSES = {
    "locon": "LoConModule",
    "loha": "LohaModule",
    "lokr": "LokrModule",
    "glora": "GLoRAModule",
    "diag_oft": "DiagOFTModule",
    "boft": "ButterflyOFTModule",
    "ia3": "IA3Module",
}


def outputs(name: str, module: cases.Module, strength: float) -> list[float]:
    """The layer with the module on it, without what the layer alone gives, in float32."""
    weight, x = cases.weight_and_input(module.layer)
    outs, ins, *kernel = weight.shape
    layer: Any = nn.Conv2d(ins, outs, 3, padding=1, bias=False) if kernel else None
    layer = layer or nn.Linear(ins, outs, bias=False)
    layer.weight.data.copy_(weight)
    cls = getattr(importlib.import_module(f"lycoris.modules.{module.algo}"), CLASSES[module.algo])
    options = {"lora_dim": cases.RANK, "alpha": cases.ALPHA, **module.options}
    made = cls("lora_x", layer, strength, **options)
    for suffix, tensor in cases.tensors(name, module).items():
        owner: Any = made
        *path, leaf = suffix.split(".")
        for part in path:
            owner = getattr(owner, part)
        assert getattr(owner, leaf).shape == tensor.shape, (name, suffix)
        getattr(owner, leaf).data.copy_(tensor)
    if module.options.get("use_scalar"):
        made.scalar.data.fill_(cases.SCALAR)
    before = layer(x)
    made.apply_to()
    with torch.no_grad():
        return [float(f"{value:.9g}") for value in cases.sample(layer(x) - before)]


def main() -> None:
    record = {
        name: {str(at): outputs(name, module, at) for at in cases.strengths(module)}
        for name, module in cases.modules().items()
    }
    FILE.write_text(
        "{\n" + ",\n".join(f'"{n}": {json.dumps(v)}' for n, v in record.items()) + "\n}\n"
    )


if __name__ == "__main__":
    main()
