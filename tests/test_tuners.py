"""What is not computed here is called by its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from adapter_samples import NETWORKS, one, write

from headstart.adapters.file import read_adapter
from headstart.adapters.tuners import tuner_of
from headstart.errors import AdapterError

KEYS = {
    "base_model.model.x.vera_lambda_b": "VeRA",
    "base_model.vera_A": "VeRA",
    "base_model.model.x.fourierft_spectrum": "FourierFT",
    "base_model.model.x.lora_E": "AdaLoRA",
    "base_model.model.x.lora_A": "AdaLoRA",
    "base_model.model.x.hra_u": "HRA",
    "base_model.model.x.boft_R": "PEFT's BOFT",
    "base_model.model.x.oft_r": "PEFT's OFT before version 0.16",
    "base_model.model.x.ia3_l": "PEFT's (IA)^3",
    "base_model.model.x.randlora_lambda": "RandLoRA",
    "base_model.model.x.lora_embedding_A": "LoRA of an embedding",
    "lora_unet_x.q_layer.weight": "T-LoRA",
    "lora_unet_x.lambda_layer": "T-LoRA",
    "lora_unet_x.oft_diag": "LyCORIS' OFT before version 2",
    "lora_unet_x.lokr_t1": "LyCORIS' LoKr with a first core",
}


@pytest.mark.parametrize("key", KEYS)
def test_a_kind_that_is_not_implemented_is_called_by_its_name(key: str, tmp_path: Path) -> None:
    module = "lora_unet_x" if key.startswith("lora_unet_x") else key.rpartition(".")[0]
    tensors = {key: torch.ones(3, 3), f"{module}.alpha": torch.tensor(1.0)}
    path = write(tmp_path / "a.safetensors", tensors)
    message = rf"got {re.escape(KEYS[key])}, which is not implemented \({re.escape(key)}"
    with pytest.raises(AdapterError, match=message):
        read_adapter(path)
    mixed = write(tmp_path / "b.safetensors", one() | tensors)
    with pytest.raises(AdapterError, match=rf"1 of {re.escape(KEYS[key])}, which is not"):
        read_adapter(mixed).resolve(NETWORKS).require()


OTHERS = ("x.lora_A.weight", "x.weight", "x.alpha", "x.hada_w1_a", "x.oft_R.weight")


@pytest.mark.parametrize("key", OTHERS)
def test_other_keys_are_no_tuners(key: str) -> None:
    assert tuner_of(key) is None
