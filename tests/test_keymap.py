"""Tensor names: every manifest's map, both ways, and the rules one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headstart.checkpoint import contents, keymap
from headstart.checkpoint.keymap import Source

UNETS = (
    *("sd15", "sd21", "sdxl", "lcm-sdxl", "lcm-sd15", "ssd-1b", "segmind-vega"),
    *("koala-700m", "koala-1b", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"),
)
OPS = {"": "", "chunk3.0": "q", "chunk3.1": "k", "chunk3.2": "v", "T": "transpose"}


def manifest(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "manifests" / f"{name}.json").read_text())


@pytest.mark.parametrize("arch", UNETS)
def test_unet_names_map_both_ways_as_the_original_code_has_them(shared: Path, arch: str) -> None:
    prefix = "model.diffusion_model."
    table = manifest(shared, f"unet_{arch}")["map_diffusers_to_ldm"]
    bare = {ours: ldm.removeprefix(prefix) for ours, ldm in table.items()}
    assert keymap.unet_to_ldm(bare) == bare
    assert keymap.unet_from_ldm(bare.values()) == {ldm: ours for ours, ldm in bare.items()}
    parts = contents.split(table.values())
    assert set(parts) == {"unet"}
    sources = contents.sources("unet", parts["unet"])
    assert sources == {ours: Source(ldm) for ours, ldm in table.items()}


@pytest.mark.parametrize("arch", ["sd15", "sdxl"])
def test_module_names_map_like_tensor_names(shared: Path, arch: str) -> None:
    table = manifest(shared, f"unet_{arch}")["map_diffusers_to_ldm"]
    modules = {ours.rpartition(".")[0] for ours in table}
    mapped = keymap.unet_to_ldm(modules)
    assert {f"model.diffusion_model.{ldm}" for ldm in mapped.values()} == {
        ldm.rpartition(".")[0] for ldm in table.values()
    }


@pytest.mark.parametrize("arch", ["sd15", "sd21", "sdxl"])
def test_vae_names_of_three_namings_come_out_the_same(shared: Path, arch: str) -> None:
    layouts = manifest(shared, f"vae_{arch}")
    parts = contents.split(layouts["ldm"])
    assert set(parts) == {"vae"}
    sources = contents.sources("vae", parts["vae"])
    assert {ours: source.name for ours, source in sources.items()} == layouts[
        "map_diffusers_to_ldm"
    ]
    assert {ours for ours, source in sources.items() if source.op == "matrix"} == set(
        layouts["ops"]
    )
    for naming in ("diffusers", "diffusers_old_attn_names"):
        names = {name: name for name in layouts[naming]}
        assert contents.sources("vae", names).keys() == layouts["diffusers"].keys()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("text_clip_l_sd15", "text"),
        ("text_clip_l_sdxl", "text"),
        ("text_openclip_h_sd21", "text"),
        ("text_openclip_bigg_sdxl", "text_2"),
    ],
)
def test_text_names_map_with_the_right_operation(shared: Path, name: str, part: str) -> None:
    layouts = manifest(shared, name)
    parts = contents.split(layouts["ldm"])
    assert set(parts) == {part}
    sources = contents.sources(part, parts[part])
    for ours, rule in layouts["map_diffusers_to_ldm"].items():
        stored, op = (rule, "") if isinstance(rule, str) else rule
        assert sources[ours] == Source(stored, OPS[op])  # type: ignore[arg-type]
    extra = sources.keys() - layouts["map_diffusers_to_ldm"].keys()
    # SD2.1's file has a 24th layer and a projection that the model never runs
    assert all(".layers.23." in n or n == "text_projection.weight" for n in extra)


def test_tiny_autoencoder_names_count_from_the_decoders_clamp(shared: Path) -> None:
    layouts = manifest(shared, "taesd")
    for half in ("encoder", "decoder"):
        parts = contents.split(layouts[f"pth_{half}"])
        sources = contents.sources("tiny", parts["tiny"])
        table = {ours: f"{half}.{source.name}" for ours, source in sources.items()}
        want = layouts["map_diffusers_to_pth"]
        assert table == {o: s for o, s in want.items() if o.startswith(half)}


# Known by heart: what the rules are for, without the manifests.
SD15_PAIRS = {
    "conv_in.weight": "input_blocks.0.0.weight",
    "time_embedding.linear_2.bias": "time_embed.2.bias",
    "down_blocks.0.resnets.0.conv1.weight": "input_blocks.1.0.in_layers.2.weight",
    "down_blocks.0.resnets.1.norm1.weight": "input_blocks.2.0.in_layers.0.weight",
    "down_blocks.0.attentions.1.proj_in.weight": "input_blocks.2.1.proj_in.weight",
    "down_blocks.0.downsamplers.0.conv.bias": "input_blocks.3.0.op.bias",
    "down_blocks.3.resnets.1.conv2.weight": "input_blocks.11.0.out_layers.3.weight",
    "mid_block.resnets.1.time_emb_proj.weight": "middle_block.2.emb_layers.1.weight",
    "mid_block.attentions.0.norm.weight": "middle_block.1.norm.weight",
    "up_blocks.0.resnets.2.conv_shortcut.weight": "output_blocks.2.0.skip_connection.weight",
    "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
    "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
    "up_blocks.1.attentions.2.proj_out.bias": "output_blocks.5.1.proj_out.bias",
    "conv_norm_out.weight": "out.0.weight",
    "conv_out.bias": "out.2.bias",
}


def test_the_rules_of_a_unet_with_two_layers_a_block() -> None:
    assert keymap.unet_to_ldm(SD15_PAIRS) == SD15_PAIRS
    assert keymap.unet_from_ldm(SD15_PAIRS.values()) == {v: k for k, v in SD15_PAIRS.items()}


def test_names_no_rule_knows_are_left_out_or_keep_their_own() -> None:
    odd = ["input_blocks.x.0.weight", "middle_block.0.strange.weight", "output_blocks.0.7.weight"]
    assert keymap.unet_from_ldm(odd) == {}
    names = {name: "model.diffusion_model." + name for name in odd}
    assert contents.sources("unet", names) == {name: Source(names[name]) for name in odd}


def test_a_downsampler_in_place_of_the_first_convolution_ends_in_no_division_by_zero() -> None:
    names = ["input_blocks.0.0.op.weight", "input_blocks.2.0.in_layers.0.weight"]
    assert keymap.unet_from_ldm(names)[names[0]] == "conv_in.op.weight"
