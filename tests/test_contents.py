"""Which network each tensor is of, whatever stands before its name, and what is let be."""

from __future__ import annotations

import pytest

from headstart.checkpoint.contents import split
from headstart.checkpoint.leftovers import is_allowed, is_leftover
from headstart.checkpoint.prefixes import DEEPEST, readings
from headstart.errors import CheckpointError

UNET = ("conv_in.weight", "time_embedding.linear_1.bias", "down_blocks.0.resnets.0.norm1.weight")
LDM = ("input_blocks.0.0.weight", "time_embed.0.bias", "input_blocks.1.0.in_layers.0.weight")
VAE = ("encoder.conv_in.weight", "decoder.mid.block_1.norm1.weight", "quant_conv.bias")
CLIP = (
    "text_model.embeddings.token_embedding.weight",
    "text_model.encoder.layers.11.mlp.fc1.weight",
    "text_projection.weight",
)
OPENCLIP = ("token_embedding.weight", "transformer.resblocks.3.ln_1.bias", "ln_final.weight")


@pytest.mark.parametrize(
    "name",
    [
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef2",
        "denoiser.sigmas",
        "model_ema.decay",
        "model_ema.diffusion_modelinput_blocks00weight",
        "embedding_manager.embedder.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
        "loss.logvar",
        "first_stage_model.loss.discriminator.main.0.weight",
        "logvar",
        "optimizer.state.0.exp_avg",
        "global_step",
        "vision_model.embeddings.class_embedding",
        "edm_mean",
        "edm_vpred.sigma_max",
    ],
)
def test_training_leftovers_are_ignored(name: str) -> None:
    assert is_leftover(name)
    assert split([name]) == {}


@pytest.mark.parametrize("name", ["conv_in.weight", "time_embed.0.weight", "betas2", "x.betas"])
def test_nothing_else_is_ignored(name: str) -> None:
    assert not is_leftover(name)


def test_a_file_is_split_by_prefix_and_what_fits_none_is_told() -> None:
    names = [
        "model.diffusion_model.out.0.weight",
        "first_stage_model.quant_conv.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "conditioner.embedders.1.model.ln_final.bias",
        "betas",
        "stranger",
    ]
    parts = split(names)
    assert parts.keys() == {"unet", "vae", "text", "text_2", ""}
    assert parts[""] == {"stranger": "stranger"}
    assert parts["unet"] == {"out.0.weight": "model.diffusion_model.out.0.weight"}


@pytest.mark.parametrize(
    ("part", "prefix", "names"),
    [
        *(("unet", prefix, UNET) for prefix in ("", "unet.", "module.", "_orig_mod.", "ema.")),
        *(("unet", prefix, LDM) for prefix in ("diffusion_model.", "model.diffusion_model.")),
        ("unet", "model.diffusion_model._orig_mod.", LDM),
        ("unet", "module.unet.", UNET),
        ("unet", "model.", UNET),
        *(("vae", prefix, VAE) for prefix in ("", "vae.", "module.", "first_stage_model.")),
        ("text", "", CLIP),
        ("text", "text_encoder.", CLIP),
        ("text", "text_encoders.clip_l.transformer.", CLIP),
        ("text", "clip_l.", CLIP),
        ("text", "clip_l.transformer.", CLIP),
        ("text", "cond_stage_model.transformer.", CLIP),
        ("text", "cond_stage_model.model.", OPENCLIP),
        ("text_2", "text_encoder_2.", CLIP),
        ("text_2", "text_encoders.clip_g.transformer.", CLIP),
        ("text_2", "clip_g.", OPENCLIP),
        ("text_2", "conditioner.embedders.1.model.", OPENCLIP),
        ("tiny", "module.", ("0.weight", "0.bias", "1.conv.0.weight")),
    ],
)
def test_every_prefix_is_peeled_off(part: str, prefix: str, names: tuple[str, ...]) -> None:
    assert split(prefix + name for name in names) == {part: {n: prefix + n for n in names}}


def test_a_whole_model_under_components_names_is_split_as_a_single_file_is() -> None:
    names = [
        *(f"unet.{name}" for name in UNET),
        *(f"vae.{name}" for name in VAE),
        *(f"text_encoders.clip_l.transformer.{name}" for name in CLIP),
        *(f"text_encoders.clip_g.transformer.{name}" for name in CLIP),
        "unet.strange.weight",
        "strange.weight",
    ]
    parts = split(names)
    assert parts.keys() == {"unet", "vae", "text", "text_2", ""}
    assert parts["unet"]["strange.weight"] == "unet.strange.weight"
    assert parts[""] == {"strange.weight": "strange.weight"}


def test_the_reading_that_says_most_of_the_file_is_taken() -> None:
    more = [f"model.diffusion_model.{name}" for name in LDM]
    parts = split([*more, "module.conv_in.weight"])
    assert list(parts["unet"].values()) == more
    assert parts[""] == {"module.conv_in.weight": "module.conv_in.weight"}


def test_two_networks_that_fit_alike_are_an_error_that_names_both() -> None:
    names = [*(f"ema.{name}" for name in UNET), *(f"model.{name}" for name in UNET)]
    with pytest.raises(CheckpointError) as caught:
        split(names)
    assert "'ema.'" in str(caught.value) and "'model.'" in str(caught.value)


def test_the_keys_of_an_adapter_are_no_network_whatever_their_prefix() -> None:
    keys = [
        f"model.diffusion_model.input_blocks.1.1.proj_in.lora_{side}.weight" for side in ("A", "B")
    ]
    assert split(keys).keys() == {"adapter"}
    whole = [f"model.diffusion_model.{name}" for name in LDM]
    parts = split([*whole, keys[0]])
    assert parts["unet"].keys() >= set(LDM) and "adapter" not in parts


def test_a_name_is_peeled_to_a_fixed_depth() -> None:
    results = list(readings("module." * 140 + "conv_in.weight"))
    assert len(results) == DEEPEST + 1


def test_what_may_be_left_is_named_as_the_file_spells_it() -> None:
    assert is_allowed("control_model.out.0.weight", ["control_model.*"])
    assert not is_allowed("Control_model.out", ["control_model.*"])
    assert not is_allowed("x", [])
