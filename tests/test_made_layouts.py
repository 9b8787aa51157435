"""Every pair of matching families, made by the ground truth's own generator, from every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import UNET_FILE, sharded
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from headstart.checkpoint import keymap
from headstart.cli import main

Maker = Callable[..., Path]

PAIRS = [
    *(("sdxl", name) for name in ("sdxl-turbo", "lcm-sdxl", "ssd-1b", "segmind-vega")),
    *(("sdxl", name) for name in ("koala-700m", "koala-1b", "sdxl")),
    *(("sd15", name) for name in ("lcm-sd15", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")),
    *(("sd21", name) for name in ("sd-turbo", "sd21")),
]
LAYOUTS = ("ldm", "folder", "sharded", "bare", "bare-ldm")
WHOLE = LAYOUTS[:3]
HEADS = {"tiny": "8", "mini": "16"}
SIZE = "128"  # at 64 the lowest level has one pixel: see placement.py, _ONE_ROW


def named(arch: str) -> str:
    """As its maker publishes it: what is no LCM and no Turbo stands for a Lightning here."""
    distilled = any(word in arch for word in ("turbo", "lcm"))
    return arch if distilled else f"{arch}_lightning_4step"


def as_ldm_unet(path: Path) -> Path:
    """The bare UNet file again, under the original code's names."""
    tensors = load_file(path)
    names = keymap.unet_to_ldm(tensors)
    folder = path.parent / "ldm-names"
    folder.mkdir(exist_ok=True)
    save_file({names[name]: tensor for name, tensor in tensors.items()}, folder / path.name)
    return folder / path.name


def in_shards(path: Path, variant: str) -> Path:
    """The folder again, its UNet in two shards and an index; everything else linked."""
    copy = path.parent / "sharded" / path.name
    if not copy.exists():
        (copy / "unet").mkdir(parents=True)
        for entry in path.iterdir():
            if entry.name != "unet":
                (copy / entry.name).symlink_to(entry)
        (copy / "unet" / "config.json").symlink_to(path / "unet" / "config.json")
        tensors = load_file(path / "unet" / f"{UNET_FILE}{variant}.safetensors")
        sharded(tensors, copy / "unet", UNET_FILE)
    return copy


def laid_out(make_ckpt: Maker, name: str, arch: str, layout: str, *more: str) -> Path:
    """A folder of F16 has the names of the fp16 variant, as the generator writes it."""
    if layout in ("folder", "sharded"):
        folder = make_ckpt(name, arch, "diffusers", *more)
        variant = ".fp16" if "F16" in more else ""
        return in_shards(folder, variant) if layout == "sharded" else folder
    if layout == "ldm":
        return make_ckpt(f"{name}.safetensors", arch, "ldm", *more)
    bare = make_ckpt(f"{name}.safetensors", arch, "unet", *more)
    return as_ldm_unet(bare) if layout == "bare-ldm" else bare


@pytest.fixture
def sampled(
    make_ckpt: Maker, small_tokenizer: Path, tmp_path: Path
) -> Callable[[str, str, str, str, str, str], tuple[bytes, object]]:
    """sampled(base, distilled, their layouts, scale, dtype) -> the image and the run's digests."""

    def run(
        base: str, distilled: str, first: str, second: str, scale: str, dtype: str
    ) -> tuple[bytes, object]:
        more = ("--scale", scale, "--dtype", dtype)
        seed = ("--seed", "1") if base == distilled else ()
        one = laid_out(make_ckpt, "v2-1_768", base, first, *more)
        two = laid_out(make_ckpt, named(distilled), distilled, second, *more, *seed)
        out = tmp_path / f"{first}-{second}"
        command = ["sample", "a fox", "--seeds", "3", "--size", SIZE, "--out", str(out)]
        command += ["--no-metadata"]  # which names the files
        command += [
            "--base",
            str(one),
            "--distilled",
            str(two),
            "--tokenizer",
            str(small_tokenizer),
        ]
        if first == "ldm":  # what no config.json says
            command += ["--text-head-dim", "32"]
        if not {first, second} <= {"folder", "sharded"} and base != "sd15":
            command += ["--head-dim", HEADS[scale]]
        assert main(command) == 0
        record = json.loads((out / "record.json").read_text())
        models = [row[0] for row in record["table"]["rows"]]
        first = 2 if "turbo" in distilled else 1  # whose latent is half as wide
        assert models == first * ["base"] + (4 - first) * ["distilled"]
        return (out / "000000.png").read_bytes(), record["results"]

    return run


Sampled = Callable[[str, str, str, str, str, str], tuple[bytes, object]]


OTHERS = (
    ("folder", "folder"),
    ("sharded", "bare-ldm"),
    ("ldm", "sharded"),
    ("folder", "ldm"),
    ("sharded", "folder"),
)


@pytest.mark.parametrize(("base", "distilled"), PAIRS)
def test_a_pair_samples_the_same_bits_from_two_layouts(
    sampled: Sampled, base: str, distilled: str
) -> None:
    turn = PAIRS.index((base, distilled))
    dtype = ("F16", "F32")[turn % 2]
    expected = sampled(base, distilled, "ldm", "bare", "tiny", dtype)
    assert sampled(base, distilled, *OTHERS[turn % 5], "tiny", dtype) == expected


@pytest.mark.parametrize(
    ("base", "distilled"),
    [
        pytest.param("sdxl", "segmind-vega", marks=pytest.mark.slow),
        ("sd15", "lcm-sd15"),
        pytest.param("sd21", "sd-turbo", marks=pytest.mark.slow),
    ],
)
def test_a_quarter_size_pair_samples_the_same_bits(
    sampled: Sampled, base: str, distilled: str
) -> None:
    expected = sampled(base, distilled, "ldm", "bare", "mini", "F16")
    assert sampled(base, distilled, "folder", "bare-ldm", "mini", "F16") == expected


@pytest.mark.slow
@pytest.mark.parametrize("scale", HEADS)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("base", "distilled"), PAIRS)
def test_every_layout_scale_and_dtype_of_a_pair_gives_the_same_bits(
    sampled: Sampled, base: str, distilled: str, dtype: str, scale: str
) -> None:
    layouts = [
        sampled(base, distilled, WHOLE[number % 3], layout, scale, dtype)
        for number, layout in enumerate(LAYOUTS)
    ]
    assert all(other == layouts[0] for other in layouts[1:])


def test_the_command_line_says_what_it_took_a_file_for(
    make_ckpt: Maker, small_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distilled = make_ckpt("lcm-sdxl.safetensors", "lcm-sdxl", "unet")
    base = make_ckpt("base.safetensors", "sdxl", "ldm")
    command = ["sample", "a fox", "--base", str(base), "--distilled", str(distilled)]
    command += ["--tokenizer", str(small_tokenizer), "--head-dim", "8", "--text-head-dim", "32"]
    status = main([*command, "--size", "64", "--out", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert printed.err == (
        "headstart: note: distilled: taken for LCM: preset lcm (set with --preset), "
        "by its tensors\n"
    )
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["machine"]["embedded_guidance"] == 8.0


def test_files_of_one_seed_hold_the_same_numbers(make_ckpt: Maker) -> None:
    """What these tests stand on: the generator's layouts do not differ in their values."""
    bare = load_file(make_ckpt("sdxl-turbo.safetensors", "sdxl-turbo", "unet"))
    names = keymap.unet_to_ldm(bare)
    with safe_open(make_ckpt("sdxl-turbo.safetensors", "sdxl-turbo", "ldm"), "pt") as single:
        for name, tensor in bare.items():
            assert (single.get_tensor(f"model.diffusion_model.{names[name]}") == tensor).all()
