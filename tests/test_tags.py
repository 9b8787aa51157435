"""`<lora:NAME:STRENGTH>`: an adapter at an image's own strength, and the text without the tag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_pair import PLAN, tiny_engine
from torch import Tensor

import headstart as hs
from headstart.conditioning.tags import Tag, take_tags


def write_lora(path: Path, *, text: bool = False) -> Path:
    torch.manual_seed(len(path.stem))
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q"
    tensors = {f"{layer}.lora_down.weight": torch.randn(2, 32)}
    tensors |= {f"{layer}.lora_up.weight": torch.randn(32, 2)}
    if text:
        layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
        tensors |= {f"{layer}.lora_down.weight": torch.randn(2, 32)}
        tensors |= {f"{layer}.lora_up.weight": torch.randn(48, 2)}
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("loras")
    write_lora(made / "ink.safetensors")
    write_lora(made / "voice.safetensors", text=True)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> hs.Engine:
    engine_ = tiny_engine("sd15")
    engine_.attach(folder / "ink.safetensors", 0.5)
    engine_.attach(folder / "voice.safetensors", 0.0)
    return engine_


def latents(engine: hs.Engine, prompts: Any, **options: Any) -> Tensor:
    return engine.sample(prompts, plan=PLAN, seeds=3, **options).latents


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    ("typed", "text", "tags"),
    [
        ("a cat", "a cat", {}),
        ("a cat <lora:ink>", "a cat", {"ink": Tag(1.0, 1.0)}),
        ("a <LyCO: my ink :-.5> cat", "a cat", {"my ink": Tag(-0.5, -0.5)}),
        ("<lora:ink.safetensors:1:0>cat", "cat", {"ink": Tag(1.0, 0.0)}),
        ("<lora:ink:0.4:unet=2>", "", {"ink": Tag(0.4, 2.0)}),
        ("<lora:a:te=0><lora:b:2>", "", {"a": Tag(0.0, 0.0), "b": Tag(2.0, 2.0)}),
        ("a < lora : ink:1.5 >", "a", {"ink": Tag(1.5, 1.5)}),
        ("a <s1> <lora> lora:ink:2", "a <s1> <lora> lora:ink:2", {}),
    ],
)
def test_a_tag_is_a_name_and_its_strengths(typed: str, text: str, tags: dict[str, Tag]) -> None:
    assert take_tags(typed) == (text, tags)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("<lora:>", "expected <lora:NAME>"),
        ("<lora:ink:1", "'<lora:ink:1' is not closed"),
        ("<lora:ink:strong>", "expected <lora:NAME>"),
        ("<lora:ink:nan>", "expected <lora:NAME>"),
        ("<lora:ink:1:2:3>", "expected <lora:NAME>"),
        ("<lora:ink:dyn=4>", "expected <lora:NAME>"),
        ("<lora:ink><lora:ink:2>", "names adapter 'ink' twice"),
        ("<hypernet:ink:1>", "hypernetworks are not read here"),
        (
            "<lora:pen:1>",
            r"'pen', which is not attached: attached are 'ink', 'voice'.*--lora",
        ),
    ],
)
def test_tags_that_cannot_act_are_refused(engine: hs.Engine, typed: str, message: str) -> None:
    with pytest.raises(hs.InputError, match=message):
        engine.iterate(f"cat {typed}", plan=PLAN)
    with pytest.raises(hs.InputError, match=r"both halves of guidance.* write it there"):
        engine.iterate("cat", negative="the <lora:ink:1>", plan=PLAN)


def test_each_image_has_the_strength_that_its_prompt_says(engine: hs.Engine) -> None:
    prompts = ["cat <lora:ink:2>", "cat", "cat <lora:voice:1:0.5>"]
    together = latents(engine, prompts)
    calls: list[dict[str, Any]] = [
        {"ink": 2.0},
        {},
        {"voice": hs.Strength(0.5, text=1.0)},
    ]
    for image, strengths in enumerate(calls):
        alone = latents(engine, "cat", adapters={"ink": 0.5, "voice": 0.0} | strengths)[0]
        assert far(together[image], alone) < 1e-4
        assert image == 1 or far(together[image], together[1]) > 1e-3


def test_a_tag_of_a_part_by_level_acts_on_its_rows(engine: hs.Engine) -> None:
    done = latents(engine, "cat <lora:ink:2><lora:voice:1> -> cat at the hand-off")
    rows = [[2.0], [2.0], [0.5], [0.5]], [[1.0], [1.0], [0.0], [0.0]]
    strengths = {"ink": rows[0], "voice": hs.Strength(rows[1], text=1.0)}  # type: ignore[arg-type]
    first = engine.begin("cat", plan=PLAN, seeds=3, adapters=strengths)
    run = engine.begin("cat <lora:ink:2><lora:voice:1> -> cat at the hand-off", plan=PLAN, seeds=3)
    for row in range(4):
        call, usual = run.call, first.call
        assert call is not None and usual is not None
        assert torch.equal(call.cond.strengths, usual.cond.strengths)
        same = torch.allclose(call.cond.context, usual.cond.context, atol=1e-5)
        assert same == (row < 2)  # the text of the second part is read without the adapter
        f = engine.denoisers[call.model](call.x_in, call.timestep, call.cond)
        run.advance(f)
        first.advance(f)
    assert far(run.state.x, done) < 1e-4


@pytest.mark.parametrize(
    "prompts",
    [
        ["cat <lora:ink:2>", "cat"],
        ["cat <lora:voice:1:0.5>", "the"],
        ["cat <lora:voice:1> -> the <lora:ink:3> at the hand-off", "cat"],
    ],
)
def test_the_record_has_the_prompt_as_typed_and_replays(
    engine: hs.Engine, prompts: list[str]
) -> None:
    done = engine.sample(prompts, plan=PLAN, seeds=3)
    record = done.record()
    assert record["prompts"] == prompts
    assert torch.equal(hs.replay(record, engine).latents, done.latents)


def test_a_merged_adapter_has_one_strength_for_all_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q"
    tensors = {f"{layer}.lokr_w1": torch.randn(4, 4), f"{layer}.lokr_w2": torch.randn(8, 8)}
    save_file(tensors, tmp_path / "sum.safetensors")
    engine = tiny_engine("sd15")
    engine.attach(tmp_path / "sum.safetensors", 0.5)
    adapter = engine.adapters.now()["sum"]
    assert not adapter.report.live
    engine.iterate(["cat <lora:sum:0.5>", "the"], plan=PLAN)
    with pytest.raises(hs.InputError, match=r"at strength 0\.5, .* prompts have <lora:sum:2:2>: w"):
        engine.iterate("cat <lora:sum:2>", plan=PLAN)
    with pytest.raises(hs.InputError, match="2>, a text without the tag: write one tag"):
        engine.iterate(["cat <lora:sum:2>", "the"], plan=PLAN)
