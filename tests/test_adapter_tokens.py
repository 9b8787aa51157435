"""Tokens that lie in an adapter's file: known while it is attached, and to whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import detach_all, layers_of, random_lora, write
from bundled import needs_pair
from encoders import sdxl_towers, small_words
from torch import Tensor

import headstart as hs
from headstart.adapters.info import describe_adapter
from headstart.adapters.textual_inversion import Embedding, read_embeddings, with_embeddings
from headstart.cli import main
from headstart.errors import AdapterError
from headstart.networks.text import ClipText
from headstart.networks.tower import Tower

pytestmark = needs_pair
Make = Callable[..., Path]
PART = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def engine(engine: hs.Engine) -> Iterator[hs.Engine]:
    yield engine
    detach_all(engine)


@pytest.fixture
def make(tmp_path: Path, engine: hs.Engine) -> Make:
    """A LoRA of one block with these tensors beside its layers."""

    def lora(name: str, beside: dict[str, Tensor], **metadata: str) -> Path:
        network: Any = engine.denoisers["base"]
        return write(
            tmp_path / f"{name}.safetensors", random_lora(network, PART) | beside, metadata
        )

    return lora


def vectors(engine: hs.Engine, word: str) -> Tensor:
    """What the bundled encoder reads where a prompt says so."""
    (tower,) = engine.text.towers
    assert isinstance(tower, Tower)
    table: Tensor = tower.text_model.embeddings.token_embedding.weight
    return table[engine.text.tokenizer.tokens(word)].clone()


def encoded(engine: hs.Engine, prompt: str) -> Tensor:
    return engine.text.encode([prompt]).context


def latents(engine: hs.Engine, prompt: str) -> Tensor:
    return engine.sample(prompt, plan="distilled", seeds=1, size=32).latents


@pytest.mark.parametrize(
    ("key", "token"),
    [
        ("bundle_emb.some token.clip_l", "some token"),
        ("bundle_emb.some token.string_to_param.*", "some token"),
        ("bundle_emb.v1.5.emb_params", "v1.5"),
        ("<s1>", "<s1>"),
        ("marked", "marked"),
        ("emb_params", "file"),
    ],
)
def test_prompts_know_the_token_of_an_attached_lora_and_forget_it_with_it(
    key: str, token: str, engine: hs.Engine, make: Make
) -> None:
    fox, before = encoded(engine, "a fox."), encoded(engine, f"a {token}.")
    path = make("file", {key: vectors(engine, "fox")}, marked="<embed>")
    report = engine.attach(path, 0.5)
    assert report.tokens == (token,) and f"prompts know {token}" in str(report)
    assert not report.models["base"].unmatched
    assert torch.equal(encoded(engine, f"a {token}."), fox)
    assert describe_adapter(path).tokens == (token,) and not describe_adapter(path).strays
    engine.detach("file")
    assert torch.equal(encoded(engine, f"a {token}."), before)


def test_a_run_keeps_the_tokens_that_it_began_with(engine: hs.Engine, make: Make) -> None:
    path = make("file", {"<s1>": vectors(engine, "fox")})
    letters = latents(engine, "a <s1>")
    early = engine.iterate("a <s1>", plan="distilled", seeds=1, size=32)
    engine.attach(path)
    fox = latents(engine, "a fox")
    assert torch.equal(latents(engine, "a <s1>"), fox)
    begun = engine.iterate("a <s1>", plan="distilled", seeds=1, size=32)
    engine.detach("file")
    assert torch.equal([*begun][-1].x, fox) and torch.equal([*early][-1].x, letters)
    assert not torch.equal(fox, letters)


def test_what_changes_the_text_acts_on_a_prompt_with_its_token(
    engine: hs.Engine, make: Make
) -> None:
    """The trained pair: the encoder's layers and the token in one file."""
    beside = {"<s1>": vectors(engine, "fox")}
    for path, layer in layers_of(engine.text.towers[0], "self_attn").items():
        name = "lora_te_" + path.replace(".", "_")
        beside[f"{name}.lora_down.weight"] = 0.2 * torch.ones(2, layer.weight.shape[1])
        beside[f"{name}.lora_up.weight"] = 0.2 * torch.ones(len(layer.weight), 2)
        beside[f"{name}.alpha"] = torch.tensor(2.0)
    plain = encoded(engine, "a fox")
    engine.attach(make("words", beside))
    with engine.adapters.now().active(torch.ones(1, 1)):
        fox, token = encoded(engine, "a fox"), encoded(engine, "a <s1>")
    assert torch.equal(token, fox) and not torch.allclose(fox, plain, atol=1e-3)


def test_a_token_that_is_taken_is_refused_and_says_what_to_do(
    engine: hs.Engine, make: Make
) -> None:
    one = make("one", {"<s1>": vectors(engine, "fox")})
    two = make("two", {"<s1>": vectors(engine, "cat"), "<s2>": vectors(engine, "cat")})
    word = make("word", {"bundle_emb.fox.clip_l": vectors(engine, "cat")})
    engine.attach(one)
    fox, cat = encoded(engine, "a fox"), encoded(engine, "a cat")
    with pytest.raises(AdapterError, match=r"known from adapter 'one'.*--allow '<s1>'"):
        engine.attach(two)
    assert [adapter.name for adapter in engine.adapters] == ["one"]
    assert torch.equal(encoded(engine, "a <s1>"), fox)
    report = engine.attach(two, allow=["<s1>"])
    assert report.tokens == ("<s2>",) and report.models["base"].unmatched == ("<s1>",)
    assert torch.equal(encoded(engine, "a <s1>"), fox)
    assert torch.equal(encoded(engine, "a <s2>"), cat)
    with pytest.raises(AdapterError, match=r"means something already.*--embedding FILE:<fox>"):
        engine.attach(word)
    assert engine.attach(word, allow=["bundle_emb.*"]).tokens == ()
    assert torch.equal(encoded(engine, "a fox"), fox)
    engine.detach("two")
    engine.attach(two, name="one", replace=True)
    assert torch.equal(encoded(engine, "a <s1>"), cat)


def test_tokens_of_another_family_are_refused_by_its_name(engine: hs.Engine, make: Make) -> None:
    pair = {"bundle_emb.x.clip_g": torch.ones(1, 1280), "bundle_emb.x.clip_l": torch.ones(1, 768)}
    message = r"for demo \(128 numbers\), got them for sdxl \(768 \+ 1280 numbers\)"
    with pytest.raises(AdapterError, match=message) as caught:
        engine.attach(make("xl", pair))
    assert "--allow 'bundle_emb.x.clip_l'" in str(caught.value).replace("clip_g", "clip_l")
    assert engine.attach(make("xl", pair), allow=["bundle_emb.x.*"]).tokens == ()
    flux = make("flux", {"bundle_emb.x.t5": torch.ones(1, 4096)})
    assert describe_adapter(flux).strays == ("bundle_emb.x.t5",)
    with pytest.raises(AdapterError, match=r"has vectors for t5: an encoder of SD 3, Flux"):
        engine.attach(flux)
    engine.attach(flux, allow=["bundle_emb.*"])
    bad = make("bad", {"<s1>": torch.full((128,), torch.nan)})
    with pytest.raises(AdapterError, match="expected finite numbers"):
        engine.attach(bad)
    alone = hs.AdapterSet({"base": engine.denoisers["base"]})
    with pytest.raises(AdapterError, match="no text encoder is here to learn it"):
        alone.attach(make("one", {"<s1>": vectors(engine, "fox")}))
    with pytest.raises(AdapterError, match="changes the UNet alone"):
        engine.adapters.attach_distilled(make("fast", {"<s1>": vectors(engine, "fox")}))
    assert sorted(adapter.name for adapter in engine.adapters) == ["flux", "xl"]


def test_the_pair_of_a_bundle_reaches_each_of_sdxls_encoders(engine: hs.Engine, make: Make) -> None:
    """And no --allow is needed; a token of two vectors, its keys in the other order."""
    words = {"text": torch.randn(2, 32), "text_2": torch.randn(2, 40)}
    text = ClipText(sdxl_towers(), small_words())
    adapters = hs.AdapterSet({"base": engine.denoisers["base"]}, text)
    keys = ("bundle_emb.some token.clip_g", "bundle_emb.some token.clip_l")
    adapters.attach(make("xl", dict(zip(keys, [*words.values()][::-1], strict=True))))
    expected = with_embeddings(text, [Embedding("<x>", words)]).encode(["the <x>"])  # pyright: ignore
    attached = adapters.look().text_encoder
    assert attached is not None
    got = attached.encode(["the some token"])
    assert torch.equal(got.context, expected.context)
    assert got.pooled is not None and torch.equal(got.pooled, expected.pooled)  # pyright: ignore
    adapters.detach("xl")
    assert adapters.look().text_encoder is text


def test_the_same_file_teaches_its_tokens_by_another_name(engine: hs.Engine, make: Make) -> None:
    word = make("word", {"bundle_emb.fox.clip_l": vectors(engine, "cat")})
    (embedding,) = read_embeddings(word, "<my fox>")
    assert embedding.token == "<my fox>"
    assert torch.equal(embedding.vectors["text"], vectors(engine, "cat"))


def test_a_record_of_such_a_prompt_replays(
    engine: hs.Engine, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make("file", {"bundle_emb.some token.clip_l": vectors(engine, "fox")})
    out = tmp_path / "run"
    command = [
        "sample",
        "a some token, red",
        "--plan",
        "distilled",
        "--size",
        "32",
        "--out",
        str(out),
    ]
    assert main([*command, "--lora", str(path)]) == 0
    assert "prompts know some token" in capsys.readouterr().err
    assert main(["replay", str(out / "record.json")]) == 0
    make("file", {"bundle_emb.some token.clip_l": vectors(engine, "cat")})
    assert main(["replay", str(out / "record.json")]) == 2
    assert "adapter:file" in capsys.readouterr().err
