"""FLOPs of the networks against torch's counter over diffusers' own, of tiny shapes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from networks import PARAMS
from torch.utils.flop_counter import FlopCounterMode

from headstart.cost.operators import Tally
from headstart.cost.stages import decode, unet_pass
from headstart.networks.vae import VaeParams

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")

META = torch.device("meta")


def _flops(network: Any, *args: Any, **options: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*args, **options)
    return counter.get_total_flops()


def test_a_unet_has_the_flops_of_diffusers_own() -> None:
    with META:
        theirs = diffusers.UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            cross_attention_dim=24,
            norm_num_groups=8,
            use_linear_projection=True,
        )
        x, context = torch.empty(2, 4, 8, 8), torch.empty(2, 77, 24)
        expected = _flops(theirs, x, torch.empty(2), encoder_hidden_states=context)
    read, row = unet_pass(PARAMS, (4, 8, 8), rows=2)
    assert Tally.of(read + row).flops == expected


def test_a_decode_has_the_flops_of_diffusers_own() -> None:
    params = VaeParams(channels=(8, 16), layers=1, norm_groups=4)
    with META:
        theirs = diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
        )
        expected = _flops(theirs.decode, torch.empty(3, 4, 8, 8))
    assert Tally.of(decode(params, (4, 8, 8), 3, torch.float16)).flops == expected
