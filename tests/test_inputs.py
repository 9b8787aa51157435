"""Conditioning and noise of the caller's own: what fits, what is told, and records of such runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_pair import PLAN, tiny_engine

import headstart as hs

CELLS = (4, 8, 8)


@pytest.fixture(scope="module")
def sdxl() -> hs.Engine:
    return tiny_engine("sdxl")


@pytest.fixture(scope="module")
def sd15() -> hs.Engine:
    return tiny_engine("sd15")


def normals(count: int, *cells: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, *(cells or CELLS), generator=generator)


def test_conditioning_of_ones_own_stands_for_the_prompts(sdxl: hs.Engine) -> None:
    cond, uncond = sdxl.text.encode(["cat", "the"], ["a", None], size=16)
    prompts = sdxl.sample(["cat", "the"], plan=PLAN, negative=["a", None])
    from_tensors = sdxl.sample(plan=PLAN, cond=cond, uncond=uncond)
    assert torch.equal(from_tensors.latents, prompts.latents)
    assert from_tensors.prompts == ("", "")
    bare = replace(cond, time_ids=None)  # told the size of the picture then
    assert torch.equal(
        sdxl.sample(plan=PLAN, cond=bare, uncond=uncond).latents, from_tensors.latents
    )
    named = sdxl.sample("my <lora:x>", plan=PLAN, cond=cond[:1], uncond=uncond[:1])
    assert named.prompts == ("my <lora:x>",)


def test_conditioning_of_ones_own_may_change_with_the_level(sdxl: hs.Engine) -> None:
    cat, the = (sdxl.text.encode([word], size=16) for word in ("cat", "the"))
    conditioning = hs.ByLevel(((math.inf, cat), ("handoff", the)))
    from_tensors = sdxl.sample(plan=PLAN, cond=conditioning, negative="a", seeds=[1, 2]).latents
    typed = sdxl.sample("cat -> the at the hand-off", plan=PLAN, negative="a", seeds=[1, 2])
    assert (from_tensors - typed.latents).norm() < 1e-4 * from_tensors.norm()


def test_conditioning_of_ones_own_may_be_longer_than_the_engines_other_half(
    sdxl: hs.Engine,
) -> None:
    long, longer = "cat " * 20, "the " * 40
    for text, other in ((long, None), (long, longer), ("cat", longer)):
        typed = sdxl.sample(text, plan=PLAN, negative=other).latents
        cond = sdxl.text.encode([text], size=16)
        from_tensors = sdxl.sample(plan=PLAN, cond=cond, negative=other).latents
        assert (from_tensors - typed).norm() < 1e-4 * typed.norm()
    odd = hs.Conditioning(torch.zeros(1, 16 * 500 + 1, 72), torch.zeros(1, 24))
    with pytest.raises(hs.InputError, match=r"16, 8001 tokens long.* divide each other"):
        sdxl.iterate(plan=PLAN, cond=odd)


def test_how_an_engine_reads_prompts_is_no_matter_where_none_is_read(sdxl: hs.Engine) -> None:
    cond, uncond = sdxl.text.encode(["cat"], "a", size=16)
    from_tensors = sdxl.with_reading("a1111", 1).sample(plan=PLAN, cond=cond, uncond=uncond)
    assert not from_tensors.reading
    assert torch.equal(
        from_tensors.latents, sdxl.sample(plan=PLAN, cond=cond, uncond=uncond).latents
    )


def test_a_start_of_ones_own_is_the_seeds_where_it_holds_their_numbers(sd15: hs.Engine) -> None:
    """And its size is the picture's."""
    plan = replace(PLAN, legs=(PLAN.legs[0], replace(PLAN.legs[1], update=hs.Update.RENOISE)))
    noise = hs.Philox([5, 6]).initial((4, 8, 12), torch.device("cpu"))
    seeds = sd15.sample("cat", plan=plan, seeds=[5, 6], size=(16, 24))
    from_noise = sd15.sample("cat", plan=plan, seeds=[5, 6], noise=noise)
    assert from_noise.size == (16, 24)
    assert torch.equal(from_noise.latents, seeds.latents)
    assert torch.equal(sd15.begin("cat", plan=plan, noise=noise).state.x[0], seeds_start(noise))


def seeds_start(drawn: torch.Tensor) -> torch.Tensor:
    return drawn[0] * PLAN.compile(hs.NoiseSchedule.scaled_linear()).init_scale


def test_all_noise_may_be_given(sd15: hs.Engine) -> None:
    plan = replace(PLAN, legs=(PLAN.legs[0], replace(PLAN.legs[1], update=hs.Update.RENOISE)))
    start, row = normals(2), normals(2) + 1
    inputs = hs.Given(start, [None, None, row])
    done = sd15.sample("cat", plan=plan, noise=inputs)
    assert len(done) == 2 and set(done.given) == {"noise.initial", "noise.2"}
    with pytest.raises(hs.InputError, match=r"rows \[2\] .* the given noise has none"):
        sd15.iterate("cat", plan=plan, noise=hs.Given(start))


def test_a_record_of_tensors_is_replayed_by_whoever_has_them(sdxl: hs.Engine) -> None:
    cond, noise = sdxl.text.encode(["cat"], size=16), normals(2)
    record = sdxl.sample(plan=PLAN, cond=cond, noise=noise).record()
    assert set(record["given"]) == {"cond.context", "cond.pooled", "cond.time_ids", "noise"}
    again = hs.replay(record, sdxl, cond=cond, noise=noise)
    assert again.record()["results"] == record["results"]
    with pytest.raises(
        hs.InputError, match=r"digests alone.* headstart\.replay\(record, engine, noise="
    ):
        hs.replay(record, sdxl, cond=cond)
    with pytest.raises(hs.InputError, match=r"cond\.context, which was given, is not the recorded"):
        hs.replay(record, sdxl, cond=replace(cond, context=2 * cond.context), noise=noise)
    usual = sdxl.sample("cat", plan=PLAN).record()
    with pytest.raises(hs.InputError, match="was not given noise="):
        hs.replay(usual, sdxl, noise=noise)


def test_a_branch_of_a_run_of_tensors_says_how_to_go_on(sdxl: hs.Engine) -> None:
    states: list[hs.State] = []
    noise = normals(1)
    origin = sdxl.sample("cat", plan=PLAN, noise=noise, on_step=states.append)
    with pytest.raises(hs.InputError, match=r"engine\.iterate\(.* resume=state\)"):
        hs.branch(sdxl, origin, states[1], model="base")
    *_, last = sdxl.iterate("cat", plan=PLAN, noise=noise, resume=states[1])
    assert torch.equal(last.x, origin.latents)


def cond_of(width: int = 72, pooled: int | None = 24, **more: Any) -> hs.Conditioning:
    pooled_zeros = None if pooled is None else torch.zeros(1, pooled)
    return hs.Conditioning(torch.zeros(1, 16, width), pooled_zeros, **more)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family's": ("sd15", {"cond": cond_of(32)}, r"cond\.pooled: this family's .* leave it"),
    "context": ("sdxl", {"cond": cond_of(32)}, r"cond\.context: expected floats \[B, tokens, 72\]"),
    "no pooled": ("sdxl", {"cond": cond_of(pooled=None)}, r"cond\.pooled: .*\[B, 24\].* none"),
    "pooled": ("sdxl", {"cond": cond_of(pooled=8)}, r"cond\.pooled: expected floats \[B, 24\]"),
    "sizes": ("sdxl", {"cond": cond_of(time_ids=torch.zeros(1, 5))}, r"cond\.time_ids: .*\[B, 6\]"),
    "strengths": ("sdxl", {"cond": cond_of(strengths=torch.ones(1, 1))}, "give them as adapters="),
    "nan": ("sdxl", {"uncond": cond_of(pooled=24), "cond": hs.Conditioning(
        torch.full((1, 16, 72), math.nan), torch.zeros(1, 24))}, "holds NaN or infinity"),
    "batch": ("sdxl", {"cond": hs.Conditioning(torch.zeros(2, 16, 72), torch.zeros(1, 24))},
              r"cond\.pooled has 1 samples, its context 2"),
    "no tensor": ("sdxl", {"cond": "cat"}, "expected a headstart.Conditioning"),
    "lengths": ("sdxl", {"cond": cond_of(), "uncond": hs.Conditioning(
        torch.zeros(1, 32, 72), torch.zeros(1, 24))}, "16 and 32 tokens"),
    "second": ("sdxl", {"cond": cond_of(), "second": "a"}, "second= would do nothing"),
    "crop": ("sdxl", {"cond": cond_of(time_ids=torch.zeros(1, 6)), "crop": (1, 0)},
             "cond has time_ids of its own, so crop= would"),
    "target": ("sdxl", {"prompts": "a", "uncond": cond_of(time_ids=torch.zeros(1, 6)),
                        "target_size": 8}, "uncond has time_ids of its own, so target_size="),
    "style": ("sdxl", {"cond": cond_of(), "uncond": cond_of(), "style": "a1111"},
              "style= would do nothing"),
    "clip skip": ("sdxl", {"cond": cond_of(), "clip_skip": 1, "plan": hs.Plan(PLAN.legs[1:])},
                  "clip_skip= would do nothing"),
    "two": ("sdxl", {"prompts": "a", "uncond": cond_of(), "negative": "a"}, "give one"),
    "unguided": ("sdxl", {"prompts": "a", "uncond": cond_of(), "plan": hs.Plan(PLAN.legs[1:])},
                 "uncond= would do nothing"),
    "noise of a batch": ("sd15", {"prompts": ["a", "b"], "noise": normals(3)}, "noise: 3 for 2"),
    "one noise": ("sd15", {"prompts": ["a", "b"], "noise": normals(1)}, "noise: 1 for 2 images"),
    "channels": ("sd15", {"prompts": "a", "noise": normals(1, 16, 8, 8)}, r"latents \[16, 8, 8\]"),
    "size": ("sd15", {"prompts": "a", "noise": normals(1), "size": 32}, r"take \[4, 16, 16\]"),
    "odd size": ("sd15", {"prompts": "a", "noise": normals(1, 4, 7, 8)}, "multiples of 8"),
    "flat": ("sd15", {"prompts": "a", "noise": torch.zeros(3)}, "expected float noise"),
    "whole": ("sd15", {"prompts": "a", "noise": torch.zeros(1, 4, 8, 8, dtype=torch.int64)},
              "expected float noise"),
    "noise of nan": ("sd15", {"prompts": "a", "noise": normals(1) / 0}, "noise holds NaN or inf"),
    "row of nan": ("sd15", {"prompts": "a", "noise": hs.Given(normals(1), [None, normals(1) / 0])},
                   "noise, row 1 holds NaN"),
    "list": ("sd15", {"prompts": "a", "noise": [1.0]}, r"noise: expected a tensor \[B, C, h, w\]"),
    "select": ("sd15", {"prompts": "a", "noise": normals(2), "diversify": "select:2"},
               "draws candidates from other seeds, and noise= replaces the"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "inputs", "says"), WRONG.values(), ids=WRONG)
def test_tensors_that_do_not_fit_are_refused(
    sd15: hs.Engine, sdxl: hs.Engine, family: str, inputs: dict[str, Any], says: str
) -> None:
    engine = sdxl if family == "sdxl" else sd15
    with pytest.raises(hs.InputError, match=says):
        engine.iterate(**{"plan": PLAN, **inputs})
