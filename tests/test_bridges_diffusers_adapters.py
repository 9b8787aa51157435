"""LoRAs on networks of diffusers, compared with PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_networks import (
    TIMES,
    TOLERANCE,
    UNET,
    Own,
    cond_of,
    diffusers,
    far,
    make,
    randn,
    tiny,
)
from flow_transformers import FAMILIES, networks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headstart as hs
from headstart.bridges import diffusers as bridge
from headstart.errors import AdapterError
from headstart.interfaces import Conditioning
from headstart.plan.schedule import NoiseSchedule

TARGETS = {
    "Qwen-Image": ["to_q", "to_out.0", "add_k_proj", "img_mod.1", "txt_mlp.net.0.proj"],
    "Wan": ["to_q", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "time_proj"],
    "SD 3": ["to_v", "add_q_proj", "ff.net.2"],
    "Flux": ["to_q", "proj_mlp", "proj_out"],
    "Z-Image": ["to_q", "w1"],
}
STRENGTHS = (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
needs_peft = pytest.mark.skipif(
    find_spec("peft") is None, reason="needs peft: it writes and runs the LoRAs here"
)


def with_lora(model: Any, targets: list[str], **config: Any) -> Any:
    """The network with a LoRA of PEFT's in it, named "a"."""
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(4)
        lora = LoraConfig(target_modules=targets, init_lora_weights=False, **config)
        model.add_adapter(lora, "a")
    return model.eval().requires_grad_(False)


def adapted(name: str) -> Any:
    return with_lora(networks(FAMILIES[name])["base"], TARGETS[name], r=3, lora_alpha=5.0)


def at(model: Any, strength: float) -> Any:
    model.set_adapters("a", weights=strength)
    return bridge.denoiser(model)


def saved(model: Any, path: Path) -> Path:
    """As diffusers itself writes one network's LoRA."""
    model.save_lora_adapter(path, "a", weight_name="lora.safetensors")
    return path / "lora.safetensors"


@needs_peft
@pytest.mark.parametrize("name", TARGETS)
def test_eight_samples_have_eight_strengths_in_one_call(name: str, tmp_path: Path) -> None:
    theirs, network = adapted(name), bridge.denoiser(networks(FAMILIES[name])["base"])
    x, cond, times = randn(8, *FAMILIES[name].shape), cond_of(8), torch.full((8,), 801.0)
    before = network(x, times, cond)
    adapters = hs.AdapterSet({"base": network})
    report = adapters.attach(saved(theirs, tmp_path), STRENGTHS, name="fast")
    assert report.live and report.rank == 3
    column = torch.tensor(STRENGTHS)[:, None]
    output = network(x, times, replace(cond, strengths=column))
    assert torch.equal(output[2], before[2])
    for n, strength in enumerate(STRENGTHS):
        sample_rows = slice(n, n + 1)
        expected = at(theirs, strength)(x[sample_rows], times[sample_rows], cond[sample_rows])
        assert far(output[sample_rows], expected) <= TOLERANCE
        if strength:
            assert far(before[sample_rows], expected) > 1000 * TOLERANCE
    adapters.detach("fast")
    assert torch.equal(network(x, times, cond), before)


@needs_peft
def test_a_kohya_lora_of_stable_diffusion_acts_on_diffusers_unet(tmp_path: Path) -> None:
    """Linear layers and convolutions, guided: both halves of a sample have its strength."""
    network, theirs = (bridge.denoiser(make("UNet2DConditionModel", **UNET)) for _ in range(2))
    with_lora(theirs.model, ["to_q", "proj_in", "conv1", "time_emb_proj"], r=2)
    tensors = kohya(load_file(saved(theirs.model, tmp_path)), 8.0, "_")
    save_file(renamed(tensors, lambda key: f"lora_unet_{key}"), tmp_path / "kohya.safetensors")
    adapters = hs.AdapterSet({"base": network})
    adapters.attach(tmp_path / "kohya.safetensors", (0.5, 2.0))
    table = hs.Plan((hs.Leg(model="base", steps=2, guidance=3.0),)).compile(
        NoiseSchedule.scaled_linear()
    )
    x, words = randn(2, 4, 8, 8), {"uncond": cond_of(seed=6)}
    options = {"strengths": adapters.strengths(table, 2), **words}
    latents = next(hs.sample(table, {"base": network}, cond_of(), hs.Given(x), **options)).x
    for n, strength in enumerate((0.5, 2.0)):
        sample_rows = slice(n, n + 1)
        alone = at(theirs.model, strength)
        noise, words = hs.Given(x[sample_rows]), {"uncond": cond_of(seed=6)[sample_rows]}
        expected = next(hs.sample(table, {"base": alone}, cond_of()[sample_rows], noise, **words)).x
        # Guidance 3 makes roundings of F five times as large.
        assert far(latents[sample_rows], expected) <= 5 * TOLERANCE


def renamed(tensors: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(name): tensor.contiguous() for name, tensor in tensors.items()}


def kohya(tensors: dict[str, Tensor], alpha: float, join: str) -> dict[str, Tensor]:
    """`lora_unet_a_b_to_q.lora_down.weight`, with alphas."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, side = name.removesuffix(".weight").rsplit(".", 1)
        module = module.replace(".", join)
        found[f"{module}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = tensor
        found[f"{module}.alpha"] = torch.tensor(alpha)
    return found


def wan_original(name: str) -> str:
    """The names of Wan's own code, which its Lightning LoRAs have."""
    for ours, original in (
        ("attn1.", "self_attn."), ("attn2.", "cross_attn."), ("to_out.0", "o"), ("to_q", "q"),
        ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
    ):  # fmt: skip
        name = name.replace(ours, original)
    return f"diffusion_model.{name}"


@needs_peft
@pytest.mark.parametrize("naming", ["pipeline", "lightning", "kohya", "onetrainer", "peft"])
@pytest.mark.parametrize("name", ["Qwen-Image", "Wan"])
def test_every_naming_of_a_lora_acts_the_same(name: str, naming: str, tmp_path: Path) -> None:
    """As the LoRA that the file was made of."""
    theirs = adapted(name)
    tensors = load_file(saved(theirs, tmp_path))
    path, alpha = tmp_path / "other.safetensors", 5.0
    if naming == "pipeline":
        pipeline = {"Qwen-Image": diffusers.QwenImagePipeline, "Wan": diffusers.WanPipeline}[name]
        config = theirs.peft_config["a"].to_dict()
        pipeline.save_lora_weights(
            tmp_path, tensors, weight_name=path.name, transformer_lora_adapter_metadata=config
        )
        assert all(key.startswith("transformer.") for key in load_file(path))
    elif naming == "lightning":
        rename = wan_original if name == "Wan" else str
        save_file(kohya(renamed(tensors, rename), alpha, "."), path)
    elif naming in ("kohya", "onetrainer"):
        prefix = {"kohya": "lora_unet_", "onetrainer": "lora_transformer_"}[naming]
        save_file(renamed(kohya(tensors, alpha, "_"), lambda key: prefix + key), path)
    else:
        scaled = {k: t * alpha / 3 if "lora_B" in k else t for k, t in tensors.items()}
        save_file(renamed(scaled, lambda key: f"base_model.model.{key}"), path)
    network = bridge.denoiser(networks(FAMILIES[name])["base"])
    hs.AdapterSet({"base": network}).attach(path)
    x, cond = randn(2, *FAMILIES[name].shape), cond_of()
    output = network(x, TIMES, replace(cond, strengths=torch.full((2, 1), 0.5)))
    assert far(output, at(theirs, 0.5)(x, TIMES, cond)) <= TOLERANCE


@needs_peft
def test_wans_own_names_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    """Its converter is the oracle for the layers. It reads no alpha of the time projection's."""
    tensors = kohya(load_file(saved(adapted("Wan"), tmp_path)), 5.0, ".")
    tensors = renamed({k: t for k, t in tensors.items() if "alpha" not in k}, wan_original)
    theirs = networks(FAMILIES["Wan"])["base"]
    converted, _ = diffusers.WanPipeline.lora_state_dict(dict(tensors), return_lora_metadata=True)
    theirs.load_lora_adapter(converted, adapter_name="a")
    save_file(tensors, tmp_path / "wan.safetensors")
    network = bridge.denoiser(networks(FAMILIES["Wan"])["base"])
    hs.AdapterSet({"base": network}).attach(tmp_path / "wan.safetensors")
    x, cond = randn(2, *FAMILIES["Wan"].shape), cond_of()
    output = network(x, TIMES, replace(cond, strengths=torch.ones(2, 1)))
    assert far(output, at(theirs, 1.0)(x, TIMES, cond)) <= TOLERANCE


@needs_peft
@pytest.mark.parametrize("name", ["Qwen-Image", "Wan"])
def test_a_distilled_lora_is_a_column_of_the_table(name: str, tmp_path: Path) -> None:
    """One network: its guided first rows are the base's, the LoRA makes it the distilled model. As
    a run of two networks; a row adds its budget to the errors that came in, at most doubled."""
    theirs, family = adapted(name), FAMILIES[name]
    network = bridge.denoiser(networks(family)["base"])
    adapters = hs.AdapterSet({"base": network, "distilled": network})
    adapters.attach_distilled(saved(theirs, tmp_path))
    legs = (
        hs.Leg(model="base", steps=4, guidance=3.0, until="next"),
        hs.Leg(model="distilled", steps=4, skip=2),
    )
    table = hs.Plan(legs).compile(NoiseSchedule.flow(3.0), prediction=hs.Prediction.FLOW)
    noise, words = hs.Given(randn(2, *family.shape)), {"uncond": cond_of(seed=6)}
    strengths = adapters.strengths(table, 2)
    assert strengths is not None and strengths[:, 0, 0].tolist() == [0, 0, 1, 1]
    both = {"base": network, "distilled": network}
    one = hs.sample(table, both, cond_of(), noise, strengths=strengths, **words)
    plain = bridge.denoiser(networks(family)["base"])
    two = hs.sample(table, {"base": plain, "distilled": at(theirs, 1.0)}, cond_of(), noise, **words)
    limit = 0.0
    for ours, expected in zip(one, two, strict=True):
        limit = 2 * limit + TOLERANCE
        assert far(ours.x, expected.x) <= limit


@needs_peft
def test_adapters_attach_to_any_network_by_its_layers_names(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = Own().requires_grad_(False)
        config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
        theirs = get_peft_model(copy.deepcopy(network), config)
    theirs.save_pretrained(tmp_path)
    hs.AdapterSet({"base": network}).attach(tmp_path, name="mine")
    x, cond = randn(3, 6), Conditioning(randn(3, 1, 1), strengths=torch.ones(3, 1))
    output = network(x, TIMES, cond)
    assert far(output, theirs(x, TIMES, cond)) <= TOLERANCE
    assert far(output, network(x, TIMES, replace(cond, strengths=torch.zeros(3, 1)))) > 0.01


@needs_peft
def test_a_lora_of_another_transformer_is_refused_by_its_names(tmp_path: Path) -> None:
    path = saved(adapted("Wan"), tmp_path)
    network = bridge.denoiser(tiny("Qwen-Image"))
    with pytest.raises(AdapterError, match=r"none of its .* modules .* fits"):
        hs.AdapterSet({"base": network}).attach(path)
    network = bridge.denoiser(tiny("Wan", num_layers=1))
    with pytest.raises(AdapterError, match=r"unknown here: .*blocks\.1\."):
        hs.AdapterSet({"base": network}).attach(path)


@needs_peft
def test_an_adapter_is_refused_where_fused_layers_would_not_run_it(tmp_path: Path) -> None:
    model = tiny("Wan")
    model.fuse_qkv_projections()
    with pytest.raises(AdapterError, match=r"unknown here: .*blocks\.0\.attn1\.to_q"):
        hs.AdapterSet({"base": bridge.denoiser(model)}).attach(saved(adapted("Wan"), tmp_path))


@needs_peft
def test_an_adapter_asks_for_its_strengths(tmp_path: Path) -> None:
    network = bridge.denoiser(tiny("Wan"))
    hs.AdapterSet({"base": network}).attach(saved(adapted("Wan"), tmp_path))
    with pytest.raises(AdapterError, match="has no strengths"):
        network(randn(2, *FAMILIES["Wan"].shape), TIMES, cond_of())


@needs_peft
def test_layers_that_see_all_samples_as_one_have_each_samples_strength(tmp_path: Path) -> None:
    """Z-Image's embedders, with texts of 3 and 40 words, which it pads to 32 and 64."""
    theirs = tiny("Z-Image", axes_lens=[128, 64, 64])
    network = bridge.denoiser(copy.deepcopy(theirs))
    with_lora(theirs, ["cap_embedder.1", "all_x_embedder.2-1"], r=2)
    hs.AdapterSet({"base": network}).attach(saved(theirs, tmp_path))
    x, words = randn(2, 4, 4, 6), [randn(3, 12), randn(40, 12, seed=2)]
    cond = replace(bridge.conditioning(words), strengths=torch.tensor([[0.5], [2.0]]))
    output = network(x, TIMES, cond)
    for n, strength in enumerate((0.5, 2.0)):
        sample_rows = slice(n, n + 1)
        expected = at(theirs, strength)(
            x[sample_rows], TIMES[sample_rows], Conditioning(words[n][None])
        )
        assert far(output[sample_rows], expected) <= TOLERANCE


@needs_peft
def test_an_adapter_acts_beside_one_that_peft_runs(tmp_path: Path) -> None:
    """The same LoRA twice is one at twice its strength."""
    theirs, x = adapted("SD 3"), randn(2, 4, 4, 6)
    path, network = saved(theirs, tmp_path), bridge.denoiser(copy.deepcopy(theirs))
    hs.AdapterSet({"base": network}).attach(path)
    output = network(x, TIMES, replace(cond_of(), strengths=torch.ones(2, 1)))
    assert far(output, at(theirs, 2.0)(x, TIMES, cond_of())) <= TOLERANCE


@needs_peft
@pytest.mark.parametrize("merged", [False, True])
def test_adapters_of_weights_kept_in_8_bits_compute_in_the_networks_dtype(
    merged: bool, tmp_path: Path
) -> None:
    """As on the same weights in bfloat16, which the 8 bits say exactly."""
    path, x = saved(adapted("SD 3"), tmp_path), randn(2, 4, 4, 6).bfloat16()
    if merged:
        path = tmp_path / "full.safetensors"
        save_file({"transformer_blocks.0.attn.to_q.diff": randn(32, 32)}, path)
    network = tiny("SD 3").bfloat16()
    network.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16, skip_modules_pattern=()
    )
    wide = tiny("SD 3").bfloat16()
    wide.load_state_dict({k: t.bfloat16() for k, t in network.state_dict().items()})
    outputs: list[Tensor] = []
    for model in (network, wide):
        adapters = hs.AdapterSet({"base": bridge.denoiser(model)})
        adapters.attach(path, name="a")
        strengths = torch.ones(2, 1) if adapters.columns else None
        outputs.append(bridge.denoiser(model)(x, TIMES, replace(cond_of(), strengths=strengths)))
    assert torch.equal(*outputs)


@needs_peft
def test_a_network_without_its_weights_gets_no_adapter(tmp_path: Path) -> None:
    network = bridge.denoiser(tiny("SD 3").to("meta"))
    with pytest.raises(AdapterError, match="enable_sequential_cpu_offload"):
        hs.AdapterSet({"base": network}).attach(saved(adapted("SD 3"), tmp_path))


class Offloading:
    """What accelerate's hooks do: keep a layer's `forward`, put another there, and put it back."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.kept, self.calls = layer, layer.forward, 0
        self.on = layer.forward = self.forward

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return self.kept(input)

    def off(self) -> None:
        self.layer.forward = self.kept


@pytest.mark.parametrize("first", ["offloading", "adapter"])
@pytest.mark.parametrize("last", ["offloading", "adapter"])
def test_a_merged_adapter_and_offloading_leave_each_others_forward(
    first: str, last: str, tmp_path: Path
) -> None:
    """Both replace it, in any order; only a call on which the adapter would be lost is refused."""
    network, cond = Own().requires_grad_(False), Conditioning(randn(2, 1, 1))
    layer, x, path = network.transformer[0], randn(2, 6), tmp_path / "full.safetensors"
    save_file({"transformer.0.diff": randn(6, 6)}, path)
    adapters, plain = hs.AdapterSet({"base": network}), network(x, TIMES, cond)
    if first == "adapter":
        adapters.attach(path, name="a")
    offloading = Offloading(layer)
    if first == "offloading":
        adapters.attach(path, name="a")
    merged = network(x, TIMES, cond)
    assert far(merged, plain) > 0.01
    if last == "adapter":
        offloading.off()
        if first == "adapter":
            assert torch.equal(network(x, TIMES, cond), merged)
        else:
            with pytest.raises(AdapterError, match="no longer acts, because something took"):
                network(x, TIMES, cond)
        adapters.detach("a")
    else:
        adapters.detach("a")
        calls = offloading.calls
        assert layer.forward == offloading.on and torch.equal(network(x, TIMES, cond), plain)
        assert offloading.calls == calls + 1
        adapters.attach(path, name="a")
        assert torch.equal(network(x, TIMES, cond), merged)
        adapters.detach("a")
        offloading.off()
    assert torch.equal(network(x, TIMES, cond), plain)
    adapters.attach(path, name="a")
    assert torch.equal(network(x, TIMES, cond), merged)


def test_a_layer_called_with_other_rows_than_samples_says_so(tmp_path: Path) -> None:
    class Joined(Own):
        def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            return super().forward(x.repeat(2, 1), timestep, cond)[: len(x)]

    network, path = Joined().requires_grad_(False), tmp_path / "a.safetensors"
    sides = {"lora_A": randn(1, 6), "lora_B": randn(6, 1)}
    save_file({f"transformer.0.{side}.weight": t for side, t in sides.items()}, path)
    hs.AdapterSet({"base": network}).attach(path)
    cond = Conditioning(randn(2, 1, 1), strengths=torch.ones(2, 1))
    with pytest.raises(AdapterError, match="with 4 rows for 2 samples"):
        network(randn(2, 6), TIMES, cond)
