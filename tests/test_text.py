"""Text encoders: every family reads a prompt as its original code does."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from encoders import BOS_ID, EOS_ID, VOCABULARY, reference, sd1_tower, sdxl_towers, small_words

from headstart.errors import InputError
from headstart.networks import emphasis
from headstart.networks.prompt_style import PROMPT_STYLES, PromptStyle
from headstart.networks.text import ClipText
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.tower import Tower


@pytest.fixture(scope="module")
def words() -> ClipTokenizer:
    return small_words()


@pytest.fixture(scope="module")
def one() -> Tower:
    return sd1_tower()


@pytest.fixture(scope="module")
def pair() -> list[Tower]:
    return sdxl_towers()


def ids_of(text: ClipText, prompts: list[str]) -> list[list[int]]:
    return text.ids(prompts)[0].tolist()


def test_ids_are_begin_text_end_and_padding(words: ClipTokenizer, pair: list[Tower]) -> None:
    text = ClipText(pair, words)
    first, second = (ids.tolist() for ids in text.ids(["The CAT, a  1", ""]))
    known = [VOCABULARY[t] for t in ("the</w>", "cat</w>", ",</w>", "a</w>", "1</w>")]
    assert first[0] == [BOS_ID, *known, EOS_ID] + [EOS_ID] * 9
    assert second[0] == [BOS_ID, *known, EOS_ID] + [0] * 9
    assert first[1] == [BOS_ID] + [EOS_ID] * 15
    assert second[1] == [BOS_ID, EOS_ID] + [0] * 14


def test_a_prompt_of_any_length_is_read_in_pieces(words: ClipTokenizer, one: Tower) -> None:
    text = ClipText([one], words)
    long = "cat " * 14
    cond = text.encode([long + "the cat", "cat"])
    assert cond.context.shape == (2, 32, 32)
    first, second = cond.context[0].split(16)
    torch.testing.assert_close(first, text.encode([long]).context[0])
    torch.testing.assert_close(second, text.encode(["the cat"]).context[0])
    torch.testing.assert_close(cond.context[1], text.encode(["cat"]).context[0].repeat(2, 1))
    assert text.encode([long], strict=True).context.shape[1] == 16
    with pytest.raises(InputError, match="1 of 2 prompts need more than one piece of 14 tokens"):
        text.encode(["a", long + "a"], strict=True)


@pytest.mark.parametrize("prompts", [[], [3], [None], ["cat", b"cat"]])
def test_what_is_no_list_of_strings_is_an_input_error(
    words: ClipTokenizer, one: Tower, prompts: Any
) -> None:
    text = ClipText([one], words)
    with pytest.raises(InputError, match="prompts: expected"):
        text.encode(prompts)
    with pytest.raises(InputError, match="negative: expected"):
        text.encode(["cat"], negative=[each or 3 for each in prompts])


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
        reference(part)(ids, output_hidden_states=True)
        for part, ids in zip(pair, text.ids(["the cat", "a"]), strict=True)
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
    cut = text.encode(["a"], size=512, original=(1536, 2048), crop=(8, 16)).time_ids
    assert cut is not None and cut.tolist() == [[1536.0, 2048.0, 8.0, 16.0, 512.0, 512.0]]
    with pytest.raises(InputError, match="crop must be pixels"):
        text.encode(["a"], crop=(-1, 0))


def test_one_negative_serves_all_prompts(words: ClipTokenizer, one: Tower) -> None:
    text = ClipText([one], words)
    cond, uncond = text.encode(["a", "the cat"], negative="cat")
    assert len(cond) == len(uncond) == 2
    torch.testing.assert_close(uncond.context[1:], text.encode(["cat"]).context)
    _, each = text.encode(["a", "b"], negative=["cat", ""])
    torch.testing.assert_close(each.context, text.encode(["cat", ""]).context)
    with pytest.raises(InputError, match="expected 1 or 3 negative prompts, got 2"):
        text.encode(["a", "b", "c"], negative=["a", "b"])


def test_no_negative_is_zeros_for_sdxl_only_and_an_empty_one_is_encoded(
    words: ClipTokenizer, one: Tower, pair: list[Tower]
) -> None:
    single, double = ClipText([one], words), ClipText(pair, words)
    for negative in ("", [None]):
        _, uncond = single.encode(["a"], negative=negative)
        torch.testing.assert_close(uncond.context, single.encode([""]).context)
    _, uncond = double.encode(["a", "b", "a"], negative=[None, "cat", ""])
    assert uncond.pooled is not None and uncond.time_ids is not None
    assert not uncond.context[0].any() and not uncond.pooled[0].any()
    torch.testing.assert_close(uncond.context[1:], double.encode(["cat", ""]).context)
    assert uncond.time_ids.all(dim=1).tolist() == [False] * 3  # crops stay zero, sizes stay
    assert uncond.time_ids[0, 0] == 1024
    assert uncond.context[2].any() and uncond.pooled[2].any()
    plain = ClipText(pair, words, zero_empty_negative=False)
    torch.testing.assert_close(
        plain.encode(["a"], negative=[None])[1].context, plain.encode("").context
    )


def test_a_negative_each_and_a_second_text_each(words: ClipTokenizer, pair: list[Tower]) -> None:
    text = ClipText(pair, words)
    cond, uncond = text.encode(
        ["a", "b"], ["cat", None], second=["the", "the cat"], negative_second=["b", None]
    )
    for part, first, second in ((cond, "a", "the"), (uncond, "cat", "b")):
        left, right = text.encode([first, second]), part
        assert left.pooled is not None and right.pooled is not None
        torch.testing.assert_close(right.context[0, :, :32], left.context[0, :, :32])
        torch.testing.assert_close(right.context[0, :, 32:], left.context[1, :, 32:])
        torch.testing.assert_close(right.pooled[0], left.pooled[1])
    assert not uncond.context[1].any()
    _, one = text.encode(["a", "b"], "cat", negative_second=["a", "cat"])
    torch.testing.assert_close(one.context[1], text.encode(["cat"]).context[0])
    _, empty = text.encode(["a"], "", negative_second="")
    torch.testing.assert_close(empty.context, text.encode([""]).context)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"second": ["a", "b", "c"]}, "expected 1 or 2 second prompts, got 3"),
        ({"second": 3}, "second: expected strings, got int"),
        ({"negative_second": "a"}, "give negative= too"),
        ({"negative": [None, "a"], "negative_second": ["a", "a"]}, "give negative= too"),
        ({"negative": "a", "negative_second": ["a"] * 3}, "expected 1 or 2 negative_second"),
        ({"style": "sdnext"}, "'sdnext': expected plain, a1111, comfyui"),
        ({"clip_skip": 0}, "from 1, the last layer, to 3, got 0"),
        ({"clip_skip": 4}, "to 3, got 4"),
        ({"clip_skip": True}, "got True"),
    ],
)
def test_what_cannot_be_read_is_refused(
    words: ClipTokenizer, pair: list[Tower], inputs: Any, match: str
) -> None:
    with pytest.raises(InputError, match=match):
        ClipText(pair, words).encode(["a", "b"], **inputs)


def test_one_encoder_reads_no_second_prompt(words: ClipTokenizer, one: Tower) -> None:
    for options in ({"second": ["b"]}, {"negative": "", "negative_second": "b"}):
        with pytest.raises(InputError, match="this family has one encoder"):
            ClipText([one], words).encode(["a"], **options)  # type: ignore[arg-type]


def test_clip_skip_counts_from_the_last_layer(
    words: ClipTokenizer, one: Tower, pair: list[Tower]
) -> None:
    single, double = ClipText([one], words), ClipText(pair, words)
    ids = single.ids(["the cat"])[0]
    model = reference(one)
    states = model(ids, output_hidden_states=True).hidden_states
    norm = getattr(model, "text_model", model).final_layer_norm
    for skip in (1, 2, 3):
        want = norm(states[-skip])
        torch.testing.assert_close(single.encode(["the cat"], clip_skip=skip).context, want)
    skipped = double.encode(["the cat"], "a", clip_skip=2)[1]
    assert torch.equal(skipped.context, double.encode(["the cat"], "a")[1].context)
    assert torch.equal(single.encode(["a"], clip_skip=1).context, single.encode(["a"]).context), (
        "the last layer is SD 1's own"
    )


def test_rows_of_other_lengths_are_repeated_until_all_meet(
    words: ClipTokenizer, pair: list[Tower]
) -> None:
    text = ClipText(pair, words)
    two, three = "cat " * 15, "cat " * 30
    cond, uncond = text.encode([two, "cat"], negative=three)
    assert cond.context.shape == uncond.context.shape == (2, 6 * 16, 72)
    torch.testing.assert_close(cond.context[0], text.encode([two]).context[0].repeat(3, 1))
    torch.testing.assert_close(uncond.context[0], text.encode([three]).context[0].repeat(2, 1))
    assert cond.pooled is not None
    first = text.encode(["cat " * 14]).pooled
    torch.testing.assert_close(cond.pooled[:1], first), "pooled is of the first piece"
    assert text.check([two, "cat"], three) == 6 * 16
    many = ["cat " * (14 * n) for n in (5, 7, 8, 9)]
    for read in (text.encode, text.check):
        with pytest.raises(InputError, match=r"are 5, 7, 8, 9 pieces of 14.* takes 2520 pieces"):
            read(many)
    with pytest.raises(InputError, match="more than 64 pieces of 14 tokens"):
        text.encode(["cat " * 1000])
    with pytest.raises(InputError, match="200000 characters: expected at most 100000"):
        text.encode(["a " * 100_000])


def test_a_repeated_text_is_attended_to_as_once(words: ClipTokenizer, one: Tower) -> None:
    """Which is why it may be: softmax over twice the keys is half of each, summed twice."""
    keys = ClipText([one], words).encode(["the cat"]).context.double()
    query = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attend = torch.nn.functional.scaled_dot_product_attention
    once = attend(query[None], keys, keys)
    twice = keys.repeat(1, 2, 1)
    torch.testing.assert_close(attend(query[None], twice, twice), once)


def test_a_text_without_signs_is_one_to_all_styles(words: ClipTokenizer, one: Tower) -> None:
    text = ClipText([one], words)
    styles = [text.encode(["the cat, a 1", ""], style=style) for style in PROMPT_STYLES]
    assert all(torch.equal(cond.context, styles[0].context) for cond in styles)


@pytest.mark.parametrize(
    ("style", "prompt", "sign"),
    [
        ("plain", "a (cat:1.3)", "(cat:1.3)"),
        ("plain", "a ((cat))", "((cat))"),
        ("plain", "cat BREAK the", "BREAK"),
        ("plain", r"cat \(a\)", r"\("),
        ("comfyui", "cat BREAK the", "BREAK"),
        ("a1111", "a [cat:the:0.5]", "[cat:the:0.5]"),
        ("a1111", "[cat|the]", "cat|the"),
        ("a1111", "cat AND the", "AND"),
    ],
)
def test_a_sign_that_is_read_as_letters_is_one_warning_a_call(
    words: ClipTokenizer, one: Tower, style: PromptStyle, prompt: str, sign: str
) -> None:
    text = ClipText([one], words)
    with pytest.warns(UserWarning, match=f"{style} reads .* as letters") as caught:
        text.encode([prompt, "a", prompt], negative=prompt + "s", style=style)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert repr(sign)[1:-1] in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode(["a (cat), [the] :) 1:1 <a:1>", "BREAK", "a: 1.3)"], style=style)


def test_weights_that_cancel_a_text_are_refused_where_its_mean_has_to_come_back() -> None:
    z = torch.ones(2, 4, 3)
    weights = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    with pytest.raises(InputError, match="cancel its text"):
        emphasis.scaled(z, weights)
    assert torch.equal(emphasis.from_empty(z, weights, z), z)


def test_weights_are_of_their_tokens_and_begin_and_end_have_none(
    words: ClipTokenizer, pair: list[Tower]
) -> None:
    """Against both formulas in float64, written out."""
    text = ClipText([tower.double() for tower in map(deepcopy, pair)], words)
    z, empty = text.encode(["the cat a"]).context[0], text.encode([""]).context[0]
    w = torch.ones(16, 1, dtype=torch.float64)
    w[2] = 1.5
    comfyui = text.encode(["the (cat:1.5) a"], style="comfyui").context[0]
    torch.testing.assert_close(comfyui, empty + w * (z - empty))
    a1111 = text.encode(["the (cat:1.5) a"], style="a1111").context[0]
    for part in (slice(0, 32), slice(32, 72)):  # a mean for each encoder
        part_ = z[:, part]
        torch.testing.assert_close(a1111[:, part], part_ * w * part_.mean() / (part_ * w).mean())
