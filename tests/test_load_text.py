"""Text encoders from files: every layout and naming gives the same conditioning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import openclip, prefixed
from encoders import (
    EOS_ID,
    MERGES,
    SIZE,
    VOCABULARY,
    reference,
    sd1_tower,
    sdxl_towers,
    small_words,
    tower,
    write_vocabulary,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.checkpoint.families import FAMILIES
from headstart.errors import CheckpointError, InputError
from headstart.networks.load import load_text
from headstart.networks.text import ClipText
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.tower import ClipParams, Tower
from headstart.networks.vocabulary import EOS

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def words() -> ClipTokenizer:
    return small_words()


@pytest.fixture(scope="module")
def one() -> Tower:
    return sd1_tower()


@pytest.fixture(scope="module")
def pair() -> list[Tower]:
    return sdxl_towers()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("tokenizer"))


def test_a_single_file_with_its_tokenizer_inside_needs_nothing_else(
    tmp_path: Path, words: ClipTokenizer, one: Tower
) -> None:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(VOCABULARY, MERGES, end_of_word_suffix="</w>", unk_token=EOS)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    metadata = {"headstart.family": "demo", "headstart.text_heads": "4"}
    metadata |= {"headstart.tokenizer": tokenizer.to_str(), "headstart.image_size": "64"}
    tensors = prefixed(dict(one.state_dict()), "cond_stage_model.transformer.")
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata)
    text = load_text(path)
    assert (text.length, text.image_size) == (16, 64)
    want = ClipText([one], words).encode(["the cat"]).context
    torch.testing.assert_close(text.encode(["the cat"]).context, want)


def test_sdxl_loads_the_same_from_a_single_file_and_a_folder(
    tmp_path: Path, vocabulary: Path, words: ClipTokenizer, pair: list[Tower]
) -> None:
    tensors = prefixed(dict(pair[0].state_dict()), "conditioner.embedders.0.transformer.")
    position = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    tensors |= prefixed(openclip(dict(pair[1].state_dict())), "conditioner.embedders.1.model.")
    save_file(tensors | {position: torch.arange(16)[None]}, tmp_path / "model.safetensors")
    single = load_text(tmp_path / "model.safetensors", tokenizer=vocabulary, head_dim=8)
    root = tmp_path / "model"
    for folder, network in zip(("text_encoder", "text_encoder_2"), pair, strict=True):
        (root / folder).mkdir(parents=True)
        save_file(dict(network.state_dict()), root / folder / "model.safetensors")
        config = {"architectures": ["CLIPTextModel"], "num_attention_heads": network.params.heads}
        config["hidden_act"] = network.params.act
        (root / folder / "config.json").write_text(json.dumps(config))
    (root / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (root / "tokenizer" / name).write_bytes((vocabulary / name).read_bytes())
    split = load_text(root)
    want = ClipText(pair, words).encode(["the cat"])
    for text in (single, split):
        cond = text.encode(["the cat"])
        torch.testing.assert_close(cond.context, want.context)
        torch.testing.assert_close(cond.pooled, want.pooled)
    assert single.exclamation == "openclip"
    other = load_text(root, exclamation="transformers")
    assert other.exclamation == "transformers"
    assert [ids[0, 1:3].tolist() for ids in other.ids(["!!"])] == [[0, EOS_ID], [0, 0]]
    with pytest.raises(InputError, match="'sdnext': expected openclip, transformers"):
        load_text(root, exclamation="sdnext")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="with 2 text encoders, found 1"):
        load_text(root / "text_encoder_2", tokenizer=vocabulary)


def test_sd21_never_runs_the_last_layer_of_an_openclip_file(
    tmp_path: Path, vocabulary: Path
) -> None:
    encoder = tower(
        ClipParams(width=40, layers=2, heads=5, mlp_width=56, act="gelu", **SIZE),
        FAMILIES["sd21"].text[0],
    )
    tensors = prefixed(
        openclip(dict(encoder.state_dict()), one_more=True), "cond_stage_model.model."
    )
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"headstart.family": "sd21"})
    text = load_text(path, tokenizer=vocabulary, head_dim=8)
    ids = text.ids(["the cat"])[0]
    assert ids[0, -1] == 0  # padded with id 0
    want = reference(encoder)(ids).last_hidden_state
    torch.testing.assert_close(text.encode(["the cat"]).context, want)


def test_what_a_text_file_cannot_say_is_asked_for(
    tmp_path: Path, vocabulary: Path, one: Tower
) -> None:
    path = tmp_path / "x.safetensors"
    bare = {n.removeprefix("text_model."): t.clone() for n, t in one.state_dict().items()}
    save_file(bare, path)
    with pytest.raises(CheckpointError, match=r"has 49408 tokens, the encoder knows .* give the"):
        load_text(path, head_dim=8)
    with pytest.raises(CheckpointError, match="head_dim="):
        load_text(path, tokenizer=vocabulary)
    with pytest.raises(CheckpointError, match="3 heads do not divide"):
        load_text(path, tokenizer=vocabulary, head_dim=10)
    assert load_text(path, tokenizer=vocabulary, head_dim=8).length == 16
    save_file(bare, path, {"headstart.text_heads": "4", "headstart.text_act": "relu"})
    with pytest.raises(CheckpointError, match="expected quick_gelu or gelu"):
        load_text(path, tokenizer=vocabulary)
    del bare["encoder.layers.1.mlp.fc2.bias"]
    save_file(bare, path, {"headstart.text_heads": "4"})
    with pytest.raises(CheckpointError, match=r"1 missing: text_model.*layers\.1\.mlp\.fc2\.bias"):
        load_text(path, tokenizer=vocabulary)


def test_outputs_equal_the_original_codes(
    shared: Path, make_ckpt: Callable[..., Path], vocabulary: Path
) -> None:
    """The two encoders from a single file and from a folder, the first also as SD1.5 reads it."""
    case = load_file(shared / "golden" / "text_sdxl_tiny.safetensors")
    alone = make_ckpt("te1.safetensors", "sdxl", "te1")
    outs: list[tuple[Tensor, str]] = []
    with torch.no_grad():
        for path in (
            make_ckpt("base.safetensors", "sdxl", "ldm"),
            make_ckpt("base", "sdxl", "diffusers"),
        ):
            both = load_text(path, head_dim=32, tokenizer=vocabulary).towers
            first, none = both[0](case["ids"])
            second, pooled = both[1](case["ids"])
            assert none is None
            outs += [(first, "te1_penultimate"), (second, "te2_penultimate")]
            outs += [(pooled, "te2_pooled")]
        last, _ = load_text(alone, head_dim=32, tokenizer=vocabulary).towers[0](case["ids"])
    for ours, name in [*outs, (last, "te1_last")]:
        error = (ours.double() - case[name].double()).norm() / case[name].double().norm()
        assert error < 1e-5, name
