"""runner="trajectory": a whole run as one launch has the bits of the same run row by row."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapter_samples import random_lora, write
from tiny_pair import PLAN, tiny_engine
from torch import Tensor

import headstart as hs
import headstart_weights
from evidence.fake_cuda import FakeCuda
from headstart.cli import main
from headstart.engine.execution import by_rows
from headstart.errors import CaptureError, InputError
from headstart.memory.budget import Chunks
from headstart.memory.residency import Residency
from headstart.networks.fusion import fusion
from headstart.runner.capture import Site
from headstart.runner.graph import GraphRunner
from headstart.runner.runner import choose_runner, open_runner

RUNNERS = "eager", "trajectory"
CPU = torch.device("cpu")
Pair = tuple[hs.Engine, hs.Engine]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def engines(request: pytest.FixtureRequest) -> Pair:
    """(eager, trajectory) of the same networks."""
    eager = tiny_engine(request.param)
    return eager, eager.with_runner("trajectory")


@pytest.fixture(scope="module")
def two() -> Pair:
    eager = tiny_engine("sd15")
    return eager, eager.with_runner("trajectory")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Launches are on a fake GPU, which overwrites the memory of its graphs before each."""
    cuda = FakeCuda()
    site = Site(CPU, cuda)
    monkeypatch.setattr("headstart.engine.execution.site_of", lambda device: site)
    return cuda


def same(engines: Pair, prompts: Any = "cat", **options: Any) -> hs.Trajectory:
    """Both ways, every bit compared; the one by launches."""
    one, other = (engine.sample(prompts, keep_x0=True, **options) for engine in engines)
    assert torch.equal(one.latents, other.latents) and torch.equal(one.rgb, other.rgb)
    assert one.x0 is not None and other.x0 is not None and torch.equal(one.x0, other.x0)
    return other


def with_update(update: hs.Update, guidance: float = 3.0) -> hs.Plan:
    base, distilled = PLAN.legs
    return replace(PLAN, legs=(replace(base, guidance=guidance), replace(distilled, update=update)))


PLANS = {
    "guided": PLAN,
    "draws noise": with_update(hs.Update.RENOISE, 1.0),
    "looks back": with_update(hs.Update.DPMPP_2M),
    "one model": replace(PLAN, legs=(replace(PLAN.legs[1], timesteps=(999, 499)),)),
    "ends above 0": hs.Plan(
        (hs.Leg(model="distilled", timesteps=(999, 499)),), start="unit", end="first"
    ),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_bits_of_an_eager_run(engines: Pair, plan: hs.Plan) -> None:
    done = same(engines, ["cat", "dog"], plan=plan, seeds=[5, 6])
    assert (done.table.end_scale < 1.0) == (plan.end == "first")
    assert set(done.latency_ms) == {"text", "base", "distilled", "decode"}
    assert done.latency_ms[done.table[-1].model] > 0 == done.latency_ms["decode"]


def test_on_a_gpu_it_is_one_launch_and_no_python(gpu: FakeCuda, two: Pair) -> None:
    """Another prompt, seed and guidance are copies: nothing is captured anew."""
    eager, whole = two
    for seed, guidance in ((1, 3.0), (2, 7.0)):
        plan = with_update(hs.Update.RENOISE, guidance)
        with gpu.running():  # the order of every access is checked
            same(two, f"cat {seed}", plan=plan, seeds=[seed, 9])
        assert len(gpu.happened("replay")) == seed and len(gpu.happened("capture")) == 1
    assert whole.runner == "trajectory" and eager.runner == "eager"


def test_more_images_than_fit_are_several_launches(
    gpu: FakeCuda, two: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with the bits of its samples alone; also of a start that is not drawn from keys."""
    none: Any = lambda *_: None  # noqa: E731
    monkeypatch.setattr("headstart.networks.convolution.small_convolution", none)  # none on a GPU
    eager, whole = two
    legs = (
        hs.Leg(model="base", timesteps=(999,), guidance=3.0),
        hs.Leg(model="distilled", timesteps=(499,), update=hs.Update.ANCESTRAL),
    )
    plan, seeds = hs.Plan(legs), [1, 2, 3]
    start = hs.Philox(seeds).initial((4, 8, 8), CPU) * 0.9
    with fusion(False):  # nor norms in C
        for options in ({}, {"noise": start}, {"diversify": "pink:1"}):
            done = whole.sample("cat", plan=plan, seeds=seeds, batch=2, keep_x0=True, **options)
            for part in (slice(0, 2), slice(2, 3)):
                settings = options | ({"noise": start[part]} if "noise" in options else {})
                alone = eager.sample("cat", plan=plan, seeds=seeds[part], keep_x0=True, **settings)
                assert torch.equal(done.rgb[part], alone.rgb)
                assert done.x0 is not None and alone.x0 is not None
                assert torch.equal(done.x0[:, part], alone.x0)
    assert done.chunk == 2 and len(gpu.happened("replay")) == 6


def test_noise_that_was_given_for_every_row(two: Pair) -> None:
    plan = with_update(hs.Update.RENOISE)
    noise = [hs.Philox([7, 8]).step(row, (4, 8, 8), CPU) for row in range(4)]
    same(two, plan=plan, noise=hs.Given(noise[0], noise))


def test_strengths_of_adapters_by_row_and_sample(two: Pair, tmp_path: Path) -> None:
    """And those of the run, whatever is attached to the networks meanwhile."""
    network: Any = two[0].denoisers["base"]
    file = write(tmp_path / "age.safetensors", random_lora(network, size=0.5))
    two[0].attach(file)
    states: list[Tensor] = []
    try:
        for strength in (0.0, 1.0, [0.5, -1.0], [[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [1.0, 1.0]]):
            options = {"adapters": {"age": strength}, "seeds": [1, 2], "plan": PLAN}
            states.append(same(two, **options).latents)
        cut = two[1].sample("cat", batch=1, plan=PLAN, seeds=[1, 2], adapters={"age": [0.5, -1.0]})
        for image, strength in enumerate((0.5, -1.0)):
            one = {"seeds": [image + 1], "adapters": {"age": strength}, "plan": PLAN}
            assert torch.equal(cut.latents[image], two[0].sample("cat", **one).latents[0])
    finally:
        two[0].detach("age")
    assert len({latents.sum().item() for latents in states}) == len(states)


def test_a_record_is_run_again_by_launch_and_by_row(two: Pair) -> None:
    _, whole = two
    record = whole.sample("cat", plan=PLAN, seeds=[3, 4]).record()
    assert record["machine"]["runner"] == "trajectory"
    for engine in two:
        hs.replay(record, engine)


class Counts:
    """An observer that wants the number of rows alone."""

    def __init__(self) -> None:
        self.states, self.budgets = 0, list[int]()

    def __call__(self, state: hs.State) -> None:
        self.states += 1

    def rows(self, count: int) -> None:
        self.budgets.append(count)


def test_an_observer_of_the_number_of_rows_is_told_it_after_the_launch(two: Pair) -> None:
    for engine, states, budgets in zip(two, (4, 0), ([], [4]), strict=True):
        counts = Counts()
        engine.sample("cat", plan=PLAN, on_step=counts)
        assert (counts.states, counts.budgets) == (states, budgets)


BY_ROW: dict[str, dict[str, Any]] = {
    "on_step looks at each": {"on_step": lambda state: None},
    "changes with the level": {"prompts": "a cat -> a dog at the hand-off"},
    "diversify cads:0.2 acts between rows": {"diversify": "cads:0.2"},
    "diversify particles:1 acts between rows": {"diversify": "particles:1"},
    "diversify select:2 acts between rows": {"diversify": "select:2"},
}


@pytest.mark.parametrize("why", BY_ROW)
def test_what_acts_between_rows_runs_row_by_row_and_the_log_says_why(
    two: Pair, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"prompts": "cat", "seeds": [1, 2, 3], "plan": PLAN} | BY_ROW[why]
    with caplog.at_level("INFO", "headstart.engine.execution"):
        same(two, options.pop("prompts"), **options)
    assert [message for message in caplog.messages if why in message] == caplog.messages != []


def test_places_that_one_launch_cannot_have_run_row_by_row() -> None:
    """Two devices, weights that take turns, a decoder with a chunk or bands of its own."""

    class Loop:
        request, conds = (
            type("R", (), {"table": PLAN.compile(hs.NoiseSchedule.scaled_linear())}),
            (),
        )
        weights: Any = type("W", (), {"vae": None, "device": CPU, "residency": Residency()})

    def why() -> str | None:
        return by_rows(Loop)  # type: ignore[arg-type]

    Loop.request.methods, Loop.request.chunks = (), Chunks(2, 2)
    far = torch.nn.Linear(1, 1, device="meta")
    Loop.weights.denoisers = {"base": torch.nn.Linear(1, 1), "distilled": far}
    assert why() == "the networks are on cpu, meta"
    Loop.weights.denoisers["distilled"] = Loop.weights.denoisers["base"]
    assert why() is None
    Loop.request.chunks = Chunks(2, 1, 4)
    assert why() == "the decoder has 1 samples at once, in 4 bands"
    Loop.weights.residency = Residency(arenas=(cast("Any", object()),))
    assert why() == "weights come and go between rows"


def test_other_ways_to_run_go_row_by_row(two: Pair) -> None:
    """iterate, and a batch of runs; resumed they may be changed."""
    _, whole = two
    states = [list(engine.iterate("cat", plan=PLAN, seeds=[1])) for engine in two]
    assert all(torch.equal(a.x, b.x) for a, b in zip(*states, strict=True))
    last = list(whole.iterate("cat", plan=PLAN, seeds=[1], resume=states[0][1]))[-1]
    assert torch.equal(last.x, states[0][-1].x)
    assert isinstance(open_runner("trajectory", whole.denoisers["base"]), GraphRunner)


def poisoned(module: Any) -> Callable[[], None]:
    """Make its outputs NaN; returns what undoes it."""
    bias = module.bias.detach().clone()
    module.bias.data.fill_(float("nan"))
    return lambda: module.bias.data.copy_(bias)


def test_nan_is_named_as_in_a_run_by_rows(two: Pair) -> None:
    networks: Any = two[0].denoisers
    for broken, message in (
        (networks["distilled"].conv_out, r"step 2: the 'distilled' network .* \[0, 1, 2\] of 3"),
        (two[0].vae.decoder.conv_out, r"decoder gave NaN or infinity for seed\(s\) \[4, 5, 6\]"),  # type: ignore[attr-defined]
    ):
        mend = poisoned(broken)
        try:
            for engine in two:
                with pytest.raises(InputError, match=message):
                    engine.sample("cat", plan=PLAN, seeds=[4, 5, 6], batch=2)
        finally:
            mend()


def test_a_decoder_runs_in_its_own_dtype_and_again_where_float16_overflows(two: Pair) -> None:
    """From the latents that the launch left, with the warning of a run by rows."""
    vae: Any = deepcopy(two[0].vae).half()
    weights = replace(two[0].weights, vae=vae, vae_dtype=torch.float16)
    pair = hs.Engine(weights), hs.Engine(weights, "trajectory")
    same(pair, plan=PLAN, seeds=[1, 2])
    vae.decoder.conv_out.weight.data.mul_(3e5)
    with pytest.warns(UserWarning, match="overflowed in float16") as warnings:
        done = same(pair, plan=PLAN, seeds=[1, 2])
    assert len(warnings) == 2 and done.latency_ms["decode"] > 0


def test_it_exists_on_a_gpu_and_on_a_cpu() -> None:
    assert {choose_runner("trajectory", kind).name for kind in ("cpu", "cuda:1")} == {"trajectory"}
    with pytest.raises(CaptureError, match="'trajectory' exists on cuda and cpu alone"):
        choose_runner("trajectory", "xpu")


@pytest.mark.skipif(
    not (Path(headstart_weights.__file__).parent / headstart_weights.MANIFEST).is_file(),
    reason="needs the bundled pair",
)
def test_from_the_command_line_it_is_one_launch_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A progress bar counts rows, and so does not look at them."""
    options = ["sample", "a fox", "--seeds", "3", "--device", "cpu", "--runner"]
    with caplog.at_level("INFO", "headstart.engine.execution"):
        for runner in RUNNERS:
            assert main([*options, runner, "--out", str(tmp_path / runner)]) == 0
    one, other = (json.loads((tmp_path / r / "record.json").read_text()) for r in RUNNERS)
    assert one["results"] == other["results"] and other["machine"]["runner"] == "trajectory"
    assert caplog.messages == []
