"""The engine: what it promises of the bundled pair, alone, in a batch, and on two threads."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bundled import needs_pair

import headstart as hs

pytestmark = needs_pair


def test_a_trajectory_holds_what_ran(engine: hs.Engine) -> None:
    done = engine.sample("a fox", seeds=[1, 2], keep_x0=True)
    assert done.rgb.shape == (2, 64, 64, 3)
    assert done.rgb.dtype == torch.uint8
    assert done.x0 is not None
    assert done.x0.shape == (4, 2, 4, 16, 16)
    assert torch.equal(done.x0[-1], done.latents)
    assert done.passes == 4
    assert set(done.latency_ms) == {"text", "base", "distilled", "decode"}
    assert [step.model for step in done.table] == ["base", *["distilled"] * 3]


def test_two_threads_get_the_bits_that_one_gets(engine: hs.Engine) -> None:
    requests = [("a fox", 1), ("a frog", 2)]
    alone = [engine.sample(prompt, seeds=seed).latents for prompt, seed in requests]
    with ThreadPoolExecutor(2) as pool:
        together = pool.map(lambda r: engine.sample(r[0], seeds=r[1]).latents, requests * 2)
    for got, expected in zip(together, alone * 2, strict=True):
        assert torch.equal(got, expected)


def test_an_image_in_a_batch_is_the_image_alone_up_to_rounding(engine: hs.Engine) -> None:
    """Measured 3e-6 relative: a matrix product of another shape rounds differently."""
    batch = engine.sample("an owl", seeds=range(4)).latents
    for seed in range(4):
        alone = engine.sample("an owl", seeds=seed).latents[0]
        assert (batch[seed] - alone).norm() <= 1e-4 * alone.norm()


def test_stopping_to_iterate_cancels_and_leaves_the_engine_usable(engine: hs.Engine) -> None:
    states = engine.iterate("a fox", seeds=1)
    assert next(states).step == 0
    del states
    whole = list(engine.iterate("a fox", seeds=1))
    assert [state.step for state in whole] == [0, 1, 2, 3]
    assert torch.equal(whole[-1].x, engine.sample("a fox", seeds=1).latents)


def test_handing_a_model_over_to_itself_changes_no_bit(engine: hs.Engine) -> None:
    whole = hs.Plan((hs.Leg(model="base", steps=4),), start="unit")
    times = (999.0, 749.0, 499.0, 249.0)
    for k in (1, 2, 3):
        parts = (
            hs.Leg(model="base", timesteps=times[:k]),
            hs.Leg(model="base", timesteps=times[k:]),
        )
        split = engine.sample("a star", plan=hs.Plan(parts, start="unit"), seeds=5)
        assert torch.equal(split.latents, engine.sample("a star", plan=whole, seeds=5).latents)


def test_guidance_one_is_one_pass_a_step_and_more_is_two(engine: hs.Engine) -> None:
    assert engine.compile("base", steps=5, base_guidance=1.0).passes() == 5
    assert engine.compile("base", steps=5, base_guidance=2.0).passes() == 10


def test_a_record_replays_to_the_bit_and_a_forged_one_does_not(engine: hs.Engine) -> None:
    record = engine.sample("a heart", seeds=[1, 2]).record()
    assert torch.equal(hs.replay(record, engine).rgb, engine.sample("a heart", seeds=[1, 2]).rgb)
    forged = {**record, "prompts": ["a lemon", "a lemon"]}
    with pytest.raises(hs.InputError, match="not equal"):
        hs.replay(forged, engine)
    other = {**forged, "machine": {**record["machine"], "exclamation": "transformers"}}
    with pytest.raises(hs.InputError, match=r"Load the weights with the recorded exclamation$"):
        hs.replay(other, engine)
    with pytest.raises(hs.InputError, match=r"the record cannot be run by .*its clip_skip"):
        hs.replay({**record, "reading": {"clip_skip": 99}}, engine)


def test_a_replay_says_nothing_of_how_a_prompt_could_be_typed(engine: hs.Engine) -> None:
    with pytest.warns(UserWarning, match="as letters"):
        record = engine.sample("(a heart:1.3)", seeds=1).record()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hs.replay(record, engine)


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        ({"plan": "hybird"}, hs.PlanError, "unknown plan"),
        ({"steps": 0, "plan": "base"}, hs.PlanError, "steps"),
        ({"base_guidance": -1.0}, hs.PlanError, "guidance"),
        ({"seeds": -1}, hs.InputError, "out of range"),
        ({"seeds": 2**64}, hs.InputError, "out of range"),
        ({"seeds": [1, 1]}, hs.InputError, "twice"),
        ({"size": 60}, hs.InputError, "multiples of 8"),
        ({"size": 800_000}, hs.InputError, "smaller size"),
        ({"negative": "a dog"}, hs.InputError, "negative"),
        ({"negative": [3], "plan": "base"}, hs.InputError, "a prompt is a string"),
        ({"adapters": 3}, hs.InputError, "strengths by name or a list of names, got 3"),
        ({"adapters": [["ink"]]}, hs.InputError, "strengths by name or a list of names"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(
    engine: hs.Engine, request_: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        engine.sample("a fox", **request_)  # type: ignore[arg-type]
