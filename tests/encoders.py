"""CLIP in small: a vocabulary of some eighty tokens, and encoders that know it."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headstart.checkpoint.families import FAMILIES, TextRule
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.tower import ClipParams, Tower
from headstart.networks.vocabulary import BOS, EOS

transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = {"ca": ("c", "a"), "cat</w>": ("ca", "t</w>"), "th": ("t", "h"), "the</w>": ("th", "e</w>")}
VOCABULARY = {
    token: i
    for i, token in enumerate(
        ["!", *LETTERS, *(f"{c}</w>" for c in LETTERS), ",</w>", "1</w>", *WORDS, BOS, EOS]
    )
}
MERGES = list(WORDS.values())
BOS_ID, EOS_ID = VOCABULARY[BOS], VOCABULARY[EOS]
SIZE = {"positions": 16, "vocabulary": len(VOCABULARY)}
ONE = ClipParams(width=32, layers=3, heads=4, mlp_width=48, act="quick_gelu", **SIZE)
TWO = ClipParams(width=40, layers=3, heads=5, mlp_width=56, act="gelu", projection=24, **SIZE)


def tower(params: ClipParams, rule: TextRule, seed: int = 0) -> Tower:
    """Random weights large enough that positions and tokens matter."""
    torch.manual_seed(seed)
    network = Tower(params, rule).requires_grad_(False).eval()
    for tensor in network.state_dict().values():
        tensor += 0.1 * torch.randn_like(tensor)
    return network


def reference(tower: Tower) -> Any:
    """The library's own model with the same weights, told nothing by our rules."""
    p = tower.params
    config = transformers.CLIPTextConfig(
        vocab_size=p.vocabulary,
        hidden_size=p.width,
        intermediate_size=p.mlp_width,
        num_hidden_layers=p.layers,
        num_attention_heads=p.heads,
        max_position_embeddings=p.positions,
        hidden_act=p.act,
        projection_dim=p.projection or p.width,
        eos_token_id=2,
    )
    model = transformers.CLIPTextModelWithProjection(config).eval()
    state = dict(tower.state_dict())
    state.setdefault("text_projection.weight", torch.zeros(config.projection_dim, p.width))
    model.load_state_dict(state)
    return model


def sd1_tower() -> Tower:
    return tower(ONE, FAMILIES["sd15"].text[0])


def sdxl_towers() -> list[Tower]:
    """SDXL's two encoders, scaled down."""
    first, second = FAMILIES["sdxl"].text
    return [tower(ONE, first), tower(TWO, second, seed=1)]


def small_words() -> ClipTokenizer:
    return ClipTokenizer.from_vocabulary(VOCABULARY, MERGES)


def write_vocabulary(folder: Path) -> Path:
    """A folder as diffusers has it: vocab.json and merges.txt."""
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return folder


FULL = {"positions": 77, "vocabulary": 49408}
FAMILY_TOWERS = {
    "sd15": [ClipParams(width=32, layers=3, heads=4, mlp_width=48, act="quick_gelu", **FULL)],
    "sd21": [ClipParams(width=40, layers=3, heads=5, mlp_width=56, act="gelu", **FULL)],
    "sdxl": [
        ClipParams(width=32, layers=3, heads=4, mlp_width=48, act="quick_gelu", **FULL),
        ClipParams(width=40, layers=3, heads=5, mlp_width=56, act="gelu", projection=40, **FULL),
    ],
}


def written_towers(family: str) -> list[Tower]:
    """Encoders that read CLIP's own vocabulary; their weights come from numpy, by name, so that
    they are the same wherever numbers of other programs are recorded."""
    towers: list[Tower] = []
    for params, rule in zip(FAMILY_TOWERS[family], FAMILIES[family].text, strict=True):
        one = Tower(params, rule).requires_grad_(False).eval()
        for name, tensor in one.state_dict().items():
            rng = np.random.default_rng(zlib.crc32(f"{family} {params.width} {name}".encode()))
            noise = torch.from_numpy(rng.standard_normal(tensor.shape, dtype=np.float32))
            tensor.copy_(
                0.15 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            )
        towers.append(one)
    return towers
