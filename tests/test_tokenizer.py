"""The tokenizer: CLIP's tokens from every form a vocabulary comes in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from encoders import (
    BOS_ID,
    EOS_ID,
    MERGES,
    VOCABULARY,
    sd1_tower,
    small_words,
    transformers,
    write_vocabulary,
)

from headstart.errors import CheckpointError, InputError
from headstart.networks.text import ClipText
from headstart.networks.tokenizer import ClipTokenizer, Word
from headstart.networks.tower import Tower
from headstart.networks.vocabulary import BOS, EOS, clip_vocabulary

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def words() -> ClipTokenizer:
    return small_words()


@pytest.fixture(scope="module")
def one() -> Tower:
    return sd1_tower()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    "prompt", ["the cat", "It's 2 CATS!!", "  spaces\n\tand\u00a0more ", "çé 猫", "a,b;c"]
)
def test_tokens_equal_the_librarys_clip_tokenizer(words: ClipTokenizer, prompt: str) -> None:
    theirs = transformers.CLIPTokenizer(vocab=dict(VOCABULARY), merges=list(MERGES))
    assert words.tokens(prompt) == theirs(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_exclamations_are_open_clips_or_transformers_of_an_encoder_padded_with_them(
    pad: str,
) -> None:
    """open_clip's own ids are in the parity tests, where the webui reads with its tokenizer."""
    whole = clip_vocabulary()
    merges = whole.merges[:4000]
    kept = [*list(whole.ids)[: 512 + len(merges)], BOS, EOS]
    ids = {token: id for id, token in enumerate(kept)}
    theirs = transformers.CLIPTokenizer(vocab=ids, merges=merges, pad_token=pad)
    ours = ClipTokenizer.from_vocabulary(ids, merges)
    assert ours.tokens("a!!! !") == ours.tokens("a!!! !", zero_pad=True) == [320, 995, 256]
    ours.exclamation = "transformers"
    ours = ours.with_tokens({"<x!>": (50000, 50001)})
    for text in ("!", "a!", "a !b", "!!", "wow!!! nice", "?!", "fox,!", "it's!", "no sign"):
        want = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.tokens(text, zero_pad=pad == "!") == want, text
    assert ours.words("a<x!>!", zero_pad=True) == [
        Word((320,)), Word((50000, 50001), True), Word((0,))
    ]  # fmt: skip


def test_words_are_kept_together(words: ClipTokenizer) -> None:
    ids = [VOCABULARY[t] for t in ("the</w>", "ca", "t", "s</w>", ",</w>", "1</w>", "1</w>")]
    grown = words.with_tokens({"<x>": (80, 81)})
    ordinary = [Word((ids[0],)), Word(tuple(ids[1:4])), *(Word((id,)) for id in ids[4:])]
    assert grown.words("the cats, 11<x>") == [*ordinary, Word((80, 81), True)]
    assert grown.tokens("the cats, 11<x>") == [*ids, 80, 81] and words.comma == VOCABULARY[",</w>"]


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


@pytest.mark.parametrize(
    ("token", "prompt", "before", "after"),
    [
        ("<a>", "the cat, <a>.", "the cat, ", "."),
        ("<a>", "the<a>cat", "the", "cat"),
        ("<a>", "(<a>)", "(", ")"),
        ("a cat", "the, a cat, the", "the, ", ", the"),
        ("a cat", "the, a \n cat", "the, ", ""),
        ("bad-hands", "the bad-hands; cat", "the ", "; cat"),
        ("v1.5 look", "v1.5 look: the cat", "", ": the cat"),
        ("é", "the é", "the ", ""),
        ("x" * 900, "the " + "x" * 900 + ", cat", "the ", ", cat"),
        ("[^a](.*)", "the [^a](.*) cat", "the ", " cat"),
        ("ca", "the ca cat", "the ", " cat"),
    ],
)
def test_a_learned_token_is_read_between_the_words_around_it(
    words: ClipTokenizer, token: str, prompt: str, before: str, after: str
) -> None:
    """Multi-vector, with spaces, signs or none; "ca" is how a piece of "cat" is spelled, too."""
    grown = words.with_tokens({token: (-1, -2, -3)})
    assert grown.tokens(prompt) == [*words.tokens(before), -1, -2, -3, *words.tokens(after)]
    assert [word.ids for word in grown.words(prompt) if word.is_embedding] == [(-1, -2, -3)]
    assert words.tokens("the cat ca") == grown.tokens("the cat") + words.tokens("ca")


@pytest.mark.parametrize("prompt", ["bad-handsome", "abad-hands", "1bad-hands"])
def test_a_learned_token_is_matched_whole(words: ClipTokenizer, prompt: str) -> None:
    grown = words.with_tokens({"bad-hands": (-1,), "<a>": (-2,)})
    assert grown.tokens(prompt) == words.tokens(prompt)


def test_of_two_learned_tokens_the_longer_is_read(words: ClipTokenizer) -> None:
    grown = words.with_tokens({"<a>": (-1,)}).with_tokens({"<a> cat": (-2,), "<ab>": (-3,)})
    assert grown.tokens("<a> <a> cat <a><ab>") == [-1, -2, -1, -3]


@pytest.mark.parametrize("token", ["cat", "CAT", "the", "c", "", " ", BOS, "<a>", " <a>", "a  cat"])
def test_what_means_something_already_is_not_learned_anew(words: ClipTokenizer, token: str) -> None:
    grown = words.with_tokens({"<a>": (-1,), "a cat": (-2, -3)})
    with pytest.raises(InputError, match="means something already"):
        grown.with_tokens({token: (-4,)})


def test_a_learned_token_is_read_in_any_case(words: ClipTokenizer) -> None:
    grown = words.with_tokens({"Bad-Hands": (-1,), "<A>": (-2,), "ſx-K": (-3,)})
    for prompt in ("bad-hands", "BAD-HANDS", "Bad-Hands"):
        assert grown.tokens(prompt) == [-1]
    assert grown.tokens("<a> Sx-k") == [-2, -3]  # ſ and s are one letter in two cases
    with pytest.raises(InputError, match="'<a>' means something already"):
        grown.with_tokens({"<a>": (-4,)})
    with pytest.raises(InputError, match="'<B>' means something already"):
        grown.with_tokens({"<B>": (-4,), "<b>": (-5,)})
