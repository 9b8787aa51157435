"""SDXL's conditioning, beside diffusers' own encode_prompt and _get_add_time_ids."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoders import EOS, SIZE, reference, write_vocabulary
from tiny_pair import PLAN, tiny_engine

import headstart as hs

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def engine() -> hs.Engine:
    return tiny_engine("sdxl")


@pytest.fixture(scope="module")
def theirs(engine: hs.Engine, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Its encode_prompt, of a pipeline that has nothing but texts."""
    folder = str(write_vocabulary(tmp_path_factory.mktemp("words")))
    # Its second tokenizer pads with "!", id 0 (tokenizer_2 of stable-diffusion-xl-base-1.0).
    words, padded = (
        transformers.CLIPTokenizer.from_pretrained(
            folder, model_max_length=SIZE["positions"], pad_token=pad
        )
        for pad in (EOS, "!")
    )
    first, second = (reference(tower) for tower in engine.text.towers)
    alone = transformers.CLIPTextModel(first.config).eval()
    state = {n: t for n, t in first.state_dict().items() if not n.startswith("text_projection")}
    names = set(alone.state_dict())
    named = {n if n in names else n.removeprefix("text_model."): t for n, t in state.items()}
    alone.load_state_dict(named)
    pipe = SimpleNamespace(
        tokenizer=words,
        tokenizer_2=padded,
        text_encoder=alone,
        text_encoder_2=second,
        unet=None,
        _execution_device=torch.device("cpu"),
        config=SimpleNamespace(force_zeros_for_empty_prompt=True),
    )
    encode = diffusers.StableDiffusionXLPipeline.encode_prompt

    def encoded(**options: Any) -> Any:
        with torch.no_grad():
            return encode(pipe, do_classifier_free_guidance=True, **options)

    return encoded


@pytest.mark.parametrize(
    ("ours", "inputs"),
    [
        ({}, {}),
        ({"negative": ""}, {"negative_prompt": ""}),
        ({"negative": "the"}, {"negative_prompt": "the"}),
        ({"second": "the"}, {"prompt_2": "the"}),
        (
            {"negative": "a", "second": "the", "negative_second": "b"},
            {"negative_prompt": "a", "prompt_2": "the", "negative_prompt_2": "b"},
        ),
    ],
)
def test_both_halves_of_guidance_are_told_what_diffusers_tells_them(
    engine: hs.Engine, theirs: Callable[..., Any], ours: dict[str, Any], inputs: dict[str, Any]
) -> None:
    """A float32 encoder of three layers, twice: 1e-5 of the largest number is a few roundings."""
    run = engine.begin("cat", plan=PLAN, **ours)
    assert run.call is not None
    cond, uncond, pooled, uncond_pooled = theirs(prompt="cat", **inputs)
    for got, expected in (
        (run.call.cond.context, torch.cat((uncond, cond))),
        (run.call.cond.pooled, torch.cat((uncond_pooled, pooled))),
    ):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_sizes_are_in_the_order_of_diffusers(engine: hs.Engine) -> None:
    pipe = SimpleNamespace(
        unet=SimpleNamespace(
            config=SimpleNamespace(addition_time_embed_dim=8),
            add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=24 + 6 * 8)),
        )
    )
    add = diffusers.StableDiffusionXLPipeline._get_add_time_ids
    expected = add(pipe, (64, 32), (3, 4), (24, 40), torch.float32, text_encoder_projection_dim=24)
    run = engine.begin("cat", plan=PLAN, original_size=(64, 32), crop=(3, 4), target_size=(24, 40))
    assert run.call is not None
    assert torch.equal(run.call.cond.time_ids, torch.cat((expected, expected)))
