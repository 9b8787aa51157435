"""Texts of a call: a negative prompt for each image, second prompts, sizes, prompts by level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pair import PLAN, tiny_engine
from torch import Tensor

import headstart as hs
from headstart.engine import record as recording

UNGUIDED = hs.Plan(PLAN.legs[1:])


@pytest.fixture(scope="module")
def sdxl() -> hs.Engine:
    return tiny_engine("sdxl")


@pytest.fixture(scope="module")
def sd15() -> hs.Engine:
    return tiny_engine("sd15")


def latents(engine: hs.Engine, prompts: Any = "cat", **options: Any) -> Tensor:
    return engine.sample(prompts, plan=PLAN, **options).latents


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_a_negative_prompt_of_each_image_is_that_of_the_image_alone(sdxl: hs.Engine) -> None:
    texts = ["the", None, "", "cat"]
    together = latents(sdxl, seeds=range(4), negative=texts)
    for seed, text in enumerate(texts):
        assert far(together[seed], latents(sdxl, seeds=seed, negative=text)[0]) < 1e-4


def test_no_negative_prompt_is_zeros_for_sdxl_and_an_empty_one_is_encoded(
    sdxl: hs.Engine, sd15: hs.Engine
) -> None:
    zeros = hs.Conditioning(torch.zeros(1, 16, 72), torch.zeros(1, 24))
    assert far(latents(sdxl), latents(sdxl, uncond=zeros)) < 1e-5
    _, encoded = sdxl.text.encode(["cat"], "", size=16)
    assert far(latents(sdxl, negative=""), latents(sdxl, uncond=encoded)) < 1e-5
    assert far(latents(sdxl, negative=""), latents(sdxl)) > 1e-3
    assert torch.equal(latents(sd15, negative=""), latents(sd15))


def test_one_prompt_and_seed_with_two_negatives_are_two_images(sdxl: hs.Engine) -> None:
    done = sdxl.sample("cat", plan=PLAN, seeds=3, negative=["the", None])
    assert (done.prompts, done.seeds, done.negative) == (("cat",) * 2, (3, 3), ("the", None))
    with pytest.raises(hs.InputError, match="would draw the same image"):
        sdxl.sample("cat", plan=PLAN, seeds=3, negative=["the", "the"])


@pytest.mark.parametrize(
    "options",
    [
        {"negative": "the"},
        {"negative": ["the", None, ""]},
        {"second": "the", "negative": "", "negative_second": "cat"},
        {"second": ["the", None, "a"]},
        {"style": "a1111", "clip_skip": 3},
        {"original_size": (64, 32), "crop": (3, 4), "target_size": 32},
        {"prompts": "cat -> the at the hand-off", "negative": "a -> the below sigma 5"},
        {"prompts": ["cat -> the below sigma 1", "the", "a -> b below sigma 2 -> c below sigma 1"]},
        {"prompts": "cat -> the below sigma 1 <lora:x>", "literal": True},
    ],
)  # fmt: skip
def test_what_was_asked_in_words_is_in_the_record_and_replays(
    sdxl: hs.Engine, options: dict[str, Any]
) -> None:
    usual = latents(sdxl, seeds=range(3))
    options_ = {"prompts": "cat"} | options
    done = sdxl.sample(plan=PLAN, seeds=range(3), **options_)
    assert far(done.latents, usual) > 1e-5
    again = hs.replay(done.record(), sdxl.with_reading("comfyui", 1))
    assert torch.equal(again.latents, done.latents)
    assert (again.reading, again.negative) == (done.reading, done.negative)


def test_an_engine_that_reads_another_way_does_so_where_a_call_says_nothing(
    sdxl: hs.Engine,
) -> None:
    other = sdxl.with_reading("a1111", 3)
    trajectory = other.sample("(cat:2)", plan=PLAN)
    assert trajectory.reading == {"style": "a1111", "clip_skip": 3}
    assert torch.equal(trajectory.latents, latents(sdxl, "(cat:2)", style="a1111", clip_skip=3))
    with pytest.warns(UserWarning, match="weight"):
        assert other.sample("(cat:2)", plan=PLAN, style="plain").reading == {"clip_skip": 3}


def test_sizes_are_told_as_time_ids(sdxl: hs.Engine) -> None:
    sizes = {"original_size": (64, 32), "crop": (3, 4), "target_size": (24, 40)}
    run = sdxl.begin("cat", plan=PLAN, size=16, **sizes)
    assert run.call is not None
    assert run.call.cond.time_ids.tolist() == [[64, 32, 3, 4, 24, 40]] * 2
    run = sdxl.begin("cat", plan=PLAN, size=(16, 32), target_size=48)
    assert run.call is not None
    assert run.call.cond.time_ids[0].tolist() == [16, 32, 0, 0, 48, 48]


def test_each_row_is_told_the_text_of_its_level(sdxl: hs.Engine) -> None:
    """One image changes at the hand-off, one a row later, one never; each is as it is alone."""
    prompts = ["cat -> the at the hand-off", "cat -> the below sigma 1", "cat"]
    run = sdxl.begin(prompts, plan=PLAN)
    by_text = dict(zip(("cat", "the"), sdxl.text.encode(["cat", "the"]).context, strict=True))
    expected = ["cat cat cat", "cat cat cat", "the cat cat", "the the cat"]
    for row in expected:
        call = run.call
        assert call is not None
        for context, text in zip(call.cond.context[-3:], row.split(), strict=True):
            assert torch.allclose(context, by_text[text], atol=1e-5)
        run.advance(sdxl.denoisers[call.model](call.x_in, call.timestep, call.cond))
    together = latents(sdxl, prompts)
    for image, prompt in enumerate(prompts):
        assert far(together[image], latents(sdxl, prompt)[0]) < 1e-4


def test_texts_by_level_of_several_lengths_share_a_server_with_others(sdxl: hs.Engine) -> None:
    long = "cat " * 30
    prompts = ["cat", f"cat -> {long} at the hand-off", long]
    batch = sdxl.batch()
    runs = [sdxl.begin(prompt, plan=PLAN, seeds=5) for prompt in prompts]
    for run in runs:
        batch.add(run)
    while batch:
        assert all(served.error is None for served in batch.step())
    for run, prompt in zip(runs, prompts, strict=True):
        assert far(run.state.x, latents(sdxl, prompt, seeds=5)) < 1e-4


@pytest.mark.parametrize("method", ["cads:0.2", "embedding-noise:1", "select:2"])
def test_methods_act_on_the_text_of_each_row(sdxl: hs.Engine, method: str) -> None:
    prompt = "cat -> the at the hand-off"
    one = sdxl.sample(prompt, plan=PLAN, seeds=[1, 2], diversify=method)
    assert far(one.latents, latents(sdxl, prompt, seeds=[1, 2])) > 1e-4
    assert torch.equal(hs.replay(one.record(), sdxl).latents, one.latents)


def test_a_run_by_level_branches_with_its_texts(sdxl: hs.Engine) -> None:
    states: list[hs.State] = []
    prompt = "cat -> the below sigma 1"
    origin = sdxl.sample(
        prompt, plan=PLAN, negative=["a", ""], seeds=[1, 2], second="the", on_step=states.append
    )
    assert torch.equal(hs.branch(sdxl, origin, states[1]).latents, origin.latents)


def test_graph_runners_capture_each_length_and_give_the_same_bits(sdxl: hs.Engine) -> None:
    prompt = f"cat -> {'cat ' * 30} at the hand-off"
    assert torch.equal(latents(sdxl.with_runner("replay"), prompt), latents(sdxl, prompt))


def test_a_record_of_the_first_format_has_letters_alone_and_no_empty_negative(
    sdxl: hs.Engine,
) -> None:
    prompt = "the <lora:x>"
    record = sdxl.sample(prompt, plan=PLAN, literal=True).record()
    assert record["format"] == "headstart.record/2" and record["negative"] is None
    old = {k: v for k, v in record.items() if k != "reading"}
    old |= {"format": "headstart.record/1", "negative": ""}
    assert hs.replay(old, sdxl).record()["results"] == record["results"]
    with pytest.raises(hs.InputError, match="cut prompts to 14 tokens"):
        hs.replay({**old, "prompts": ["cat " * 30]}, sdxl)
    strange = {**record, "reading": {"voice": "loud"}}
    with pytest.raises(hs.InputError, match="'voice', which this version does not know"):
        recording.parse(strange)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sd15", {"second": "a"}, "this family has one"),
        ("sd15", {"negative": "", "negative_second": "a"}, "this family has one"),
        ("sd15", {"crop": (0, 0)}, "are SDXL's time_ids, which this"),
        ("sdxl", {"negative_second": "a"}, "give negative="),
        ("sdxl", {"crop": (-1, 0)}, "crop: expected two whole numbers of pixels of at least 0"),
        ("sdxl", {"crop": 1.5}, "crop: expected two whole numbers"),
        ("sdxl", {"original_size": (0, 5)}, "original_size: expected two whole numbers"),
        ("sdxl", {"original_size": (1, 2, 3)}, "original_size: expected two whole numbers"),
        ("sdxl", {"target_size": 2**40}, "target_size: expected two whole numbers"),
        ("sdxl", {"style": "webui"}, "expected plain, a1111, comfyui"),
        ("sdxl", {"clip_skip": 4}, "from 1, the last layer, to 3, got 4"),
        ("sdxl", {"clip_skip": True}, "got True"),
        ("sdxl", {"negative": ["a", "b"], "seeds": [1, 2, 3]}, "negative: 2 for 3 images"),
        ("sdxl", {"negative": []}, "negative: expected a text, None, or a list"),
        ("sdxl", {"negative": {"a": 1}}, "negative: expected a text, None, or a list"),
        ("sdxl", {"negative": [3]}, "a prompt is a string, got int"),
        ("sdxl", {"second": ["a", "b"], "prompts": ["a", "b", "c"]}, "second: 2 for 3 images"),
        ("sdxl", {"prompts": "a -> b below sigma 0.1"}, r"starts at sigma 0.1 or below .* 0\.6932"),
        ("sdxl", {"negative": "a -> b below sigma 99"}, "starts above sigma 99"),
        ("sdxl", {"prompts": "a -> b below sigma 1 -> c at the hand-off"}, "levels must fall"),
        ("sdxl", {"prompts": None}, "say what to draw"),
        ("sdxl", {"negative": "", "plan": UNGUIDED}, "the negative prompt would do nothing"),
        ("sdxl", {"negative": "", "negative_second": "a", "plan": UNGUIDED}, "would do nothing"),
        ("sdxl", {"negative": "a -> b at the hand-off", "plan": PLAN}, "'b' would do nothing: it"),
        ("sdxl", {"negative": "", "negative_second": "a -> b at the hand-off", "plan": PLAN},
         "negative_second 'a -> b .*'b' would do nothing"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_used_are_refused(
    sd15: hs.Engine, sdxl: hs.Engine, family: str, options: dict[str, Any], message: str
) -> None:
    engine = sdxl if family == "sdxl" else sd15
    with pytest.raises(hs.InputError, match=message):
        engine.iterate(**{"prompts": "cat", "plan": PLAN, **options})
    with pytest.raises(TypeError, match="no keyword argument 'tile'"):
        engine.iterate("cat", tile=3)  # type: ignore[call-arg]


def test_texts_of_any_two_lengths_share_a_call(sd15: hs.Engine) -> None:
    """5 and 7, 16 and 19 pieces; what cannot is refused before anything runs."""
    some, more = ("cat " * (14 * pieces) for pieces in (16, 19))
    alone = latents(sd15, some)
    assert far(latents(sd15, [some, more], batch=1)[:1], alone) < 1e-4
    latents(sd15, some, negative=more)
    latents(sd15, f"{some} -> {more} at the hand-off")
    lengths = ["cat " * (14 * pieces) for pieces in (5, 7, 8, 9)]
    with pytest.raises(hs.InputError, match=r"5, 7, 8, 9 pieces .* \(in a sweep a smaller --batch"):
        sd15.iterate(lengths, plan=PLAN)
