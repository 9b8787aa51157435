"""One CLIP text encoder as a network: ids -> hidden states, and the pooled text.

context = the hidden state that the family reads          pooled = P @ normed[argmax(ids)]  (SDXL)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from headstart.checkpoint.families import TextRule
from headstart.checkpoint.params import ClipParams


class Tower(nn.Module):
    """One encoder: ids [B, L] -> (context [B, L, width], pooled [B, projection] or None).

    Its state dict has the names files have, `text_model.*` and `text_projection.weight`, whichever
    release of transformers is installed (5.x dropped the prefix from its own).
    """

    def __init__(self, params: ClipParams, rule: TextRule) -> None:
        super().__init__()
        # By name, because importing it takes seconds, and type-checking its sources takes minutes.
        transformers: Any = import_module("transformers")
        self.params, self.rule = params, rule
        config = transformers.CLIPTextConfig(
            vocab_size=params.vocabulary,
            hidden_size=params.width,
            intermediate_size=params.mlp_width,
            num_hidden_layers=params.layers,
            num_attention_heads=params.heads,
            max_position_embeddings=params.positions,
            hidden_act=params.act,
            layer_norm_eps=1e-5,
            # Never used here, but ids beyond a small vocabulary make the library warn.
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
        )
        model: Any = transformers.CLIPTextModel(config)
        self.text_model: Any = getattr(model, "text_model", model)
        self.text_projection = (
            nn.Linear(params.width, params.projection, bias=False) if params.projection else None
        )

    def reset_positions(self, device: torch.device) -> None:
        """Recreate the position ids, which no file holds, after a build on the meta device."""
        ids = torch.arange(self.params.positions, device=device)[None]
        self.text_model.embeddings.position_ids = ids

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        out = self.text_model(input_ids=ids, output_hidden_states=True)
        last: Tensor = out.last_hidden_state  # after the final layer norm
        if self.rule.hidden == -1 and self.rule.normed:
            context = last
        else:
            context = out.hidden_states[self.rule.hidden]
            context = self.text_model.final_layer_norm(context) if self.rule.normed else context
        if self.text_projection is None:
            return context, None
        # The end token has the highest id of the vocabulary; what follows it is padding. Learned
        # tokens (textual inversion) have ids beyond the vocabulary and end nothing.
        known = ids.where(ids < self.params.vocabulary, 0)
        ends = last[torch.arange(len(ids), device=ids.device), known.argmax(dim=-1)]
        return context, self.text_projection(ends)
