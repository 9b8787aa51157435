"""The networks against diffusers' own, with random weights, in float64 and in float32.

In float64 both must agree to 1e-9. In float32 our distance from the float64 result may be at most
twice the one diffusers itself has there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headstart.interfaces import Conditioning
from headstart.networks.fusion import fusion
from headstart.networks.load import load_tiny, load_unet, load_vae
from headstart.prompt_cache import PromptCache

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")

DOWN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
SIZE = {"in_channels": 4, "out_channels": 4, "sample_size": 8}
SDXL_LIKE = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": (DOWN, CROSS, CROSS),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 24,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 12 + 6 * 8,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15-like": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": (CROSS, CROSS, DOWN),
        "layers_per_block": 2,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
    },
    "sd21-like": {
        "block_out_channels": (32, 64),
        "down_block_types": (CROSS, DOWN),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 24,
        "use_linear_projection": True,
    },
    "sdxl-like": SDXL_LIKE,
    "lcm-like": {**SDXL_LIKE, "time_cond_proj_dim": 16},
    "no-mid": {
        "block_out_channels": (32, 64),
        "down_block_types": (CROSS, CROSS),
        "mid_block_type": None,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
    },
    "demo-like": {
        "block_out_channels": (32, 64, 128),
        "down_block_types": (DOWN, CROSS, CROSS),
        "layers_per_block": 1,
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 24,
        "norm_num_groups": 16,
        "use_linear_projection": True,
    },
}


def distance(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def compare(
    ours: nn.Module,
    theirs: nn.Module,
    run: Callable[[nn.Module, torch.dtype], Tensor],
    run_theirs: Callable[[nn.Module, torch.dtype], Tensor],
) -> None:
    """Agreement in float64, and no more rounding in float32 than twice diffusers' own."""
    with torch.no_grad():
        rough = run(ours.float(), torch.float32), run_theirs(theirs.float(), torch.float32)
        exact = run_theirs(theirs.double(), torch.float64)
        assert exact.norm() > 0.1
        assert distance(run(ours.double(), torch.float64), exact) < 1e-9
    assert distance(rough[0], exact) <= 2 * distance(rough[1], exact) + 2.0**-24


def randomise(module: nn.Module) -> None:
    """Norm scales and biases too, which are born as ones and zeros."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)


def as_on_a_cpu(unet: Any, *call: Any) -> Tensor:
    return unet(*call)


def as_on_a_gpu(unet: Any, *call: Any) -> Tensor:
    """Fused layers, channels-last convolutions, layers of one input as one product, and the prompt
    read ahead: with the kernels' references, on a CPU."""
    unet.lay_out(torch.device("cuda"))
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    with fusion(True):
        return unet(*call[:2], PromptCache().of(unet, call[2]))


@pytest.mark.parametrize("called", [as_on_a_cpu, as_on_a_gpu])
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_equals_diffusers(tmp_path: Path, name: str, called: Any) -> None:
    config = UNETS[name]
    up = tuple(kind.replace("Down", "Up") for kind in reversed(config["down_block_types"]))
    theirs = diffusers.UNet2DConditionModel(**SIZE, **config, up_block_types=up).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_unet(tmp_path)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    torch.manual_seed(1)
    x, time, context = draw(2, 4, 8, 6), torch.tensor([999, 37]), draw(2, 5, 24)
    xl, lcm = name in ("sdxl-like", "lcm-like"), name == "lcm-like"
    pooled = draw(2, 12) if xl else None
    sizes = torch.tensor([[64.0, 48.0, 0.0, 8.0, 64.0, 48.0]] * 2) if xl else None
    guidance = draw(2, 16) if lcm else None
    cond = Conditioning(context, pooled, sizes, guidance)

    def run_theirs(model: Any, dtype: torch.dtype) -> Tensor:
        added = None
        if pooled is not None:
            added = {"text_embeds": pooled.to(dtype), "time_ids": sizes}
        return model(
            x.to(dtype),
            time,
            context.to(dtype),
            added_cond_kwargs=added,
            timestep_cond=None if guidance is None else guidance.to(dtype),
        ).sample

    compare(ours, theirs, lambda m, d: called(m, x.to(d), time, cond.to("cpu", d)), run_theirs)


VAES: dict[str, dict[str, Any]] = {
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025},
    # Flux's and SD3's: no convolutions around the latent, and a shift.
    "flux": {
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "playground": {
        "latent_channels": 4,
        "scaling_factor": 0.5,
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    },
}


def _of_channels(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_a_vae_equals_diffusers(tmp_path: Path, direction: str, name: str) -> None:
    """Scale, shift, mean and deviation are applied as diffusers' pipelines of SDXL and Flux do."""
    config = VAES[name]
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        **config,
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_vae(tmp_path)
    count, scale = config["latent_channels"], config["scaling_factor"]
    shift = config.get("shift_factor", 0.0)
    mean = _of_channels(config.get("latents_mean", [0.0] * count))
    std = _of_channels(config.get("latents_std", [1.0] * count))
    assert ours.scale_factor == scale
    latents = torch.randn(2, count, 4, 6, dtype=torch.float64)
    pixels = torch.rand(2, 3, 16, 24, dtype=torch.float64) * 2 - 1

    def z(d: torch.dtype) -> Tensor:
        return latents.to(d) * std.to(d) / scale + mean.to(d) + shift

    def back(output: Tensor) -> Tensor:
        return (output - mean.to(output) - shift) * scale / std.to(output)

    runs: dict[str, tuple[Any, Any]] = {
        "decode": (
            lambda m, d: m.decode(latents.to(d)),
            lambda m, d: m.decode(z(d)).sample,
        ),
        "encode": (
            lambda m, d: m.encode(pixels.to(d)),
            lambda m, d: back(m.encode(pixels.to(d)).latent_dist.mean),
        ),
    }
    compare(ours, theirs, *runs[direction])


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_a_tiny_autoencoder_equals_diffusers(tmp_path: Path, direction: str) -> None:
    theirs = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 3, 2),
        num_decoder_blocks=(2, 3, 1),
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_tiny(tmp_path)
    latents = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    pixels = torch.rand(2, 3, 16, 24, dtype=torch.float64) * 2 - 1
    runs: dict[str, tuple[Any, Any]] = {
        "decode": (
            lambda m, d: m.decode(latents.to(d)),
            lambda m, d: m.decode(latents.to(d)).sample,
        ),
        "encode": (
            lambda m, d: m.encode(pixels.to(d)),
            lambda m, d: m.encode(pixels.to(d)).latents,
        ),
    }
    compare(ours, theirs, *runs[direction])
