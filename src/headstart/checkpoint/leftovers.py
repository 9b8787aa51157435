"""Tensors beside the networks of a file: what they are, and whether they may be ignored.

is_leftover  schedules, averages, losses, optimizers: recomputed or never read by every loader
is_allowed   any other one, if the caller allows its name
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

_LEFTOVERS = re.compile(
    # Noise schedules.
    r"betas|(sqrt_)?alphas_cumprod(_prev)?|(sqrt|log)_one_minus_alphas_cumprod"
    r"|sqrt_recipm?1?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])"
    r"|denoiser\.(sigmas|log_sigmas)|lvlb_weights"
    # By these a file describes itself: see `headstart.checkpoint.lineage`.
    r"|v_pred|ztsnr|edm_mean|edm_std|edm_vpred\.sigma_(max|min)"
    # Averages of weights. CompVis, ldm/modules/losses: the discriminator, LPIPS and its variance.
    r"|(first_stage_model\.|vae\.)?(model_ema\b|(loss|discriminator|perceptual_loss)\.).*"
    # Buffers, and the embedding table of a training.
    r"|(.*\.)?(position_ids|logit_scale)|logvar|scale_factor|embedding_manager\b.*"
    # The state of a trainer.
    r"|(optimizer|optimizers|optimizer_states?|lr_schedulers?|loops|callbacks|scaler)\b.*"
    r"|global_step|epoch|iteration|step|num_updates"
    # The image side of CLIP.
    r"|(vision_model|visual)\..*|visual_projection(\.weight)?"
)


def is_leftover(name: str) -> bool:
    """Whether a tensor of this stored name is ignored by every loader."""
    return _LEFTOVERS.fullmatch(name) is not None


def is_allowed(name: str, allow: Collection[str]) -> bool:
    """Whether one of the patterns, with `*` and `?` for any text, matches the stored name."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in allow)
