"""Learned tokens from the command line: `--embedding FILE[:TOKEN]`, and the records they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bundled import needs_pair
from safetensors.torch import save_file
from torch import Tensor

import headstart as hs
import headstart_weights
from headstart.adapters.textual_inversion import parse_embedding, read_embeddings, with_embeddings
from headstart.cli import main
from headstart.errors import InputError
from headstart.networks.tower import Tower

pytestmark = needs_pair


@pytest.fixture(scope="module")
def words() -> dict[str, Tensor]:
    """What the bundled encoder reads where a prompt says "fox" and "cat"."""
    text = hs.Engine.demo(device="cpu").text
    (tower,) = text.towers
    assert isinstance(tower, Tower)
    table = tower.text_model.embeddings.token_embedding.weight
    return {word: table[text.tokenizer.tokens(word)].clone() for word in ("fox", "cat")}


def sampled(prompt: str, out: Path, *options: str) -> list[str]:
    """SHA-256 of the latents that `headstart sample` recorded."""
    command = [prompt, "--seeds", "1,2", "--plan", "distilled", "--out", str(out), *options]
    assert main(["sample", *command]) == 0
    return json.loads((out / "record.json").read_text())["results"]["latents"]


def test_a_token_with_the_vectors_of_a_word_draws_that_word_and_replays(
    words: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fox = tmp_path / "beast.safetensors"
    save_file({"emb_params": words["fox"]}, fox)
    pets = tmp_path / "pets.safetensors"
    save_file({"<tom>": words["cat"], "<rex>": words["fox"]}, pets)
    plain = sampled("a fox", tmp_path / "plain")
    command = ["--embedding", f"{fox}:<b>", "--embedding", str(pets)]
    assert sampled("a <b>", tmp_path / "named", *command) == plain
    assert sampled("a <rex>", tmp_path / "two", *command) == plain
    assert sampled("a <tom>", tmp_path / "cat", *command) == sampled(
        "a cat", tmp_path / "plain cat"
    )
    assert main(["replay", str(tmp_path / "cat" / "record.json")]) == 0
    assert main(["replay", str(tmp_path / "named" / "record.json")]) == 0
    record = json.loads((tmp_path / "named" / "record.json").read_text())
    assert {"embedding:<b>", "embedding:<tom>", "embedding:<rex>"} < record["weights"].keys()
    save_file({"emb_params": words["fox"] + 1}, fox)
    capsys.readouterr()
    assert main(["replay", str(tmp_path / "named" / "record.json")]) == 2
    assert "embedding:<b>" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "trace", "slide"])
def test_every_command_that_samples_knows_the_token(
    command: str, words: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "<b>.safetensors"
    save_file({"emb_params": words["fox"]}, file)
    out = tmp_path / "sheet.png"
    typed = [command, "a <b>", "--seeds", "3", "--out", str(out), "--embedding", str(file)]
    assert main(typed + ([] if command != "compare" else ["--rounds", "1"])) == 0
    assert out.stat().st_size


def test_what_cannot_be_learned_is_one_line(
    words: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, one = tmp_path / "wide.safetensors", tmp_path / "one.safetensors"
    save_file({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, wide)
    save_file({"emb_params": words["cat"]}, one)
    for inputs, message in (
        (f"{wide}", "learned for another family"),
        (f"{tmp_path / 'none.safetensors'}", "none.safetensors"),
        (f"{one}:", "expected FILE or FILE:token"),
        (f"{one}:fox", "means something already"),
        (str(headstart_weights.path("yellow")), "no learned token"),
    ):
        out = str(tmp_path / "run")
        assert main(["sample", "a fox", "--out", out, "--embedding", inputs]) == 2, inputs
        complaint = capsys.readouterr().err
        assert message in complaint and complaint.count("\n") == 1, complaint


def test_a_colon_belongs_to_a_file_that_is_there(tmp_path: Path) -> None:
    odd = tmp_path / "a:b"
    assert parse_embedding(str(odd)) == (str(tmp_path / "a"), "b")
    odd.write_bytes(b"")
    assert parse_embedding(str(odd)) == (str(odd), None)
    assert parse_embedding(f"{odd}:<c>") == (str(odd), "<c>")
    with pytest.raises(InputError, match="FILE or FILE:token"):
        parse_embedding(":<c>")


def test_half_precision_encoders_stay_widened_at_use(
    words: dict[str, Tensor], tmp_path: Path
) -> None:
    """dtype "stored": the same bits as float32, with the table grown."""
    save_file({"<b>": words["fox"].half()}, tmp_path / "b.safetensors")
    wide, stored = (
        with_embeddings(
            hs.Engine.demo(device="cpu", dtype=dtype).text,
            read_embeddings(tmp_path / "b.safetensors"),
        )
        for dtype in ("float32", "stored")
    )
    assert next(stored.parameters()).dtype == torch.float16
    prompts = ["a <b>, blue background", "a fox, blue background"]
    encoded = stored.encode(prompts).context
    assert torch.equal(encoded, wide.encode(prompts).context)
    assert torch.equal(encoded[0], encoded[1])
