"""Where PEFT keeps its alpha: a configuration beside the file, or metadata."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from adapter_samples import (
    ATTENTION,
    NETWORKS,
    Changes,
    dotted,
    known,
    text_modules,
    write,
)

from headstart.adapters.delta import LowRank
from headstart.adapters.file import read_adapter
from headstart.errors import AdapterError


def peft_changes() -> Changes:
    return known("unet", ATTENTION[:2]) | known("text", text_modules("text")[:1])


def peft_file(folder: Path, config: object, metadata: dict[str, str] | None = None) -> Path:
    path = write(folder / "a.safetensors", dotted(peft_changes(), "lora_A", "lora_B"), metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


def scales(path: Path) -> list[float]:
    """Of the two layers of the UNet, then that of the text encoder."""
    deltas = read_adapter(path).resolve(NETWORKS).require().deltas
    ordered = (deltas[change] for change in peft_changes())
    return [delta.scale for delta in ordered if isinstance(delta, LowRank)]


def test_peft_alpha_comes_from_the_configuration_beside_the_file(tmp_path: Path) -> None:
    config: dict[str, object] = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    assert scales(peft_file(tmp_path, config)) == [2.0, 2.0, 2.0]
    assert scales(peft_file(tmp_path, config | {"use_rslora": True})) == [6 / math.sqrt(3)] * 3
    first = {"alpha_pattern": {ATTENTION[0].partition(".")[2]: 12}}
    assert scales(peft_file(tmp_path, config | first)) == [4.0, 2.0, 2.0]
    other = {"alpha_pattern": {"^" + ATTENTION[1]: 9, "^to_q": 12}}
    assert scales(peft_file(tmp_path, config | other)) == [2.0, 3.0, 2.0]
    assert scales(peft_file(tmp_path, None)) == [2.0, 3.0, 2.0], "the folder still has the file"
    (tmp_path / "adapter_config.json").unlink()
    assert scales(peft_file(tmp_path, None)) == [1.0, 1.0, 1.0]


def test_peft_alpha_comes_from_the_metadata_of_diffusers(tmp_path: Path) -> None:
    config = {
        "unet.r": 3,
        "unet.lora_alpha": 6,
        "text_encoder.r": 3,
        "text_encoder.lora_alpha": 1.5,
    }
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    assert scales(peft_file(tmp_path, None, metadata)) == [2.0, 2.0, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": "8"}, "lora_alpha: expected a positive number"),
        ({"r": 0}, "r: expected a positive number"),
        ({"r": True}, "r: expected a positive number"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "plain names of modules"),
        ({"alpha_pattern": [1]}, "expected an object"),
    ],
)
def test_a_bad_peft_configuration_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        read_adapter(peft_file(tmp_path, {"r": 3, "lora_alpha": 6} | change))
