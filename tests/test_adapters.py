"""Adapters on both models: exact, live, per sample and per row, and gone without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import (
    call,
    detach_all,
    digest,
    merged_by_hand,
    random_lora,
    write_lora,
)
from bundled import needs_pair
from torch import Tensor, nn

import headstart as hs
from headstart.adapters.strength import Strength

pytestmark = needs_pair
Make = Callable[..., Path]
SEEDS = (1, 2, 3)


@pytest.fixture
def engine(engine: hs.Engine) -> Iterator[hs.Engine]:
    yield engine
    detach_all(engine)


@pytest.fixture
def make(tmp_path: Path, engine: hs.Engine) -> Make:
    return partial(write_lora, tmp_path, engine)


@pytest.mark.parametrize("part", ["attn", "conv", "emb", ""])
def test_a_live_lora_is_the_merged_network(engine: hs.Engine, make: Make, part: str) -> None:
    """Against float64 weights merged by hand. The unadapted float32 network differs from its own
    float64 twin by the rounding of the same sums, so that difference, doubled, is the tolerance:
    the low-rank path has at most as many roundings again."""
    network: Any = engine.denoisers["base"]
    rounding = (call(network) - call(merged_by_hand(network, {}, 0))).abs().max()
    path = make(part=part)
    tensors = random_lora(network, part)
    engine.attach(path)
    live = call(network, strengths=torch.full((3, 1), 1.5))
    engine.detach("age")
    oracle = call(merged_by_hand(network, tensors, 1.5))
    assert (live - oracle).abs().max() <= 2 * rounding
    assert (call(network) - oracle).abs().max() > 1e3 * rounding  # it does something


def test_peft_computes_the_same_adapter(engine: hs.Engine, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import copy

    network: Any = engine.denoisers["distilled"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v", "conv1"])
    theirs = peft.get_peft_model(copy.deepcopy(network), config)
    draw = torch.Generator().manual_seed(3)
    for name, tensor in theirs.named_parameters():
        if "lora_" in name:
            tensor.data.copy_(0.05 * torch.randn(tensor.shape, generator=draw))
    theirs.save_pretrained(tmp_path / "peft")
    with torch.inference_mode():
        expected = call(theirs.base_model.model)
    report = engine.attach(tmp_path / "peft", to=["distilled"], name="theirs")
    assert report.rank == 4
    got = call(network, strengths=torch.ones(3, 1))
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_detaching_leaves_not_one_bit_any_number_of_times(engine: hs.Engine, make: Make) -> None:
    before = digest(engine.sample("a fox", seeds=1))
    state = [id(p) for model in engine.denoisers.values() for p in model.parameters()]  # type: ignore[attr-defined]
    path = make(part="")
    outputs = set()
    for _ in range(3):
        engine.attach(path)
        outputs.add(digest(engine.sample("a fox", seeds=1)))
        engine.detach("age")
        assert digest(engine.sample("a fox", seeds=1)) == before
    assert len(outputs) == 1
    assert outputs != {before}
    assert state == [id(p) for model in engine.denoisers.values() for p in model.parameters()]  # type: ignore[attr-defined]
    hooks = [m._forward_hooks for model in engine.denoisers.values() for m in model.modules()]  # type: ignore[attr-defined]
    assert not any(hooks)


def test_strength_zero_is_detached_to_the_bit(engine: hs.Engine, make: Make) -> None:
    plans = [engine.compile("hybrid"), engine.compile("base", steps=2, base_guidance=2.0)]
    before = [digest(engine.sample("a fox", seeds=1, plan=plan)) for plan in plans]
    engine.attach(make(part=""), strength=0.0)
    assert [digest(engine.sample("a fox", seeds=1, plan=plan)) for plan in plans] == before


def test_a_sample_at_strength_zero_keeps_its_values_beside_others(
    engine: hs.Engine, make: Make
) -> None:
    """The other samples run the low-rank path, so this one gets 0 added: equal values."""
    plain = engine.sample("a fox", seeds=SEEDS).latents
    engine.attach(make(part=""))
    mixed = engine.sample("a fox", seeds=SEEDS, adapters={"age": [1.0, 0.0, -1.0]}).latents
    assert torch.equal(mixed[1], plain[1])
    assert not torch.equal(mixed[0], plain[0])


def test_strengths_of_a_batch_are_those_of_runs_of_their_own(engine: hs.Engine, make: Make) -> None:
    """The batch is the same, so the rounding is too: every sample equal to the bit."""
    engine.attach(make())
    values = (-2.0, 0.5, 2.0)
    mixed = engine.sample("a fox", seeds=SEEDS, adapters={"age": values}).latents
    for sample, value in enumerate(values):
        alone = engine.sample("a fox", seeds=SEEDS, adapters={"age": value}).latents
        assert torch.equal(mixed[sample], alone[sample])


def test_a_guided_plan_steers_both_halves_of_the_pair(engine: hs.Engine, make: Make) -> None:
    """Against the guided network written out: F_u + w (F_c - F_u), each at its strength."""
    engine.attach(make())
    values = [-1.0, 0.0, 2.0]
    table = engine.compile("base", steps=2, base_guidance=3.0)
    outputs: list[Tensor] = []
    network: Any = engine.denoisers["base"]
    spy = network.register_forward_pre_hook(lambda _, args: outputs.append(args[2].strengths))
    engine.sample("a fox", seeds=SEEDS, plan=table, adapters={"age": values})
    spy.remove()
    assert [list(strengths.shape) for strengths in outputs] == [[6, 1], [6, 1]]
    assert outputs[0].flatten().tolist() == values * 2


@pytest.mark.parametrize("batch", [1, 2])
def test_chunks_take_their_own_samples_strengths(engine: hs.Engine, make: Make, batch: int) -> None:
    engine.attach(make())
    options = {"adapters": {"age": [-2.0, 0.5, 2.0]}, "plan": "base", "steps": 3}
    whole = engine.sample("a fox", seeds=SEEDS, **options).latents
    cut = engine.sample("a fox", seeds=SEEDS, batch=batch, **options).latents
    assert (cut - whole).norm() <= 1e-4 * whole.norm()  # products of another shape round otherwise


def test_a_strength_by_row_is_the_run_resumed_at_another_strength(
    engine: hs.Engine, make: Make
) -> None:
    engine.attach(make())
    rows = (1.0, 0.0, 2.0, -1.0)
    states = list(engine.iterate("a fox", seeds=SEEDS, adapters={"age": Strength(rows=rows)}))
    table = engine.compile("hybrid")
    cond = engine.text.encode(["a fox"] * 3)
    for row in range(1, 4):
        strengths = engine.adapters.strengths(table, 3, {"age": rows[row]})
        again = hs.sample(
            table,
            engine.denoisers,
            cond,
            hs.Philox(SEEDS),
            resume=states[row - 1],
            strengths=strengths,
        )
        assert torch.equal(next(again).x, states[row].x)


def test_off_above_a_timestep_and_on_one_leg_are_columns(engine: hs.Engine, make: Make) -> None:
    engine.attach(make())
    table = engine.compile("hybrid")
    column = {
        name: engine.adapters.strengths(table, 1, {"age": strength})
        for name, strength in {
            "late": Strength(2.0, below=749),
            "distilled": Strength(2.0, models=("distilled",)),
            "base": Strength(2.0, models=("base",), below=2000),
        }.items()
    }
    outputs = {
        name: [v.item() for v in values] for name, values in column.items() if values is not None
    }
    assert [step.model for step in table] == ["base", *["distilled"] * 3]
    times = [step.timestep for step in table]
    assert outputs["late"] == [2.0 if t <= 749 else 0.0 for t in times]
    assert 0.0 in outputs["late"] and 2.0 in outputs["late"]
    assert outputs["distilled"] == [0.0, 2.0, 2.0, 2.0]
    assert outputs["base"] == [2.0, 0.0, 0.0, 0.0]


def test_a_plan_multiplies_its_own_column(engine: hs.Engine, make: Make) -> None:
    engine.attach(make(), strength=[1.0, -2.0])
    legs = (
        hs.Leg(model="base", timesteps=(999,), guidance=1.0),
        hs.Leg(model="distilled", timesteps=(749, 499), adapters=(("age", 0.5),)),
    )
    table = engine.compile(hs.Plan(legs))
    strengths = engine.adapters.strengths(table, 2)
    assert strengths is not None
    assert strengths[..., 0].tolist() == [[0.0, 0.0], [0.5, -1.0], [0.5, -1.0]]


def test_an_adapter_of_one_model_leaves_the_other_alone(engine: hs.Engine, make: Make) -> None:
    plain = engine.sample("a fox", seeds=1, plan="distilled").latents
    engine.attach(make(), to=["base"])
    assert torch.equal(engine.sample("a fox", seeds=1, plan="distilled").latents, plain)
    assert not torch.equal(
        engine.sample("a fox", seeds=1, plan="hybrid").latents,
        engine.sample("a fox", seeds=1, plan="hybrid", adapters=[]).latents,
    )


def test_composition_adds_and_the_order_of_attaching_does_not_matter(
    engine: hs.Engine, make: Make
) -> None:
    one, two = make("one", seed=1), make("two", seed=2)
    network: Any = engine.denoisers["base"]
    twin = merged_by_hand(network, random_lora(network, seed=1), 1.0)
    twin = merged_by_hand(twin, random_lora(network, seed=2), -0.5)
    outputs: list[Tensor] = []
    for order in ((one, two), (two, one)):
        for path in order:
            engine.attach(path)
        assert engine.adapters.columns == ("one", "two")
        outputs.append(call(network, strengths=torch.tensor([[1.0, -0.5]])))
        for path in order:
            engine.detach(path.stem)
    assert torch.equal(*outputs)
    rounding = (call(network) - call(merged_by_hand(network, {}, 0))).abs().max()
    assert (outputs[0] - call(twin)).abs().max() <= 2 * rounding


def test_swapping_a_smaller_adapter_moves_no_buffer(engine: hs.Engine, make: Make) -> None:
    small = make("small", rank=2, seed=5)
    engine.attach(small, name="age")
    alone = digest(engine.sample("a fox", seeds=SEEDS))
    engine.detach("age")
    engine.attach(make(rank=4), name="age")
    pointers = buffers(engine)
    assert pointers
    report = engine.attach(small, name="age", replace=True)
    assert report.in_place
    assert pointers == buffers(engine)
    assert _close(engine.sample("a fox", seeds=SEEDS), alone, engine, small)
    before, pointers = engine.adapters.look(), buffers(engine)  # kept: memory is used again
    grown = engine.attach(make("large", rank=8), name="age", replace=True)
    assert not grown.in_place
    assert before != engine.adapters.look() and not set(buffers(engine)) & set(pointers)


def buffers(engine: hs.Engine) -> list[int]:
    """Where the tensors of attached adapters are."""
    now = engine.adapters.now()
    parts = [part for network in engine.denoisers.values() for part in now.parts(network)]
    return [b.data_ptr() for part in parts for b in part.buffers()]


def _close(done: hs.Trajectory, alone: str, engine: hs.Engine, small: Path) -> bool:
    """Unused ranks add zeros, in a product of another shape: equal up to rounding."""
    engine.attach(small, name="other", strength=0.0)
    engine.detach("other")
    engine.detach("age")
    engine.attach(small, name="age")
    again = engine.sample("a fox", seeds=SEEDS)
    assert digest(again) == alone
    return bool((done.latents - again.latents).norm() <= 1e-4 * again.latents.norm())


def test_a_swap_in_place_leaves_nothing_of_what_was_there(engine: hs.Engine, make: Make) -> None:
    engine.attach(make("age", part="attn"), name="age")
    part = make("part", part="attn1", seed=4)
    assert engine.attach(part, name="age", replace=True).in_place
    swapped = call(engine.denoisers["base"], strengths=torch.ones(3, 1))
    engine.detach("age")
    engine.attach(part, name="age")
    fresh = call(engine.denoisers["base"], strengths=torch.ones(3, 1))
    assert torch.equal(swapped, fresh)


def test_two_threads_with_strengths_of_their_own_do_not_mix(engine: hs.Engine, make: Make) -> None:
    engine.attach(make())

    def run(value: float) -> Tensor:
        return engine.sample("a fox", seeds=SEEDS, adapters={"age": value}).latents

    values = (-2.0, 2.0)
    alone = [run(value) for value in values]
    with ThreadPoolExecutor(2) as pool:
        for got, expected in zip(pool.map(run, values * 3), alone * 3, strict=True):
            assert torch.equal(got, expected)


def test_a_record_with_adapters_replays_and_tells_what_is_missing(
    engine: hs.Engine, make: Make
) -> None:
    path = make()
    engine.attach(path, to=["distilled"])
    options = {"age": Strength((2.0, -1.0), below=800)}
    done = engine.sample("a fox", seeds=(1, 2), adapters=options)
    record = done.record()
    assert record["adapters"]["age"]["to"] == ["distilled"]
    assert torch.equal(hs.replay(record, engine).rgb, done.rgb)
    engine.detach("age")
    with pytest.raises(hs.InputError, match="adapter:age"):
        hs.replay(record, engine)
    engine.attach(path)
    with pytest.raises(hs.InputError, match="to="):
        hs.replay(record, engine)
    plain = engine.sample("a fox", seeds=1, adapters=[])
    engine.detach("age")
    bare = engine.sample("a fox", seeds=1)
    assert torch.equal(plain.rgb, bare.rgb)
    engine.attach(path)
    with pytest.raises(hs.InputError, match="without adapter:age"):
        hs.replay(bare.record(), engine)


def test_networks_outside_a_run_demand_their_strengths(engine: hs.Engine, make: Make) -> None:
    engine.attach(make())
    with pytest.raises(hs.AdapterError, match="has no strengths"):
        call(engine.denoisers["base"])
    for wrong in (torch.ones(3, 2), torch.ones(2, 1)):
        with pytest.raises(hs.AdapterError, match="expected strengths"):
            call(engine.denoisers["base"], strengths=wrong)
    network: Any = engine.denoisers["base"]
    with pytest.raises(hs.AdapterError, match="not called as"):
        network(torch.zeros(1, 4, 8, 8), torch.tensor(1))
    engine.detach("age")
    call(engine.denoisers["base"])


def test_a_failed_call_leaves_no_strengths_behind(engine: hs.Engine, make: Make) -> None:
    engine.attach(make())
    network: Any = engine.denoisers["base"]
    cond = hs.Conditioning(torch.zeros(1, 16, 127), strengths=torch.ones(1, 1))
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 4, 16, 16), torch.tensor(1), cond)
    layer = network.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(1, 3, 128)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))


BAD_RUNS: list[tuple[str, Any]] = [
    ("no adapter 'ages'", {"adapters": {"ages": 1.0}}),
    ("no adapter 'ages'", {"adapters": ["ages"]}),
    ("2.*samples.*3", {"adapters": {"age": [1.0, 2.0]}}),
    ("rows", {"adapters": {"age": Strength(rows=(1.0, 2.0))}}),
    ("finite", {"adapters": {"age": float("nan")}}),
    ("finite", {"adapters": {"age": [1.0, float("inf"), 0.0]}}),
    ("a number", {"adapters": {"age": "strong"}}),
    ("it is attached to 'base', 'distilled'", {"adapters": {"age": Strength(models=("distil",))}}),
    ("sets adapter", {"plan": hs.Plan((hs.Leg(model="base", steps=2, adapters=(("x", 1),)),))}),
]


@pytest.mark.parametrize(("message", "inputs"), BAD_RUNS)
def test_a_run_that_asks_for_strengths_it_cannot_have_is_refused(
    engine: hs.Engine, make: Make, message: str, inputs: dict[str, Any]
) -> None:
    engine.attach(make())
    with pytest.raises(hs.InputError, match=message):
        engine.iterate("a fox", seeds=SEEDS, **inputs)


def test_what_does_not_fit_is_refused_and_changes_nothing(engine: hs.Engine, make: Make) -> None:
    good = random_lora(engine.denoisers["base"])  # type: ignore[arg-type]
    key = next(name for name in good if name.endswith("lora_up.weight"))
    bad: dict[str, tuple[str, dict[str, Tensor]]] = {
        "nan": ("NaN|finite", {**good, key: good[key] * float("nan")}),
        "rank": ("rank", {**good, key: torch.zeros(len(good[key]), 7)}),
        "stray": ("unknown here", {**good, "lora_unet_sideways.diff": torch.ones(2, 2)}),
        "zero": ("torn", {"lora_unet_x_to_q.lora_up.weight": torch.ones(4, 4)}),
    }
    before = digest(engine.sample("a fox", seeds=1))
    for name, (message, tensors) in bad.items():
        with pytest.raises(hs.AdapterError, match=message):
            engine.attach(make(name, tensors))
    assert not len(engine.adapters)
    assert digest(engine.sample("a fox", seeds=1)) == before
    engine.attach(make())
    with pytest.raises(hs.AdapterError, match="attached already"):
        engine.attach(make())
    with pytest.raises(hs.AdapterError, match="this engine has"):
        engine.attach(make(), name="b", to=["turbo"])
    with pytest.raises(hs.InputError, match="to act on 'distilled': it is attached to 'base'"):
        engine.attach(make(), Strength(models=("distilled",)), ["base"], name="b")
    with pytest.raises(hs.InputError, match="no adapter"):
        engine.detach("b")


def test_state_dicts_do_not_know_of_adapters(engine: hs.Engine, make: Make) -> None:
    network: Any = engine.denoisers["base"]
    names = list(network.state_dict())
    engine.attach(make())
    assert list(network.state_dict()) == names
