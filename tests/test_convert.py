"""`headstart convert` from safetensors: other names, other dtypes, the same numbers."""

from __future__ import annotations

import importlib.util
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import random_unet, weights
from safetensors.torch import load_file, save_file

from headstart.checkpoint import keymap
from headstart.checkpoint.cast import cast
from headstart.checkpoint.checkpoint import inspect_checkpoint
from headstart.cli import main
from headstart.convert.convert import convert
from headstart.errors import CheckpointError, InputError

KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@pytest.fixture(scope="module")
def maker(shared: Path) -> Any:
    spec = importlib.util.spec_from_file_location("make_ckpt", shared / "tools" / "make_ckpt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    tensors = {"a": torch.randn(5, 3), "alpha": torch.tensor(4), "b": torch.randn(7).half()}
    save_file(tensors, path, {"author": "me"})
    return path


@pytest.mark.parametrize("arch", ["sd15", "sd21", "sdxl", "lcm-sdxl", "bk-sdm-tiny", "ssd-1b"])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_one_layout_becomes_the_other_bit_for_bit(
    maker: Any, tmp_path: Path, arch: str, part: str
) -> None:
    built = maker.build(arch, "tiny")
    ldm = {
        "unet": lambda: {
            "model.diffusion_model." + maker.unet_ldm_key(k, built["u"]): t
            for k, t in built["unet"].items()
        },
        "vae": lambda: maker.vae_ldm(built),
    }[part]()
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    maker.save(built[part], a, "F16")
    maker.save(ldm, b, "F16")
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert convert(a, there, layout="ldm").left_out == ()
    assert convert(b, back, layout="diffusers").left_out == ()
    for path, expected in ((there, load_file(b)), (back, load_file(a))):
        tensors = load_file(path)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_full_size_vae_has_the_names_of_the_manifest(shared: Path) -> None:
    manifest = json.loads((shared / "manifests" / "vae_sdxl.json").read_text())
    names = keymap.vae_to_ldm(manifest["diffusers"])
    prefix = "first_stage_model."
    stated = {k: v.removeprefix(prefix) for k, v in manifest["map_diffusers_to_ldm"].items()}
    assert names == stated
    assert {keymap.vae_name(ldm, 4): ldm for ldm in names.values()} == names


def test_a_network_is_taken_out_of_a_full_file(maker: Any, tmp_path: Path) -> None:
    full, out = tmp_path / "full.safetensors", tmp_path / "out.safetensors"
    maker.save(maker.ldm_single("sd21", "tiny"), full)
    with pytest.raises(InputError, match="holds unet, vae, text: say which one"):
        convert(full, out, layout="diffusers")
    done = convert(full, out, layout="diffusers", part="text", dtype="bf16")
    assert "model_ema.decay" in done.left_out
    assert inspect_checkpoint(out).parts == ("text",)
    expected = maker.build("sd21", "tiny")["te1"]
    tensors = load_file(out)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], torch.from_numpy(np.array(tensor.fn())).bfloat16()), name
    with pytest.raises(InputError, match="expected a text_2"):
        convert(full, out, part="text_2", overwrite=True)


@pytest.mark.parametrize("target", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("stored", [*KINDS, "F8_E4M3", "F8_E5M2"])
def test_every_dtype_rounds_as_torch_rounds(stored: str, target: str) -> None:
    """torch is the other implementation: ties to even, subnormals, NaN; all codes of F8."""
    narrow = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    kind = (KINDS | narrow)[stored]
    if stored in narrow:
        values = torch.arange(256, dtype=torch.uint8).view(kind)
    else:
        spread = torch.randn(20_000) * 10 ** (torch.rand(20_000) * 12 - 8)
        odd = [0.0, -0.0, float("nan"), 60000.0, 1 + 2**-9, 1 + 3 * 2**-9]
        # float32 numbers first: torch narrows float64 by way of it, which rounds others twice
        values = torch.cat([spread, torch.tensor(odd)]).clamp(-60000, 60000).to(kind)
    expected = values.float().to(KINDS[target.upper()])
    raw = memoryview(values.view(torch.uint8).numpy().tobytes())
    actual = torch.frombuffer(bytearray(cast(raw, stored, target.upper())), dtype=expected.dtype)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~actual.isnan()], expected[~actual.isnan()])


def test_a_number_beyond_the_range_is_an_error_that_names_its_tensor(tmp_path: Path) -> None:
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"fine": torch.ones(3), "large": torch.tensor([1.0, 65520.0])}, path)
    with pytest.raises(CheckpointError, match="'large' holds 65520, which F16 cannot"):
        convert(path, out, dtype="f16")
    assert not out.exists() and len([*tmp_path.iterdir()]) == 1
    convert(path, out, dtype="bf16")
    save_file({"kept": torch.tensor([float("inf"), float("nan")])}, path)
    convert(path, out, dtype="f16", overwrite=True)
    assert load_file(out)["kept"].isinf()[0] and load_file(out)["kept"].isnan()[1]


def test_integers_and_metadata_stay(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert convert(source, out, dtype="f16").dtype == "F16"
    info, tensors = inspect_checkpoint(out), load_file(out)
    assert tensors["alpha"].dtype == torch.int64 and tensors["alpha"].item() == 4
    assert info.tensors == 3
    assert torch.equal(tensors["a"], load_file(source)["a"].half())


def test_a_request_that_cannot_be_served_changes_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    before = source.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    for target, options, reason in (
        (source, {"overwrite": True}, "are the same file"),
        (link, {"overwrite": True}, "are the same file"),
        (tmp_path / "x.ckpt", {}, "must end in .safetensors"),
        (tmp_path, {}, "must end in"),
        (source / "x.safetensors", {}, "is a file"),
        (out, {"dtype": "f8"}, "expected one of same, f32, f16, bf16"),
        (out, {"layout": "sgm"}, "expected one of same, diffusers, ldm"),
        (out, {"part": "head"}, "expected one of unet, vae"),
    ):
        with pytest.raises(InputError, match=reason):
            convert(source, target, **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "absent.ckpt", out)
    assert source.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "link.safetensors"]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A tensor of 64 MB goes through pieces of 4 MB: a few of them, twice as wide in float32."""
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"a": torch.ones(2**24)}, path)
    convert(path, out)
    tracemalloc.start()
    try:
        convert(path, out, dtype="bf16", overwrite=True)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_the_command_converts(source: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(source), str(out), "--dtype", "bf16"]) == 0
    assert "3 tensors, mostly BF16" in capsys.readouterr().out
    assert main(["convert", str(source), str(source), "--overwrite"]) == 2
    assert "the same file" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["same", "diffusers", "ldm"])
@pytest.mark.parametrize(
    ("marks", "prediction"),
    [
        ({"v_pred": (0,), "ztsnr": (0,)}, "v"),
        ({"edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1)}, "edm"),
        ({"edm_vpred.sigma_max": (), "edm_vpred.sigma_min": ()}, "edm_v"),
    ],
)
def test_what_a_file_says_of_its_unet_goes_with_it(
    layout: Any, marks: dict[str, tuple[int, ...]], prediction: str, tmp_path: Path
) -> None:
    names = keymap.unet_to_ldm(state := weights(random_unet()))
    tensors = {f"model.diffusion_model.{names[n]}": t for n, t in state.items()}
    marked = {name: torch.ones(shape) for name, shape in marks.items()}
    path, out = tmp_path / "whole.safetensors", tmp_path / "unet.safetensors"
    if "edm_vpred.sigma_min" in marked:
        marked["edm_vpred.sigma_min"] = torch.tensor(0.002)
    save_file(tensors | marked, path, {"headstart.head_dim": "8", "headstart.norm_groups": "8"})
    convert(path, out, layout=layout, part="unet", dtype="f16")
    before, after = inspect_checkpoint(path), inspect_checkpoint(out)
    assert before.prediction == after.prediction == prediction
    assert after.prediction_declared and set(marks) <= set(load_file(out))
