"""Families: recognised from names and shapes alone, and overruled by what a file declares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from headstart.checkpoint.declarations import Statements, declared
from headstart.checkpoint.families import FAMILIES, Family, Shapes, recognise
from headstart.errors import CheckpointError
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule

# Manifest -> family. LCM's guidance projection does not make another family.
MANIFESTS = {name: name for name in FAMILIES if name != "demo"} | {
    "lcm-sdxl": "sdxl",
    "lcm-sd15": "sd15",
}


def shapes_of(shared: Path, arch: str) -> Shapes:
    table = json.loads((shared / "manifests" / f"unet_{arch}.json").read_text())["diffusers"]
    return {name: tuple(shape) for name, (_, shape) in table.items()}


def of_unet(shapes: Shapes) -> Family:
    family = recognise({"unet": shapes}, {})
    assert family is not None
    return family


@pytest.mark.parametrize(("arch", "name"), MANIFESTS.items())
def test_every_full_size_unet_is_recognised(shared: Path, arch: str, name: str) -> None:
    family = of_unet(shapes_of(shared, arch))
    assert family is FAMILIES[name] and family.exact


def test_the_manifests_cover_every_family(shared: Path) -> None:
    there = {p.stem.removeprefix("unet_") for p in (shared / "manifests").glob("unet_*.json")}
    assert there == set(MANIFESTS)


def test_the_demo_is_recognised_without_metadata(shared: Path) -> None:
    from headstart.checkpoint.tensors import Checkpoint

    for role in ("base", "student"):
        shapes = Checkpoint.open(shared / "data" / "demo-prototype" / role).shapes
        assert of_unet(shapes) is FAMILIES["demo"]


def small(**more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    block = "down_blocks.0.attentions.0"
    return {
        "conv_in.weight": (32, 4, 3, 3),
        f"{block}.proj_in.weight": (32, 32),
        f"{block}.transformer_blocks.0.attn2.to_k.weight": (32, 64),
        **more,
    }


def test_a_scaled_down_relative_gets_its_ancestors_row() -> None:
    sd21 = of_unet(small())
    assert (sd21.name, sd21.exact, sd21.signature) == ("sd21", False, (3, 32, 64))
    sdxl = of_unet(small(**{"add_embedding.linear_1.weight": (128, 288)}))
    assert (sdxl.lineage, sdxl.scale_factor, sdxl.exact) == ("sdxl", 0.13025, False)
    sd15 = of_unet(small(**{"down_blocks.0.attentions.0.proj_in.weight": (32, 32, 1, 1)}))
    assert (sd15.lineage, sd15.heads) == ("sd15", 8)
    top = {n.replace("down_blocks.0", "down_blocks.1"): s for n, s in small().items()}
    assert of_unet(top).lineage == "demo"


def test_what_is_no_such_unet_has_no_family() -> None:
    assert recognise({"unet": {"conv_in.weight": (32, 4, 3, 3)}}, {}) is None
    mixed = small(**{"mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (32, 65)})
    assert recognise({"unet": mixed}, {}) is None
    assert recognise({}, {}) is None


def test_text_encoders_alone_tell_the_family_when_they_can() -> None:
    norm = "text_model.final_layer_norm.weight"
    for width, name in ((768, "sd15"), (1024, "sd21")):
        assert recognise({"text": {norm: (width,)}}, {}) is FAMILIES[name]
    assert recognise({"text": {norm: (1280,)}}, {}) is None
    assert recognise({"text": {}, "text_2": {}}, {}) is FAMILIES["sdxl"]


def test_metadata_names_the_family_first() -> None:
    assert recognise({"unet": small()}, {"headstart.family": "demo"}) is FAMILIES["demo"]
    with pytest.raises(CheckpointError, match="'sd99': expected one of sd15"):
        recognise({"unet": small()}, {"headstart.family": "sd99"})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_complete_and_of_a_known_lineage(name: str) -> None:
    family = FAMILIES[name]
    assert family.lineage in FAMILIES
    assert (family.heads is None) != (family.head_dim is None)
    assert len({other.signature for other in FAMILIES.values()}) == len(FAMILIES)
    assert family.schedule == NoiseSchedule.scaled_linear()
    assert sum(rule.pooled for rule in family.text) == (1 if family.lineage == "sdxl" else 0)


# --------------------------------------------------------------------- declarations

SDXL = FAMILIES["sdxl"]


def test_nothing_said_leaves_the_row_as_it_is() -> None:
    family = declared(SDXL, Statements())
    assert family == SDXL and family.declared == frozenset()


def test_metadata_replaces_the_rows_values() -> None:
    metadata = {
        "headstart.prediction": "v",
        "headstart.head_dim": "32",
        "headstart.norm_groups": "16",
        "headstart.vae_norm_groups": "8",
        "headstart.scale_factor": "0.5",
        "headstart.image_size": "64",
        "headstart.tokenizer": "{}",
        "something.else": "ignored",
    }
    family = declared(FAMILIES["sd15"], Statements(metadata=metadata))
    assert (family.prediction, family.head_dim, family.heads) == (Prediction.V, 32, None)
    assert (family.norm_groups, family.vae_norm_groups) == (16, 8)
    assert (family.scale_factor, family.image_size) == (0.5, 64)
    assert "prediction" in family.declared and "schedule" not in family.declared


@pytest.mark.parametrize(
    "metadata",
    [
        {"headstart.head_dim": "many"},
        {"headstart.head_dim": "0"},
        {"headstart.head_dim": "8.5"},
        {"headstart.norm_groups": "-1"},
        {"headstart.scale_factor": "nan"},
        {"headstart.scale_factor": "inf"},
        {"headstart.image_size": "9" * 30},
        {"headstart.prediction": "guess"},
    ],
)
def test_metadata_that_cannot_be_read_is_an_error(metadata: dict[str, str]) -> None:
    with pytest.raises(CheckpointError):
        declared(SDXL, Statements(metadata=metadata))


@pytest.mark.parametrize(
    ("config", "heads", "head_dim"),
    [
        ({"attention_head_dim": 8, "block_out_channels": [320, 640]}, 8, None),
        ({"attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280]}, None, 64),
        ({"attention_head_dim": [1, 2, 4], "block_out_channels": [32, 64, 128]}, None, 32),
        ({"attention_head_dim": [4, 4], "block_out_channels": [32, 64]}, 4, None),
        ({"num_attention_heads": 2, "attention_head_dim": [5, 10]}, 2, None),
        ({"act_fn": "silu"}, 8, None),
    ],
)
def test_a_configs_head_dim_is_a_head_count(
    config: dict[str, object], heads: int | None, head_dim: int | None
) -> None:
    family = declared(SDXL, Statements(unet=config))
    assert (family.heads, family.head_dim) == (heads, head_dim)


@pytest.mark.parametrize(
    "config",
    [
        {"attention_head_dim": [2, 8], "block_out_channels": [32, 64]},
        {"attention_head_dim": [0, 0], "block_out_channels": [32, 64]},
        {"attention_head_dim": "8"},
        {"norm_num_groups": 0},
        {"norm_num_groups": True},
        {"act_fn": "gelu"},
        {"flip_sin_to_cos": False},
        {"class_embed_type": "timestep"},
        {"addition_embed_type": "image"},
        {"resnet_time_scale_shift": "scale_shift"},
    ],
)
def test_a_config_of_another_network_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"config"):
        declared(SDXL, Statements(unet=config))


@pytest.mark.parametrize("name", ["sd1.5", "sd2.1", "sd2.1-base", "sdxl-base-1.0", "sdxl-turbo"])
def test_the_official_configs_agree_with_the_table(shared: Path, name: str) -> None:
    def read(path: str) -> dict[str, object]:
        return json.loads((shared / "configs" / name / path).read_text())

    row = FAMILIES["sdxl" if "sdxl" in name else "sd21" if "2.1" in name else "sd15"]
    statements = Statements(
        unet=read("unet/config.json"),
        vae=read("vae/config.json"),
        scheduler=read("scheduler/scheduler_config.json"),
    )
    family = declared(row, statements)
    assert (family.heads, family.head_dim) == (row.heads, row.head_dim)
    assert (family.norm_groups, family.vae_norm_groups) == (32, 32)
    assert family.scale_factor == row.scale_factor
    assert family.schedule == row.schedule
    assert family.prediction is (Prediction.EPS if name == "sd2.1-base" else row.prediction)
    turbo_or_base = {"sd2.1-base": 512, "sdxl-turbo": 512}
    assert family.image_size == turbo_or_base.get(name, row.image_size)


@pytest.mark.parametrize(
    ("statements", "prediction"),
    [
        (Statements(), Prediction.EPS),
        (Statements(flags=frozenset({"v_pred"})), Prediction.V),
        (Statements(scheduler={"prediction_type": "v_prediction"}), Prediction.V),
        (Statements(metadata={"modelspec.prediction_type": "v"}), Prediction.V),
        (
            Statements(
                metadata={"headstart.prediction": "eps"},
                scheduler={"prediction_type": "v_prediction"},
            ),
            Prediction.EPS,
        ),
    ],
)
def test_prediction_is_the_most_specific_statement(
    statements: Statements, prediction: Prediction
) -> None:
    assert declared(SDXL, statements).prediction is prediction


@pytest.mark.parametrize(("dtype", "rounding"), [("f4", 2.0**-20), ("f2", 2.0**-10)])
def test_a_rounded_copy_of_the_familys_schedule_is_the_exact_one(
    dtype: str, rounding: float
) -> None:
    exact = NoiseSchedule.scaled_linear()
    stored = exact.alphas_cumprod.astype(dtype).astype(np.float64)
    assert declared(SDXL, Statements(alphas=(stored, rounding))).schedule == exact


def test_another_schedule_in_the_file_is_taken_as_it_is() -> None:
    other = NoiseSchedule.scaled_linear().matched(0.3)
    stored = other.alphas_cumprod.astype(np.float32).astype(np.float64)
    family = declared(SDXL, Statements(alphas=(stored, 2.0**-20)))
    assert np.array_equal(family.schedule.alphas_cumprod, stored)
    assert "schedule" in family.declared


def test_an_unusable_schedule_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="unusable"):
        declared(SDXL, Statements(alphas=(np.zeros(1000), 2.0**-20)))
    with pytest.raises(CheckpointError, match="beta_schedule"):
        declared(SDXL, Statements(scheduler={"beta_schedule": "sigmoid"}))
    with pytest.raises(CheckpointError, match="num_train_timesteps"):
        declared(SDXL, Statements(scheduler={"num_train_timesteps": 2**31}))


def test_scheduler_configs_give_each_known_schedule() -> None:
    def schedule(**config: object) -> NoiseSchedule:
        return declared(SDXL, Statements(scheduler=config)).schedule

    assert schedule(beta_schedule="linear") == NoiseSchedule.linear()
    assert schedule(beta_schedule="squaredcos_cap_v2") == NoiseSchedule.cosine()
    assert schedule(trained_betas=[0.1, 0.2]) == NoiseSchedule.from_betas([0.1, 0.2])
    scaled = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    zero = NoiseSchedule.scaled_linear().zero_terminal_snr()
    assert schedule(**scaled, rescale_betas_zero_snr=True) == zero
    assert declared(SDXL, Statements(flags=frozenset({"ztsnr"}))).schedule == zero
