"""Networks, prompts, schedulers and LoRAs of diffusers; its own calls and PEFT are the oracles.

Whole runs beside its pipelines' loops are in `parity/test_transformers.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headstart as hs
from headstart.bridges import diffusers as bridge
from headstart.errors import AdapterError, HeadstartError, InputError
from headstart.interfaces import Conditioning
from headstart.plan.edm import EdmSchedule
from headstart.plan.flow import FlowSchedule
from headstart.plan.schedule import NoiseSchedule

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: its networks are bridged")

from flow_transformers import FAMILIES, networks, packed  # noqa: E402

BATCH = 2
TOLERANCE = 16 * 2.0**-24
"""Of max |F|: two float32 passes of one network that order their sums differently. The worst that
was measured is 7 roundings; each mistake below shows as 1000 tolerances or more."""
UNET = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 8,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 12,
}  # fmt: skip
SDXL = UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 10,
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(kind: str, **config: Any) -> Any:
    if not hasattr(diffusers, kind):
        pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(diffusers, kind)(**config).eval().requires_grad_(False)


def tiny(name: str, **config: Any) -> Any:
    return made(FAMILIES[name].kind, **FAMILIES[name].config | config)


def told(batch: int = BATCH, words: int = 5, seed: int = 1, **extra: Tensor) -> Conditioning:
    return Conditioning(
        randn(batch, words, 12, seed=seed), randn(batch, 10, seed=seed + 1), extra=extra
    )


def far(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest of what is expected."""
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


TIMES = torch.tensor([801.0, 801.0])

# ------------------------------------------------------------------ networks


def test_a_unet_is_called_as_stable_diffusions_pipeline_calls_it() -> None:
    unet, x, cond = made("UNet2DConditionModel", **UNET), randn(2, 4, 8, 8), told()
    expected = unet(x, torch.tensor(801), encoder_hidden_states=cond.context).sample
    assert torch.equal(bridge.denoiser(unet)(x, torch.tensor([801, 801]), cond), expected)


def test_sdxl_and_lcm_are_told_what_their_pipelines_tell_them() -> None:
    unet = made("UNet2DConditionModel", **SDXL, time_cond_proj_dim=16)
    x, embedded = randn(2, 4, 8, 8), randn(2, 16, seed=5)
    cond = replace(told(), time_ids=randn(2, 6).abs() * 512, guidance_embedding=embedded)
    expected = unet(
        x,
        801,
        encoder_hidden_states=cond.context,
        timestep_cond=embedded,
        added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.time_ids},
    ).sample
    network = bridge.denoiser(unet)
    assert torch.equal(network(x, TIMES, cond), expected)
    for missing in ("pooled", "time_ids", "guidance_embedding"):
        with pytest.raises(InputError, match=missing):
            network(x, TIMES, replace(cond, **{missing: None}))


def test_inpainting_channels_go_behind_the_latent() -> None:
    unet = made("UNet2DConditionModel", **UNET, in_channels=9)
    x, more, cond = randn(2, 4, 8, 8), randn(2, 5, 8, 8, seed=7), told()
    expected = unet(torch.cat((x, more), 1), 801, cond.context).sample
    network = bridge.denoiser(unet)
    assert torch.equal(network(x, TIMES, told(channels=more)), expected)
    with pytest.raises(InputError, match="takes 9 channels, and these latents have 4"):
        network(x, TIMES, cond)


def test_flux_is_told_the_guidance_that_it_was_distilled_for() -> None:
    model, x = tiny("Flux", guidance_embeds=True), randn(2, 4, 4, 6)
    cond = bridge.conditioning(told().context, told().pooled, guidance=3.5)
    f = model(
        hidden_states=packed(x),
        encoder_hidden_states=cond.context,
        pooled_projections=cond.pooled,
        timestep=TIMES / 1000,
        img_ids=diffusers.FluxPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", x.dtype),
        txt_ids=torch.zeros(5, 3),
        guidance=torch.tensor([3.5, 3.5]),
    ).sample
    expected = diffusers.FluxPipeline._unpack_latents(f, 32, 48, 8)
    assert torch.equal(bridge.denoiser(model)(x, TIMES, cond), expected)
    with pytest.raises(InputError, match="the guidance that it is told"):
        bridge.denoiser(model)(x, TIMES, told())


def test_wan_reads_the_first_frame_and_its_tokens() -> None:
    model = tiny("Wan", in_channels=9, image_dim=20, added_kv_proj_dim=32)
    x, more, image = randn(2, 4, 3, 4, 6), randn(2, 5, 3, 4, 6, seed=3), randn(2, 7, 20, seed=4)
    cond = told(channels=more, image_context=image)
    expected = model(
        hidden_states=torch.cat([x, more], dim=1),
        timestep=TIMES,
        encoder_hidden_states=cond.context,
        encoder_hidden_states_image=image,
    ).sample
    assert torch.equal(bridge.denoiser(model)(x, TIMES, cond), expected)


@pytest.mark.parametrize("name", ["Qwen-Image", "Z-Image"])
def test_padding_changes_no_sample(name: str) -> None:
    """Prompts of 3 and 5 words in one batch, padded to 7, as each is alone without a mask."""
    network, x = bridge.denoiser(tiny(name)), randn(2, 4, 4, 6)
    words = [randn(3, 12), randn(5, 12, seed=2)]
    both = bridge.conditioning(words)
    assert both.extra["mask"].sum(1).tolist() == [3, 5]
    longer, _ = bridge.same_length(both, told(1, 7))
    assert longer.context.shape == (2, 7, 12)
    for cond in (both, longer):
        found = network(x, TIMES, cond)
        for n, own in enumerate(words):
            alone = network(x[n : n + 1], TIMES[:1], Conditioning(own[None]))
            assert far(found[n : n + 1], alone) <= TOLERANCE
    unmasked = network(x, TIMES, Conditioning(longer.context))
    assert far(unmasked[:1], found[:1]) > 1000 * TOLERANCE


def test_a_guided_run_may_have_halves_of_different_lengths() -> None:
    """Rounding alone parts it from two runs of one row, F mixed by hand."""
    network, noise = bridge.denoiser(tiny("Qwen-Image")), randn(2, 4, 4, 6)
    cond, uncond = told(words=6), told(words=3, seed=8)
    legs = (hs.Leg(model="base", steps=4, guidance=4.0),)
    table = hs.Plan(legs).compile(NoiseSchedule.flow(), prediction=hs.Prediction.FLOW)
    one, two = bridge.same_length(cond, uncond)
    state = next(hs.sample(table, {"base": network}, one, hs.Given(noise), uncond=two))
    time = torch.tensor([1000.0, 1000.0])
    positive, negative = network(noise, time, cond), network(noise, time, uncond)
    expected = noise - (negative + 4.0 * (positive - negative))
    # |F| is amplified by 2*4 - 1, and so are its roundings.
    largest = max(positive.abs().max(), negative.abs().max(), noise.abs().max())
    assert (state.x0 - expected).abs().max() <= 7 * TOLERANCE * largest


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_in_half_precision_is_fed_its_own_dtype(name: str) -> None:
    network = bridge.denoiser(tiny(name).bfloat16())
    legs = (hs.Leg(model="base", steps=2),)
    table = hs.Plan(legs).compile(NoiseSchedule.flow(), prediction=hs.Prediction.FLOW)
    noise = hs.Given(randn(2, *FAMILIES[name].shape))
    assert network.dtype == torch.bfloat16
    *_, state = hs.sample(table, {"base": network}, told(), noise)
    assert state.x.dtype == torch.float32 and bool(state.x.isfinite().all())


def test_one_network_has_one_denoiser() -> None:
    """Or adapters attached to both would act twice."""
    model = tiny("SD 3")
    network = bridge.denoiser(model)
    assert bridge.denoiser(model) is network
    other = copy.deepcopy(model)
    assert bridge.denoiser(other).model is other
    with pytest.raises(InputError, match="a network has one"):
        bridge.denoiser(torch.compile(model, backend="eager"))


def test_a_compiled_network_is_the_family_that_it_was() -> None:
    model, x = tiny("SD 3"), randn(2, 4, 4, 6)
    expected = bridge.denoiser(copy.deepcopy(model))(x, TIMES, told())
    network = bridge.denoiser(torch.compile(model, backend="eager"))
    assert "transformer_blocks.0.attn.to_q" in dict(network.named_modules())
    assert far(network(x, TIMES, told()), expected) <= TOLERANCE


def test_modules_and_tensors_have_the_networks_own_names() -> None:
    model = tiny("Wan")
    network = bridge.denoiser(model)
    assert dict(network.named_parameters()) == dict(model.named_parameters())
    assert set(dict(network.named_modules())) == set(dict(model.named_modules()))
    assert {network, *model.modules()} == set(network.modules())


def test_a_subclass_is_the_family_that_it_extends() -> None:
    class Own(diffusers.SD3Transformer2DModel):
        pass

    model = Own(**FAMILIES["SD 3"].config).eval()
    x, cond = randn(2, 4, 4, 6), told()
    expected = model(x, cond.context, cond.pooled, TIMES).sample
    assert torch.equal(bridge.denoiser(model)(x, TIMES, cond), expected)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: bridge.denoiser(nn.Linear(2, 2)), "Linear is no network of diffusers"),
        (lambda: bridge.denoiser(SimpleNamespace()), "expected one of UNet2DConditionModel, SD3"),
        (lambda: bridge.denoiser(made("UNet2DConditionModel", **UNET, class_embed_type="timestep")),
         "class_embed_type='timestep'"),
        (lambda: bridge.denoiser(made("UNet2DConditionModel", **UNET, num_class_embeds=4)),
         "num_class_embeds=4"),
        (lambda: ask("SD 3", randn(2, 4, 4, 6), Conditioning(randn(2, 5, 12))), "pooled="),
        (lambda: ask("Flux", randn(2, 6, 16)), r"takes latents \[B, C, h, w\], also where"),
        (lambda: ask("Wan", randn(2, 4, 4, 6)), r"takes latents \[B, C, T, h, w\]"),
        (lambda: ask("Flux", randn(2, 4, 5, 6)), "5 x 6: give even sides"),
        (lambda: ask("SD 3", randn(2, 16, 4, 6)), "takes 4 channels, and these latents have 16"),
        (lambda: ask("Flux", randn(2, 16, 4, 6)), "takes 4 channels, and these latents have 16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_what_to_give(made: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made()


def ask(name: str, x: Tensor, cond: Conditioning | None = None) -> Tensor:
    return bridge.denoiser(tiny(name))(x, TIMES, cond or told())


def test_a_run_on_a_network_that_is_no_denoiser_yet_names_the_bridge() -> None:
    table = hs.Plan((hs.Leg(model="base", steps=2),)).compile(NoiseSchedule.scaled_linear())
    unet, noise = made("UNet2DConditionModel", **UNET), hs.Given(randn(2, 4, 8, 8))
    with pytest.raises(InputError, match=r"give headstart\.bridges\.diffusers\.denoiser"):
        hs.sample(table, {"base": unet}, told(), noise)


# ------------------------------------------------------------------ prompts


def test_sizes_are_what_sdxls_pipeline_makes_of_them() -> None:
    unet = made("UNet2DConditionModel", **SDXL)
    pipeline = SimpleNamespace(unet=unet)
    sizes = ((1024, 768), (3, 5), (512, 640))
    expected = diffusers.StableDiffusionXLPipeline._get_add_time_ids(
        pipeline, *sizes, torch.float32, text_encoder_projection_dim=10
    )
    cond = bridge.conditioning(
        told().context,
        told().pooled,
        original_size=sizes[0],
        crops_coords_top_left=sizes[1],
        target_size=sizes[2],
    )
    assert torch.equal(cond.time_ids, expected.expand(2, -1))
    plain = bridge.conditioning(told().context, original_size=(64, 32))
    assert plain.time_ids is not None and plain.time_ids[0].tolist() == [64, 32, 0, 0, 64, 32]


def test_texts_of_one_length_stay_as_they_are() -> None:
    one, two = bridge.same_length(told(), told(seed=4))
    assert torch.equal(one.context, told().context) and not one.extra and not two.extra
    masked = bridge.conditioning(told().context, told().pooled, prompt_embeds_mask=torch.ones(2, 5))
    one, two = bridge.same_length(masked, told())
    assert one.extra["mask"].all() and two.extra["mask"].all()
    Conditioning.cat((one, two))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_embeds": randn(5, 12)}, r"expected \[B, L, D\], got \[5, 12\]"),
        ({"prompt_embeds": []}, "expected one"),
        ({"prompt_embeds": [randn(3, 12), randn(3, 10)]}, "of one width"),
        ({"prompt_embeds_mask": torch.ones(2, 4)}, r"expected \[2, 5\]"),
        ({"pooled_prompt_embeds": randn(3, 10)}, "of 3 prompts, prompt_embeds of 2"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"prompt_embeds": None}, "got .'NoneType'.: give what encode_prompt"),
        ({"prompt_embeds": "a fox"}, "got .'str'.: give what encode_prompt"),
        ({"prompt_embeds": (randn(1, 5, 12), None)}, r"got \['Tensor', 'NoneType'\]"),
        ({"prompt_embeds": (randn(1, 5, 12),) * 2}, "of what encode_prompt returns give the parts"),
        ({"pooled_prompt_embeds": randn(2, 5, 12)}, r"got torch.float32 \[2, 5, 12\]: encode_"),
        ({"pooled_prompt_embeds": torch.ones(2, 5).bool()}, r"\(text, mask\) of Qwen-Image"),
        ({"pooled_prompt_embeds": [randn(3, 12)] * 2}, r"\(text, negative\) of SD, Wan and Z-"),
    ],
)
def test_prompts_that_do_not_fit_say_why(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadstartError, match=message):
        bridge.conditioning(**{"prompt_embeds": told().context} | arguments)


# ------------------------------------------------------------------ schedulers


@pytest.mark.parametrize("kind", ["DDIM", "EulerDiscrete", "LCM", "DPMSolverMultistep"])
def test_a_schedulers_table_is_its_process(kind: str) -> None:
    """Theirs is a float32 product of 1000 factors."""
    scheduler = getattr(diffusers, f"{kind}Scheduler")(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
    )
    schedule, prediction = bridge.process(scheduler)
    assert schedule == NoiseSchedule.scaled_linear() and prediction is hs.Prediction.V
    own = scheduler.alphas_cumprod.double().numpy()
    assert abs(own / schedule.alphas_cumprod - 1).max() <= 1000 * 2.0**-24
    assert (
        bridge.process(dict(scheduler.config) | {"_class_name": f"{kind}Scheduler"})[0] == schedule
    )


def test_flows_and_edm_are_read_too() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert bridge.process(flow) == (FlowSchedule(3.0), hs.Prediction.FLOW)
    edm = diffusers.EDMEulerScheduler(sigma_max=120.0, prediction_type="v_prediction")
    assert bridge.process(edm) == (EdmSchedule(sigma_max=120.0), hs.Prediction.EDM_V)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shifting_is_read_with_its_mu(kind: str) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=0.02
    )
    schedule, _ = bridge.process(scheduler, mu=0.8)
    scheduler.set_timesteps(sigmas=[1 - i / 6 for i in range(6)], mu=0.8)
    found = schedule.points(6, hs.Spacing.TRAILING).timesteps.tolist()
    assert found == pytest.approx(scheduler.timesteps.tolist(), abs=8 * 2.0**-24 * 1000)
    with pytest.raises(InputError, match="use_dynamic_shifting: give mu="):
        bridge.process(scheduler)


@pytest.mark.parametrize(
    ("given", "mu", "message"),
    [
        (diffusers.DDIMScheduler(), 0.8, "this scheduler has none"),
        ({}, None, "with a _class_name"),
        ("euler", None, "expected a scheduler of diffusers"),
        (diffusers.DDIMScheduler, None, "such as pipe.scheduler, got <class"),
        ({"_class_name": "VQDiffusionScheduler"}, None, "not known to use a table"),
        ({"_class_name": "DDIMScheduler", "beta_start": -1.0}, None, "beta_start"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow_map"}, None, "unusable"),
    ],
)
def test_a_scheduler_that_is_no_process_here_says_why(given: Any, mu: Any, message: str) -> None:
    with pytest.raises(HeadstartError, match=message):
        bridge.process(given, mu=mu)


# ------------------------------------------------------------------ adapters

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


def adapted(name: str, rank: int = 3, alpha: float = 5.0) -> Any:
    """The same network with a LoRA of PEFT's in it, named "a"."""
    from peft import LoraConfig

    model = networks(FAMILIES[name])["base"]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=TARGETS[name], init_lora_weights=False
        )
        model.add_adapter(config, "a")
    return model.eval().requires_grad_(False)


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
    x, cond, times = randn(8, *FAMILIES[name].shape), told(8), torch.full((8,), 801.0)
    before = network(x, times, cond)
    adapters = hs.AdapterSet({"base": network})
    report = adapters.attach(saved(theirs, tmp_path), STRENGTHS, name="fast")
    assert report.live and report.rank == 3
    column = torch.tensor(STRENGTHS)[:, None]
    found = network(x, times, replace(cond, strengths=column))
    assert torch.equal(found[2], before[2])
    for n, strength in enumerate(STRENGTHS):
        own = slice(n, n + 1)
        expected = at(theirs, strength)(x[own], times[own], cond[own])
        assert far(found[own], expected) <= TOLERANCE
        if strength:
            assert far(before[own], expected) > 1000 * TOLERANCE
    adapters.detach("fast")
    assert torch.equal(network(x, times, cond), before)


@needs_peft
def test_a_kohya_lora_of_stable_diffusion_acts_on_diffusers_unet(tmp_path: Path) -> None:
    """Linear layers and convolutions, guided: both halves of a sample have its strength."""
    from peft import LoraConfig

    network, theirs = (bridge.denoiser(made("UNet2DConditionModel", **UNET)) for _ in range(2))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        targets = ["to_q", "proj_in", "conv1", "time_emb_proj"]
        theirs.model.add_adapter(
            LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "a"
        )
    tensors = kohya(load_file(saved(theirs.model, tmp_path)), 8.0, "_")
    save_file(renamed(tensors, lambda key: f"lora_unet_{key}"), tmp_path / "kohya.safetensors")
    adapters = hs.AdapterSet({"base": network})
    adapters.attach(tmp_path / "kohya.safetensors", (0.5, 2.0))
    table = hs.Plan((hs.Leg(model="base", steps=2, guidance=3.0),)).compile(
        NoiseSchedule.scaled_linear()
    )
    x, words = randn(2, 4, 8, 8), {"uncond": told(seed=6)}
    given = {"strengths": adapters.strengths(table, 2), **words}
    found = next(hs.sample(table, {"base": network}, told(), hs.Given(x), **given)).x
    for n, strength in enumerate((0.5, 2.0)):
        own = slice(n, n + 1)
        alone = at(theirs.model, strength)
        noise, words = hs.Given(x[own]), {"uncond": told(seed=6)[own]}
        expected = next(hs.sample(table, {"base": alone}, told()[own], noise, **words)).x
        # Guidance 3 makes roundings of F five times as large.
        assert far(found[own], expected) <= 5 * TOLERANCE


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
        said = theirs.peft_config["a"].to_dict()
        pipeline.save_lora_weights(
            tmp_path, tensors, weight_name=path.name, transformer_lora_adapter_metadata=said
        )
        assert all(key.startswith("transformer.") for key in load_file(path))
    elif naming == "lightning":
        own = wan_original if name == "Wan" else str
        save_file(kohya(renamed(tensors, own), alpha, "."), path)
    elif naming in ("kohya", "onetrainer"):
        prefix = {"kohya": "lora_unet_", "onetrainer": "lora_transformer_"}[naming]
        save_file(renamed(kohya(tensors, alpha, "_"), lambda key: prefix + key), path)
    else:
        scaled = {k: t * alpha / 3 if "lora_B" in k else t for k, t in tensors.items()}
        save_file(renamed(scaled, lambda key: f"base_model.model.{key}"), path)
    network = bridge.denoiser(networks(FAMILIES[name])["base"])
    hs.AdapterSet({"base": network}).attach(path)
    x, cond = randn(2, *FAMILIES[name].shape), told()
    found = network(x, TIMES, replace(cond, strengths=torch.full((2, 1), 0.5)))
    assert far(found, at(theirs, 0.5)(x, TIMES, cond)) <= TOLERANCE


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
    x, cond = randn(2, *FAMILIES["Wan"].shape), told()
    found = network(x, TIMES, replace(cond, strengths=torch.ones(2, 1)))
    assert far(found, at(theirs, 1.0)(x, TIMES, cond)) <= TOLERANCE


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
    noise, words = hs.Given(randn(2, *family.shape)), {"uncond": told(seed=6)}
    strengths = adapters.strengths(table, 2)
    assert strengths is not None and strengths[:, 0, 0].tolist() == [0, 0, 1, 1]
    one = hs.sample(
        table, {"base": network, "distilled": network}, told(), noise, strengths=strengths, **words
    )
    plain = bridge.denoiser(networks(family)["base"])
    two = hs.sample(table, {"base": plain, "distilled": at(theirs, 1.0)}, told(), noise, **words)
    limit = 0.0
    for ours, expected in zip(one, two, strict=True):
        limit = 2 * limit + TOLERANCE
        assert far(ours.x, expected.x) <= limit


class Own(nn.Module):
    """A network of nobody's: its layers begin with what looks like a prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return self.transformer[1](self.transformer[0](x).sin())


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
    found = network(x, TIMES, cond)
    assert far(found, theirs(x, TIMES, cond)) <= TOLERANCE
    assert far(found, network(x, TIMES, replace(cond, strengths=torch.zeros(3, 1)))) > 0.01


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
        network(randn(2, *FAMILIES["Wan"].shape), TIMES, told())


@needs_peft
def test_layers_that_see_all_samples_as_one_have_each_samples_strength(tmp_path: Path) -> None:
    """Z-Image's embedders, with texts of 3 and 40 words, which it pads to 32 and 64."""
    from peft import LoraConfig

    theirs = tiny("Z-Image", axes_lens=[128, 64, 64])
    network = bridge.denoiser(copy.deepcopy(theirs))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        targets = ["cap_embedder.1", "all_x_embedder.2-1"]
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        theirs.add_adapter(config, "a")
    hs.AdapterSet({"base": network}).attach(saved(theirs.eval().requires_grad_(False), tmp_path))
    x, words = randn(2, 4, 4, 6), [randn(3, 12), randn(40, 12, seed=2)]
    cond = replace(bridge.conditioning(words), strengths=torch.tensor([[0.5], [2.0]]))
    found = network(x, TIMES, cond)
    for n, strength in enumerate((0.5, 2.0)):
        own = slice(n, n + 1)
        expected = at(theirs, strength)(x[own], TIMES[own], Conditioning(words[n][None]))
        assert far(found[own], expected) <= TOLERANCE


@needs_peft
def test_an_adapter_acts_beside_one_that_peft_runs(tmp_path: Path) -> None:
    """The same LoRA twice is one at twice its strength."""
    theirs, x = adapted("SD 3"), randn(2, 4, 4, 6)
    path, network = saved(theirs, tmp_path), bridge.denoiser(copy.deepcopy(theirs))
    hs.AdapterSet({"base": network}).attach(path)
    found = network(x, TIMES, replace(told(), strengths=torch.ones(2, 1)))
    assert far(found, at(theirs, 2.0)(x, TIMES, told())) <= TOLERANCE


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
    kept = tiny("SD 3").bfloat16()
    kept.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16, skip_modules_pattern=()
    )
    wide = tiny("SD 3").bfloat16()
    wide.load_state_dict({k: t.bfloat16() for k, t in kept.state_dict().items()})
    found: list[Tensor] = []
    for model in (kept, wide):
        adapters = hs.AdapterSet({"base": bridge.denoiser(model)})
        adapters.attach(path, name="a")
        strengths = torch.ones(2, 1) if adapters.columns else None
        found.append(bridge.denoiser(model)(x, TIMES, replace(told(), strengths=strengths)))
    assert torch.equal(*found)


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
    save_file(
        {"transformer.0.lora_A.weight": randn(1, 6), "transformer.0.lora_B.weight": randn(6, 1)},
        path,
    )
    hs.AdapterSet({"base": network}).attach(path)
    cond = Conditioning(randn(2, 1, 1), strengths=torch.ones(2, 1))
    with pytest.raises(AdapterError, match="with 4 rows for 2 samples"):
        network(randn(2, 6), TIMES, cond)
