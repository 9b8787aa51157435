"""Learned tokens: which rows a prompt reads, what they do not disturb, and what is refused."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headstart.adapters.textual_inversion import (
    Embedding,
    read_embeddings,
    recorded_embeddings,
    with_embeddings,
    with_tokens,
)
from headstart.checkpoint.families import FAMILIES, TextRule
from headstart.errors import AdapterError, InputError
from headstart.networks.prompt_style import PROMPT_STYLES
from headstart.networks.text import ClipText
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.tower import ClipParams, Tower
from headstart.networks.vocabulary import BOS, EOS

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = ["!", *LETTERS, *(f"{c}</w>" for c in LETTERS), "<", ">", "</w>", "></w>", "1", "1</w>"]
VOCABULARY = {token: i for i, token in enumerate([*TOKENS, "<</w>", BOS, EOS])}
SIZE = {"positions": 20, "vocabulary": len(VOCABULARY)}
ONE = ClipParams(width=32, layers=2, heads=4, mlp_width=48, act="quick_gelu", **SIZE)
TWO = ClipParams(width=40, layers=2, heads=5, mlp_width=56, act="gelu", projection=24, **SIZE)


def tower(params: ClipParams, rule: TextRule) -> Tower:
    torch.manual_seed(0)
    network = Tower(params, rule).requires_grad_(False).eval()
    for tensor in network.state_dict().values():
        tensor += 0.1 * torch.randn_like(tensor)
    return network


@pytest.fixture(scope="module")
def words() -> ClipTokenizer:
    return ClipTokenizer.from_vocabulary(VOCABULARY, [])


@pytest.fixture(scope="module")
def single(words: ClipTokenizer) -> ClipText:
    return ClipText([tower(ONE, FAMILIES["sd15"].text[0])], words)


@pytest.fixture(scope="module")
def double(words: ClipTokenizer) -> ClipText:
    first, second = FAMILIES["sdxl"].text
    return ClipText([tower(ONE, first), tower(TWO, second)], words)


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def test_every_form_of_file_gives_its_tokens(tmp_path: Path) -> None:
    one, many = torch.randn(32), torch.randn(3, 32)
    cat, dog = read_embeddings(write(tmp_path / "a.safetensors", {"<cat>": one, "<dog>": many}))
    assert (cat.token, cat.count) == ("<cat>", 1) and (dog.token, dog.count) == ("<dog>", 3)
    assert torch.equal(cat.vectors["text"], one[None])
    (bad,) = read_embeddings(write(tmp_path / "bad-hands.safetensors", {"emb_params": many}))
    assert bad.token == "bad-hands" and torch.equal(bad.vectors["text"], many)
    both = {"clip_l": many, "clip_g": torch.randn(3, 40)}
    (pair,) = read_embeddings(write(tmp_path / "xl.safetensors", both), token="<xl>")
    assert pair.token == "<xl>" and pair.vectors.keys() == {"text", "text_2"}
    beside = {"unet:0:up": torch.ones(4, 2), "unet:0:down": torch.ones(2, 4), "<s1>": one}
    (learned,) = read_embeddings(write(tmp_path / "b.safetensors", beside))
    assert learned.token == "<s1>"


def test_a_token_reads_its_vectors_and_nothing_else_changes(single: ClipText) -> None:
    vectors = torch.randn(3, 32)
    grown = with_embeddings(single, [Embedding("<cat>", {"text": vectors})])
    (ids,) = grown.ids(["a <cat> b"])
    a, b = VOCABULARY["a</w>"], VOCABULARY["b</w>"]
    bos, eos = VOCABULARY[BOS], VOCABULARY[EOS]
    assert ids[0, :8].tolist() == [bos, a, -1, -2, -3, b, eos, eos]
    assert grown.towers[0] is single.towers[0], "one network, and what is attached to it"

    plain = ["a b", "cat", ""]
    assert torch.equal(grown.encode(plain).context, single.encode(plain).context)
    assert not torch.equal(grown.encode(["<cat>"]).context, single.encode(["<cat>"]).context)
    assert (single.ids(["<cat>"])[0] >= 0).all(), "the encoder it was made from is as it was"


def test_learned_vectors_encode_as_rows_of_a_longer_table(double: ClipText) -> None:
    """The oracle: the same network with the vectors at the end of its table, ids beyond it."""
    vectors = {"text": torch.randn(2, 32), "text_2": torch.randn(2, 40)}
    grown = with_embeddings(double, [Embedding("<cat>", vectors)])  # pyright: ignore[reportArgumentType]
    ours = grown.encode(["b <cat>, a", "a b"])
    contexts: list[Tensor] = []
    rows = len(VOCABULARY)
    for ids, tower, token in zip(
        grown.ids(["b <cat>, a", "a b"]), double.towers, vectors, strict=True
    ):
        assert isinstance(tower, Tower)
        longer = deepcopy(tower)
        table = longer.text_model.embeddings.token_embedding
        table.weight = nn.Parameter(torch.cat([table.weight, vectors[token]]), requires_grad=False)
        beyond = ids.where(ids >= 0, rows - 1 - ids)
        assert beyond.max() == rows + 1
        contexts.append(longer(beyond)[0])
        ends = (ids == VOCABULARY[EOS]).int().argmax(dim=-1)
        if tower.text_projection is not None and ours.pooled is not None:
            states = longer.text_model.final_layer_norm(longer(beyond, hidden=-1)[0])
            last = states[torch.arange(2), ends]
            assert torch.equal(ours.pooled, tower.text_projection(last))
    assert torch.equal(ours.context, torch.cat(contexts, dim=-1))


def test_calls_at_the_same_time_know_each_their_own_tokens(single: ClipText) -> None:
    texts = [
        with_embeddings(single, [Embedding("<x>", {"text": torch.randn(1 + n, 32)})])
        for n in range(4)
    ]
    alone = [text.encode(["a <x> b"]).context for text in texts]
    with ThreadPoolExecutor(4) as pool:
        again = [*pool.map(lambda n: texts[n % 4].encode(["a <x> b"]).context, range(80))]
    assert all(torch.equal(context, alone[n % 4]) for n, context in enumerate(again))
    assert len({tuple(context.flatten().tolist()) for context in alone}) == 4


def test_vectors_that_are_those_of_a_word_mean_that_word(
    single: ClipText, double: ClipText
) -> None:
    """Also for the pooled text, which is read at the end token and not at the highest id."""
    for text in (single, double):
        names = ("text", "text_2")
        vectors = {
            name: tower.text_model.embeddings.token_embedding.weight[VOCABULARY["q</w>"]][None]
            for name, tower in zip(names, text.towers, strict=False)
        }
        grown = with_embeddings(text, [Embedding("<same>", vectors)])  # pyright: ignore
        ours, theirs = grown.encode(["a <same> b"]), text.encode(["a q b"])
        assert torch.equal(ours.context, theirs.context)
        if theirs.pooled is not None:
            assert ours.pooled is not None and torch.equal(ours.pooled, theirs.pooled)


def test_tokens_add_up_and_words_match_whole(single: ClipText) -> None:
    first = with_embeddings(single, [Embedding("<one>", {"text": torch.randn(1, 32)})])
    second = with_embeddings(first, [Embedding("hands", {"text": torch.randn(2, 32).half()})])
    (ids,) = second.ids(["<one> hands shands"])
    assert [id for id in ids[0].tolist() if id < 0] == [-1, -2, -3]
    assert [(rows.dtype, len(rows)) for rows in second.token_vectors] == [(torch.float32, 3)]
    assert torch.equal(second.encode(["<one>"]).context, first.encode(["<one>"]).context)


def test_two_files_of_one_token_are_a_pair_as_diffusers_saves_them(tmp_path: Path) -> None:
    size = {"layers": 1, "heads": 4, "mlp_width": 8, "act": "gelu", **SIZE}
    rules = FAMILIES["sdxl"].text
    towers = [
        tower(ClipParams(width=768, **size), rules[0]),
        tower(ClipParams(width=1280, projection=8, **size), rules[1]),
    ]
    xl = ClipText(towers, ClipTokenizer.from_vocabulary(VOCABULARY, []))
    first, second = torch.randn(2, 768), torch.randn(2, 1280)
    one = write(tmp_path / "learned_embeds.safetensors", {"<c>": first})
    two = write(tmp_path / "learned_embeds_2.safetensors", {"<c>": second})
    pair = write(tmp_path / "pair.safetensors", {"clip_g": second, "clip_l": first})
    expected = with_tokens(xl, [(pair, "<c>")])[0].encode(["a <c>"])
    for order in ([one, two], [two, one]):
        text, files = with_tokens(xl, order)
        assert torch.equal(text.encode(["a <c>"]).context, expected.context)
        weights = {role: {"file": file} for role, (file, _) in files.items()}
        assert recorded_embeddings(weights) == [(str(path), "<c>") for path in order]
    with pytest.raises(AdapterError, match="got those of the second alone"):
        with_tokens(xl, [two])
    rows = write(
        tmp_path / "rows.safetensors", {"text_encoders_1": second, "text_encoders_0": first}
    )
    each, whole = (with_tokens(xl, [entry])[0] for entry in (rows, (rows, "TOK")))
    assert torch.equal(each.encode(["a <s0><s1>"]).context, expected.context)
    assert torch.equal(whole.encode(["a TOK"]).context, expected.context)
    assert not torch.equal(each.encode(["a <s1><s0>"]).context, expected.context)
    sd15 = write(tmp_path / "sd15.safetensors", {"emb_params": torch.randn(2, 768)})
    with pytest.raises(AdapterError, match="got those of the first alone"):
        with_tokens(xl, [sd15])
    sd21 = write(tmp_path / "sd21.safetensors", {"clip_h": torch.randn(2, 1024)})
    message = r"for sdxl \(768 \+ 1280 numbers\), got them for sd21 \(1024 numbers\)"
    with pytest.raises(AdapterError, match=message):
        with_tokens(xl, [sd21])


def test_a_token_takes_a_weight_and_is_not_cut_by_the_end_of_a_piece(single: ClipText) -> None:
    grown = with_embeddings(single, [Embedding("<cat>", {"text": torch.randn(9, 32)})])
    z, empty = grown.encode(["a <cat>"]).context[0], grown.encode([""]).context[0]
    weighed = grown.encode(["a (<cat>:1.5)"], style="comfyui").context[0]
    torch.testing.assert_close(weighed[2:11], empty[2:11] + 1.5 * (z - empty)[2:11])
    assert torch.equal(weighed[:2], z[:2]) and torch.equal(weighed[11:], z[11:])
    for style in PROMPT_STYLES:
        cond = grown.encode(["b " * 15 + "<cat>"], style=style).context[0]
        torch.testing.assert_close(cond[20:], grown.encode(["<cat>"]).context[0])


def test_a_token_of_more_vectors_than_a_piece_has_room_for_is_refused(single: ClipText) -> None:
    grown = with_embeddings(single, [Embedding("<many>", {"text": torch.randn(30, 32)})])
    with pytest.raises(InputError, match="30 vectors does not fit into a piece of 18 tokens"):
        grown.ids(["<many>"])


def test_what_does_not_belong_is_refused(
    single: ClipText, double: ClipText, tmp_path: Path
) -> None:
    def refused(tensors: dict[str, Tensor]) -> str:
        with pytest.raises(AdapterError) as caught:
            read_embeddings(write(tmp_path / "a.safetensors", tensors))
        return str(caught.value)

    assert "finite numbers" in refused({"<a>": torch.full((32,), math.nan)})
    assert "got F32 [2, 3, 4]" in refused({"<a>": torch.zeros(2, 3, 4)})
    assert "got I64 [3]" in refused({"<a>": torch.zeros(3, dtype=torch.int64)})
    assert "n at most 75, got F32 [76, 4]" in refused({"emb_params": torch.zeros(76, 4)})
    assert "as many vectors" in refused({"clip_l": torch.ones(2, 4), "clip_g": torch.ones(3, 4)})
    assert "nothing besides" in refused({"emb_params": torch.ones(2, 4), "<a>": torch.ones(4)})
    assert "got no learned token" in refused({"unet:0:up": torch.ones(4, 2)})
    assert "a checkpoint (unet)" in refused({"conv_in.weight": torch.ones(4, 4, 3, 3)})
    torch.save({"<a>": torch.ones(4)}, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="headstart convert"):
        read_embeddings(tmp_path / "a.pt")
    two = write(tmp_path / "two.safetensors", {"<a>": torch.ones(4), "<b>": torch.ones(4)})
    with pytest.raises(AdapterError, match="holds 2 tokens"):
        read_embeddings(two, token="<c>")

    narrow, fitting = torch.ones(1, 31), torch.ones(1, 32)
    with pytest.raises(AdapterError, match="learned for another family"):
        with_embeddings(single, [Embedding("<a>", {"text": narrow})])
    with pytest.raises(AdapterError, match=r"\(32 \+ 40 numbers\), got those of the first alone"):
        with_embeddings(double, [Embedding("<a>", {"text": fitting})])
    with pytest.raises(AdapterError, match="given twice"):
        with_embeddings(single, [Embedding("<a>", {"text": fitting})] * 2)
    with pytest.raises(InputError, match="means something already: give another, as <q>"):
        with_embeddings(single, [Embedding("q", {"text": fitting})])
    once = with_embeddings(single, [Embedding("<a>", {"text": fitting})])
    with pytest.raises(InputError, match="means something already"):
        with_embeddings(once, [Embedding("<a>", {"text": fitting})])
