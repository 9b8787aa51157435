"""One CLIP text encoder as a network: ids -> hidden states, and the pooled text.

context = the hidden state that the family reads          pooled = P @ normed[argmax(ids)]  (SDXL)
token   = table[id], or learned[-1 - id] where id < 0: textual inversion, arXiv:2208.01618
"""

from __future__ import annotations

from contextvars import ContextVar
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headstart.checkpoint.families import TextRule
from headstart.checkpoint.params import ClipParams


class _Learned(NamedTuple):
    """What one call looks up beside the table: where [B, L, 1], and the vectors [B, L, width]."""

    where: Tensor
    vectors: Tensor


_LEARNED: ContextVar[_Learned | None] = ContextVar("headstart_learned", default=None)
"""Of the call that runs in this thread: transformers takes no vectors in the place of ids."""


def _look_up(table: nn.Module, ids: tuple[Tensor, ...], found: Tensor) -> Tensor | None:
    """After the table's lookup; None leaves what it found."""
    learned = _LEARNED.get()
    if learned is None:
        return None
    return torch.where(learned.where, learned.vectors.to(found), found)


_look_up.in_key = True  # pyright: ignore[reportFunctionMemberAccess]: see `headstart.engine.encoded`


class Tower(nn.Module):
    """One encoder: ids [B, L] -> (context [B, L, width], pooled [B, projection] or None).

    An id below 0 is a learned vector, `learned[-1 - id]` of the call's `learned` [n, width], so who
    knows which tokens is a matter of the call, and calls with others may run at the same time.

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
        self.text_model.embeddings.token_embedding.register_forward_hook(_look_up)
        self.text_projection = (
            nn.Linear(params.width, params.projection, bias=False) if params.projection else None
        )

    def reset_positions(self, device: torch.device) -> None:
        """Recreate the position ids, which no file holds, after a build on the meta device."""
        ids = torch.arange(self.params.positions, device=device)[None]
        self.text_model.embeddings.position_ids = ids

    def forward(
        self, ids: Tensor, hidden: int | None = None, learned: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`hidden`: the hidden state that is the context, -1 the last; None is the family's."""
        if learned is None or not len(learned):
            return self._read(ids, ids, hidden)
        beyond = ids < 0
        vectors = learned.to(ids.device)[(-1 - ids).clamp(min=0)]
        token = _LEARNED.set(_Learned(beyond[..., None], vectors))
        try:
            return self._read(ids.clamp(min=0), ids, hidden)
        finally:
            _LEARNED.reset(token)

    def _read(self, known: Tensor, ids: Tensor, hidden: int | None) -> tuple[Tensor, Tensor | None]:
        out = self.text_model(input_ids=known, output_hidden_states=True)
        last: Tensor = out.last_hidden_state  # after the final layer norm
        hidden = self.rule.hidden if hidden is None else hidden
        if hidden == -1 and self.rule.normed:
            context = last
        else:
            context = out.hidden_states[hidden]
            context = self.text_model.final_layer_norm(context) if self.rule.normed else context
        if self.text_projection is None:
            return context, None
        # The end token has the highest id of the vocabulary; what follows it is padding.
        ends = last[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
        return context, self.text_projection(ends)
