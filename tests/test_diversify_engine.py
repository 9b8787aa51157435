"""Methods on an engine: what each call promises, with the bundled pair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from bundled import needs_pair

import headstart as hs
import headstart_weights
from headstart.adapters.extract import extract
from headstart.adapters.strength import Strength
from headstart.diversify.methods import NAMES
from headstart.diversify.select import farthest, pooled, seed_of

pytestmark = needs_pair
SEEDS = tuple(range(4))
SHORT = {"steps": 3, "base_guidance": 2.0}
EACH = ("cads:0.25", "embedding-noise:1", "pink:1", "particles:64", "select:2")
MIXED = ("pink:0.5", "cads:0.25,mix=0.5", "particles:16", "select:2", "embedding-noise:1")
INSIDE = "interval:0.3,high=3"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> hs.Engine:
    """The distilled model as a LoRA on the base, of a rank that holds most of it."""
    base, distilled = (headstart_weights.path(name) for name in ("base", "distilled"))
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    extract(base, distilled, path, rank=16)
    return hs.Engine.load(base, distilled_lora=path, preset="demo", device="cpu")


def near(one: hs.Trajectory, other: hs.Trajectory, rows: Sequence[int]) -> None:
    """The images of `one` are these of `other`, up to what a network rounds in another batch."""
    torch.testing.assert_close(one.latents, other.latents[list(rows)], rtol=0, atol=2e-4)
    assert (one.rgb.int() - other.rgb[list(rows)].int()).abs().max() <= 1


@pytest.mark.parametrize("method", EACH)
def test_every_method_changes_the_images_and_costs_what_it_says(
    engine: hs.Engine, method: str
) -> None:
    plain = engine.sample("a frog", plan="distilled", seeds=SEEDS)
    trajectory = engine.sample("a frog", plan="distilled", seeds=SEEDS, diversify=method)
    assert trajectory.passes == (5 if method == "select:2" else 4) and plain.passes == 4
    assert trajectory.table == plain.table and str(trajectory.diversify[0]) == method
    assert not torch.equal(trajectory.rgb, plain.rgb)
    assert trajectory.record()["diversify"] == [method] and "diversify" not in plain.record()


@pytest.mark.parametrize("method", ["cads:0.25", "embedding-noise:1", "pink:1"])
def test_an_image_is_the_same_in_any_batch_and_beside_any_prompt(
    engine: hs.Engine, method: str
) -> None:
    prompts, seeds = ["a fox", "an owl", "a fox", "an owl"], [1, 1, 2, 3]
    every = engine.sample(prompts, plan="hybrid", seeds=seeds, diversify=method)
    for row in (0, 3):
        alone = engine.sample(prompts[row], plan="hybrid", seeds=seeds[row], diversify=method)
        near(alone, every, [row])


@pytest.mark.parametrize("method", ["particles:64", "select:2", MIXED])
def test_images_of_a_prompt_do_not_depend_on_the_other_prompts(
    engine: hs.Engine, method: str | Sequence[str]
) -> None:
    prompts = ["a fox", "an owl", "a fox", "an owl", "an owl", "a fox", "an owl"]
    seeds = [5, 1, 6, 2, 3, 7, 4]
    every = engine.sample(prompts, plan="distilled", seeds=seeds, diversify=method)
    for prompt in ("a fox", "an owl"):
        rows = [row for row, text in enumerate(prompts) if text == prompt]
        text = [seeds[row] for row in rows]
        alone = engine.sample(prompt, plan="distilled", seeds=text, diversify=method)
        near(alone, every, rows)
        if every.chosen is not None:
            assert alone.chosen == tuple(every.chosen[row] for row in rows)


@pytest.mark.parametrize(
    ("plan", "settings"),
    [("distilled", {}), ("base", SHORT), ("distilled", {"steps": 1, "preset": "turbo"})],
)
def test_a_chosen_image_is_that_of_its_seed_without_the_method(
    engine: hs.Engine, plan: str, settings: dict[str, object]
) -> None:
    table = engine.compile(plan, **settings)  # pyright: ignore[reportArgumentType]
    trajectory = engine.sample(
        "a fox", plan=table, seeds=SEEDS, diversify="select:3", keep_x0=True,
        negative="a dog" if plan == "base" else None,
    )  # fmt: skip
    assert (
        trajectory.seeds == SEEDS
        and trajectory.chosen is not None
        and len(set(trajectory.chosen)) == 4
    )
    assert set(trajectory.chosen) - set(SEEDS)
    again = engine.sample(
        "a fox", plan=table, seeds=trajectory.chosen, keep_x0=True,
        negative="a dog" if plan == "base" else None,
    )  # fmt: skip
    near(again, trajectory, range(4))
    assert trajectory.x0 is not None and again.x0 is not None
    torch.testing.assert_close(again.x0, trajectory.x0, rtol=0, atol=2e-4)
    assert trajectory.passes == again.passes + 2 * table[0].passes
    assert trajectory.record()["chosen"] == list(trajectory.chosen)


def test_the_chosen_first_steps_are_the_most_different_of_all_candidates(
    engine: hs.Engine,
) -> None:
    trajectory = engine.sample("a fox", plan="distilled", seeds=SEEDS, diversify="select:2")
    pool = [seed_of(seed, number) for seed in SEEDS for number in range(2)]
    first = next(engine.iterate("a fox", plan="distilled", seeds=pool))
    best = farthest(pooled(first.x0).double(), 4)
    assert trajectory.chosen == tuple(pool[row] for row in best)


def test_candidates_run_with_the_other_methods(engine: hs.Engine) -> None:
    methods = ["cads:0.25", "pink:1"]
    trajectory = engine.sample("a fox", seeds=SEEDS, diversify=["select:2", *methods])
    assert trajectory.chosen is not None
    near(engine.sample("a fox", seeds=trajectory.chosen, diversify=methods), trajectory, range(4))


def test_a_step_is_told_once_a_row_and_the_states_are_the_trajectory(engine: hs.Engine) -> None:
    states: list[hs.State] = []
    trajectory = engine.sample("a fox", seeds=SEEDS, diversify=MIXED, on_step=states.append)
    assert [state.step for state in states] == [0, 1, 2, 3]
    assert torch.equal(states[-1].x, trajectory.latents) and len(states[0].x) == 4
    again = [*engine.iterate("a fox", seeds=SEEDS, diversify=MIXED)]
    assert all(torch.equal(a.x, b.x) for a, b in zip(states, again, strict=True))


@pytest.mark.parametrize("method", ["cads:0.25", "embedding-noise:1,until=0.8", "particles:64"])
def test_a_resumed_run_goes_on_to_the_same_bits(engine: hs.Engine, method: str) -> None:
    options = {"plan": "base", "seeds": SEEDS, "diversify": method, **SHORT}
    whole = [*engine.iterate("a fox", **options)]  # type: ignore[arg-type]
    rest = [*engine.iterate("a fox", **options, resume=whole[0])]  # type: ignore[arg-type]
    assert [state.step for state in rest] == [1, 2]
    assert torch.equal(rest[-1].x, whole[-1].x)


def test_a_branch_of_a_run_with_methods_goes_on_to_its_bits(engine: hs.Engine) -> None:
    states: list[hs.State] = []
    run = engine.sample("a fox", seeds=SEEDS, diversify=MIXED, on_step=states.append)
    assert torch.equal(hs.branch(engine, run, states[1]).rgb, run.rgb)


@pytest.mark.parametrize("methods", [*EACH, MIXED])
def test_a_record_replays_to_the_bit(engine: hs.Engine, methods: str | Sequence[str]) -> None:
    trajectory = engine.sample("a fox", seeds=SEEDS, diversify=methods)
    record = json.loads(json.dumps(trajectory.record()))
    again = hs.replay(record, engine)
    assert again.chosen == trajectory.chosen and again.diversify == trajectory.diversify


def test_the_table_of_an_interval_is_recorded_and_replayed_as_it_ran(engine: hs.Engine) -> None:
    options = {"plan": "base", "steps": 4, "base_guidance": 2.0}
    plain = engine.compile(**options)  # type: ignore[arg-type]
    trajectory = engine.sample("a fox", diversify=INSIDE, **options)  # type: ignore[arg-type]
    levels = [step.sigma for step in plain if not 0.3 < step.sigma <= 3]
    assert 0 < len(levels) < 4 and trajectory.passes == plain.passes() - len(levels)
    by_hand = engine.sample("a fox", plan=trajectory.table)
    assert torch.equal(trajectory.latents, by_hand.latents)
    again = hs.replay(trajectory.record(), engine)
    assert again.table == trajectory.table and again.record()["diversify"] == [INSIDE]


def test_a_record_of_a_method_that_is_not_known_here_is_refused(engine: hs.Engine) -> None:
    record = engine.sample("a fox", diversify="pink:1").record()
    for methods in (["wink:1"], ["pink:9"], ["pink:1", "pink:2"], "pink:1", [3]):
        with pytest.raises(hs.InputError) as caught:
            hs.replay({**record, "diversify": methods}, engine)
        assert len(str(caught.value).splitlines()) <= 10
    with pytest.raises(hs.InputError, match="did you mean 'pink:1'"):
        hs.replay({**record, "diversify": ["pnk:1"]}, engine)
    with pytest.raises(hs.InputError, match="not equal to the record"):
        hs.replay({k: v for k, v in record.items() if k != "diversify"}, engine)


@pytest.mark.parametrize("plan", ["distilled", "base"])
def test_a_replayed_network_gives_the_bits_of_an_eager_one(engine: hs.Engine, plan: str) -> None:
    settings = SHORT if plan == "base" else {}
    methods = [*MIXED, INSIDE] if plan == "base" else MIXED
    options = {"plan": plan, "seeds": SEEDS, "diversify": methods, **settings}
    one = engine.sample("a fox", **options)  # type: ignore[arg-type]
    other = engine.with_runner("replay").sample("a fox", **options)  # type: ignore[arg-type]
    assert torch.equal(one.latents, other.latents) and one.chosen == other.chosen


def test_fewer_samples_at_once_change_an_image_by_rounding_alone(engine: hs.Engine) -> None:
    """Chunks are inside: what acts across images sees all of them."""
    one = engine.sample("a fox", seeds=SEEDS, diversify=MIXED)
    other = engine.sample("a fox", seeds=SEEDS, diversify=MIXED, batch=2)
    assert (one.chunk, other.chunk) == (8, 2)
    near(other, one, range(4))


def test_methods_compose_in_the_order_given(engine: hs.Engine) -> None:
    one, other = "cads:0.5,mix=0", "embedding-noise:4,until=1"
    first = engine.sample("a fox", plan="distilled", seeds=SEEDS, diversify=[one, other])
    second = engine.sample("a fox", plan="distilled", seeds=SEEDS, diversify=[other, one])
    assert not torch.equal(first.rgb, second.rgb)


def test_the_dial_is_a_strength_of_the_distilled_lora(lora: hs.Engine) -> None:
    name = "distilled-lora"
    for method, strength in (
        ("dial:0.25", Strength(0.25, models=("distilled",))),
        ("dial:0.25,first=1", Strength(models=("distilled",), rows=(1.0, 0.25, 1.0, 1.0))),
    ):
        trajectory = lora.sample("a fox", seeds=SEEDS, diversify=method)
        by_hand = lora.sample("a fox", seeds=SEEDS, adapters={name: strength})
        assert torch.equal(trajectory.latents, by_hand.latents)
        assert hs.replay(trajectory.record(), lora).diversify == trajectory.diversify
        assert lora.adapters[name].strength == Strength(models=("distilled",))
    dialled = lora.sample("a fox", plan="distilled", seeds=SEEDS, diversify="dial:0")
    base = lora.sample("a fox", plan="replace-final", k=4, seeds=SEEDS)
    near(dialled, base, range(4))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"diversify": "dial:1"}, "dial:1: it would do nothing"),
        ({"diversify": "dial:0.5", "plan": "base"}, "no row of the distilled model"),
        (
            {"diversify": "dial:0.5", "adapters": {"distilled-lora": 0.3}},
            "adapters= says another strength of 'distilled-lora'",
        ),
    ],
)
def test_a_dial_that_does_nothing_or_is_said_twice_is_refused(
    lora: hs.Engine, inputs: dict[str, object], says: str
) -> None:
    with pytest.raises(hs.InputError, match=says):
        lora.sample("a fox", seeds=SEEDS, **inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"diversify": "dial:0.5"}, "--distilled-lora FILE.*headstart transfer"),
        ({"diversify": INSIDE}, "no row of plan 'demo-hybrid' is guided"),
        ({"diversify": "interval:0", **SHORT, "plan": "base"}, "each of them lies in .0, inf."),
        ({"diversify": "interval:50", **SHORT, "plan": "base"}, "none of them lies in .50, inf."),
        ({"diversify": "cads:0.1", "plan": "skip-first", "k": 2}, "starts at 0.499: give a lower"),
        ({"diversify": "particles:1,above=6"}, "acts at level 6 and above"),
        ({"diversify": "particles:1", "seeds": (1, 2)}, "at least 3 images of a prompt.* has 2"),
        ({"diversify": "select:2", "seeds": 1}, "at least 2 images of a prompt"),
        ({"diversify": ["pink:1", "pink:2"]}, "'pink' is given twice"),
        ({"diversify": "zzz:1"}, "there is\n  cads:0.1"),
        ({"diversify": 1}, "expected methods such as"),
    ],
)
def test_a_method_that_cannot_act_is_refused_before_anything_runs(
    engine: hs.Engine, inputs: dict[str, object], says: str
) -> None:
    inputs = {"seeds": SEEDS, **inputs}
    for call in (engine.sample, engine.iterate):
        with pytest.raises(hs.InputError, match=f"(?s){says}"):
            call("a fox", **inputs)  # type: ignore[arg-type, operator]


def test_a_prompt_with_fewer_images_than_the_others_is_named(engine: hs.Engine) -> None:
    prompts = ["a fox"] * 3 + ["an owl"] * 2
    with pytest.raises(hs.InputError, match="'an owl' has 2: give more seeds"):
        engine.sample(prompts, seeds=range(5), diversify="particles:8")


def test_what_acts_across_images_takes_no_strength_for_each(engine: hs.Engine) -> None:
    control = engine.attach(headstart_weights.path("yellow"), name="yellow")
    try:
        with pytest.raises(hs.InputError, match="strengths of their own"):
            engine.sample(
                "a fox", seeds=SEEDS, adapters={control.name: (0, 1, 2, 3)}, diversify="select:2"
            )
        one = engine.sample("a fox", seeds=SEEDS, adapters={control.name: 2}, diversify=MIXED)
        assert hs.replay(one.record(), engine).chosen == one.chosen
    finally:
        engine.detach(control.name)


def test_a_run_behind_its_first_row_cannot_choose_seeds(engine: hs.Engine) -> None:
    state = next(engine.iterate("a fox", seeds=SEEDS))
    with pytest.raises(hs.InputError, match=r"leave it out.*Trajectory.chosen"):
        engine.iterate("a fox", seeds=SEEDS, diversify="select:2", resume=state)


def test_a_run_for_a_batch_takes_no_methods(engine: hs.Engine) -> None:
    with pytest.raises(hs.InputError, match="use sample or iterate"):
        engine.begin("a fox", diversify="cads:0.1")  # type: ignore[call-arg]


def test_a_network_that_fails_at_its_candidates_is_told_at_that_row(engine: hs.Engine) -> None:
    def broken(x_in: torch.Tensor, timestep: object, cond: object) -> torch.Tensor:
        return x_in * float("nan")

    weights = replace(engine.weights, denoisers={"base": broken, "distilled": broken})
    with pytest.raises(hs.InputError, match="step 0"):
        hs.Engine(weights).sample("a fox", seeds=SEEDS, diversify="select:2")


def test_every_method_of_the_table_is_run_here() -> None:
    run = {method.partition(":")[0] for method in (*EACH, *MIXED, INSIDE, "dial:0.25")}
    assert run == set(NAMES)


@pytest.mark.parametrize("method", ["select:2", "particles:64"])
def test_methods_across_images_refuse_images_that_are_told_several_things(
    engine: hs.Engine, method: str
) -> None:
    call = {"plan": "distilled", "seeds": SEEDS[:3], "diversify": method}
    negatives = ["a frog", "a frog, blue", "a barn"]
    with pytest.raises(hs.InputError, match=r"'a fox' differ in negative="):
        engine.sample("a fox", negative=negatives, distilled_guidance=2.0, **call)
    rows = engine.text.encode(["a fox", "a fox", "an owl"])
    with pytest.raises(hs.InputError, match=r"differ in cond="):
        engine.sample(cond=rows, **call)
    alike = rows[torch.tensor([0, 0, 0])]
    one = engine.sample(cond=rows[:1], **call)
    assert torch.equal(engine.sample(cond=alike, **call).latents, one.latents)
    several, names = rows[torch.tensor([0, 0, 0, 2, 2, 2])], ["a"] * 3 + ["b"] * 3
    named = engine.sample(names, cond=several, **call | {"seeds": [*SEEDS[:3]] * 2})
    near(one, named, range(3))


@pytest.mark.parametrize("method", ["cads:0.1", "embedding-noise:1"])
def test_an_image_does_not_depend_on_how_long_other_texts_are(
    engine: hs.Engine, method: str
) -> None:
    long = "a fox, " + "a red and very small barn, " * 10
    call = {"plan": "base", "steps": 2, "base_guidance": 2.0, "seeds": 1, "diversify": method}
    short = engine.sample("a fox", **call)
    near(short, engine.sample(["a fox", long], **call), [0])
    near(engine.sample(long, **call), engine.sample(["a fox", long], **call), [1])
    near(short, engine.sample("a fox", **call | {"negative": ["", long]}), [0])
    levels = "a fox -> {} below sigma 1"
    apart = engine.sample(levels.format(long), **call)
    near(apart, engine.sample(["a fox", levels.format(long)], **call), [1])
