"""Tiny flow transformers of diffusers, and what its pipelines do with them.

Import diffusers with `pytest.importorskip` first: it is an oracle of the tests alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor, nn

import headstart as hs

WORDS, GUIDANCE = 5, 3.5
"""Tokens of text, and the guidance of every base."""


class Grid(NamedTuple):
    """A flow's schedule: a shift or e^mu, and the last t of every grid."""

    shift: float = 1.0
    mu: float | None = None
    terminal: float | None = None

    def ours(self) -> Any:
        shift = {"shift": self.shift} if self.mu is None else {"mu": self.mu}
        return hs.NoiseSchedule.flow(**shift, terminal=self.terminal)

    def theirs(self, steps: int) -> list[float]:
        """1000*t, as diffusers makes them."""
        dynamic = self.mu is not None
        peer = diffusers.FlowMatchEulerDiscreteScheduler(
            shift=self.shift, use_dynamic_shifting=dynamic, shift_terminal=self.terminal
        )
        peer.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)], mu=self.mu)
        return peer.timesteps.tolist()

    def exactly(self, steps: int) -> list[float]:
        """t in float64."""
        shift = self.shift if self.mu is None else math.exp(self.mu)
        t = [shift * u / (1 + (shift - 1) * u) for u in (1.0 - i / steps for i in range(steps))]
        stretch = 1.0 if self.terminal is None else (1 - self.terminal) / (1 - t[-1])
        return [1.0 - (1.0 - value) * stretch for value in t]


# What diffusers' pipelines do in their loops: F of one row, by the pipeline's own expressions.
# `words` is (negative, positive), or (positive,) where there is no guidance.


def sd3_pipeline(model: nn.Module, z: Tensor, t: Tensor, words: list[hs.Conditioning]) -> Tensor:
    """pipeline_stable_diffusion_3.py: one call of both halves, t as it is."""
    both = torch.cat([z] * len(words))
    noise_pred = model(
        hidden_states=both,
        timestep=t.expand(both.shape[0]),
        encoder_hidden_states=torch.cat([part.context for part in words]),
        pooled_projections=torch.cat([part.pooled for part in words]),
        return_dict=False,
    )[0]
    if len(words) == 1:
        return noise_pred
    noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
    return noise_pred_uncond + GUIDANCE * (noise_pred_text - noise_pred_uncond)


def apart(call: Callable[[hs.Conditioning], Tensor], words: list[hs.Conditioning]) -> Tensor:
    """The positive half first, then, where there is guidance, the negative one."""
    noise_pred = call(words[-1])
    if len(words) == 1:
        return noise_pred
    negative = call(words[0])
    return negative + GUIDANCE * (noise_pred - negative)


def packed(z: Tensor) -> Tensor:
    return diffusers.FluxPipeline._pack_latents(z, *z.shape)


def flux_pipeline(model: nn.Module, z: Tensor, t: Tensor, words: list[hs.Conditioning]) -> Tensor:
    """pipeline_flux.py with true_cfg_scale: packed tokens, t/1000, ids of tokens and of words."""
    timestep = t.expand(z.shape[0]).to(z.dtype)
    noise_pred = apart(
        lambda part: model(
            hidden_states=packed(z),
            timestep=timestep / 1000,
            guidance=None,
            pooled_projections=part.pooled,
            encoder_hidden_states=part.context,
            txt_ids=torch.zeros(WORDS, 3),
            img_ids=diffusers.FluxPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", z.dtype),
            return_dict=False,
        )[0],
        words,
    )
    return diffusers.FluxPipeline._unpack_latents(noise_pred, 8 * 4, 8 * 6, 8)


def qwen_pipeline(model: nn.Module, z: Tensor, t: Tensor, words: list[hs.Conditioning]) -> Tensor:
    """pipeline_qwenimage.py: packed tokens, t/1000; its rescale of the guided norm is a rule of its
    own, left out. A mask of ones it takes for none."""
    timestep = t.expand(z.shape[0]).to(z.dtype)
    noise_pred = apart(
        lambda part: model(
            hidden_states=packed(z),
            timestep=timestep / 1000,
            guidance=None,
            encoder_hidden_states_mask=None,
            encoder_hidden_states=part.context,
            img_shapes=[[(1, 2, 3)]] * z.shape[0],
            return_dict=False,
        )[0],
        words,
    )
    return diffusers.QwenImagePipeline._unpack_latents(noise_pred, 8 * 4, 8 * 6, 8).squeeze(2)


def z_image_pipeline(
    model: nn.Module, z: Tensor, t: Tensor, words: list[hs.Conditioning]
) -> Tensor:
    """pipeline_z_image.py: (1000 - t)/1000, lists, the positive half first, and -F. Its guidance is
    pos + s*(pos - neg), which is ours at 1 + s."""
    timestep = (1000 - t.expand(z.shape[0])) / 1000
    embeds = [row for part in reversed(words) for row in part.context]
    network = model(
        list(z.repeat(len(words), 1, 1, 1).unsqueeze(2).unbind(dim=0)),
        timestep.repeat(len(words)),
        embeds,
        return_dict=False,
    )[0]
    pos, neg = torch.stack(network[: len(z)]), network[len(z) :]
    pred = pos if not neg else pos + (GUIDANCE - 1.0) * (pos - torch.stack(neg))
    return -pred.squeeze(2)


def wan_pipeline(model: nn.Module, z: Tensor, t: Tensor, words: list[hs.Conditioning]) -> Tensor:
    """pipeline_wan.py: two models, one a noise range; t as it is."""
    return apart(
        lambda part: model(
            hidden_states=z,
            timestep=t.expand(z.shape[0]),
            encoder_hidden_states=part.context,
            return_dict=False,
        )[0],
        words,
    )


class Family(NamedTuple):
    """A network of diffusers, and the schedules that a base and a student of it run on here."""

    kind: str
    config: dict[str, Any]
    shape: tuple[int, ...]
    theirs: Callable[[nn.Module, Tensor, Tensor, list[hs.Conditioning]], Tensor]
    base: Grid
    student: Grid


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
FAMILIES = {
    "SD 3": Family(
        "SD3Transformer2DModel",
        HEADS | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 12,
         "caption_projection_dim": 32, "pooled_projection_dim": 10, "pos_embed_max_size": 8},
        (4, 4, 6), sd3_pipeline, Grid(3.0), Grid(3.0),
    ),
    "Flux": Family(
        "FluxTransformer2DModel",
        HEADS | {"in_channels": 16, "num_single_layers": 2, "joint_attention_dim": 12,
         "pooled_projection_dim": 10, "axes_dims_rope": (4, 6, 6)},
        (4, 4, 6), flux_pipeline, Grid(mu=1.15), Grid(1.0),
    ),
    "Qwen-Image": Family(
        "QwenImageTransformer2DModel",
        HEADS | {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 12,
         "axes_dims_rope": (4, 6, 6)},
        (4, 4, 6), qwen_pipeline, Grid(mu=0.8, terminal=0.02), Grid(mu=math.log(3)),
    ),
    "Z-Image": Family(
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
         "n_kv_heads": 2, "cap_feat_dim": 12, "axes_dims": [4, 6, 6], "axes_lens": [64, 16, 16]},
        (4, 4, 6), z_image_pipeline, Grid(6.0), Grid(3.0),
    ),
    "Wan": Family(
        "WanTransformer3DModel",
        HEADS | {"in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 16,
         "ffn_dim": 48, "rope_max_seq_len": 16},
        (4, 3, 4, 6), wan_pipeline, Grid(8.0), Grid(5.0),
    ),
}  # fmt: skip


def networks(family: Family) -> dict[str, nn.Module]:
    """A base and a student with diffusers' own initial weights."""
    if not hasattr(diffusers, family.kind):
        pytest.skip(f"diffusers {diffusers.__version__} has no {family.kind}")
    made: dict[str, nn.Module] = {}
    with torch.random.fork_rng():
        for seed, name in enumerate(("base", "distilled")):
            torch.manual_seed(seed)
            network = getattr(diffusers, family.kind)(**family.config)
            made[name] = network.eval().requires_grad_(False)
    return made
