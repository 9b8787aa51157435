"""A preview at SDXL's full size on a device that is not there: what the sampling thread may do.

It may start work. It may not read a device value, nor copy to the host so that it has to wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from evidence.audit import Finding, Hazard, Report, audit
from headstart.networks.tiny import TinyDecoder, TinyParams, TinyVae
from headstart.traces.decoders import Decoder, Picture
from headstart.traces.preview import SideStream
from headstart_kernels import decode_u8, preview_rgb

LATENT = (2, 4, 128, 128)
DRAWS = ("linear", "tiny", "full")


class Quiet:
    """Streams and events that do nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: nullcontext() if name == "stream" else self


def decoder_of(name: Any, draw: Callable[[Tensor], Picture]) -> Decoder:
    scale = 1 if name == "linear" else 8
    return Decoder(name=name, space="sdxl", channels=4, scale=scale, draw=draw)


@pytest.fixture(scope="module")
def decoders(gpu: Any, sdxl: dict[str, Any]) -> dict[str, Decoder]:
    factors, bias = gpu.empty(4, 3, dtype=torch.float32), gpu.empty(3, dtype=torch.float32)
    tiny = gpu.network(lambda params: TinyVae(TinyDecoder(params)), TinyParams())

    def linear(x0: Tensor) -> Picture:
        finite = torch.ones(len(x0), dtype=torch.bool, device=x0.device)
        return Picture(preview_rgb(x0, factors, bias), finite)

    def network(codec: Any) -> Callable[[Tensor], Picture]:
        def draw(x0: Tensor) -> Picture:
            pixels = codec.decode(x0.half())
            finite = torch.isfinite(pixels).flatten(1).all(1)
            return Picture(decode_u8(pixels, check=False), finite)

        return draw

    draws = {"linear": linear, "tiny": network(tiny), "full": network(sdxl["vae"])}
    return {name: decoder_of(name, draw) for name, draw in draws.items()}


def began(gpu: Any, decoder: Decoder, first: Decoder | None = None) -> Report:
    """Audit of the start of two frames, in a slot that has held one of their size."""
    lane = SideStream(torch.device("cuda"), 1, cuda=Quiet(), pin=False)
    slot = lane._free.get()
    frames = [gpu.empty(*LATENT, dtype=torch.float32) for _ in range(3)]
    with gpu.fake:
        lane._start(slot, first or decoder, frames[0])
    return audit(lambda x0: lane._start(slot, decoder, x0), frames[1:], fake=gpu.fake)


def waits(report: Report) -> list[Finding]:
    """What would hold up the thread; a capture's other hazards are none here."""
    kinds = {Hazard.WAITS, Hazard.REFUSED, Hazard.PINNED, Hazard.HOST_TENSOR}
    return [finding for finding in report.findings if finding.hazard in kinds]


@pytest.mark.parametrize("name", DRAWS)
def test_a_frame_is_begun_without_waiting(
    gpu: Any, decoders: dict[str, Decoder], name: str
) -> None:
    report = began(gpu, decoders[name])
    assert waits(report) == []
    copies = [finding for finding in report.findings if finding.hazard is Hazard.HOST_COPY]
    assert len(copies) == 2, "the picture and what is finite, and nothing else"
    started = [operator for operator in report.operators if operator.name == "copy_"]
    assert [operator.numbers for operator in started if "preview" in operator.where] == [
        (True,)
    ] * 3, "x0 into the slot, then both to the host, each non_blocking"


def test_a_decoder_that_reads_the_device_is_found(gpu: Any, decoders: dict[str, Decoder]) -> None:
    def nosy(x0: Tensor) -> Picture:
        assert float(x0.abs().amax()) < 1e4
        return decoders["linear"].draw(x0)

    assert waits(began(gpu, decoder_of("linear", nosy), first=decoders["linear"]))
