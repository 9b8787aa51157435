"""Learned tokens in a file's header: which are in it, for which encoders, and what it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from headstart.checkpoint.embeddings import (
    Token,
    describe_embedding,
    is_embedding,
    token_keys,
    tokens_of,
)
from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import CheckpointError

L, G = 768, 1280
LAYER = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)}
Shapes = dict[str, tuple[int, ...]]


def write(path: Path, shapes: Shapes, metadata: dict[str, str] | None = None) -> Checkpoint:
    save_file({name: torch.zeros(*shape) for name, shape in shapes.items()}, path, metadata)
    return Checkpoint.open(path)


def found(folder: Path, shapes: Shapes, **options: Any) -> list[Token]:
    path = folder / "file name.safetensors"
    return [*tokens_of(path, write(path, shapes), **options)]


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        ({"clip_l": (2, L), "clip_g": (2, G)}, "file name"),
        ({"clip_g": (2, G), "clip_l": (2, L)}, "file name"),
        ({"clip_l": (2, G), "clip_g": (2, L)}, "file name"),
        ({"emb": (L,), "emb2": (G,)}, "file name"),
        ({"emb2": (G,), "emb": (L,)}, "file name"),
        ({"text_encoder": (2, L), "text_encoder_2": (2, G)}, "file name"),
        ({"first one": (2, G), "other": (2, L)}, "file name"),
        ({"bundle_emb.a b.clip_l": (2, L), "bundle_emb.a b.clip_g": (2, G)}, "a b"),
        ({"bundle_emb.v1.5.clip_g": (2, G), "bundle_emb.v1.5.clip_l": (2, L)}, "v1.5"),
    ],
)  # fmt: skip
def test_a_pair_is_one_token_of_sdxl_however_it_is_spelled_and_ordered(
    shapes: Shapes, name: str, tmp_path: Path
) -> None:
    (token,) = found(tmp_path, shapes)
    assert token.name == name and token.row is None
    assert token.widths == {"text": L, "text_2": G}
    assert {own: shapes[key][-1] for own, key in token.keys.items()} == token.widths
    assert token.vectors == (2 if len(next(iter(shapes.values()))) == 2 else 1)
    (renamed,) = found(tmp_path, shapes, rename="<x>")
    assert renamed == token._replace(name="<x>")


def test_each_row_of_cog_sdxl_is_a_token_and_all_of_them_are_behind_a_name(tmp_path: Path) -> None:
    pti = {"text_encoders_0": (3, L), "text_encoders_1": (3, G)}
    tokens = found(tmp_path, pti)
    assert [(token.name, token.row, token.vectors) for token in tokens] == [
        ("<s0>", 0, 1), ("<s1>", 1, 1), ("<s2>", 2, 1)
    ]  # fmt: skip
    (whole,) = found(tmp_path, pti, rename="TOK")
    assert (whole.name, whole.row, whole.vectors) == ("TOK", None, 3)


@pytest.mark.parametrize(
    ("shapes", "tokens"),
    [
        ({"emb_params": (4, L)}, {"file name": 4}),
        ({"*": (L,)}, {"file name": 1}),
        ({"string_to_param.*": (4, 1024)}, {"file name": 4}),
        ({"clip_h": (4, 1024)}, {"file name": 4}),
        ({"emb_params.<a>": (2, L), "emb_params.<b>": (1, L)}, {"<a>": 2, "<b>": 1}),
        ({"<cat>": (L,), "a dog": (2, L), "llama": (L,)}, {"<cat>": 1, "a dog": 2, "llama": 1}),
        ({"emb": (L,)}, {"emb": 1}),
        ({"bundle_emb.x.string_to_param.*": (2, L), "bundle_emb.y.emb_params": (L,)},
         {"x": 2, "y": 1}),
        ({"<cat>": (2, G)}, {"<cat>": 2}),
    ],
)  # fmt: skip
def test_every_spelling_of_a_single_encoder(
    shapes: Shapes, tokens: dict[str, int], tmp_path: Path
) -> None:
    came = found(tmp_path, shapes)
    assert {token.name: token.vectors for token in came} == tokens
    encoder = "text_2" if G in next(iter(shapes.values())) else "text"
    assert all([*token.keys] == [encoder] for token in came)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"clip_l": (1, L), "clip_g": (1, G), "t5": (1, 4096)}, "SD 3, Flux or another family"),
        ({"bundle_emb.q.t5": (1, 4096)}, "the token 'q' has vectors for t5"),
        ({"clip_l": (1, L), "clip_l_out": (1, L)}, "OneTrainer's output embeddings"),
        ({"clip_l": (1, L), "emb_params": (1, L)}, "both for one text encoder"),
        ({"emb": (1, L), "emb2": (2, G)}, "as many vectors"),
        ({"emb_params": (2, 4), "<a>": (4,)}, "nothing besides"),
        ({"emb_params": (76, 4)}, r"n at most 75, got F32 \[76, 4\]"),
        ({"<a>": (2, 3, 4)}, r"got F32 \[2, 3, 4\]"),
        ({"<a>": (0, 4)}, r"got F32 \[0, 4\]"),
        ({f"<{n}>": (2,) for n in range(1001)}, "at most 1000 learned tokens, got 1001"),
        ({}, "no learned token"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_called_what_it_is(
    shapes: Shapes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        found(tmp_path, shapes)
    assert len(str(caught.value)) < 600


def test_a_file_says_what_it_is_and_networks_and_adapters_are_none(tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    held = write(path, {"clip_l": (2, L), "clip_g": (2, G)})
    info = describe_embedding(path, held)
    assert info is not None and info.family == "sdxl" and info.tokens == ("cat",)
    assert info.vectors == (2,) and info.widths == {"text": L, "text_2": G}
    for family, width in (("sd15", 768), ("sd21", 1024), (None, 1280), (None, 99)):
        held = write(path, {"<cat>": (width,)})
        described = describe_embedding(path, held)
        assert described is not None and described.family == family
    others: tuple[Shapes, ...] = (
        LAYER,
        LAYER | {"bundle_emb.x.clip_l": (1, L)},
        {"unet:0:up": (4, 2)},
        {"conv_in.weight": (4, 4, 3, 3)},
        {"0.weight": (4, 4, 3, 3)},
        {"mm_projector.weight": (4, 8)},
        {"alphas_cumprod": (1000,)},
        {"some": (4, 4, 3, 3)},
    )
    for shapes in others:
        assert describe_embedding(path, write(path, shapes)) is None, shapes
    held = write(path, {"clip_l": (2, 3, L)})
    assert is_embedding(held)
    with pytest.raises(CheckpointError, match="expected floating point"):
        describe_embedding(path, held)


def test_tokens_beside_layers_are_told_from_what_nobody_knows(tmp_path: Path) -> None:
    shapes = LAYER | {
        "bundle_emb.x.clip_l": (1, L),
        "clip_g": (1, G),
        "<s1>": (L,),
        "marked": (L,),
        "mystery": (L,),
        "text_encoder": (L,),
    }
    held = write(tmp_path / "a.safetensors", shapes, {"marked": "<embed>"})
    assert {*token_keys(held)} == {"bundle_emb.x.clip_l", "clip_g", "<s1>", "marked"}
