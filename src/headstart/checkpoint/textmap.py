"""Names of CLIP text encoders: OpenCLIP's, transformers' with and without `text_model.` -> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from headstart.checkpoint.keymap import Source, rename

_OPENCLIP_BLOCK = re.compile(r"transformer\.resblocks\.([0-9]{1,3})\.(.+)")
OPENCLIP_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPENCLIP_TOP = {
    "token_embedding.weight": Source("text_model.embeddings.token_embedding.weight"),
    "positional_embedding": Source("text_model.embeddings.position_embedding.weight"),
    "ln_final.weight": Source("text_model.final_layer_norm.weight"),
    "ln_final.bias": Source("text_model.final_layer_norm.bias"),
    "text_projection": Source("text_projection.weight", "transpose"),  # OpenCLIP computes x @ P
}


def text_sources(names: Mapping[str, str]) -> dict[str, Source]:
    """Our tensor name -> its source, for a CLIP encoder; an unknown name stays as it is."""
    sources: dict[str, Source] = {}
    for name, full in names.items():
        for ours in _text_names(name):
            sources[ours.name] = Source(full, ours.op)
    return sources


def _text_names(name: str) -> list[Source]:
    """Our names for one name of a file; OpenCLIP's fused in_proj has three."""
    if name in _OPENCLIP_TOP:
        return [_OPENCLIP_TOP[name]]
    match = _OPENCLIP_BLOCK.fullmatch(name)
    if match is None:
        bare = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
        return [Source(f"text_model.{name}" if bare else name)]
    layer, rest = f"text_model.encoder.layers.{match[1]}", match[2]
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        leaf = rest.removeprefix("attn.in_proj_")
        return [Source(f"{layer}.self_attn.{op}_proj.{leaf}", op) for op in ("q", "k", "v")]
    inner = rename(rest, OPENCLIP_INNER)
    return [Source(f"{layer}.{inner}" if inner else name)]
