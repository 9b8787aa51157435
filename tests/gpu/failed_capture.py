"""What a failed capture leaves behind, on a GPU; run by test_gpu.py in a process of its own.

python failed_capture.py waits | raises | "falls back"
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import CaptureError, InputError
from headstart.interfaces import Conditioning
from headstart.runner.capture import Site
from headstart.runner.graph import GraphRunner


class Waits(nn.Module):
    """Reads the device on the host, which a capture does not permit."""

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return x_in * float(timestep[0])


class Raises(nn.Module):
    """Fails for a reason of its own, of which the device knows nothing."""

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        raise InputError("not today")


class Doubles(nn.Module):
    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return x_in * 2


def inputs(size: int = 8) -> tuple[Any, ...]:
    x = torch.ones(1, 4, size, size, device="cuda")
    cond = Conditioning(torch.ones(1, 7, 64, device="cuda"))
    return x, torch.full((1,), 7, device="cuda"), cond


def fail(how: str, site: Site) -> None:
    if how == "falls back":
        runner = GraphRunner(Waits(), site, fallback=True)
        for _ in range(2):  # a shape that was refused is not tried again
            assert torch.equal(runner(*inputs()), inputs()[0] * 7)
        assert len(runner.refusals) == 1
        return
    try:
        GraphRunner(Waits() if how == "waits" else Raises(), site)(*inputs())
    except CaptureError as error:
        assert how == "waits" and "Waits could not be captured" in str(error), error
        assert "previous error" not in str(error), "the first error is the one to tell"
    except InputError as error:
        assert how == "raises" and str(error) == "not today", error
    else:
        raise AssertionError(f"{how}: nothing was raised")


def main(how: str) -> None:
    site, stream = Site.of(torch.device("cuda")), torch.cuda.current_stream()
    good = GraphRunner(Doubles(), site)
    before = good(*inputs())
    fail(how, site)
    assert torch.cuda.current_stream() == stream, "the thread is on the stream it was on"
    if site.dead is not None:
        print(f"the site is dead, which it may be: {site.dead}")
        runner = GraphRunner(Doubles(), fallback=True)
        assert torch.equal(runner(*inputs()), before), "eager goes on"
        return
    assert torch.equal(good(*inputs()), before), "a graph from before still runs"
    captures = site.captures
    assert torch.equal(good(*inputs(16)), inputs(16)[0] * 2) and site.captures == captures + 1
    large = torch.empty(100 * 2**20, dtype=torch.uint8, device="cuda")
    reserved = torch.cuda.memory_reserved()
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - 100 * 2**20, "the allocator is not capturing"
    torch.randn(4, device="cuda")  # nor is the generator
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
