"""One CLIP text encoder as a network: ids -> hidden states, and the pooled text.

x     = token + position            token = table[id], or token_vectors[-1 - id] where id < 0
x'    = x + out(attention(q, k, v of norm1(x)))        each position sees itself and those before it
x''   = x' + fc2(act(fc1(norm2(x'))))                  a layer; hidden state i is what layer i made
context = the hidden state that the family reads       pooled = P @ normed[argmax(ids)]  (SDXL)

arXiv:2103.00020, section 2.4, with the names of the released files; learned vectors are textual
inversion, arXiv:2208.01618.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.checkpoint.families import TextRule
from headstart.checkpoint.params import ClipParams
from headstart.errors import InputError


def _quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's networks were trained with it (github.com/openai/CLIP, clip/model.py)."""
    return x * torch.sigmoid(1.702 * x)


_ACTS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": F.gelu}
"""Those that `checkpoint.sizing.clip_params` lets pass."""


class Tower(nn.Module):
    """One encoder: ids [B, L] -> (context [B, L, width], pooled [B, projection] or None).

    An id below 0 is row -1 - id of the call's `token_vectors` [n, width]. So each call has its own
    tokens, and calls with other tokens may run at the same time.

    Its state dict has the names files have, `text_model.*` and `text_projection.weight`.
    """

    def __init__(self, params: ClipParams, rule: TextRule) -> None:
        super().__init__()
        self.params, self.rule = params, rule
        self.text_model = TextModel(params)
        self.text_projection = (
            nn.Linear(params.width, params.projection, bias=False) if params.projection else None
        )

    def forward(
        self, ids: Tensor, hidden: int | None = None, token_vectors: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`hidden`: the hidden state that is the context, -1 the last; None is the family's.

        Layers behind it run only where there is a pooled text, which is read from the last. Raises
        InputError for ids of another form, or more of them than there are positions.
        """
        if ids.ndim != 2 or ids.shape[1] > self.params.positions:
            raise InputError(
                f"ids: expected [B, L] with L at most {self.params.positions}, got "
                f"{list(ids.shape)}: read a longer text in pieces"
            )
        model, layers = self.text_model, self.params.layers
        state = range(layers + 1)[self.rule.hidden if hidden is None else hidden]
        context = model.run(model.embeddings(ids, token_vectors), 0, state)
        last = context if self.text_projection is None else model.run(context, state, layers)
        if self.rule.normed:
            context = model.final_layer_norm(context)
        if self.text_projection is None:
            return context, None
        normed = context if self.rule.normed and state == layers else model.final_layer_norm(last)
        # The end token has the highest id of the vocabulary; what follows it is padding.
        ends = normed[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
        return context, self.text_projection(ends)


class TextModel(nn.Module):
    """What lies below `text_model.` in a file."""

    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        self.embeddings = Embeddings(params)
        layers = nn.ModuleList(Layer(params) for _ in range(params.layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(params.width)

    def run(self, x: Tensor, first: int, end: int) -> Tensor:
        """Hidden state `first` -> hidden state `end`, of which 0 is the embeddings."""
        layers = cast("nn.ModuleList", self.encoder["layers"])
        for layer in cast("Iterable[nn.Module]", layers[first:end]):
            x = layer(x)
        return x


class Embeddings(nn.Module):
    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(params.vocabulary, params.width)
        self.position_embedding = nn.Embedding(params.positions, params.width)

    def forward(self, ids: Tensor, token_vectors: Tensor | None) -> Tensor:
        """Ids [B, L] -> [B, L, width]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self._tokens(ids, token_vectors) + self.position_embedding(positions)

    def _tokens(self, ids: Tensor, token_vectors: Tensor | None) -> Tensor:
        if token_vectors is None or not len(token_vectors):
            return self.token_embedding(ids)
        words = self.token_embedding(ids.clamp(min=0))
        vectors = token_vectors.to(ids.device)[(-1 - ids).clamp(min=0)]
        return torch.where((ids < 0)[..., None], vectors.to(words), words)


class Layer(nn.Module):
    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        self.self_attn = Attention(params)
        self.layer_norm1 = nn.LayerNorm(params.width)
        self.mlp = Mlp(params)
        self.layer_norm2 = nn.LayerNorm(params.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Attention(nn.Module):
    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        self.heads = params.heads
        self.k_proj = nn.Linear(params.width, params.width)
        self.v_proj = nn.Linear(params.width, params.width)
        self.q_proj = nn.Linear(params.width, params.width)
        self.out_proj = nn.Linear(params.width, params.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        self.act = _ACTS[params.act]
        self.fc1 = nn.Linear(params.width, params.mlp_width)
        self.fc2 = nn.Linear(params.mlp_width, params.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
