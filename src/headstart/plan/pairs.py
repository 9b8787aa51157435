"""The pairs with a name, one row each, with the card that its numbers are from.

Names follow the model cards. `paper-*` is what the notebooks of arXiv:2503.10637 ran, with one
scheduler for both models; `script-*` is what its script ran, where that differs and is sound.
Guidance 1.0 is what cards call 0; flow cards that write cond + s*(cond - uncond) have 1 + s here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from headstart.plan.pair import HANDOFF, Pair
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.spacing import Spacing
from headstart.plan.update import Update

DEMO_RATIO = 0.4
DEMO_TIMESTEPS = (999.0, 749.0, 499.0, 249.0)
DEMO_SCHEDULE = NoiseSchedule.scaled_linear().matched(DEMO_RATIO)
"""The bundled pair's schedule: Stable Diffusion's, matched to a 16x16 latent. It predicts v."""

_LCM = Pair(name="", card="", update=Update.RENOISE, boundary=True, start="unit")
_TCD = Pair(name="", card="", spacing=Spacing.LCM, update=Update.TCD, start="unit", end="first")
"""What rows of diffusers' LCMScheduler and TCDScheduler have in common."""
_NITROFUSION = replace(
    _LCM,
    name="nitrofusion",
    card="huggingface.co/ChenDY/NitroFusion, Realism: LCM, shifted_timestep 250, 1 to 4 steps",
    steps=(4, 1, 2, 3),
    # LCM's scheduler with `original_inference_steps = 4`, as the card sets it.
    timesteps={4: DEMO_TIMESTEPS, 3: (999.0, 749.0, 499.0), 2: (999.0, 499.0), 1: (999.0,)},
    shifted_timestep=250,
)

_TABLE_PAIRS = (
    Pair(
        name="demo",
        card="the bundled pair, weights/headstart_weights/README.md",
        timesteps={4: DEMO_TIMESTEPS},
        base_scale=2.0,  # the teacher's guidance in the recipe's distillation
        start="unit",
        handoff=None,
        schedule=DEMO_SCHEDULE,
        prediction=Prediction.V,
        ratio=DEMO_RATIO,
    ),
    # Lightning, arXiv:2402.13929: one network for each step count, on the trailing grid of that
    # count; EulerDiscrete trailing on its card. The 1-step network predicts x0.
    Pair(name="lightning", card="huggingface.co/ByteDance/SDXL-Lightning", steps=(4, 2, 8)),
    Pair(
        name="lightning-1step",
        card="huggingface.co/ByteDance/SDXL-Lightning, sdxl_lightning_1step_unet_x0",
        steps=(1,),
        distilled_prediction=Prediction.X0,
    ),
    # Adversarial diffusion distillation, arXiv:2311.17042; both are of 512 px.
    Pair(
        name="turbo",
        card="huggingface.co/stabilityai/sdxl-turbo: EulerAncestral trailing, 1 to 4 steps",
        steps=(4, 1, 2, 3),
        update=Update.ANCESTRAL,
        handoff=0.5 * HANDOFF,
        ratio=0.5,
    ),
    Pair(
        name="sd-turbo",
        card="huggingface.co/stabilityai/sd-turbo: EulerDiscrete trailing, 1 to 4 steps",
        steps=(4, 1, 2, 3),
        handoff=0.5 * HANDOFF,
        ratio=0.5,
    ),
    # Consistency on the 50 steps of a DDIM teacher, arXiv:2310.04378.
    replace(
        _LCM,
        name="lcm",
        card="huggingface.co/latent-consistency/lcm-sdxl: LCM, 4 steps, embedded guidance 8",
        spacing=Spacing.LCM,
    ),
    replace(
        _LCM,
        name="lcm-lora",
        card="huggingface.co/latent-consistency/lcm-lora-sdxl: LCM, 4 steps, guidance 0 to 2",
        steps=(4, 2, 3, 5, 6, 7, 8),
        spacing=Spacing.LCM,
    ),
    # Distribution matching, arXiv:2405.14867.
    replace(
        _LCM,
        name="dmd2",
        card="huggingface.co/tianweiy/DMD2: LCM, timesteps 999 749 499 249",
        timesteps={4: DEMO_TIMESTEPS},
    ),
    replace(
        _LCM,
        name="dmd2-1step",
        card="huggingface.co/tianweiy/DMD2, dmd2_sdxl_1step: LCM, timestep 399",
        steps=(1,),
        timesteps={1: (399.0,)},
    ),
    # Trajectory-segmented consistency, arXiv:2404.13686. DDIM of SDXL's config ends at timestep 0.
    Pair(
        name="hyper-sd",
        card="huggingface.co/ByteDance/Hyper-SD, 2, 4 and 8-step LoRAs: DDIM trailing",
        steps=(4, 2, 8),
        update=Update.DDIM,
        start="unit",
        end="first",
    ),
    replace(
        _LCM,
        name="hyper-sd-1step",
        card="huggingface.co/ByteDance/Hyper-SD, 1-step SDXL UNet: LCM, timestep 800",
        steps=(1,),
        timesteps={1: (800.0,)},
    ),
    Pair(
        name="hyper-sd-cfg",
        card="huggingface.co/ByteDance/Hyper-SD, 8 and 12-step CFG LoRAs: DDIM trailing, 5 to 8",
        steps=(8, 12),
        update=Update.DDIM,
        guidance=5.0,
        base_guidance=5.0,
        start="unit",
        end="first",
    ),
    replace(
        _TCD,
        name="hyper-sd-unified",
        card="huggingface.co/ByteDance/Hyper-SD, 1-step unified LoRA: TCD, eta 1, 1 to 8 steps",
        steps=(4, 1, 2, 3, 5, 6, 7, 8),
        gamma=1.0,
    ),
    replace(
        _TCD,
        name="tcd",
        card="huggingface.co/h1t/TCD-SDXL-LoRA: TCD, eta 0.3 (arXiv:2402.19159)",
        steps=(4, 2, 8),
    ),
    replace(
        _TCD,
        name="pcm",
        card="huggingface.co/wangfuyun/PCM_Weights: TCD, eta 0 (arXiv:2405.18407)",
        steps=(4, 2, 8, 16),
        gamma=0.0,
    ),
    replace(
        _TCD,
        name="pcm-cfg",
        card="huggingface.co/wangfuyun/PCM_Weights, normalcfg: TCD, eta 0, guidance 7.5",
        steps=(4, 8, 16),
        gamma=0.0,
        guidance=7.5,
        base_guidance=7.5,
    ),
    _NITROFUSION,
    replace(
        _NITROFUSION,
        name="nitrofusion-vibrant",
        card="huggingface.co/ChenDY/NitroFusion, Vibrant: LCM, shifted_timestep 500, 1 to 4 steps",
        shifted_timestep=500,
    ),
    Pair(
        name="sdxl-flash",
        card="huggingface.co/sd-community/sdxl-flash: DPM++ singlestep, trailing, 7 steps, 3",
        steps=(7, 6, 8, 9),
        update=Update.DPMPP_2S,
        guidance=3.0,
        base_guidance=3.0,
        start="unit",
    ),
)

_FLOW_PAIRS = tuple(
    replace(pair, prediction=Prediction.FLOW, base_scale=pair.base_guidance)
    for pair in (
        Pair(
            name="z-image",
            card="huggingface.co/Tongyi-MAI/Z-Image (shift 6, 4) and Z-Image-Turbo (shift 3, 0)",
            steps=(8,),
            schedule=NoiseSchedule.flow(3.0),
            base_schedule=NoiseSchedule.flow(6.0),
            base_guidance=5.0,
            base_steps=50,
        ),
        Pair(
            name="qwen-lightning",
            card="huggingface.co/lightx2v/Qwen-Image-Lightning (mu log 3); Qwen-Image at 1328 px",
            steps=(8, 4),
            schedule=NoiseSchedule.flow(3.0),
            base_schedule=NoiseSchedule.flow(mu=0.8343, terminal=0.02),
            base_guidance=4.0,
            base_steps=50,
        ),
        Pair(
            name="krea2",
            card="diffusers' Krea2Pipeline: Turbo mu 1.15, 0; base at 1024 px mu 0.906, 4.5",
            steps=(8,),
            schedule=NoiseSchedule.flow(mu=1.15),
            base_schedule=NoiseSchedule.flow(mu=0.90625),
            base_guidance=5.5,
            base_steps=28,
        ),
        Pair(
            name="sd35-turbo",
            card="huggingface.co/stabilityai/stable-diffusion-3.5-large-turbo and -large",
            spacing=Spacing.LINSPACE,  # what diffusers makes of a bare step count
            schedule=NoiseSchedule.flow(3.0),
            base_guidance=3.5,
            base_steps=28,
        ),
        Pair(
            name="wan22",
            card="Wan-AI/Wan2.2-T2V-A14B (shift 12, 4.0) and lightx2v's 4-step LoRAs (shift 5)",
            schedule=NoiseSchedule.flow(5.0),
            base_schedule=NoiseSchedule.flow(12.0),
            base_guidance=4.0,
            base_steps=40,
            ratio=None,  # frames are averaged too: nobody has measured what that does
        ),
        Pair(
            name="klein",
            card="black-forest-labs/FLUX.2-klein-4B and -base-4B at 1024 px, mu of diffusers",
            schedule=NoiseSchedule.flow(mu=2.2912),
            base_schedule=NoiseSchedule.flow(mu=2.0233),
            base_guidance=4.0,
            base_steps=50,
        ),
    )
)

_NOTEBOOKS = Pair(
    name="paper-lightning",
    card="arXiv:2503.10637, its notebooks: base and distilled model share one scheduler",
    handoff=None,
)
_NOTEBOOKS_LCM = replace(  # this scheduler adds new noise to the base's x0 too
    _LCM,
    card=_NOTEBOOKS.card,
    spacing=Spacing.LCM,
    base_update=Update.RENOISE,
    base_boundary=True,
    handoff=None,
)
_PAPER_PAIRS = (
    replace(_NOTEBOOKS_LCM, name="paper-dmd2"),
    replace(_NOTEBOOKS_LCM, name="paper-lcm"),
    _NOTEBOOKS,
    replace(_NOTEBOOKS, name="paper-turbo", update=Update.ANCESTRAL, base_update=Update.ANCESTRAL),
    replace(
        _NOTEBOOKS,
        name="script-turbo",
        card="improved_sdxl_inference.py of arXiv:2503.10637: Euler for the base",
        update=Update.ANCESTRAL,
    ),
)

PAIRS: Mapping[str, Pair] = MappingProxyType(
    {pair.name: pair for pair in (*_TABLE_PAIRS, *_FLOW_PAIRS, *_PAPER_PAIRS)}
)

CUSTOM = Pair(name="custom", card="the grid of the settings", handoff=None)
"""For timesteps or sigmas of the caller, without a pair."""


def presets() -> Mapping[str, Pair]:
    """Every pair by name: its grid, rules, guidance, level of the hand-off, and its card."""
    return PAIRS
