"""What a pair's parts are loaded as."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import headstart as hs
from headstart.engine.parts import computes_bfloat16, decoder_dtype
from headstart.errors import InputError
from headstart.networks.assembly import Dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BOTH = (torch.float32, torch.bfloat16)


def capability(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: version)


@pytest.mark.parametrize("kind", [None, torch.float16, "stored", "float8"])
def test_a_gpu_decodes_in_bfloat16_where_it_computes_in_it_else_in_float32(
    kind: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, dtype in {(9, 0): BOTH[1], (8, 0): BOTH[1], (7, 5): BOTH[0]}.items():
        capability(monkeypatch, version)
        assert decoder_dtype("auto", kind, CUDA) == dtype


@pytest.mark.parametrize("kind", BOTH)
def test_what_was_asked_for_by_name_is_the_decoders_too(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability(monkeypatch, (9, 0))
    assert decoder_dtype("auto", kind, CUDA) == kind
    with mock.patch("headstart.engine.parts.has_c", return_value=False):
        assert decoder_dtype("auto", kind, CPU) == kind
    with mock.patch("headstart.engine.parts.has_c", return_value=True):
        assert decoder_dtype("auto", kind, CPU) == torch.float32  # fewer products than bfloat16's
    assert decoder_dtype("float16", kind, CUDA) == torch.float16


def test_a_cpu_decodes_in_what_its_networks_compute_in_but_never_in_float16() -> None:
    assert decoder_dtype("auto", torch.float16, CPU) is None
    assert decoder_dtype("auto", None, CPU) is None
    assert decoder_dtype("auto", "float8", CPU) == decoder_dtype("auto", "stored", CPU) == "stored"


def test_other_accelerators_decode_in_float32_unless_they_are_known() -> None:
    answers = [computes_bfloat16(torch.device(name)) for name in ("xpu", "mps", "cpu")]
    assert answers == [True, False, False]


def test_a_dtype_that_there_is_not_is_refused() -> None:
    with pytest.raises(InputError, match="vae_dtype 'half': expected auto, float32, float16, bf"):
        hs.Engine.demo(device="cpu", vae_dtype="half")


def test_bfloat16_decodes_to_50_db_of_float32_and_is_recorded(tmp_path: Path) -> None:
    """The bundled decoder: 55.2 dB at least over 16 images (measured); float16 64.6."""
    wide, half = (
        hs.Engine.demo(device="cpu", vae_dtype=name).sample("a red circle", seeds=[1, 2])
        for name in ("auto", "bfloat16")
    )
    assert torch.equal(wide.latents, half.latents)
    error = (wide.rgb.float() - half.rgb.float()).square().flatten(1).mean(1)
    assert bool((10 * torch.log10(255**2 / error) > 50).all()) and not torch.equal(
        wide.rgb, half.rgb
    )
    machine: Any = half.record()["machine"]
    assert machine["vae_dtype"] == "bfloat16" and machine["dtype"] == "float32"
    assert "vae_dtype" not in wide.record()["machine"]
