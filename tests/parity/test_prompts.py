"""Weights and long prompts as AUTOMATIC1111's webui and ComfyUI have them.

Their numbers are in prompts.json, from `record_prompts.py`, which runs their own code. Both are
float32, so ours may differ from the float64 run about as much as theirs does.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import FAMILY_TOWERS, written_towers
from parity.record_prompts import PAIRS, PROMPTS, sampled

from headstart.errors import InputError
from headstart.networks.grammar import read
from headstart.networks.prompt_style import PromptStyle
from headstart.networks.text import ClipText
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.vocabulary import clip_vocabulary

RECORDED: dict[PromptStyle, Any] = json.loads(
    Path(__file__).with_name("prompts.json").read_text(encoding="utf-8")
)


@cache
def words() -> ClipTokenizer:
    return ClipTokenizer.from_vocabulary(*clip_vocabulary())


@cache
def encoder(family: str) -> ClipText:
    return ClipText(written_towers(family), words())


@cache
def exact(family: str) -> ClipText:
    return ClipText([tower.double() for tower in written_towers(family)], words())


def check(
    family: str, want: dict[str, dict[str, list[float]]], prompts: Any, **options: Any
) -> None:
    """All prompts in one call; a row is repeated where another is longer, so its start counts.

    How far float32 goes is the largest error of all rows: of one row it may be small by chance.
    """
    ours, true = (make(family).encode(prompts, **options) for make in (encoder, exact))
    recorded = [
        (n, row, f, values) for row, (n, r) in enumerate(want.items()) for f, values in r.items()
    ]
    pairs = [
        [_start(cond, row, field, len(values)) for cond in (ours, true)]
        for _, row, field, values in recorded
    ]
    errors = [float((mine - right).abs().max()) for mine, right in pairs]
    atol = 4 * max(*errors, 1e-6)  # what the file rounds to
    for (name, _, _, values), (_, right) in zip(recorded, pairs, strict=True):
        torch.testing.assert_close(
            torch.tensor(values), right, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def _start(cond: Any, row: int, field: str, count: int) -> torch.Tensor:
    embedding = cond.context[row] if field == "context" else cond.pooled[row : row + 1]
    return torch.tensor(sampled(embedding)[:count])


@pytest.mark.filterwarnings("ignore:prompt style comfyui reads 'BREAK'")
@pytest.mark.parametrize("family", FAMILY_TOWERS)
@pytest.mark.parametrize("style", RECORDED)
def test_weights_and_pieces_are_theirs(style: PromptStyle, family: str) -> None:
    want = RECORDED[style][family]
    check(family, want, [PROMPTS[name] for name in want], style=style)


@pytest.mark.parametrize(
    ("style", "family", "skip"),
    [("a1111", "sd15", 2), *(("comfyui", f, n) for f in ("sd15", "sdxl") for n in (1, 2, 3))],
)
def test_clip_skip_counts_as_theirs(style: PromptStyle, family: str, skip: int) -> None:
    want = RECORDED[style][f"{family} skip {skip}"]
    check(family, want, [PROMPTS["weights"]], style=style, clip_skip=skip)


def test_a_second_prompt_is_read_as_comfyui_reads_it() -> None:
    for name, want in RECORDED["comfyui"]["second"].items():
        first, second = PAIRS[name]
        check("sdxl", {name: want}, [first], second=[second], style="comfyui")


@pytest.mark.parametrize("style", RECORDED)
def test_random_texts_have_the_spans_that_they_have_there(style: PromptStyle) -> None:
    """Text between the same weights, letter by letter; one weight is a float's last bits."""
    for text, spans in RECORDED[style]["spans"].items():
        if spans is None:  # the webui ends with an error
            with pytest.raises(InputError, match="no number"):
                read(text, style)
            continue
        ours = [(span.text, span.weight) for span in read(text, style) if span.text]
        assert ours == [(part, weight) for part, weight in spans if part], text
