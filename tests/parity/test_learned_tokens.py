"""Learned tokens against diffusers: a prompt with them, and what its encoder makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import MERGES, VOCABULARY, reference, sd1_tower, small_words
from safetensors.torch import save_file
from torch import Tensor

from headstart.adapters.textual_inversion import with_tokens
from headstart.networks.text import ClipText

transformers = pytest.importorskip("transformers")
loaders = pytest.importorskip("diffusers.loaders")


class Pipeline(loaders.TextualInversionLoaderMixin):  # pyright: ignore[reportUntypedBaseClass]
    """What of a pipeline of diffusers loads tokens and reads a prompt with them."""

    def __init__(self, text_encoder: Any) -> None:
        self.text_encoder, self.hf_device_map = text_encoder, None
        self.components: dict[str, Any] = {}
        self.tokenizer = transformers.CLIPTokenizer(
            vocab=dict(VOCABULARY), merges=list(MERGES), model_max_length=16
        )

    def context(self, prompt: str) -> Tensor:
        tokens = self.tokenizer(
            self.maybe_convert_prompt(prompt, self.tokenizer),
            padding="max_length",
            return_tensors="pt",
        )
        return self.text_encoder(tokens["input_ids"]).last_hidden_state


@pytest.mark.parametrize("form", ["diffusers", "rows", "a1111"])
def test_diffusers_reads_the_same_file_to_the_same_encoding(form: str, tmp_path: Path) -> None:
    """To the bit: both run the same layers, diffusers with the vectors in a longer table."""
    draw = torch.Generator().manual_seed(1)
    vectors = torch.randn(3, 32, generator=draw)
    encoder, path = sd1_tower(), tmp_path / "catty.safetensors"
    pipeline = Pipeline(reference(encoder))
    prompts = ["the catty, a cat", "a cat"]
    if form == "diffusers":
        save_file({"<x>": vectors}, path)
        pipeline.load_textual_inversion(str(path))
        prompts = ["the <x>, a cat", "<x>", "a cat"]
    elif form == "rows":  # cog-sdxl's
        save_file({"text_encoders_0": vectors}, path)
        pipeline.load_textual_inversion(vectors, token=["<s0>", "<s1>", "<s2>"])
        prompts = ["the <s0><s1><s2> cat", "a <s2>, cat"]
    else:
        save_file({"emb_params": vectors}, path)
        pipeline.load_textual_inversion({"catty": vectors})
    text, _ = with_tokens(ClipText([encoder], small_words()), [path])
    with torch.no_grad():
        for prompt in prompts:
            theirs, ours = pipeline.context(prompt), text.encode([prompt]).context
            assert torch.equal(theirs, ours), prompt
