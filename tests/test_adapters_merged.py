"""Adapters that are merged, that act on the text, and that are the distilled model themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import (
    call,
    detach_all,
    digest,
    layers_of,
    merged_by_hand,
    random_lora,
    write_lora,
)
from bundled import needs_pair
from safetensors.torch import save_file
from torch import Tensor, nn

import headstart as hs
import headstart_weights
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


def text_lora(engine: hs.Engine) -> dict[str, Tensor]:
    """A kohya file with a text encoder's part, and enough of a UNet to be allowed."""
    unet: Any = engine.denoisers["base"]
    tensors = random_lora(unet, "attn2", seed=6)
    draw = torch.Generator().manual_seed(7)
    for path, layer in layers_of(engine.text.towers[0], "self_attn").items():
        name = "lora_te_" + path.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = 0.2 * torch.randn(
            4, layer.weight.shape[1], generator=draw
        )
        tensors[f"{name}.lora_up.weight"] = 0.2 * torch.randn(len(layer.weight), 4, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    return tensors


def test_a_text_part_acts_with_its_own_strength_on_each_image(
    engine: hs.Engine, make: Make
) -> None:
    plain = engine.text.encode(["a fox"]).context
    report = engine.attach(make("words", text_lora(engine)))
    assert report.models["base"].layers["text"] == 12
    adapters = {"words": Strength(0.0, text=(0.0, 1.0, -1.0))}
    call = engine.begin("a fox", plan="base", seeds=SEEDS, adapters=adapters).call
    assert call is not None
    uncond, cond = call.cond.context.chunk(2)  # of a guided row
    assert torch.equal(cond[0], plain[0])
    assert not torch.allclose(cond[1], plain[0], atol=1e-3)
    assert not torch.allclose(uncond[1], uncond[2], atol=1e-3)
    with engine.adapters.now().active(torch.ones(1, 1)):
        alone = engine.text.encode(["a fox"]).context[0]
    assert (cond[1] - alone).norm() <= 1e-5 * alone.norm()
    long, short = "a (fox:1.3) in the snow by the old bridge", "a fox"
    with engine.adapters.now().active(torch.tensor([[0.0], [1.0], [1.0]])):  # in pieces
        rows = engine.text.encode([short, long, short], style="comfyui").context
        two = engine.text.encode([short, short, long], style="comfyui").context
    with engine.adapters.now().active(torch.ones(1, 1)):
        one = engine.text.encode([long], style="comfyui").context[0]
    assert len(one) > len(alone) and len(one) == rows.shape[1]
    assert torch.equal(rows[0, : len(alone)], plain[0])
    for row, want in ((rows[1], one), (two[2], one), (rows[2, : len(alone)], alone)):
        assert (row - want).norm() <= 1e-5 * want.norm()
    engine.detach("words")
    assert torch.equal(engine.text.encode(["a fox"]).context, plain)


def test_what_changes_the_text_alone_acts_on_both_models_alike(
    engine: hs.Engine, make: Make
) -> None:
    def sample(**more: Any) -> Tensor:
        return engine.sample("a fox", seeds=SEEDS, size=32, **more).latents

    plain = sample()
    words = {k: t for k, t in text_lora(engine).items() if k.startswith("lora_te_")}
    path = make("words", words)
    with pytest.raises(hs.AdapterError, match="leaves out distilled: attach it without to="):
        engine.attach(path, to=["base"])
    report = engine.attach(path, (0.0, 1.0, -1.0))
    assert report.live and report.models["distilled"].layers == {"text": 12}
    assert "changes the text alone, which all models read" in str(report)
    done = sample()
    bare = sample(adapters=[])
    assert torch.equal(done[0], bare[0]) and torch.equal(bare, plain)
    assert not torch.allclose(done[1:], bare[1:], atol=1e-3)
    for strength in (Strength(models=("base",)), Strength(below=500)):
        with pytest.raises(hs.InputError, match="encoded once for all rows and models"):
            engine.adapters["words"].strength = strength
        with pytest.raises(hs.InputError, match="encoded once for all rows and models"):
            sample(adapters={"words": strength})
    legs = (hs.Leg(model="distilled", steps=4, adapters=(("words", 0.5),)),)
    with pytest.raises(hs.InputError, match="text alone, which is encoded once"):
        sample(plan=hs.Plan(legs))
    engine.attach(make(), name="age")  # beside one that steers
    assert torch.equal(sample(adapters=["words"]), done)
    engine.detach("age")
    engine.detach("words")
    assert torch.equal(sample(), plain)
    with pytest.raises(hs.AdapterError, match="this one changes the text encoders"):
        engine.adapters.attach_distilled(path)
    with pytest.raises(hs.InputError, match="one number for all"):
        engine.adapters.attach_distilled(make("h", dense(engine.denoisers["base"])))  # type: ignore[arg-type]
    assert not len(engine.adapters)


def test_a_distilled_model_that_is_a_lora_shares_its_bases_network(tmp_path: Path) -> None:
    """Equal to two networks merged separately, to 1e-5, with one network in memory."""
    base = hs.Engine.load(headstart_weights.path("base"), preset="demo", device="cpu")
    unet: Any = base.denoisers["base"]
    tensors = random_lora(unet, "", size=0.02, seed=8)
    save_file(tensors, tmp_path / "fast.safetensors")
    engine = hs.Engine.load(
        headstart_weights.path("base"),
        distilled_lora=tmp_path / "fast.safetensors",
        preset="demo",
        device="cpu",
    )
    assert engine.denoisers["base"] is engine.denoisers["distilled"]
    merged: Any = merged_by_hand(unet, tensors, 1.0).float()
    two = hs.Engine(
        replace(
            base.weights,
            denoisers={"base": unet, "distilled": merged},
            predictions={m: hs.Prediction.V for m in ("base", "distilled")},
            schedules=dict.fromkeys(("base", "distilled"), base.schedule),
        )
    )
    for plan in ("hybrid", "distilled", "replace-final"):
        expected = two.sample("a fox", seeds=SEEDS, plan=plan).latents
        got = engine.sample("a fox", seeds=SEEDS, plan=plan).latents
        assert (got - expected).norm() <= 1e-5 * expected.norm()
    bare = base.sample("a fox", seeds=SEEDS, plan="base", steps=4)
    assert digest(engine.sample("a fox", seeds=SEEDS, plan="base", steps=4)) == digest(bare)
    engine.adapters["distilled-lora"].strength = Strength(0.0, models=("distilled",))
    all_base = engine.sample("a fox", seeds=SEEDS, plan="distilled").latents
    by_base = replace(two.weights, denoisers={"base": unet, "distilled": unet})
    assert torch.equal(
        all_base, hs.Engine(by_base).sample("a fox", seeds=SEEDS, plan="distilled").latents
    )


def dense(network: nn.Module, size: float = 0.05) -> dict[str, Tensor]:
    """A LoHa on the cross-attention, which no low-rank path computes."""
    draw = torch.Generator().manual_seed(9)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers_of(network, "attn2").items():
        name = "lora_unet_" + path.replace(".", "_")
        out, into = layer.weight.shape[:2]
        for side in ("w1", "w2"):
            tensors[f"{name}.hada_{side}_a"] = size**0.5 * torch.randn(out, 2, generator=draw)
            tensors[f"{name}.hada_{side}_b"] = size**0.5 * torch.randn(2, into, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def merged_weights(engine: hs.Engine, model: str) -> dict[str, Tensor]:
    """Layer -> what it runs on, of the layers that run on a sum."""
    network, merged = engine.denoisers[model], engine.adapters.now().merged
    sums = next(sums for host, sums in merged.items() if host.module is network)
    return {path: change.weight for path, change in sums.by_path.items()}


def test_what_has_no_low_rank_path_is_merged_and_leaves_the_very_same_tensors(
    engine: hs.Engine, make: Make
) -> None:
    network: Any = engine.denoisers["distilled"]
    before = digest(engine.sample("a fox", seeds=SEEDS))
    originals = {name: (id(p), p.clone()) for name, p in network.named_parameters()}
    tensors = dense(network)
    report = engine.attach(make("hada", tensors), strength=0.7)
    assert not report.live and report.rank == 2
    for path in layers_of(network, "attn2"):
        part = {k: v.double() for k, v in tensors.items() if path.replace(".", "_") in k}
        side = [
            next(v for k, v in part.items() if k.endswith(f"hada_w{n}_a"))
            @ next(v for k, v in part.items() if k.endswith(f"hada_w{n}_b"))
            for n in (1, 2)
        ]
        expected = originals[f"{path}.weight"][1].double() + 0.7 * side[0] * side[1]
        summed = merged_weights(engine, "distilled")[path]
        assert (summed - expected).abs().max() <= 4 * 2**-24 * expected.abs().max()
    changed = digest(engine.sample("a fox", seeds=SEEDS))
    assert changed != before
    engine.adapters["hada"].strength = 0.0
    assert digest(engine.sample("a fox", seeds=SEEDS)) == before
    engine.adapters["hada"].strength = 0.7
    assert digest(engine.sample("a fox", seeds=SEEDS)) == changed
    engine.detach("hada")
    for name, parameter in network.named_parameters():
        assert id(parameter) == originals[name][0]
        assert torch.equal(parameter, originals[name][1])


def test_merged_and_live_adapters_add(engine: hs.Engine, make: Make) -> None:
    network: Any = engine.denoisers["base"]
    outputs: list[Tensor] = []
    for names in (("age", "hada"), ("hada", "age")):
        for name in names:
            engine.attach(make(name, dense(network) if name == "hada" else None))
        outputs.append(call(network, strengths=torch.ones(3, 1)))
        for name in names:
            engine.detach(name)
    assert torch.equal(*outputs)


def test_a_merged_adapter_has_one_strength_and_says_why(engine: hs.Engine, make: Make) -> None:
    path = make("hada", dense(engine.denoisers["base"]))  # type: ignore[arg-type]
    for strength in ([1.0, 2.0], Strength(models=("base",)), Strength(below=500)):
        with pytest.raises(hs.InputError, match="one number for all"):
            engine.attach(path, strength)
    assert not len(engine.adapters)
    engine.attach(path, 0.5)
    with pytest.raises(hs.InputError, match=r"merged at strength 0\.5"):
        engine.sample("a fox", adapters={"hada": 1.0})
    legs = (hs.Leg(model="distilled", steps=4, adapters=(("hada", 0.5),)),)
    with pytest.raises(hs.InputError, match="serve all rows"):
        engine.sample("a fox", plan=hs.Plan(legs))
