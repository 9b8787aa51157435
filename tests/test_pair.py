"""Engines made of small random files in the bundled layout: loading, batches, threads, records."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import headstart as hs
from headstart.checkpoint.families import FAMILIES
from headstart.engine.devices import choose_device
from headstart.interfaces import Conditioning
from headstart.networks.tower import ClipParams, Tower
from headstart.networks.unet import Mid, Stage, UNet, UNetParams
from headstart.networks.vae import Vae, VaeParams
from headstart.noise import Philox
from headstart_kernels import INITIAL, philox_normal
from headstart_weights.recipe.export import base_tensors, half, serialise
from headstart_weights.recipe.tokenizer import fit_tokenizer

CPU = torch.device("cpu")
CAPTIONS = ["a fox", "an owl on a blue background"]
METADATA = {
    "headstart.family": "demo",
    "headstart.prediction": "v",
    "headstart.head_dim": "8",
    "headstart.norm_groups": "8",
    "headstart.vae_norm_groups": "4",
    "headstart.scale_factor": "1.0",
    "headstart.text_heads": "2",
    "headstart.image_size": "32",
}


def tiny_unet(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    params = UNetParams(
        down=(Stage(8, (0,), True), Stage(16, (1,), False)),
        mid=Mid(resnets=2, depth=1),
        up=(Stage(16, (1, 1), True), Stage(8, (0, 0), False)),
        context_dim=16,
        head_dim=8,
        norm_groups=8,
    )
    return UNet(params).state_dict()


def tiny_text(vocabulary: int) -> dict[str, Tensor]:
    params = ClipParams(
        width=16,
        layers=1,
        heads=2,
        mlp_width=32,
        act="quick_gelu",
        positions=16,
        vocabulary=vocabulary,
    )
    return Tower(params, FAMILIES["demo"].text[0]).state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.safetensors with everything in it, distilled.safetensors with a UNet alone."""
    found = tmp_path_factory.mktemp("pair")
    tokenizer = fit_tokenizer(CAPTIONS)
    vae = Vae(VaeParams(channels=(4, 8, 8), layers=1, norm_groups=4)).state_dict()
    text = tiny_text(tokenizer.get_vocab_size())
    tensors = base_tensors(tiny_unet(1), vae, text, hs.NoiseSchedule.scaled_linear().matched(0.4))
    words = {"headstart.tokenizer": tokenizer.to_str()}
    (found / "base.safetensors").write_bytes(serialise(tensors, METADATA | words))
    (found / "distilled.safetensors").write_bytes(serialise(half(tiny_unet(2)), METADATA))
    return found


@pytest.fixture(scope="module")
def engine(folder: Path) -> hs.Engine:
    return hs.Engine.load(folder / "base.safetensors", folder / "distilled.safetensors")


def with_denoiser(engine: hs.Engine, model: str, network: hs.Engine | object) -> hs.Engine:
    denoisers = {**engine.denoisers, model: network}
    return hs.Engine(replace(engine.weights, denoisers=denoisers))  # type: ignore[arg-type]


def test_a_distilled_unet_borrows_text_and_vae_from_the_base(engine: hs.Engine) -> None:
    done = engine.sample("a fox", seeds=[0, 1])
    assert done.rgb.shape == (2, 32, 32, 3)
    assert done.latents.shape == (2, 4, 8, 8)
    assert (engine.weights.preset, engine.weights.downscale) == ("demo", 4)


def test_one_model_may_be_left_out_and_plans_that_need_it_are_refused(folder: Path) -> None:
    alone = hs.Engine.load(folder / "base.safetensors")
    assert alone.sample("a fox", plan="base", steps=2).passes == 4
    with pytest.raises(hs.PlanError, match=r"runs 'distilled', and this engine has 'base'"):
        alone.sample("a fox")
    lent = hs.Engine.load(
        None,
        folder / "distilled.safetensors",
        vae=folder / "base.safetensors",
        text=folder / "base.safetensors",
    )
    assert lent.sample("a fox", plan="distilled").passes == 4


def test_a_unet_alone_is_not_enough(folder: Path) -> None:
    with pytest.raises(hs.CheckpointError, match="expected a text encoder, found UNet"):
        hs.Engine.load(None, folder / "distilled.safetensors")
    with pytest.raises(hs.InputError, match="no weights"):
        hs.Engine.load()


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"base": "absent.safetensors"}, hs.CheckpointError, "absent.safetensors"),
        ({"dtype": "int4"}, hs.InputError, "expected auto, float32"),
        ({"device": "abacus"}, hs.InputError, "abacus"),
        ({"device": "cuda:7"}, hs.InputError, "cuda:7"),
        ({"runner": "graph"}, hs.CaptureError, "graph"),
    ],
)
def test_an_engine_that_cannot_be_loaded_says_why(
    folder: Path, settings: dict[str, str], kind: type[Exception], message: str
) -> None:
    if message == "cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("this machine has eight GPUs")
    with pytest.raises(kind, match=message):
        hs.Engine.load(**{"base": folder / "base.safetensors", **settings})  # type: ignore[arg-type]


def test_auto_is_the_cpu_where_there_is_nothing_else() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_prompts_with_one_seed_share_its_noise(
    engine: hs.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the steps draw: no noise of a row is ever written to memory."""
    leg = hs.Leg(model="distilled", steps=2, update=hs.Update.RENOISE)
    seeds_drawn: list[int] = []
    monkeypatch.setattr(
        "headstart.noise.philox_normal",
        lambda *a: seeds_drawn.append(a[2]) or philox_normal(*a),  # pyright: ignore
    )
    for seeds in (5, [5, 6]):
        engine.sample(["a fox", "an owl"], seeds=seeds, plan=hs.Plan((leg,)))
    assert seeds_drawn == [INITIAL] * 2
    done = engine.sample(["a fox", "an owl"], seeds=5)
    assert done.seeds == (5, 5)
    assert not torch.equal(done.latents[0], done.latents[1])


def test_the_noise_of_an_image_has_the_same_bits_in_any_batch() -> None:
    many = Philox.shared(range(9))
    for seed in (0, 4, 8):
        alone = Philox.shared([seed])
        assert torch.equal(many.initial((4, 8, 8), CPU)[seed], alone.initial((4, 8, 8), CPU)[0])
        assert torch.equal(many.step(3, (4, 8, 8), CPU)[seed], alone.step(3, (4, 8, 8), CPU)[0])


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_cut_batch_differs_by_rounding_at_most(engine: hs.Engine, batch: int) -> None:
    """float32 has 1.2e-7; the observed difference is printed with -rP, about 4e-7 relative."""
    for plan in ("hybrid", "base"):
        whole = engine.sample("a fox", plan=plan, seeds=range(5)).latents
        cut = engine.sample("a fox", plan=plan, seeds=range(5), batch=batch)
        worst = float((cut.latents - whole).norm() / whole.norm())
        print(f"{plan}, batch {batch}: relative difference {worst:.1e}")
        assert cut.chunk == batch
        assert worst <= 1e-4


def test_threads_on_one_engine_get_the_bits_of_a_sequence(engine: hs.Engine) -> None:
    def run(seed: int) -> Tensor:
        plan = ("hybrid", "base", "distilled")[seed % 3]
        return engine.sample("a fox", plan=plan, seeds=[seed, seed + 100]).latents

    expected = [run(seed) for seed in range(6)]
    with ThreadPoolExecutor(2) as pool:
        for got, latents in zip(pool.map(run, range(6)), expected, strict=True):
            assert torch.equal(got, latents)


def test_interleaved_runs_do_not_meet(engine: hs.Engine) -> None:
    first, second = engine.iterate("a fox", seeds=1), engine.iterate("an owl", seeds=2)
    pairs = list(zip(first, second, strict=True))
    assert torch.equal(pairs[-1][0].x, engine.sample("a fox", seeds=1).latents)
    assert torch.equal(pairs[-1][1].x, engine.sample("an owl", seeds=2).latents)


def test_iterate_checks_at_once_and_runs_as_it_is_iterated(engine: hs.Engine) -> None:
    class Counted(nn.Module):
        calls = 0

        def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            Counted.calls += 1
            return torch.zeros_like(x_in)

    with pytest.raises(hs.PlanError):
        engine.iterate("a fox", plan="hybird")
    counted = with_denoiser(engine, "distilled", Counted())
    states = counted.iterate("a fox")
    next(states)
    assert Counted.calls == 0
    next(states)
    assert Counted.calls == 1


def test_a_raise_in_on_step_cancels(engine: hs.Engine) -> None:
    steps: list[int] = []

    def stop(state: hs.State) -> None:
        steps.append(state.step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.sample("a fox", on_step=stop)
    assert steps == [0]


def test_time_is_told_by_stage_and_adds_up(engine: hs.Engine) -> None:
    spent = engine.sample("a fox", plan="distilled").latency_ms
    assert list(spent) == ["text", "base", "distilled", "decode"]
    assert spent["base"] == 0.0
    assert min(spent["text"], spent["distilled"], spent["decode"]) > 0.0


def test_a_network_that_gives_nan_is_named(engine: hs.Engine) -> None:
    class Broken(nn.Module):
        def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            return torch.full_like(x_in, float("nan"))

    with pytest.raises(hs.InputError, match=r"step 1: the 'distilled' network gave NaN"):
        with_denoiser(engine, "distilled", Broken()).sample("a fox")


def test_a_decoder_that_gives_nan_names_the_seed(engine: hs.Engine) -> None:
    class Broken:
        def decode(self, latents: Tensor) -> Tensor:
            pixels = torch.zeros(len(latents), 3, 32, 32)
            pixels[-1, 0, 0, 0] = float("inf")
            return pixels

        def encode(self, pixels: Tensor) -> Tensor:
            raise NotImplementedError

    broken = hs.Engine(replace(engine.weights, vae=Broken()))
    with pytest.raises(hs.InputError, match=r"decoder gave NaN or infinity for seed\(s\) \[8\]"):
        broken.sample("a fox", seeds=[7, 8])


def test_an_empty_prompt_samples_without_text(engine: hs.Engine) -> None:
    assert engine.sample("", seeds=1).prompts == ("",)


def test_a_long_prompt_is_read_in_pieces_and_an_absurd_one_refused(engine: hs.Engine) -> None:
    short, long = (engine.sample(text, plan="distilled") for text in ("fox " * 14, "fox " * 20))
    assert long.latents.isfinite().all() and not torch.equal(short.latents, long.latents)
    with pytest.raises(hs.InputError, match="more than 64 pieces of 14 tokens"):
        engine.sample("fox " * 10_000, plan="distilled")


def test_settings_belong_to_named_plans(engine: hs.Engine) -> None:
    with pytest.raises(hs.PlanError, match="belong to a plan given by name"):
        engine.sample("a fox", plan=hs.preset("demo"), steps=4)


def test_a_table_runs_as_its_plan_and_a_foreign_one_is_refused(engine: hs.Engine) -> None:
    table = engine.compile("hybrid")
    by_name = engine.sample("a fox", seeds=1).latents
    assert torch.equal(engine.sample("a fox", seeds=1, plan=table).latents, by_name)
    with pytest.raises(hs.PlanError, match="compiled for noise schedule"):
        engine.sample("a fox", plan=hs.preset("turbo").compile(hs.NoiseSchedule.scaled_linear()))
    with pytest.raises(hs.PlanError, match="whole tables"):
        engine.sample("a fox", plan=table[1:])


def test_a_record_survives_json_and_names_what_made_it(engine: hs.Engine) -> None:
    done = engine.sample(["a fox", "an owl"], seeds=[3, 2**64 - 1], plan="base", steps=2)
    record = json.loads(json.dumps(done.record()))
    assert record["seeds"] == [3, 2**64 - 1]
    assert len(record["results"]["rgb"]) == 2
    assert {"device", "threads", "torch", "dtype"} <= set(record["machine"])
    assert set(record["weights"]) == {"base", "distilled"}
    assert hs.StepTable.from_json(json.dumps(record["table"])) == done.table
    assert torch.equal(hs.replay(record, engine).rgb, done.rgb)


def test_a_replay_that_differs_names_image_and_machine(engine: hs.Engine) -> None:
    record = engine.sample("a fox", seeds=[1, 2]).record()
    record["results"]["latents"][1] = "0" * 64
    with pytest.raises(hs.InputError, match=r"latents of image 1, seed 2.*are the recorded ones"):
        hs.replay(record, engine)
    record["machine"]["threads"] = 99
    with pytest.raises(hs.InputError, match=r"what differs: threads 99 then, \d+ now"):
        hs.replay(record, engine)


def test_a_replay_with_other_weights_is_refused_before_it_runs(engine: hs.Engine) -> None:
    record = engine.sample("a fox").record()
    record["weights"]["base"]["sha256"] = "f" * 64
    with pytest.raises(hs.InputError, match=r"made with base .* sha256 ffffffffffffffff"):
        hs.replay(record, engine)


@pytest.mark.parametrize("change", [{"format": "other/1"}, {"seeds": None}, {"size": [64]}])
def test_what_is_no_record_is_refused(engine: hs.Engine, change: dict[str, object]) -> None:
    record = engine.sample("a fox").record() | change
    with pytest.raises(hs.InputError, match="record"):
        hs.replay(record, engine)
