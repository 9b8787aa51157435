"""Weights of tokens, applied to what an encoder made of them, as two programs do it.

    a1111     z' = w*z * mean(z)/mean(w*z)        means over a piece, positions and channels
    comfyui   z' = e + w*(z - e)                  e: the empty prompt at the same position

Sources, for facts: AUTOMATIC1111/stable-diffusion-webui v1.10, modules/sd_emphasis.py
(`EmphasisOriginal`, its default); Comfy-Org/ComfyUI a125cd8, comfy/sd1_clip.py
(`encode_token_weights`). The pooled text has no weights in either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headstart.errors import InputError


def scaled(z: Tensor, weights: Tensor) -> Tensor:
    """`a1111`: z [B, L, D] and weights [B, L] -> [B, L, D], in z's dtype.

    A row whose weights are all 1 keeps its bits. Raises InputError where the mean cannot be
    brought back, because the weights take it to 0.
    """
    weighed = z * weights[..., None].to(z.dtype)
    ratio = z.mean((1, 2), keepdim=True) / weighed.mean((1, 2), keepdim=True)
    if not ratio.isfinite().all():
        raise InputError(
            "the weights of a prompt cancel its text: nothing is left to bring back to the mean; "
            "use weights that are not all 0, or the style comfyui"
        )
    unweighed = (weights == 1.0).all(dim=1)[:, None, None]
    return torch.where(unweighed, z, weighed * ratio)


def from_empty(z: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """`comfyui`: z and empty [B, L, D], weights [B, L] -> [B, L, D]; weight 1 keeps z's bits."""
    w = weights[..., None].to(z.dtype)
    return torch.where(w == 1.0, z, (z - empty) * w + empty)
