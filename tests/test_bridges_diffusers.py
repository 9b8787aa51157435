"""Networks, prompts and schedulers of diffusers, compared with its own calls.

Whole runs beside its pipelines' loops are in `parity/test_transformers.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers_networks import (
    SDXL,
    TIMES,
    TOLERANCE,
    UNET,
    cond_of,
    diffusers,
    far,
    make,
    randn,
    tiny,
)
from flow_transformers import FAMILIES, packed
from torch import Tensor, nn

import headstart as hs
from headstart.bridges import diffusers as bridge
from headstart.errors import HeadstartError, InputError
from headstart.interfaces import Conditioning
from headstart.plan.edm import EdmSchedule
from headstart.plan.flow import FlowSchedule
from headstart.plan.schedule import NoiseSchedule

# ------------------------------------------------------------------ networks


def test_a_unet_is_called_as_stable_diffusions_pipeline_calls_it() -> None:
    unet, x, cond = make("UNet2DConditionModel", **UNET), randn(2, 4, 8, 8), cond_of()
    expected = unet(x, torch.tensor(801), encoder_hidden_states=cond.context).sample
    assert torch.equal(bridge.denoiser(unet)(x, torch.tensor([801, 801]), cond), expected)


def test_sdxl_and_lcm_are_told_what_their_pipelines_tell_them() -> None:
    unet = make("UNet2DConditionModel", **SDXL, time_cond_proj_dim=16)
    x, embedded = randn(2, 4, 8, 8), randn(2, 16, seed=5)
    cond = replace(cond_of(), time_ids=randn(2, 6).abs() * 512, guidance_embedding=embedded)
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
    unet = make("UNet2DConditionModel", **UNET, in_channels=9)
    x, more, cond = randn(2, 4, 8, 8), randn(2, 5, 8, 8, seed=7), cond_of()
    expected = unet(torch.cat((x, more), 1), 801, cond.context).sample
    network = bridge.denoiser(unet)
    assert torch.equal(network(x, TIMES, cond_of(channels=more)), expected)
    with pytest.raises(InputError, match="takes 9 channels, and these latents have 4"):
        network(x, TIMES, cond)


def test_flux_is_told_the_guidance_that_it_was_distilled_for() -> None:
    model, x = tiny("Flux", guidance_embeds=True), randn(2, 4, 4, 6)
    cond = bridge.conditioning(cond_of().context, cond_of().pooled, guidance=3.5)
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
    with pytest.raises(InputError, match="its guidance input"):
        bridge.denoiser(model)(x, TIMES, cond_of())


def test_wan_reads_the_first_frame_and_its_tokens() -> None:
    model = tiny("Wan", in_channels=9, image_dim=20, added_kv_proj_dim=32)
    x, more, image = randn(2, 4, 3, 4, 6), randn(2, 5, 3, 4, 6, seed=3), randn(2, 7, 20, seed=4)
    cond = cond_of(channels=more, image_context=image)
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
    longer, _ = bridge.same_length(both, cond_of(1, 7))
    assert longer.context.shape == (2, 7, 12)
    for cond in (both, longer):
        output = network(x, TIMES, cond)
        for n, words_of in enumerate(words):
            alone = network(x[n : n + 1], TIMES[:1], Conditioning(words_of[None]))
            assert far(output[n : n + 1], alone) <= TOLERANCE
    unmasked = network(x, TIMES, Conditioning(longer.context))
    assert far(unmasked[:1], output[:1]) > 1000 * TOLERANCE


def test_a_guided_run_may_have_halves_of_different_lengths() -> None:
    """Rounding alone parts it from two runs of one row, F mixed by hand."""
    network, noise = bridge.denoiser(tiny("Qwen-Image")), randn(2, 4, 4, 6)
    cond, uncond = cond_of(words=6), cond_of(words=3, seed=8)
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
    *_, state = hs.sample(table, {"base": network}, cond_of(), noise)
    assert state.x.dtype == torch.float32 and bool(state.x.isfinite().all())


def test_one_network_has_one_denoiser() -> None:
    """Or adapters attached to both would act twice."""
    model = tiny("SD 3")
    network = bridge.denoiser(model)
    assert bridge.denoiser(model) is network
    other = copy.deepcopy(model)
    assert bridge.denoiser(other).model is other
    with pytest.raises(InputError, match="use that one"):
        bridge.denoiser(torch.compile(model, backend="eager"))


def test_a_compiled_network_is_the_family_that_it_was() -> None:
    model, x = tiny("SD 3"), randn(2, 4, 4, 6)
    expected = bridge.denoiser(copy.deepcopy(model))(x, TIMES, cond_of())
    network = bridge.denoiser(torch.compile(model, backend="eager"))
    assert "transformer_blocks.0.attn.to_q" in dict(network.named_modules())
    assert far(network(x, TIMES, cond_of()), expected) <= TOLERANCE


def test_modules_and_tensors_have_the_networks_own_names() -> None:
    model = tiny("Wan")
    network = bridge.denoiser(model)
    assert dict(network.named_parameters()) == dict(model.named_parameters())
    assert set(dict(network.named_modules())) == set(dict(model.named_modules()))
    assert {network, *model.modules()} == set(network.modules())


def test_a_subclass_is_the_family_that_it_extends() -> None:
    class Subclass(diffusers.SD3Transformer2DModel):
        pass

    model = Subclass(**FAMILIES["SD 3"].config).eval()
    x, cond = randn(2, 4, 4, 6), cond_of()
    expected = model(x, cond.context, cond.pooled, TIMES).sample
    assert torch.equal(bridge.denoiser(model)(x, TIMES, cond), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bridge.denoiser(nn.Linear(2, 2)), "Linear is no network of diffusers"),
        (lambda: bridge.denoiser(SimpleNamespace()), "expected one of UNet2DConditionModel, SD3"),
        (lambda: bridge.denoiser(make("UNet2DConditionModel", **UNET, class_embed_type="timestep")),
         "class_embed_type='timestep'"),
        (lambda: bridge.denoiser(make("UNet2DConditionModel", **UNET, num_class_embeds=4)),
         "num_class_embeds=4"),
        (lambda: ask("SD 3", randn(2, 4, 4, 6), Conditioning(randn(2, 5, 12))), "pooled="),
        (lambda: ask("Flux", randn(2, 6, 16)), r"takes latents \[B, C, h, w\], also where"),
        (lambda: ask("Wan", randn(2, 4, 4, 6)), r"takes latents \[B, C, T, h, w\]"),
        (lambda: ask("Flux", randn(2, 4, 5, 6)), "5 x 6: give even sides"),
        (lambda: ask("SD 3", randn(2, 16, 4, 6)), "takes 4 channels, and these latents have 16"),
        (lambda: ask("Flux", randn(2, 16, 4, 6)), "takes 4 channels, and these latents have 16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_what_to_give(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def ask(name: str, x: Tensor, cond: Conditioning | None = None) -> Tensor:
    return bridge.denoiser(tiny(name))(x, TIMES, cond or cond_of())


def test_a_run_on_a_network_that_is_no_denoiser_yet_names_the_bridge() -> None:
    table = hs.Plan((hs.Leg(model="base", steps=2),)).compile(NoiseSchedule.scaled_linear())
    unet, noise = make("UNet2DConditionModel", **UNET), hs.Given(randn(2, 4, 8, 8))
    with pytest.raises(InputError, match=r"give headstart\.bridges\.diffusers\.denoiser"):
        hs.sample(table, {"base": unet}, cond_of(), noise)


# ------------------------------------------------------------------ prompts


def test_sizes_are_what_sdxls_pipeline_makes_of_them() -> None:
    unet = make("UNet2DConditionModel", **SDXL)
    pipeline = SimpleNamespace(unet=unet)
    sizes = ((1024, 768), (3, 5), (512, 640))
    expected = diffusers.StableDiffusionXLPipeline._get_add_time_ids(
        pipeline, *sizes, torch.float32, text_encoder_projection_dim=10
    )
    cond = bridge.conditioning(
        cond_of().context,
        cond_of().pooled,
        original_size=sizes[0],
        crops_coords_top_left=sizes[1],
        target_size=sizes[2],
    )
    assert torch.equal(cond.time_ids, expected.expand(2, -1))
    plain = bridge.conditioning(cond_of().context, original_size=(64, 32))
    assert plain.time_ids is not None and plain.time_ids[0].tolist() == [64, 32, 0, 0, 64, 32]


def test_texts_of_one_length_stay_as_they_are() -> None:
    one, two = bridge.same_length(cond_of(), cond_of(seed=4))
    assert torch.equal(one.context, cond_of().context) and not one.extra and not two.extra
    masked = bridge.conditioning(
        cond_of().context, cond_of().pooled, prompt_embeds_mask=torch.ones(2, 5)
    )
    one, two = bridge.same_length(masked, cond_of())
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
        bridge.conditioning(**{"prompt_embeds": cond_of().context} | arguments)


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
    alphas = scheduler.alphas_cumprod.double().numpy()
    assert abs(alphas / schedule.alphas_cumprod - 1).max() <= 1000 * 2.0**-24
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
    timesteps = schedule.points(6, hs.Spacing.TRAILING).timesteps.tolist()
    assert timesteps == pytest.approx(scheduler.timesteps.tolist(), abs=8 * 2.0**-24 * 1000)
    with pytest.raises(InputError, match="use_dynamic_shifting: give mu="):
        bridge.process(scheduler)


@pytest.mark.parametrize(
    ("inputs", "mu", "message"),
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
def test_a_scheduler_that_is_no_process_here_says_why(inputs: Any, mu: Any, message: str) -> None:
    with pytest.raises(HeadstartError, match=message):
        bridge.process(inputs, mu=mu)
