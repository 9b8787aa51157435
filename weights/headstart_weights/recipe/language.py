"""The pair's text encoder: a small CLIP text transformer, prompts -> context [B, 16, 128]."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from headstart_weights.recipe.tokenizer import END, START, load_tokenizer

POSITIONS = 16
_PREFIX = "text_model."


class Language(nn.Module):
    """Tokenizer and transformer together; padded with the end-of-text token, as CLIP-L is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
        assert start is not None and end is not None
        config = CLIPTextConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            hidden_act="quick_gelu",
            bos_token_id=start,
            eos_token_id=end,
            projection_dim=128,
        )
        self.transformer = CLIPTextModel(config)

        @lru_cache(maxsize=65536)
        def token_ids(prompt: str) -> list[int]:
            ids = tokenizer.encode(prompt, add_special_tokens=False).ids[: POSITIONS - 2]
            return [start, *ids, *[end] * (POSITIONS - 1 - len(ids))]

        self._ids = token_ids

    def forward(self, prompts: Sequence[str]) -> Tensor:
        ids = torch.tensor([self._ids(prompt) for prompt in prompts])
        return self.transformer(input_ids=ids).last_hidden_state


def load(work: Path) -> Language:
    """The trained text encoder, from `text.safetensors`."""
    language = Language(load_tokenizer(work))
    bare = not any(k.startswith(_PREFIX) for k in language.transformer.state_dict())
    tensors = load_file(work / "text.safetensors")
    state = {k.removeprefix(_PREFIX) if bare else k: v for k, v in tensors.items()}
    language.transformer.load_state_dict(state)
    return language.eval()
