"""Adapter files: what of them finds its place, what is refused, and what a header tells."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from adapter_samples import (
    ATTENTION,
    CONVS,
    CROSS,
    IN,
    NETWORKS,
    OUT,
    UNET,
    Changes,
    Known,
    Layers,
    flat,
    known,
    kohya,
    one,
    small_unet,
    text_modules,
    write,
)

from headstart.adapters.file import layer_shapes, read_adapter
from headstart.adapters.info import describe_adapter
from headstart.adapters.names import AdapterForm
from headstart.checkpoint.checkpoint import inspect_checkpoint
from headstart.errors import AdapterError
from headstart.networks.unet import UNet


def test_an_adapter_of_another_family_is_told_by_its_cross_attention(tmp_path: Path) -> None:
    changes: Changes = {
        ("unet", n): Known.of(s, n) for n, s in small_unet(768).items() if n in CROSS
    }
    path = write(tmp_path / "a.safetensors", kohya(changes))
    assert read_adapter(path).family == "sd15"
    with pytest.raises(AdapterError, match="expected an adapter for sdxl, got one for sd15"):
        read_adapter(path).resolve({"unet": small_unet(2048)})


def test_a_text_encoder_alone_needs_one_to_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya(known("text", text_modules("text"))))
    texts: Layers = {"text": NETWORKS["text"]}
    for networks in (NETWORKS, texts):
        assert read_adapter(path).resolve(networks).require().rank == 3
    with pytest.raises(AdapterError, match=r"none of its 4 modules .* fits unet"):
        read_adapter(path).resolve({"unet": NETWORKS["unet"]})


def test_what_does_not_fit_is_listed_and_allowed_only_by_name(tmp_path: Path) -> None:
    changes = known("unet", ATTENTION) | known("text_2", text_modules("text_2"))
    tensors = kohya(changes)
    wrong = flat(ATTENTION[0])
    tensors[f"{wrong}.lora_up.weight"] = torch.ones(OUT + 1, 3)
    tensors["bundle_emb.cat"] = torch.ones(4)
    file = read_adapter(write(tmp_path / "a.safetensors", tensors))
    networks: Layers = {"unet": UNET, "text": NETWORKS["text"]}
    resolution = file.resolve(networks)
    assert len(resolution.deltas) == len(ATTENTION) - 1
    assert len(resolution.matched) == 3 * len(resolution.deltas)
    assert resolution.mismatched == ((wrong, (OUT, IN), (OUT + 1, IN)),)
    texts = {name for name in tensors if name.startswith("lora_te2_")}
    assert set(resolution.unmatched) == texts | {"bundle_emb.cat"}
    assert len(resolution.matched) + len(resolution.unmatched) + 3 == len(tensors), "no key is lost"
    with pytest.raises(AdapterError) as caught:
        resolution.require()
    message = str(caught.value)
    assert f"1 of another shape: {wrong} [33, 32] instead of [32, 32]" in message
    assert "19 unknown here: " in message and message.count("lora_te2_") == 3
    assert "--allow 'lora_te2_text_model_encoder_layers_*'" in message
    assert "--allow 'bundle_emb.cat'" in message and len(message) < 1000
    with pytest.raises(AdapterError, match=r"fit, but 1 of another shape: [^;]*\. Attach"):
        resolution.require(allow=("lora_te2_*", "bundle_emb.*"))
    assert resolution.require(allow=("lora_te2_*", "bundle_emb.*", wrong)) is resolution
    assert resolution.require(allow=("*",)) is resolution


def test_files_that_are_no_adapters_are_refused(tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(AdapterError) as caught:
            read_adapter(path)
        return str(caught.value)

    empty = write(tmp_path / "empty.safetensors", {})
    assert "without tensors" in refused(empty)
    checkpoint = {"conv_in.weight": torch.zeros(4, 4, 3, 3)}
    text = refused(write(tmp_path / "unet.safetensors", checkpoint))
    assert "a checkpoint (unet)" in text and "headstart transfer" in text
    prefixed = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}
    assert "a checkpoint (unet)" in refused(write(tmp_path / "ldm.safetensors", prefixed))
    torch.save(one(), tmp_path / "slider.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    for name in ("slider.pt", "old.pt"):
        assert f"headstart convert '{tmp_path / name}'" in refused(tmp_path / name)
    assert "does not exist" in refused(tmp_path / "absent.safetensors")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(write(tmp_path / "a.safetensors", one()).read_bytes()[:-3])
    assert "truncated" in refused(torn)


def test_an_adapter_is_described_from_its_header(tmp_path: Path) -> None:
    changes = known("unet", ATTENTION + CONVS) | known("text_2", text_modules("text_2"))
    path = write(tmp_path / "a.safetensors", kohya(changes) | {"bundle_emb.x": torch.ones(2)})
    info = describe_adapter(path)
    assert (info.form, info.family, info.ranks) == ("locon", None, (3, 3))
    assert info.modules == {"unet": len(ATTENTION) + len(CONVS), "text_2": 6}
    assert info.strays == ("bundle_emb.x",) and info.tensors == 3 * len(changes) + 1
    assert info.size_bytes == path.stat().st_size and info.dtype == "F32"
    assert json.loads(json.dumps(info.to_json()))["modules"] == info.modules


def test_files_of_differences_and_of_custom_diffusion_are_inspected_as_adapters(
    tmp_path: Path,
) -> None:
    for key in ("lora_unet_x.diff", "mid_block.attn2.processor.to_k_custom_diffusion.weight"):
        path = write(tmp_path / "a.safetensors", {key: torch.ones(3, 3)})
        assert inspect_checkpoint(path).layout == "adapter"


def manifest(shared: Path, name: str) -> dict[str, tuple[int, ...]]:
    table = json.loads((shared / "manifests" / name).read_text())
    return {n: tuple(shape) for n, (_, shape) in (table.get("diffusers") or table["hf"]).items()}


def full_size(shared: Path, family: str) -> Layers:
    """The families' networks on the meta device, from the manifests' shapes."""
    from headstart.checkpoint.families import FAMILIES
    from headstart.checkpoint.sizing import unet_params

    with torch.device("meta"):
        unet = UNet(unet_params(manifest(shared, f"unet_{family}.json"), FAMILIES[family]))
    files = {
        "sd15": ["text_clip_l_sd15.json"],
        "sdxl": ["text_clip_l_sdxl.json", "text_openclip_bigg_sdxl.json"],
    }
    networks: Layers = {"unet": layer_shapes(unet)}
    for network, file in zip(("text", "text_2"), files[family], strict=False):
        shapes = manifest(shared, file)
        networks[network] = {n[:-7]: s for n, s in shapes.items() if n.endswith(".weight")}
    return networks


def test_every_full_size_key_set_finds_all_its_layers(shared: Path, tmp_path: Path) -> None:
    """26 files' keys as the original programs write them, on SD1.5 and SDXL at full size."""
    sets = json.loads((shared / "manifests" / "lora_formats.json").read_text())
    networks = {family: full_size(shared, family) for family in ("sd15", "sdxl")}
    for name, keys in sets.items():
        header: dict[str, object] = {}
        end = 0
        for key, (dtype, shape) in keys.items():
            size = math.prod(shape) * {"I64": 8, "F32": 4, "F16": 2}[dtype]
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        path = tmp_path / "a.safetensors"
        with path.open("wb") as file:  # zeros that take no space
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        adapter = read_adapter(path)
        family = "sd15" if "sd15" in name else "sdxl"
        match = adapter.match(networks[family])
        assert not match.unmatched and not match.mismatched, name
        assert len(match.owners) == len(adapter.groups), name
        other = networks["sdxl" if family == "sd15" else "sd15"]
        try:
            result = adapter.match(other)
        except AdapterError as error:
            assert "expected an adapter for" in str(error), name
        else:  # self-attention alone does not tell the family
            assert result.unmatched or result.mismatched, name
        assert ("slider" in name) == (adapter.form is AdapterForm.SLIDER), name


@pytest.mark.parametrize(
    ("name", "form", "layers"),
    [
        ("catundchat_sd15_diffusers_old", AdapterForm.DIFFUSERS_PROCESSOR, 128),
        ("cloneofsimo_analog_svd_rank4", AdapterForm.CLONEOFSIMO, 192),
    ],
)
def test_real_files_resolve_completely(
    name: str, form: AdapterForm, layers: int, shared: Path
) -> None:
    file = read_adapter(shared / "data" / "lora" / f"{name}.safetensors")
    resolution = file.resolve(full_size(shared, "sd15")).require()
    assert file.form is form and resolution.rank == 4
    assert len(resolution.deltas) == layers == len(file.groups)
