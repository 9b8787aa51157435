"""Every naming of adapters: the same change is found under all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from adapter_samples import (
    ATTENTION,
    CONVS,
    DOTTED,
    FEED,
    NETWORKS,
    UNET,
    Changes,
    Layers,
    Tensors,
    dotted,
    known,
    kohya,
    one,
    text_modules,
    write,
)

from headstart.adapters.delta import LowRank
from headstart.adapters.file import read_adapter
from headstart.adapters.names import AdapterForm
from headstart.checkpoint import keymap


def processors(changes: Changes, prefix: bool) -> Tensors:
    tensors: Tensors = {}
    for (network, module), (down, up) in changes.items():
        if network == "unet":
            block, _, leaf = module.rpartition(".to_")
            name = f"{block}.processor.to_{leaf.removesuffix('.0')}_lora"
        else:  # the first releases named CLIP's projections like the UNet's
            block, _, leaf = module.rpartition(".")
            name = f"{block}.to_{leaf.removesuffix('_proj')}_lora"
        name = (DOTTED[network] if prefix else "") + name
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return tensors


def cloneofsimo(changes: Changes) -> Tensors:
    """N counts CrossAttention and GEGLU layers in diffusers' order of registration."""
    order: list[str] = []
    for side in ("down_blocks", "up_blocks", "mid_block"):
        blocks = [n.removesuffix(".attn1.to_q") for n in UNET if n.endswith("attn1.to_q")]
        for block in (b for b in blocks if b.startswith(side)):
            order += [f"{block}.attn1.to_{x}" for x in ("q", "k", "v", "out.0")]
            order += [f"{block}.ff.net.0.proj"]
            order += [f"{block}.attn2.to_{x}" for x in ("q", "k", "v", "out.0")]
    text = [
        f"text_model.encoder.layers.{i}.self_attn.{x}_proj"
        for i in range(2)
        for x in ("k", "v", "q", "out")
    ]
    tensors: Tensors = {}
    for (network, module), (down, up) in changes.items():
        name = (
            f"unet:{order.index(module)}"
            if network == "unet"
            else f"text_encoder:{text.index(module)}"
        )
        tensors |= {f"{name}:down": down, f"{name}:up": up}
    return tensors


class Case(NamedTuple):
    form: AdapterForm
    changes: Changes
    spell: Callable[[Changes], Tensors]
    scale: float


def cases() -> dict[str, Case]:
    attention = known("unet", ATTENTION)
    wide = attention | known("unet", FEED + CONVS)
    text = known("text", text_modules("text"))
    both = text | known("text_2", text_modules("text_2"))
    F = AdapterForm
    linear = ("lora_linear_layer.down", "lora_linear_layer.up")
    return {
        "kohya sd": Case(
            F.KOHYA, known("unet", ATTENTION + FEED) | text, lambda c: kohya(c, single=True), 0.5
        ),
        "kohya sgm": Case(
            F.KOHYA, known("unet", ATTENTION + FEED) | both, lambda c: kohya(c, ldm=True), 0.5
        ),
        "locon": Case(F.LOCON, wide | text, kohya, 0.5),
        "locon sgm": Case(F.LOCON, wide | both, lambda c: kohya(c, ldm=True), 0.5),
        "slider lierla": Case(F.SLIDER, attention, kohya, 0.5),
        "slider c3lier": Case(F.SLIDER, attention | known("unet", CONVS), kohya, 0.5),
        "distillation": Case(F.LOCON, wide, kohya, 0.5),
        "diffusers 0.16": Case(
            F.DIFFUSERS_PROCESSOR, attention, lambda c: processors(c, prefix=False), 1.0
        ),
        "diffusers 0.17": Case(
            F.DIFFUSERS_PREFIXED, attention | both, lambda c: processors(c, prefix=True), 1.0
        ),
        "diffusers 0.22": Case(
            F.DIFFUSERS, wide | both, lambda c: dotted(c, "lora.down", "lora.up", linear), 1.0
        ),
        "peft": Case(F.PEFT, wide | both, lambda c: dotted(c, "lora_A", "lora_B"), 1.0),
        "peft adapter name": Case(
            F.PEFT, attention, lambda c: dotted(c, "lora_A.default", "lora_B.default"), 1.0
        ),
        "cloneofsimo": Case(
            F.CLONEOFSIMO,
            known("unet", ATTENTION + FEED) | known("text", text_modules("text", ("_proj",))),
            cloneofsimo,
            1.0,
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_every_spelling_of_the_same_change_is_that_change(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    file = read_adapter(write(tmp_path / "a.safetensors", case.spell(case.changes)))
    assert file.form is case.form and not file.strays
    resolution = file.resolve(NETWORKS).require()
    assert resolution.deltas.keys() == case.changes.keys() and resolution.rank == 3
    for layer, (down, up) in case.changes.items():
        delta = resolution.deltas[layer]
        assert isinstance(delta, LowRank)
        assert torch.equal(delta.down, down) and torch.equal(delta.up, up.flatten(1)), layer
        assert delta.scale == case.scale, layer
        assert delta.shape == NETWORKS[layer[0]][layer[1]]


def test_bare_and_ldm_spellings_of_peft_keys_are_read(tmp_path: Path) -> None:
    """`base_model.model.`, no prefix at all, and ComfyUI's `diffusion_model.` with LDM's names."""
    changes = known("unet", ATTENTION + CONVS)
    ldm = keymap.unet_to_ldm(UNET)
    for prefix, names in (("base_model.model.", {}), ("", {}), ("diffusion_model.", ldm)):
        tensors: Tensors = {}
        for (_, module), (down, up) in changes.items():
            name = prefix + names.get(module, module)
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        resolution = read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS)
        assert resolution.require().deltas.keys() == changes.keys()


def test_a_bare_text_name_goes_to_the_encoder_whose_width_it_has(tmp_path: Path) -> None:
    """PEFT saves an encoder alone, and transformers 5 dropped `text_model.` from its names."""
    for network in ("text", "text_2"):
        for cut in ("", "text_model."):
            changes = known(network, text_modules(network))
            tensors: Tensors = {}
            for (_, module), (down, up) in changes.items():
                name = "base_model.model." + module.removeprefix(cut)
                tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            file = read_adapter(write(tmp_path / "a.safetensors", tensors))
            texts: Layers = {n: NETWORKS[n] for n in ("text", "text_2")}
            assert file.resolve(texts).require().deltas.keys() == changes.keys()


def test_long_and_odd_keys_are_strays_and_cost_nothing(tmp_path: Path) -> None:
    tensors = one() | {"a" * 900 + ".alpha": torch.ones(1), ".alpha.": torch.ones(1)}
    file = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert len(file.strays) == 2 and len(file.groups) == 1
