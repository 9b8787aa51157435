"""Files whose weights are laid out for a CPU's products as they are loaded, and who may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import METADATA, random_pass, random_unet, weights
from safetensors.torch import save_file

import headstart as hs
from headstart.errors import InputError
from headstart.networks import packed
from headstart.networks.casting import compute_dtype
from headstart.networks.load import load_unet
from headstart.networks.packed import PackedConv2d, is_packed, pack

pytestmark = pytest.mark.skipif(
    packed.unpackable(torch.float32) is not None, reason="this torch has no oneDNN"
)


def write_unet(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    path = folder / "unet.safetensors"
    save_file(weights(random_unet().to(dtype)), path, METADATA)
    return path


@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_file_is_packed_from_its_mapping(
    tmp_path: Path, kept: torch.dtype, dtype: torch.dtype | None
) -> None:
    if packed.unpackable(dtype or torch.float32):
        pytest.skip("this processor has no bfloat16 products")
    path = write_unet(tmp_path, kept)
    unet = load_unet(path, dtype=dtype, packed=True)
    plain = load_unet(path, dtype=dtype)
    assert compute_dtype(unet) == (dtype or torch.float32) == compute_dtype(plain)
    assert {layer.weight.dtype for layer in unet.modules() if type(layer) is PackedConv2d} == {kept}
    assert random_pass(unet).dtype == random_pass(plain).dtype
    assert torch.equal(random_pass(unet), random_pass(pack(plain)))


def test_a_file_read_in_inference_mode_has_weights_that_are_watched(tmp_path: Path) -> None:
    with torch.inference_mode():
        unet = load_unet(write_unet(tmp_path, torch.float16), packed=True)
        before = random_pass(unet)
        unet.conv_in.weight.mul_(2)
        assert not torch.equal(random_pass(unet), before)
    assert not any(weight.is_inference() for weight in unet.parameters())


def test_narrow_networks_stay_as_they_are_unless_they_are_asked_for(tmp_path: Path) -> None:
    path = write_unet(tmp_path)
    assert not is_packed(load_unet(path)) and not is_packed(load_unet(path, packed=None))
    assert is_packed(load_unet(path, packed=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "stored"}, '"stored".*use float32.*--no-packed'),
        ({"dtype": "float8"}, '"float8".*use float32.*--no-packed'),
        ({"dtype": torch.float16}, "got torch.float16.*--no-packed"),
        ({"device": "meta"}, "device cpu"),
    ],
)
def test_what_cannot_be_packed_says_why(
    tmp_path: Path, options: dict[str, object], says: str
) -> None:
    path = write_unet(tmp_path)
    with pytest.raises(InputError, match=f"cannot be packed.*{says}"):
        load_unet(path, packed=True, **options)  # pyright: ignore[reportArgumentType]
    assert not is_packed(load_unet(path, packed=None, **options))  # pyright: ignore


@pytest.mark.parametrize("dtype", ["stored", "float8"])
def test_a_pair_says_which_dtype_cannot_be_packed(dtype: str) -> None:
    with pytest.raises(InputError, match=f'cannot be packed: dtype "{dtype}".*bfloat16'):
        hs.Engine.demo(device="cpu", dtype=dtype, packed=True)


def test_without_onednn_networks_run_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_OPS", ("no_such_operator",))
    with pytest.raises(InputError, match="built without oneDNN"):
        hs.pack(random_unet())
