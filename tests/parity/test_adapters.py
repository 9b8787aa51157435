"""Adapters beside peft and diffusers: files that they write, and the weights that they merge.

Our UNet has diffusers' module names, so peft trains it as it would diffusers' own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import merge, merge_bias
from torch import Tensor

from headstart.adapters.delta import Dense, LowRank
from headstart.adapters.file import layer_shapes, read_adapter
from headstart.adapters.names import AdapterForm
from headstart.adapters.tuners import tuner_of
from headstart.networks.unet import Mid, Stage, UNet, UNetParams

EPS = 2.0**-24
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "conv_shortcut", "proj_in"]


def unet() -> UNet:
    torch.manual_seed(0)
    params = UNetParams(
        down=(Stage(32, (1,), True), Stage(64, (1,), False)),
        mid=Mid(2, 1),
        up=(Stage(64, (1, 1), True), Stage(32, (1, 1), False)),
        context_dim=24,
        heads=2,
        norm_groups=8,
        linear_projection=False,
    )
    return UNet(params)


def lora(**changed: object) -> tuple[AdapterForm, Any]:
    import peft

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 2, "target_modules": TARGETS} | changed
    form = AdapterForm.DORA if changed.get("use_dora") else AdapterForm.PEFT
    return form, peft.LoraConfig(init_lora_weights=False, **settings)


def loha(**changed: object) -> tuple[AdapterForm, Any]:
    import peft

    settings: dict[str, Any] = {"r": 4, "alpha": 2, "target_modules": TARGETS} | changed
    return AdapterForm.LOHA, peft.LoHaConfig(init_weights=False, **settings)


def lokr(**changed: object) -> tuple[AdapterForm, Any]:
    import peft

    settings: dict[str, Any] = {"r": 2, "alpha": 3, "target_modules": TARGETS} | changed
    return AdapterForm.LOKR, peft.LoKrConfig(init_weights=False, **settings)


def oft(**changed: object) -> tuple[AdapterForm, Any]:
    import peft

    settings: dict[str, Any] = {"r": 0, "oft_block_size": 4, "target_modules": TURNED} | changed
    return AdapterForm.OFT_V2, peft.OFTConfig(init_weights=False, **settings)


TURNED = ["to_k", "conv1", "proj_in"]
BIASED = ["to_out.0", "ff.net.0.proj", "conv1", "conv_shortcut", "proj_in"]
CASES: dict[str, Any] = {
    "lora": lambda: lora(),
    "rslora": lambda: lora(use_rslora=True),
    "patterns": lambda: lora(
        alpha_pattern={"attn1.to_q": 7, "conv1": 5}, rank_pattern={"to_k": 2, "conv1": 3}
    ),
    "dora": lambda: lora(use_dora=True),
    "loha": lambda: loha(),
    "loha with cores": lambda: loha(use_effective_conv2d=True),
    "lokr": lambda: lokr(),
    "lokr both": lambda: lokr(decompose_both=True, decompose_factor=4),
    "lokr full": lambda: lokr(r=64),
    "lokr with cores": lambda: lokr(use_effective_conv2d=True),
    "lora with biases": lambda: lora(lora_bias=True, target_modules=BIASED),
    "oft": lambda: oft(),
    "oft shared": lambda: oft(block_share=True, oft_block_size=8, num_cayley_neumann_terms=3),
    "oft without a series": lambda: oft(use_cayley_neumann=False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_that_peft_writes_gives_the_weights_that_peft_merges(
    name: str, tmp_path: Path
) -> None:
    import peft

    form, config = CASES[name]()
    ours = unet()
    pristine = {n: t.clone() for n, t in ours.state_dict().items()}
    model = peft.get_peft_model(copy.deepcopy(ours), config)  # pyright: ignore
    for parameter in model.parameters():  # DoRA's magnitudes start at the norms
        if parameter.requires_grad:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    model.save_pretrained(str(tmp_path))
    merged: dict[str, Tensor] = model.merge_and_unload().state_dict()

    file = read_adapter(tmp_path)
    assert file.form is form
    resolution = file.resolve({"unet": layer_shapes(ours)}).require()
    changed = {n for n, t in merged.items() if not torch.equal(t, pristine[n])}
    ours_too = {f"{module}.weight" for _, module in resolution.deltas}
    ours_too |= {
        f"{m}.bias"
        for (_, m), d in resolution.deltas.items()
        if getattr(d, "bias", None) is not None
    }
    assert ours_too == changed and len(changed) > 14
    for (_, module), delta in resolution.deltas.items():
        if isinstance(delta, Dense) and delta.bias is not None:
            bias = merge_bias(delta, pristine[f"{module}.bias"], 1.0)
            assert torch.allclose(bias, merged[f"{module}.bias"], rtol=0, atol=4 * EPS * 4)
        weight, theirs = pristine[f"{module}.weight"], merged[f"{module}.weight"]
        tuned = merge(delta, weight, 1.0)
        # Both sum at most 64 products a factor, or the squares of a row, in another order.
        scale = max(theirs.abs().max(), weight.abs().max(), (theirs - weight).abs().max())
        assert (tuned - theirs).abs().max() <= 128 * EPS * scale, module


def test_a_file_that_diffusers_writes_is_read_with_the_alpha_of_its_metadata(
    tmp_path: Path,
) -> None:
    import peft
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    _, config = lora(lora_alpha=6)
    ours = unet()
    model = peft.get_peft_model(copy.deepcopy(ours), config)  # pyright: ignore
    state = get_peft_model_state_dict(model)
    layers = {n.removeprefix("base_model.model."): t for n, t in state.items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict()
    )
    (path,) = tmp_path.glob("*.safetensors")
    resolution = read_adapter(path).resolve({"unet": layer_shapes(ours)}).require()
    assert len(resolution.deltas) == len(state) // 2
    for (_, module), delta in resolution.deltas.items():
        assert isinstance(delta, LowRank) and delta.scale == 6 / 4
        assert torch.equal(delta.down, state[f"base_model.model.{module}.lora_A.weight"])


PROMPTS = {
    *("prompt_tuning_", "p_tuning_", "prefix_tuning_", "multitask_prompt_tuning_", "cpt_"),
    *("adaption_prompt_", "cartridge_"),
}
LEAVES = ("A", "u", "l", "block", "kernel", "R", "b", "layers", "v", "weight", "delta")


def test_every_tuner_of_peft_has_a_formula_here_or_a_name() -> None:
    """A PEFT that brings another shows up here. Those of prompts change no layer."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    here = {"lora_", "hada_", "lokr_", "oft_"}
    prefixes = {str(prefix) for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix}
    unnamed = {p for p in prefixes if not any(tuner_of(f"x.{p}{leaf}") for leaf in LEAVES)}
    assert unnamed <= here | PROMPTS
