"""Every pair of matching families samples from every layout, to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import headstart as hs
from headstart.checkpoint import keymap
from headstart.cli import main

Maker = Callable[..., Path]

PAIRS = [
    *(("sdxl", name) for name in ("sdxl-turbo", "lcm-sdxl", "ssd-1b", "segmind-vega")),
    *(("sdxl", name) for name in ("koala-700m", "koala-1b", "sdxl")),
    *(("sd15", name) for name in ("lcm-sd15", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")),
    *(("sd21", name) for name in ("sd-turbo", "sd21")),
]
HEADS = {"tiny": 8, "mini": 16}
SIZES = {"tiny": 128, "mini": 128}  # at 64 the lowest level has one pixel: see load.py, _ONE_ROW
UNET_FILE = "diffusion_pytorch_model.safetensors"


def options(arch: str, scale: str, tokenizer: Path | None) -> dict[str, Any]:
    """What files without a config.json cannot say; SD1's attention has 8 heads at any size."""
    heads = None if arch == "sd15" else HEADS[scale]
    return {"tokenizer": tokenizer, "head_dim": heads, "text_head_dim": 32}


def named(arch: str) -> str:
    """As its maker publishes it: what is no LCM and no Turbo stands for a Lightning here."""
    known = any(word in arch for word in ("turbo", "lcm"))
    return arch if known else f"{arch}_lightning_4step"


def sampled(engine: hs.Engine, scale: str) -> hs.Trajectory:
    done = engine.sample("a fox", seeds=[3], size=SIZES[scale])
    assert [step.model for step in done.table] == ["base"] + 3 * ["distilled"]
    assert torch.isfinite(done.latents).all() and done.latents.std() > 0.1
    assert done.rgb.shape == (1, SIZES[scale], SIZES[scale], 3)
    assert done.rgb.float().std() > 1  # neither black nor flat
    return done


def same(one: hs.Trajectory, other: hs.Trajectory) -> bool:
    return torch.equal(one.latents, other.latents) and torch.equal(one.rgb, other.rgb)


@pytest.mark.parametrize(("base", "distilled"), PAIRS)
def test_a_pair_samples_the_same_bits_from_single_files_and_from_folders(
    make_ckpt: Maker, small_tokenizer: Path, base: str, distilled: str
) -> None:
    seed = ("--seed", "1") if base == distilled else ()
    name = named(distilled)
    single = hs.Engine.load(
        make_ckpt("base.safetensors", base, "ldm"),
        make_ckpt(f"{name}.safetensors", distilled, "unet", *seed),
        **options(base, "tiny", small_tokenizer),
    )
    folders = hs.Engine.load(
        make_ckpt("base", base, "diffusers"),
        make_ckpt(name, distilled, "diffusers", *seed),
        tokenizer=small_tokenizer,
    )
    assert single.weights.preset == folders.weights.preset is not None
    assert single.weights.predictions == folders.weights.predictions
    assert same(sampled(single, "tiny"), sampled(folders, "tiny"))


# --------------------------------------------------------------------- every layout there is


def as_ldm_unet(path: Path) -> Path:
    """The bare UNet file again, under the original code's names."""
    tensors = load_file(path)
    names = keymap.unet_to_ldm(tensors)
    folder = path.parent / "ldm-names"
    folder.mkdir(exist_ok=True)
    save_file({names[name]: tensor for name, tensor in tensors.items()}, folder / path.name)
    return folder / path.name


def sharded(path: Path, variant: str = "") -> Path:
    """The folder again, its UNet in two shards and an index; everything else linked."""
    copy = path.parent / "sharded" / path.name
    if copy.exists():
        return copy
    copy.mkdir(parents=True)
    for entry in path.iterdir():
        if entry.name != "unet":
            (copy / entry.name).symlink_to(entry)
    (copy / "unet").mkdir()
    (copy / "unet" / "config.json").symlink_to(path / "unet" / "config.json")
    tensors = load_file(path / "unet" / f"diffusion_pytorch_model{variant}.safetensors")
    names, weight_map = sorted(tensors), {}
    for number, held in enumerate((names[::2], names[1::2]), start=1):
        stem = f"diffusion_pytorch_model{variant}-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in held}, copy / "unet" / stem)
        weight_map |= dict.fromkeys(held, stem)
    index = copy / "unet" / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return copy


LAYOUTS = ("ldm", "folder", "sharded", "bare", "bare-ldm")


def laid_out(make_ckpt: Maker, name: str, arch: str, layout: str, *more: str) -> Path:
    if layout in ("folder", "sharded"):
        folder = make_ckpt(name, arch, "diffusers", *more)
        variant = ".fp16" if "F16" in more else ""
        return sharded(folder, variant) if layout == "sharded" else folder
    if layout == "ldm":
        return make_ckpt(f"{name}.safetensors", arch, "ldm", *more)
    bare = make_ckpt(f"{name}.safetensors", arch, "unet", *more)
    return as_ldm_unet(bare) if layout == "bare-ldm" else bare


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("base", "distilled"), PAIRS)
def test_every_layout_and_dtype_of_a_pair_gives_the_same_bits(
    make_ckpt: Maker, small_tokenizer: Path, base: str, distilled: str, dtype: str
) -> None:
    name, more = named(distilled), ("--dtype", dtype)
    seed = ("--seed", "1") if base == distilled else ()
    said = options(base, "tiny", small_tokenizer)
    found: list[hs.Trajectory] = []
    for number, layout in enumerate(LAYOUTS):
        first = laid_out(make_ckpt, "base", base, LAYOUTS[number % 3], *more)
        second = laid_out(make_ckpt, name, distilled, layout, *more, *seed)
        found.append(sampled(hs.Engine.load(first, second, **said), "tiny"))
    assert all(same(found[0], other) for other in found[1:])


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_of_a_distilled_file_gives_the_same_bits(
    make_ckpt: Maker, small_tokenizer: Path, layout: str
) -> None:
    base = make_ckpt("base.safetensors", "sdxl", "ldm")
    said = options("sdxl", "tiny", small_tokenizer)
    paths = (laid_out(make_ckpt, "sdxl-turbo", "sdxl-turbo", way) for way in ("ldm", layout))
    one, other = (sampled(hs.Engine.load(base, path, **said), "tiny") for path in paths)
    assert same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "distilled"), [("sdxl", "lcm-sdxl"), ("sd15", "bk-sdm-small")])
def test_a_quarter_size_pair_samples_the_same_bits(
    make_ckpt: Maker, base: str, distilled: str
) -> None:
    if packaged() is None:
        pytest.skip("needs the extra `clip` for a full-size vocabulary")
    scale, name = ("--scale", "mini"), named(distilled)
    single = hs.Engine.load(
        make_ckpt("base.safetensors", base, "ldm", *scale),
        make_ckpt(f"{name}.safetensors", distilled, "unet", *scale),
        **options(base, "mini", None),
    )
    folders = hs.Engine.load(
        make_ckpt("base", base, "diffusers", *scale),
        make_ckpt(name, distilled, "diffusers", *scale),
    )
    assert same(sampled(single, "mini"), sampled(folders, "mini"))


def packaged() -> Path | None:
    from headstart.networks.vocabulary import packaged_file

    return packaged_file()


# --------------------------------------------------------------------- at the command line


def test_the_command_line_samples_a_pair_and_says_what_it_took_it_for(
    make_ckpt: Maker, small_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distilled = make_ckpt("lcm-sdxl.safetensors", "lcm-sdxl", "unet")
    base = make_ckpt("base.safetensors", "sdxl", "ldm")
    asked = ["sample", "a fox", "--base", str(base), "--distilled", str(distilled)]
    asked += ["--tokenizer", str(small_tokenizer), "--head-dim", "8", "--text-head-dim", "32"]
    status = main([*asked, "--size", "64", "--out", str(tmp_path / "run")])
    told = capsys.readouterr()
    assert status == 0, told.err
    assert (tmp_path / "run" / "000000.png").is_file()
    assert told.err == (
        "headstart: note: distilled: taken for LCM: preset lcm (set with --preset or preset=), "
        "by its tensors\n"
    )
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["machine"]["embedded_guidance"] == 8.0


def test_files_of_one_seed_hold_the_same_numbers(make_ckpt: Maker) -> None:
    """What these tests stand on: the maker's layouts do not differ in their values."""
    bare = load_file(make_ckpt("sdxl-turbo.safetensors", "sdxl-turbo", "unet"))
    names = keymap.unet_to_ldm(bare)
    with safe_open(make_ckpt("sdxl-turbo.safetensors", "sdxl-turbo", "ldm"), "pt") as single:
        for name, tensor in bare.items():
            assert torch.equal(single.get_tensor(f"model.diffusion_model.{names[name]}"), tensor)
