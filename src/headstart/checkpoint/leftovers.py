"""Tensors beside the networks of a file: what they are, and whether they may be ignored.

leftover_of  schedules, averages, losses, optimizers: recomputed or never read by every loader
is_allowed   any other one, if the caller allows its name
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import NamedTuple


class Leftover(NamedTuple):
    """`pattern` matches a whole name as stored."""

    what: str
    pattern: re.Pattern[str]


_IN_VAE = r"(first_stage_model\.|vae\.)?"
KNOWN = tuple(
    Leftover(what, re.compile(pattern))
    for what, pattern in (
        (
            "noise schedule",
            r"betas|(sqrt_)?alphas_cumprod(_prev)?|(sqrt|log)_one_minus_alphas_cumprod"
            r"|sqrt_recipm?1?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])"
            r"|denoiser\.(sigmas|log_sigmas)|lvlb_weights",
        ),
        # By these a file describes itself: see `headstart.checkpoint.lineage`.
        ("statement", r"v_pred|ztsnr|edm_mean|edm_std|edm_vpred\.sigma_(max|min)"),
        ("average of weights", _IN_VAE + r"model_ema\b.*"),
        ("buffer", r"(.*\.)?(position_ids|logit_scale)|logvar|scale_factor"),
        ("embedding table of a training", r"embedding_manager\b.*"),
        # CompVis, ldm/modules/losses: the discriminator, LPIPS and its own variance.
        ("training loss", _IN_VAE + r"(loss|discriminator|perceptual_loss)\..*"),
        (
            "state of a trainer",
            r"(optimizer|optimizers|optimizer_states?|lr_schedulers?|loops|callbacks|scaler)\b.*"
            r"|global_step|epoch|iteration|step|num_updates",
        ),
        ("image side of CLIP", r"(vision_model|visual)\..*|visual_projection(\.weight)?"),
    )
)  # fmt: skip


_ANY = re.compile("|".join(f"(?:{row.pattern.pattern})" for row in KNOWN))


def leftover_of(name: str) -> str | None:
    """What a leftover tensor is, by its stored name; None for any other name."""
    if _ANY.fullmatch(name) is None:
        return None
    return next(row.what for row in KNOWN if row.pattern.fullmatch(name))


def is_allowed(name: str, allow: Collection[str]) -> bool:
    """Whether one of the patterns, with `*` and `?` for any text, matches the stored name."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in allow)
