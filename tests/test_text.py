"""Text encoders: every family reads a prompt as the original code does, from every layout."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.checkpoint.families import FAMILIES, TextRule
from headstart.errors import CheckpointError, InputError
from headstart.networks.load import load_text
from headstart.networks.text import ClipParams, ClipText, Tower
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.vocabulary import BOS, EOS

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

Tensors = dict[str, Tensor]
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


@pytest.fixture(scope="module")
def words() -> ClipTokenizer:
    return ClipTokenizer.from_vocabulary(VOCABULARY, MERGES)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers has it: vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return folder


def tower(params: ClipParams, rule: TextRule, seed: int = 0) -> Tower:
    """Random weights large enough that positions and tokens matter."""
    torch.manual_seed(seed)
    made = Tower(params, rule).requires_grad_(False).eval()
    for tensor in made.state_dict().values():
        tensor += 0.1 * torch.randn_like(tensor)
    return made


@pytest.fixture(scope="module")
def one() -> Tower:
    return tower(ONE, FAMILIES["sd15"].text[0])


@pytest.fixture(scope="module")
def pair() -> list[Tower]:
    """SDXL's two encoders, scaled down."""
    first, second = FAMILIES["sdxl"].text
    return [tower(ONE, first), tower(TWO, second, seed=1)]


def reference(made: Tower) -> Any:
    """The library's own model with the same weights, told nothing by our rules."""
    p = made.params
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
    state = dict(made.state_dict())
    state.setdefault("text_projection.weight", torch.zeros(config.projection_dim, p.width))
    model.load_state_dict(state)
    return model


def openclip(made: Tower, extra_layer: bool = False) -> Tensors:
    """The same weights in OpenCLIP's form: fused in_proj, transposed projection, logit scale."""
    state = dict(made.state_dict())
    found: Tensors = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
        "text_projection": state.get("text_projection.weight", torch.zeros(7, 40)).T,
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
    inner |= {"mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    layers = [*range(made.params.layers), *([0] if extra_layer else [])]
    for place, layer in enumerate(layers):
        ours, theirs = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{place}."
        for leaf in ("weight", "bias"):
            parts = [state[f"{ours}self_attn.{q}_proj.{leaf}"] for q in "qkv"]
            found[f"{theirs}attn.in_proj_{leaf}"] = torch.cat(parts)
            found |= {f"{theirs}{b}.{leaf}": state[f"{ours}{a}.{leaf}"] for a, b in inner.items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor.clone() for name, tensor in tensors.items()}


def ids_of(text: ClipText, prompts: list[str]) -> list[list[int]]:
    return text.ids(prompts)[0].tolist()


# --------------------------------------------------------------------- tokens


def test_ids_are_begin_text_end_and_padding(words: ClipTokenizer, pair: list[Tower]) -> None:
    text = ClipText(pair, words)
    first, second = (ids.tolist() for ids in text.ids(["The CAT, a  1", ""]))
    known = [VOCABULARY[t] for t in ("the</w>", "cat</w>", ",</w>", "a</w>", "1</w>")]
    assert first[0] == [BOS_ID, *known, EOS_ID] + [EOS_ID] * 9
    assert second[0] == [BOS_ID, *known, EOS_ID] + [0] * 9
    assert first[1] == [BOS_ID] + [EOS_ID] * 15
    assert second[1] == [BOS_ID, EOS_ID] + [0] * 14


@pytest.mark.parametrize(
    "prompt", ["the cat", "It's 2 CATS!!", "  spaces\n\tand\u00a0more ", "çé 猫", "a,b;c"]
)
def test_tokens_equal_the_librarys_clip_tokenizer(words: ClipTokenizer, prompt: str) -> None:
    theirs = transformers.CLIPTokenizer(vocab=dict(VOCABULARY), merges=list(MERGES))
    assert words.tokens(prompt) == theirs(prompt, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_loads_from_every_form(vocabulary: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(VOCABULARY, MERGES, end_of_word_suffix="</w>", unk_token=EOS)
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path / "tokenizer.json", tmp_path, vocabulary):
        loaded = ClipTokenizer.load(path)
        assert (loaded.bos, loaded.eos, len(loaded)) == (BOS_ID, EOS_ID, len(VOCABULARY))
        assert loaded.tokens("cat") == [VOCABULARY["cat</w>"]]


def test_a_broken_tokenizer_is_a_checkpoint_error(vocabulary: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a tokenizer\.json"):
        ClipTokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        ClipTokenizer.from_json('{"model": 3}')
    with pytest.raises(CheckpointError, match="CLIP's vocabulary"):
        ClipTokenizer.from_vocabulary({"a": 0, EOS: 1}, [])
    with pytest.raises(CheckpointError, match="do not fit"):
        ClipTokenizer.from_vocabulary(VOCABULARY, [("x", "nowhere")])
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(CheckpointError, match="token: integer"):
        ClipTokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(VOCABULARY))
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(CheckpointError, match="two tokens on each line"):
        ClipTokenizer.load(tmp_path)


def test_a_vocabulary_larger_than_the_encoders_is_refused(one: Tower) -> None:
    more = VOCABULARY | {f"w{i}</w>": len(VOCABULARY) + i for i in range(3)}
    with pytest.raises(CheckpointError, match="give the tokenizer that belongs"):
        ClipText([one], ClipTokenizer.from_vocabulary(more, MERGES))


def test_a_long_prompt_is_cut_with_one_warning_that_counts(
    words: ClipTokenizer, one: Tower
) -> None:
    text = ClipText([one], words)
    long = "cat " * 14
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode([long])
    with pytest.warns(UserWarning) as caught:
        cond = text.encode([long + "the cat", "cat", long + "a"], negative=long + "b b b")[0]
    assert len(caught) == 1
    assert "3 of 4 prompts exceed 14 tokens; dropped the last 6 tokens (3 of " in str(
        caught[0].message
    )
    assert torch.equal(cond.context[0], text.encode([long]).context[0])
    with pytest.raises(InputError, match="would drop the last 2 tokens"):
        text.encode([long + "the cat"], strict=True)


@pytest.mark.parametrize("prompts", [[], [3], [None], ["cat", b"cat"]])
def test_what_is_no_list_of_strings_is_an_input_error(
    words: ClipTokenizer, one: Tower, prompts: Any
) -> None:
    text = ClipText([one], words)
    with pytest.raises(InputError, match="prompts: expected"):
        text.encode(prompts)
    with pytest.raises(InputError, match="negative: expected"):
        text.encode(["cat"], negative=prompts)


# --------------------------------------------------------------------- what the families read


def test_sd1_reads_the_last_normed_state(words: ClipTokenizer, one: Tower) -> None:
    text = ClipText([one], words)
    cond = text.encode(["the cat", ""])
    want = reference(one)(torch.tensor(ids_of(text, ["the cat", ""]))).last_hidden_state
    torch.testing.assert_close(cond.context, want)
    assert cond.pooled is None and cond.time_ids is None
    assert torch.equal(text.encode("the cat").context, text.encode(["the cat"]).context)


def test_sdxl_reads_both_penultimate_states_and_the_projected_end(
    words: ClipTokenizer, pair: list[Tower]
) -> None:
    text = ClipText(pair, words, image_size=1024)
    cond = text.encode(["the cat", "a"])
    outs = [
        reference(made)(ids, output_hidden_states=True)
        for made, ids in zip(pair, text.ids(["the cat", "a"]), strict=True)
    ]
    want = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
    torch.testing.assert_close(cond.context, want)
    assert cond.pooled is not None and cond.time_ids is not None
    torch.testing.assert_close(cond.pooled, outs[1].text_embeds)
    assert cond.time_ids.tolist() == [[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * 2
    sized = text.encode(["a"], size=(512, 768)).time_ids
    assert sized is not None and sized.tolist() == [[512.0, 768.0, 0.0, 0.0, 512.0, 768.0]]
    with pytest.raises(InputError, match="positive pixels"):
        text.encode(["a"], size=0)


def test_one_negative_serves_all_prompts(words: ClipTokenizer, one: Tower) -> None:
    text = ClipText([one], words)
    cond, uncond = text.encode(["a", "the cat"], negative="cat")
    assert len(cond) == len(uncond) == 2
    torch.testing.assert_close(uncond.context[1:], text.encode(["cat"]).context)
    _, each = text.encode(["a", "b"], negative=["cat", ""])
    torch.testing.assert_close(each.context, text.encode(["cat", ""]).context)
    with pytest.raises(InputError, match="expected 1 or 3 negative prompts, got 2"):
        text.encode(["a", "b", "c"], negative=["a", "b"])


def test_an_empty_negative_is_zeros_for_sdxl_only(
    words: ClipTokenizer, one: Tower, pair: list[Tower]
) -> None:
    single, double = ClipText([one], words), ClipText(pair, words)
    _, uncond = single.encode(["a"], negative="")
    torch.testing.assert_close(uncond.context, single.encode([""]).context)
    _, uncond = double.encode(["a", "b"], negative=["", "cat"])
    assert uncond.pooled is not None and uncond.time_ids is not None
    assert not uncond.context[0].any() and not uncond.pooled[0].any()
    torch.testing.assert_close(uncond.context[1:], double.encode(["cat"]).context)
    assert uncond.time_ids.all(dim=1).tolist() == [False, False]  # crops stay zero, sizes stay
    assert uncond.time_ids[0, 0] == 1024
    assert double.encode([""]).context.any()
    plain = ClipText(pair, words, zero_empty_negative=False)
    torch.testing.assert_close(
        plain.encode(["a"], negative="")[1].context, plain.encode("").context
    )


# --------------------------------------------------------------------- from files


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
    tensors |= prefixed(openclip(pair[1]), "conditioner.embedders.1.model.")
    save_file(tensors | {position: torch.arange(16)[None]}, tmp_path / "model.safetensors")
    single = load_text(tmp_path / "model.safetensors", tokenizer=vocabulary, head_dim=8)
    root = tmp_path / "model"
    for folder, made in zip(("text_encoder", "text_encoder_2"), pair, strict=True):
        (root / folder).mkdir(parents=True)
        save_file(dict(made.state_dict()), root / folder / "model.safetensors")
        config = {"architectures": ["CLIPTextModel"], "num_attention_heads": made.params.heads}
        config["hidden_act"] = made.params.act
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
    with pytest.raises(CheckpointError, match="with 2 text encoders, found 1"):
        load_text(root / "text_encoder_2", tokenizer=vocabulary)


def test_sd21_never_runs_the_last_layer_of_an_openclip_file(
    tmp_path: Path, vocabulary: Path
) -> None:
    made = tower(
        ClipParams(width=40, layers=2, heads=5, mlp_width=56, act="gelu", **SIZE),
        FAMILIES["sd21"].text[0],
    )
    tensors = prefixed(openclip(made, extra_layer=True), "cond_stage_model.model.")
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"headstart.family": "sd21"})
    text = load_text(path, tokenizer=vocabulary, head_dim=8)
    ids = text.ids(["the cat"])[0]
    assert ids[0, -1] == 0  # padded with id 0
    want = reference(made)(ids).last_hidden_state
    torch.testing.assert_close(text.encode(["the cat"]).context, want)


def test_what_a_text_file_cannot_say_is_asked_for(
    tmp_path: Path, vocabulary: Path, one: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.networks.vocabulary.cached_folder", lambda: None)
    monkeypatch.setattr("headstart.networks.vocabulary.packaged_file", lambda: None)
    path = tmp_path / "x.safetensors"
    bare = {n.removeprefix("text_model."): t.clone() for n, t in one.state_dict().items()}
    save_file(bare, path)
    with pytest.raises(
        CheckpointError, match=r"no tokenizer: install .* the extra `clip` .* give --tokenizer"
    ):
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
