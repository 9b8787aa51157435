"""What `headstart inspect` says of every kind of file, and of what is wrong with one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import METADATA, random_unet, weights
from safetensors.torch import save_file

import headstart_weights
from headstart.checkpoint.checkpoint import CheckpointInfo, inspect_checkpoint, read_family
from headstart.cli import main
from headstart.errors import CheckpointError

ARCHS = {
    **{"sd15": "sd15", "lcm-sd15": "sd15", "sd21": "sd21", "sd-turbo": "sd21"},
    **{"sdxl": "sdxl", "sdxl-turbo": "sdxl", "lcm-sdxl": "sdxl"},
    **{name: name for name in ("ssd-1b", "segmind-vega", "koala-700m", "koala-1b")},
    **{name: name for name in ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")},
}
"""Architecture -> the family that its full-size file is recognised as."""


@pytest.fixture(scope="module")
def maker(shared: Path) -> Any:
    """The checkpoint maker as a module: headers of any size, no numbers."""
    spec = importlib.util.spec_from_file_location("make_ckpt", shared / "tools" / "make_ckpt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hollow(maker: Any, tensors: dict[str, Any], path: Path, dtype: str = "F16") -> Path:
    """A file with these tensors' header and a hole where its data would be.

    Triage reads none of them but the noise schedule, which is left out.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name != "alphas_cumprod"}
    path.parent.mkdir(parents=True, exist_ok=True)
    _, text, end = maker.header(tensors, dtype, {"format": "pt"})
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def folder(maker: Any, arch: str, scale: str, root: Path, how: str) -> Path:
    """A diffusers folder: plain, with the fp16 names, or with its UNet in two shards."""
    built = maker.build(arch, scale, 0)
    configs = maker.configs(built, arch)
    for name, key, stem in (
        ("unet", "unet", "diffusion_pytorch_model"),
        ("vae", "vae", "diffusion_pytorch_model"),
        ("text_encoder", "te1", "model"),
        ("text_encoder_2", "te2", "model"),
    ):
        if key not in built:
            continue
        where, tensors = root / name, built[key]
        if how == "sharded" and key == "unet":
            halves = [dict([*tensors.items()][i::2]) for i in (0, 1)]
            files = [f"{stem}-{i + 1:05d}-of-00002.safetensors" for i in (0, 1)]
            for half, file in zip(halves, files, strict=True):
                hollow(maker, half, where / file)
            table = {name: files[i] for i in (0, 1) for name in halves[i]}
            index = where / f"{stem}.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": table}))
        else:
            middle = ".fp16" if how == "fp16" else ""
            hollow(maker, tensors, where / f"{stem}{middle}.safetensors")
        (where / "config.json").write_text(json.dumps(configs[name]))
    (root / "scheduler").mkdir()
    text = json.dumps(configs["scheduler"])
    (root / "scheduler" / "scheduler_config.json").write_text(text)
    return root


def expect(info: CheckpointInfo, layout: str, family: str, parts: tuple[str, ...]) -> None:
    assert (info.layout, info.family, info.parts) == (layout, family, parts)
    assert info.problems == () and info.ok
    assert json.loads(json.dumps(info.to_json()))["ok"] is True


def networks(family: str) -> tuple[str, ...]:
    xl = family in ("sdxl", "ssd-1b", "segmind-vega") or family.startswith("koala")
    return ("unet", "vae", "text", "text_2") if xl else ("unet", "vae", "text")


@pytest.mark.parametrize("arch", ARCHS)
def test_a_full_size_file_of_every_architecture_is_named(
    maker: Any, tmp_path: Path, arch: str
) -> None:
    family = ARCHS[arch]
    info = inspect_checkpoint(hollow(maker, maker.ldm_single(arch, "full"), tmp_path / "a"))
    expect(info, "ldm", family, networks(family))
    assert info.exact and info.dtype == "F16"
    assert info.prediction == ("v" if family == "sd21" else "eps")
    unet = maker.build(arch, "full")["unet"]
    bare = inspect_checkpoint(hollow(maker, unet, tmp_path / "b"))
    expect(bare, "unet", family, ("unet",))
    assert bare.weights == {"unet": info.weights["unet"]}
    assert any("LCM" in note for note in bare.notes) is arch.startswith("lcm")


@pytest.mark.parametrize("arch", ARCHS)
def test_a_scaled_down_file_of_every_architecture_is_a_relative(
    maker: Any, tmp_path: Path, arch: str
) -> None:
    family = ARCHS[arch]
    lineage = networks(family)
    info = inspect_checkpoint(hollow(maker, maker.ldm_single(arch, "tiny"), tmp_path / "a"))
    expect(
        info, "ldm", "sdxl" if "text_2" in lineage else family[:4].replace("bk-s", "sd15"), lineage
    )
    assert not info.exact


@pytest.mark.parametrize("how", ["plain", "fp16", "sharded"])
@pytest.mark.parametrize("arch", ["sd15", "sd21", "sdxl"])
def test_a_folder_is_named_however_its_weights_are_stored(
    maker: Any, tmp_path: Path, arch: str, how: str
) -> None:
    info = inspect_checkpoint(folder(maker, arch, "full", tmp_path / "model", how))
    expect(info, "diffusers", arch, networks(arch))
    assert info.exact and info.prediction_declared
    component = inspect_checkpoint(tmp_path / "model" / "unet")
    expect(component, "unet", arch, ("unet",))


@pytest.mark.parametrize(
    ("kind", "layout", "family", "parts"),
    [
        ("vae", "vae", "unknown", ("vae",)),
        ("vae-old", "vae", "unknown", ("vae",)),
        ("vae-ldm", "vae", "unknown", ("vae",)),
        ("te1", "text", "sd15", ("text",)),
        ("taesd", "tiny", "unknown", ("tiny",)),
        ("taesd-diffusers", "tiny", "unknown", ("tiny",)),
    ],
)
def test_a_single_network_is_named(
    maker: Any, tmp_path: Path, kind: str, layout: str, family: str, parts: tuple[str, ...]
) -> None:
    built = maker.build("sdxl", "full")
    tensors = {
        "vae": lambda: built["vae"],
        "vae-old": lambda: maker.vae_old(built),
        "vae-ldm": lambda: maker.vae_ldm(built),
        "te1": lambda: built["te1"],
        "te2": lambda: built["te2"],
        "taesd": lambda: maker.taesd_pth()[1],
        "taesd-diffusers": lambda: maker.taesd_pth()[2],
    }[kind]()
    expect(inspect_checkpoint(hollow(maker, tensors, tmp_path / "x")), layout, family, parts)


@pytest.mark.parametrize(
    "form",
    [
        *("kohya", "kohya-sgm", "peft", "peft-base", "diffusers", "diffusers-proc", "slider"),
        *("diffusers-proc-unet", "lcm", "dora", "loha", "lokr"),
    ],
)
def test_every_form_of_adapter_is_an_adapter(maker: Any, tmp_path: Path, form: str) -> None:
    tensors = maker.lora("sdxl", "tiny", form)
    info = inspect_checkpoint(hollow(maker, tensors, tmp_path / "x"))
    expect(info, "adapter", "unknown", ())


def test_the_table_says_what_the_file_is_and_what_to_do_next(
    maker: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hollow(maker, maker.ldm_single("sdxl", "full"), tmp_path / "xl.safetensors")
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    for line in (
        "family      sdxl, full size",
        "layout      ldm, the original single file",
        "unet        2567.5 M parameters",
        "prediction  eps (not in the file, so guessed)",
        f"next        --base '{path}' or --distilled '{path}'",
    ):
        assert f"  {line}\n" in printed
    lora = hollow(maker, maker.lora("sdxl", "tiny", "kohya"), tmp_path / "l.safetensors")
    assert main(["inspect", str(lora)]) == 0
    assert f"next        --lora '{lora}'" in capsys.readouterr().out


def test_deep_counts_what_no_network_survives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, tensors = tmp_path / "x.safetensors", weights(random_unet())
    tensors = {name: tensor.clone() + 0.01 for name, tensor in tensors.items()}
    first, second, third = (n for n in list(tensors)[:6] if n.endswith("weight"))
    save_file(tensors, path, METADATA)
    clean = inspect_checkpoint(path, deep=True)
    assert clean.ok and clean.census is not None and clean.census.zero == []
    tensors[first] = tensors[first].half()
    tensors[first][0, 0, 0, :3] = float("nan")
    tensors[second] = tensors[second].bfloat16()
    tensors[second][1, 1] = float("-inf")
    tensors[third].zero_()
    save_file(tensors, path, METADATA)
    assert inspect_checkpoint(path).ok
    steps: list[tuple[int, int]] = []
    info = inspect_checkpoint(path, deep=True, on_bytes=lambda *step: steps.append(step))
    assert info.census is not None
    assert (info.census.nan, info.census.inf) == ({first: 3}, {second: 1})
    assert info.census.zero == [third]
    assert f"1 tensors hold NaN: {first} (3)" in info.problems
    assert f"1 tensors hold infinity: {second} (1)" in info.problems
    assert any(third in note for note in info.notes)
    assert steps == sorted(steps) and steps[-1][0] <= steps[-1][1] == path.stat().st_size
    assert main(["inspect", "--deep", str(path)]) == 1
    assert "some are not finite" in capsys.readouterr().out
    assert main(["inspect", "--deep", "--json", str(path)]) == 1
    assert json.loads(capsys.readouterr().out)["census"]["nan"] == {first: 3}


def test_rare_float8_and_empty_tensors_are_problems(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", weights(random_unet())
    name = "down_blocks.0.resnets.0.conv1.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path, METADATA)
    assert inspect_checkpoint(path).ok
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fnuz)}, path, METADATA)
    (problem,) = inspect_checkpoint(path).problems
    assert "1 tensors of F8_E4M3FNUZ, which is not supported" in problem
    save_file(tensors | {name: torch.zeros(0, 4)}, path, METADATA)
    (problem,) = inspect_checkpoint(path).problems
    assert f"1 of another shape: {name} [0, 4] instead of [16, 16, 3, 3]" in problem


def test_a_bad_file_is_one_error_and_exit_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"<html>404</html>")
    for options in ([], ["--deep"]):
        assert main(["inspect", str(path), *options]) == 1
        error = capsys.readouterr().err
        assert error.startswith("headstart: error: ") and "a web page" in error
        assert error.count("\n") == 1
    assert main(["inspect", str(path), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is False and "a web page" in printed["problems"][0]


def test_inspection_lists_what_is_torn_or_foreign(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", weights(random_unet())
    save_file(tensors, path, METADATA)
    assert inspect_checkpoint(path).problems == ()
    gone = "down_blocks.1.resnets.0.norm1.weight"
    torn = {name: tensor for name, tensor in tensors.items() if name != gone}
    save_file(torn | {"conv_in.bias": torch.zeros(16, dtype=torch.int16)}, path, METADATA)
    (problem,) = inspect_checkpoint(path).problems
    assert f"1 missing: {gone}" in problem and "1 not floating point: conv_in.bias I16" in problem
    save_file({f"model.diffusion_model.{n}": t for n, t in tensors.items()}, path, METADATA)
    assert inspect_checkpoint(path).ok
    save_file(tensors | {"x": torch.zeros(1)}, path, METADATA)
    assert "belong to no network: x. `--allow" in inspect_checkpoint(path).problems[0]
    assert main(["inspect", "--allow", "x", str(path)]) == 0
    save_file({"x": torch.zeros(1)}, path)
    assert inspect_checkpoint(path).problems[0].startswith("no network recognised")
    with pytest.raises(CheckpointError, match="no network recognised"):
        read_family(path)


def test_a_bad_declaration_is_a_problem_and_not_a_crash(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", weights(random_unet())
    save_file(tensors, path, {"headstart.head_dim": "many"})
    assert "headstart.head_dim" in inspect_checkpoint(path).problems[0]
    save_file(tensors, path, {"headstart.family": "sd99"})
    assert "sd99" in inspect_checkpoint(path).problems[0]


def test_inspection_loads_neither_torch_nor_numpy(tmp_path: Path) -> None:
    save_file(weights(random_unet()), tmp_path / "x.safetensors", METADATA)
    code = (
        "import sys; from headstart.checkpoint.checkpoint import inspect_checkpoint as inspect\n"
        "assert inspect(sys.argv[1]).ok\n"
        "assert not {'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    source = str(Path(__file__).parents[1] / "src")
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.safetensors")],
        check=True,
        env=os.environ | {"PYTHONPATH": source},
    )


def test_an_adapter_is_told_by_form_rank_and_layers(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(headstart_weights.__file__).parent / "yellow.safetensors"
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layout"] == "adapter" and facts["adapter"]["ranks"] == [4, 4]
    assert main(["inspect", str(path)]) == 0
    table = capsys.readouterr().out
    assert "concept-slider" in table and "86 of unet" in table and "--lora" in table
