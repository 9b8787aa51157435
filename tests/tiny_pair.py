"""Engines of small random networks with the texts of SD 1 or SDXL, made in memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from encoders import sd1_tower, sdxl_towers, small_words

import headstart as hs
from headstart.engine.pair import Pair
from headstart.networks.text import ClipText
from headstart.networks.unet import Mid, Stage, UNet, UNetParams
from headstart.networks.vae import Vae, VaeParams
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule

PARAMS = UNetParams(
    down=(Stage(16, (0,), True), Stage(32, (1,), False)),
    mid=Mid(2, 1),
    up=(Stage(32, (1, 1), True), Stage(16, (0, 0), False)),
    context_dim=32,
    head_dim=8,
    norm_groups=8,
)
SDXL = replace(PARAMS, context_dim=72, added_dim=24 + 6 * 8)
PLAN = hs.Plan(
    (
        hs.Leg(model="base", steps=4, guidance=3.0, until="next"),
        hs.Leg(model="distilled", timesteps=(499, 249)),
    ),
)
"""Rows at sigma 14.61 and 4.082 of the base, guided; 1.613 and 0.6932 of the distilled model."""


def tiny_engine(family: str) -> hs.Engine:
    """ "sd15" with one encoder, or "sdxl" with two, a pooled text and time_ids; 16 px, 8 cells."""
    params = SDXL if family == "sdxl" else PARAMS
    unets: dict[str, UNet] = {}
    for seed, role in enumerate(("base", "distilled")):
        torch.manual_seed(seed)
        unets[role] = UNet(params).requires_grad_(False).eval()
    torch.manual_seed(2)
    vae = Vae(VaeParams(channels=(8, 16), layers=1, norm_groups=4, scale_factor=0.5))
    towers = sdxl_towers() if family == "sdxl" else [sd1_tower()]
    schedule, prediction = NoiseSchedule.scaled_linear(), Prediction.EPS
    return hs.Engine(
        Pair(
            denoisers=unets,
            text=ClipText(towers, small_words(), image_size=16),
            vae=vae.requires_grad_(False).eval(),
            schedules=dict.fromkeys(unets, schedule),
            predictions=dict.fromkeys(unets, prediction),
            image_size=16,
            downscale=2,
            lineage=family,
        )
    )
