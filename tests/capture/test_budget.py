"""What a pass of SDXL asks of a GPU, as a budget: a change that costs more has to say so here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counted import Counts, counted

from evidence.audit import audit
from headstart.networks.unet import UNet
from headstart.prompt_cache import PromptCache
from headstart.runner.graph import GraphRunner

SAMPLES, LATENT = 2, (4, 128, 128)


@pytest.fixture(scope="module")
def calls(gpu: Any, sdxl: dict[str, Any]) -> tuple[UNet, dict[str, tuple[Any, ...]]]:
    """A network as it is loaded on a GPU, and its calls: in a first row, which reads the prompt,
    and in the rows after it, which have it."""
    x, time = gpu.empty(SAMPLES, *LATENT), gpu.empty(SAMPLES, dtype=torch.int64)
    words, unet = gpu.words(SAMPLES), gpu.network(UNet, sdxl["base"].params)
    with gpu.fake, torch.no_grad():
        unet.lay_out()
        read_ahead = PromptCache().of(unet, words)
    return unet, {"first": (x, time, words), "later": (x, time, read_ahead)}


@pytest.fixture(scope="module")
def passes(gpu: Any, calls: tuple[UNet, dict[str, tuple[Any, ...]]]) -> dict[str, Counts]:
    """What they ask of the GPU.

    Such a pass was 1588 operators, 743 matrix products, 14 copies and 35.3 GB when layers were
    called one by one on images that lay plane by plane.
    """
    unet, inputs = calls
    with gpu.fake:
        first = counted(lambda: unet(*inputs["first"]))
        return {"first": first, "later": counted(lambda: unet(*inputs["later"]))}


def test_such_a_network_may_be_captured(
    gpu: Any, calls: tuple[UNet, dict[str, tuple[Any, ...]]]
) -> None:
    unet, arguments = calls
    program, inputs = GraphRunner(unet, dtype=torch.float16).request(*arguments["later"])
    report = audit(program.body, [inputs], fake=gpu.fake, declared=unet.parameters())
    assert report.findings == () and len(report.operators) > 1000


def test_a_pass_is_within_its_operators(passes: dict[str, Counts]) -> None:
    assert passes["first"].operators <= 1098 and passes["later"].operators <= 1097
    assert passes["first"].convolutions == 51 and passes["first"].attentions == 140


def test_layers_of_one_input_are_one_product_each(passes: dict[str, Counts]) -> None:
    """70 blocks: self-attention has 1 product of queries, keys and values and 1 of its output;
    cross-attention 1 of queries and 1 of its output; feed-forward 2. Then 2 projections around each
    of 11 transformers, 4 of the timestep and the sizes, 1 of all ResBlocks' timesteps. The first
    row has 1 more, of the prompt's keys and values in all blocks."""
    assert passes["later"].gemms == 70 * 6 + 11 * 2 + 4 + 1
    assert passes["first"].gemms == passes["later"].gemms + 1


def test_no_image_is_turned(passes: dict[str, Counts]) -> None:
    """The 3 copies are of the timestep's and the sizes' embeddings; a kernel of a norm adds the
    timestep's shift, so what is added is 70 feed-forwards, 17 + 11 residuals, and the sizes'."""
    for counts in passes.values():
        assert counts.copies == 3 and counts.names["clone"] == 0
        assert counts.names["add"] == 70 + 17 + 11 + 1
        assert counts.names["native_group_norm"] == 0 and counts.names["silu"] == 3


def test_a_pass_is_within_its_bytes(passes: dict[str, Counts]) -> None:
    """5.1 GB are weights, each read once; the rest is what layers hand on to each other."""
    assert passes["first"].moved < 32.8e9 and passes["later"].moved < 32.1e9
