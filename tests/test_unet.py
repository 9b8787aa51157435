"""The UNet: names and shapes of every full-size family, and the original code's outputs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from headstart.checkpoint.families import recognise
from headstart.checkpoint.sizing import unet_params
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.networks.fusion import fusion
from headstart.networks.joint_linear import joint_weights
from headstart.networks.layout import FORMATS
from headstart.networks.load import load_unet
from headstart.networks.numbers import guidance_embedding, sinusoid
from headstart.networks.unet import Mid, Stage, UNet, UNetParams

ARCHS = (
    *("sd15", "sd21", "sdxl", "lcm-sdxl", "lcm-sd15", "ssd-1b", "segmind-vega"),
    *("koala-700m", "koala-1b", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"),
)
SMALL = UNetParams(
    down=(Stage(16, (0,), True), Stage(32, (1,), False)),
    mid=Mid(2, 1),
    up=(Stage(32, (1, 1), True), Stage(16, (0, 0), False)),
    context_dim=24,
    head_dim=8,
    norm_groups=8,
)
GPU = torch.device("cuda")
GOLDEN_BOUND = 1e-5  # relative L2 in float32: about 80 roundings of 2^-24 deep


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("arch", ARCHS)
def test_names_and_shapes_are_those_of_the_full_size_file(shared: Path, arch: str) -> None:
    layouts = json.loads((shared / "manifests" / f"unet_{arch}.json").read_text())
    shapes = {name: tuple(shape) for name, (_, shape) in layouts["diffusers"].items()}
    family = recognise({"unet": shapes}, {})
    assert family is not None
    with torch.device("meta"):
        unet = UNet(unet_params(shapes, family))
    assert {name: tuple(t.shape) for name, t in unet.state_dict().items()} == shapes
    assert sum(t.numel() for t in unet.parameters()) == layouts["n_params"]
    widths = [stage.channels for stage in unet.params.down]
    heads = [unet.params.heads_of(width) for width in widths]
    assert heads == ([8] * len(widths) if family.lineage == "sd15" else [w // 64 for w in widths])


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def golden(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Tensor]]:
    """(architecture, folder with both layouts, inputs and outputs of the original code)."""
    arch, folder = request.param, tmp_path_factory.mktemp(request.param)
    tool = shared / "tools" / "make_ckpt.py"
    for form, name in (("ldm", "ldm.safetensors"), ("diffusers", "diffusers")):
        subprocess.run(
            [
                sys.executable,
                str(tool),
                "--arch",
                arch,
                "--scale",
                "tiny",
                "--format",
                form,
                "--out",
                str(folder / name),
            ],
            check=True,
            capture_output=True,
        )
    return arch, folder, load_file(shared / "golden" / f"unet_{arch}_tiny.safetensors")


@pytest.mark.parametrize("layout", ["ldm.safetensors", "diffusers"])
def test_outputs_equal_the_original_codes(
    golden: tuple[str, Path, dict[str, Tensor]], layout: str
) -> None:
    arch, folder, case = golden
    # the maker scales SD2.1 and SDXL down with heads 8 wide; only the folder's config says so
    head_dim = 8 if layout.startswith("ldm") and arch != "sd15" else None
    unet = load_unet(folder / layout, head_dim=head_dim)
    cond = Conditioning(case["ctx"], case.get("pooled"), case.get("time_ids"))
    with torch.no_grad():
        out = unet(case["x"], case["t"], cond)
    assert relative(out, case["out"]) < GOLDEN_BOUND
    assert relative(out, case["out_original"]) < GOLDEN_BOUND


@pytest.fixture(scope="module")
def small() -> UNet:
    torch.manual_seed(0)
    return UNet(SMALL).double().requires_grad_(False)


def conditioning(batch: int) -> Conditioning:
    return Conditioning(torch.randn(batch, 5, 24, dtype=torch.float64))


def test_each_sample_of_a_batch_is_computed_alone(small: UNet) -> None:
    x, cond = torch.randn(3, 4, 8, 8, dtype=torch.float64), conditioning(3)
    times = torch.tensor([1.0, 400.5, 999.0])
    together = small(x, times, cond)
    for i in range(3):
        alone = small(x[i : i + 1], times[i], cond[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-9, atol=1e-12)


def test_weights_laid_out_for_a_gpu_are_the_same_numbers_in_as_many_bytes(small: UNet) -> None:
    unet, x, cond = deepcopy(small), torch.randn(2, 4, 8, 8, dtype=torch.float64), conditioning(2)
    times = torch.tensor([3.0, 900.0])
    unet.lay_out(GPU)
    mine, plain = unet.state_dict(), small.state_dict()
    assert mine.keys() == plain.keys() and all(torch.equal(mine[n], plain[n]) for n in plain)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in mine.values()}
    assert sum(storages.values()) == sum(t.nbytes for t in plain.values())
    assert len(storages) < len(plain) - 20, "layers of one input share a buffer"
    torch.testing.assert_close(unet(x, times, cond), small(x, times, cond), rtol=1e-9, atol=1e-12)


def test_weights_that_are_moved_are_laid_out_for_where_they_come(
    small: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, plain = deepcopy(small), torch.randn(2, 4, 8, 8)
    monkeypatch.setitem(FORMATS, "cpu", torch.channels_last)
    unet.float()
    assert unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert joint_weights(unet._text_layers()) is not None
    assert joint_weights(unet._time_layers()) is not None
    flags: list[bool] = []
    unet.conv_out.register_forward_pre_hook(
        lambda _, args: flags.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    with fusion(True):
        unet(plain, torch.tensor(3.0), conditioning(2).to("cpu", torch.float32))
    assert flags == [True], "images are channels-last from the first convolution to the last"


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (1, 5)])
def test_odd_sizes_come_back_as_they_were(small: UNet, size: tuple[int, int]) -> None:
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    assert small(x, torch.tensor(500.0), conditioning(1)).shape == x.shape


def test_time_and_text_change_the_output(small: UNet) -> None:
    x, cond = torch.randn(1, 4, 8, 8, dtype=torch.float64), conditioning(1)
    out = small(x, torch.tensor(10.0), cond)
    assert relative(small(x, torch.tensor(900.0), cond), out) > 1e-3
    assert relative(small(x, torch.tensor(10.0), conditioning(1)), out) > 1e-4


def test_sizes_of_an_sdxl_are_required_and_matter() -> None:
    torch.manual_seed(0)
    unet = UNet(replace(SMALL, added_dim=12 + 6 * 8)).requires_grad_(False)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    with pytest.raises(InputError, match="pooled"):
        unet(x, torch.tensor(1.0), Conditioning(context))
    outs = [
        unet(x, torch.tensor(1.0), Conditioning(context, torch.ones(1, 12), torch.tensor([ids])))
        for ids in ([64.0] * 6, [64.0] * 5 + [32.0])
    ]
    assert relative(*outs) > 1e-4


def test_an_lcm_reads_its_guidance_embedding() -> None:
    torch.manual_seed(0)
    unet = UNet(replace(SMALL, guidance_dim=16)).requires_grad_(False)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    low, high = (
        unet(x, torch.tensor(1.0), Conditioning(context, guidance_embedding=w))
        for w in guidance_embedding(torch.tensor([1.0, 8.0]), 16).split(1)
    )
    assert relative(low, high) > 1e-4


def test_sinusoids_are_cosines_then_sines_of_falling_frequencies() -> None:
    values, dim = torch.tensor([0.0, 1.0, 999.0, 1024.0]), 64
    got = sinusoid(values, dim).double()
    for row, value in zip(got, values.tolist(), strict=True):
        angles = [value * 10000.0 ** (-i / 32) for i in range(32)]
        want = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        # an angle of 1024 in float32 is off by up to two roundings of 2^-24 of it
        torch.testing.assert_close(
            row, torch.tensor(want, dtype=torch.float64), rtol=0, atol=2.5e-4
        )


def test_guidance_embeds_sines_first_with_one_less_in_the_exponent() -> None:
    got = guidance_embedding(torch.tensor([1.0, 1.5]), 256).double()
    assert torch.equal(got[0], torch.cat([torch.zeros(128), torch.ones(128)]).double())
    angles = [500.0 * 10000.0 ** (-i / 127) for i in range(128)]
    want = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(got[1], torch.tensor(want, dtype=torch.float64), rtol=0, atol=1.5e-4)
