"""The options of an engine about its files, what it guesses, and what it warns of."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import headstart as hs
from headstart.commands.values import read_predictions
from headstart.engine.pair import EMBEDDED_GUIDANCE
from headstart.interfaces import Conditioning
from headstart.networks.numbers import guidance_embedding
from headstart.plan.prediction import Prediction

Maker = Callable[..., Path]


@pytest.fixture
def load(make_ckpt: Maker, small_tokenizer: Path) -> Callable[..., hs.Engine]:
    """load(base arch, distilled arch, distilled file's name) -> an engine of tiny files."""

    def load(base: str, distilled: str, name: str, **more: Any) -> hs.Engine:
        heads = None if base == "sd15" else 8
        return hs.Engine.load(
            make_ckpt(f"{more.pop('base_name', 'base')}.safetensors", base, "ldm"),
            make_ckpt(f"{name}.safetensors", distilled, "unet"),
            **{"tokenizer": small_tokenizer, "head_dim": heads, "text_head_dim": 32, **more},
        )

    return load


class Spy:
    """A network that remembers the conditioning it was given."""

    def __init__(self, network: Any) -> None:
        self.network, self.seen = network, list[Conditioning]()
        self.dtype = torch.float32

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.seen.append(cond)
        return self.network(x_in, timestep, cond)


def spied(engine: hs.Engine) -> tuple[hs.Engine, Mapping[str, Spy]]:
    spies = {role: Spy(network) for role, network in engine.denoisers.items()}
    return hs.Engine(replace(engine.weights, denoisers=spies)), spies


def test_how_an_exclamation_is_read_is_part_of_the_record(load: Callable[..., hs.Engine]) -> None:
    engine = load("sdxl", "lcm-sdxl", "lcm", exclamation="transformers")
    record = engine.sample("wow!", plan="distilled", size=64).record()
    assert record["machine"]["exclamation"] == "transformers" == engine.text.exclamation
    engine.text.tokenizer.exclamation = "openclip"
    with pytest.raises(hs.InputError, match="exclamation 'transformers' then, None now"):
        hs.replay(record, engine)


# --------------------------------------------------------------------- LCM's guidance


@pytest.mark.parametrize("guidance", [None, 4.0, 0.0])
def test_an_lcm_gets_the_embedding_of_the_stated_guidance(
    load: Callable[..., hs.Engine], guidance: float | None
) -> None:
    more = {} if guidance is None else {"embedded_guidance": guidance}
    engine, spies = spied(load("sdxl", "lcm-sdxl", "lcm", **more))
    engine.sample("a fox", seeds=[1, 2], size=64)
    expected = guidance_embedding(
        torch.tensor([EMBEDDED_GUIDANCE if guidance is None else guidance]), 32
    )
    for cond in spies["distilled"].seen:
        assert torch.equal(cond.guidance_embedding, expected.expand(2, 32))


def test_a_base_without_the_projection_is_not_moved_by_it(load: Callable[..., hs.Engine]) -> None:
    outs = [
        load("sdxl", "lcm-sdxl", "lcm", embedded_guidance=w).sample("a fox", size=64, keep_x0=True)
        for w in (2.0, 14.0)
    ]
    assert torch.equal(outs[0].x0[0], outs[1].x0[0])
    assert not torch.equal(outs[0].x0[1], outs[1].x0[1])


def test_guided_rows_of_the_base_still_work_beside_an_lcm(load: Callable[..., hs.Engine]) -> None:
    engine = load("sd15", "lcm-sd15", "lcm")
    assert engine.sample("a fox", size=64, base_guidance=5.0).passes == 5


def test_guidance_for_networks_that_read_none_is_refused(load: Callable[..., hs.Engine]) -> None:
    with pytest.raises(hs.InputError, match="none of these does"):
        load("sdxl", "sdxl-turbo", "turbo", embedded_guidance=8.0)
    with pytest.raises(hs.InputError, match="finite"):
        load("sdxl", "lcm-sdxl", "lcm", embedded_guidance=float("nan"))


def test_the_guidance_is_in_the_record_and_a_replay_needs_it(
    load: Callable[..., hs.Engine],
) -> None:
    record = load("sdxl", "lcm-sdxl", "lcm").sample("a fox", size=64).record()
    assert record["machine"]["embedded_guidance"] == EMBEDDED_GUIDANCE
    hs.replay(record, load("sdxl", "lcm-sdxl", "lcm"))
    with pytest.raises(hs.InputError, match=r"embedded_guidance 8\.0 then, 2\.0 now"):
        hs.replay(record, load("sdxl", "lcm-sdxl", "lcm", embedded_guidance=2.0))


# --------------------------------------------------------------------- preset and grid


def test_the_files_name_chooses_the_plan_and_its_step_count(load: Callable[..., hs.Engine]) -> None:
    engine = load("sdxl", "ssd-1b", "sdxl_lightning_8step_unet")
    assert engine.weights.preset == "lightning"
    assert len(engine.compile("hybrid")) == 8
    with pytest.warns(UserWarning, match="use preset='lightning', steps=8"):
        assert len(engine.compile("hybrid", preset="turbo")) == 4
    assert len(engine.compile("base")) == 30
    assert engine.weights.notes == (
        "distilled: taken for Lightning, 8 steps: preset lightning (set with --preset or preset=), "
        "by its name",
    )


def test_a_wrong_grid_is_a_warning_that_names_the_right_one(load: Callable[..., hs.Engine]) -> None:
    engine = load("sdxl", "sdxl-turbo", "sdxl_turbo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.compile("hybrid")
    for plan in ("lcm", hs.preset("paper-dmd2"), hs.preset("lcm").compile(engine.schedule)):
        with pytest.warns(UserWarning, match=r"taken for Turbo by its name.*use preset='turbo'"):
            engine.compile(plan)
    engine = load("sdxl", "sdxl-turbo", "sdxl_turbo", preset="lcm")
    assert engine.weights.preset == "lcm"
    with pytest.warns(UserWarning, match="759, 499, 259"):
        engine.compile("hybrid")


def test_a_file_that_tells_nothing_is_asked_about(load: Callable[..., hs.Engine]) -> None:
    engine = load("sdxl", "ssd-1b", "model")
    assert engine.weights.notes == () and engine.weights.preset is None
    with pytest.raises(hs.PlanError, match="these weights do not say: give preset="):
        engine.compile("hybrid")
    assert len(engine.compile("hybrid", preset="lcm")) == 4


# --------------------------------------------------------------------- eps or v


def test_a_prediction_is_stated_guessed_or_given(
    load: Callable[..., hs.Engine], make_ckpt: Maker, small_tokenizer: Path
) -> None:
    def predictions(engine: hs.Engine) -> list[str]:
        return [p.value for p in engine.weights.predictions.values()]

    plain = load("sd21", "sd-turbo", "sd_turbo")
    assert predictions(plain) == ["v", "eps"]
    assert "nothing says whether it predicts eps or v" in plain.weights.notes[0]
    assert "predicts eps (set with --prediction or prediction=)" in plain.weights.notes[1]
    named = load("sd21", "sd-turbo", "sd_turbo", base_name="v2-1_512-ema-pruned")
    assert predictions(named) == ["eps", "eps"]
    inputs = load("sd21", "sd-turbo", "sd_turbo", prediction={"base": "eps"})
    assert predictions(inputs) == ["eps", "eps"]
    assert predictions(load("sd21", "sd-turbo", "sd_turbo", prediction="x0")) == ["x0", "x0"]
    folder = hs.Engine.load(
        make_ckpt("v2-1_512", "sd21", "diffusers"), None, tokenizer=small_tokenizer
    )
    assert predictions(folder) == ["v"]  # its scheduler's config states it
    assert {row.c_skip for row in named.compile(hs.preset("turbo"))} == {1.0}
    assert plain.compile(hs.preset("turbo"))[0].c_skip < 0.01


def test_a_prediction_of_nobody_or_of_no_kind_is_refused(load: Callable[..., hs.Engine]) -> None:
    with pytest.raises(hs.InputError, match="prediction for 'student': this pair has 'base'"):
        load("sd21", "sd-turbo", "sd_turbo", prediction={"student": "v"})
    with pytest.raises(hs.HeadstartError, match="unknown prediction 'score'"):
        load("sd21", "sd-turbo", "sd_turbo", prediction="score")


def test_predictions_are_read_from_the_command_line() -> None:
    assert read_predictions(None) is None
    assert read_predictions("v") == "v"
    assert read_predictions("base=v,distilled=eps") == {"base": "v", "distilled": "eps"}
    with pytest.raises(hs.InputError, match="expected eps, v, x0, flow, or base=v"):
        read_predictions("base=")


# --------------------------------------------------------------------- the rest of a file


def test_a_bare_vae_takes_the_scale_of_the_pair(
    make_ckpt: Maker, load: Callable[..., hs.Engine]
) -> None:
    for form in ("vae", "vae-old", "vae-ldm"):
        engine = load(
            "sdxl", "sdxl-turbo", "turbo", vae=make_ckpt(f"{form}.safetensors", "sdxl", form)
        )
        assert engine.vae.scale_factor == 0.13025
        rgb = engine.sample("a fox", size=64).rgb
        assert torch.equal(rgb, load("sdxl", "sdxl-turbo", "turbo").sample("a fox", size=64).rgb)


def test_widths_that_no_file_states_are_asked_for(load: Callable[..., hs.Engine]) -> None:
    with pytest.raises(hs.CheckpointError, match="head_dim="):
        load("sdxl", "sdxl-turbo", "turbo", head_dim=None)
    with pytest.raises(hs.CheckpointError, match="head_dim="):
        load("sdxl", "sdxl-turbo", "turbo", text_head_dim=None)


def overflowing(path: Path, to: Path) -> Path:
    """An SD1 file whose decoder's last norm is so large that float16 cannot hold the pixels."""
    tensors = load_file(path)
    for leaf in ("weight", "bias"):
        tensors[f"first_stage_model.decoder.norm_out.{leaf}"] *= 40000.0
    save_file(tensors, to)
    return to


def test_what_overflows_in_half_precision_is_decoded_again(
    make_ckpt: Maker, small_tokenizer: Path, tmp_path: Path
) -> None:
    path = overflowing(make_ckpt("base.safetensors", "sd15", "ldm"), tmp_path / "x.safetensors")
    options: dict[str, Any] = {"tokenizer": small_tokenizer, "text_head_dim": 32}
    engine = hs.Engine.load(path, **options)
    wide = engine.sample("a fox", plan="base", preset="turbo", steps=1, size=64, base_guidance=1.0)
    assert wide.rgb.float().std() > 1
    half = replace(engine.weights, vae=engine.vae.half(), vae_dtype=torch.float16)
    with pytest.warns(UserWarning, match="overflowed in float16"):
        again = hs.Engine(half).sample(
            "a fox", plan="base", preset="turbo", steps=1, size=64, base_guidance=1.0
        )
    assert (again.rgb.int() - wide.rgb.int()).abs().float().mean() < 8


def test_every_option_of_loading_is_documented() -> None:
    from headstart.engine.options import LoadOptions

    text = f"{hs.Engine.load.__doc__}{LoadOptions.__doc__}"
    assert all(re.search(rf"\b{name}\b", text) for name in LoadOptions.__annotations__)
    assert Prediction("x0") is Prediction.X0
