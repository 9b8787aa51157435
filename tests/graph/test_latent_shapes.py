"""Graphs of networks and of whole runs over video [C, T, h, w] and packed tokens [L, C]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stand import Stand, hybrid
from torch import Tensor

import headstart as hs
from headstart.plan.update import Update
from headstart.runner.graph import GraphRunner
from headstart.runner.trajectory_graph import TrajectoryGraph
from headstart_kernels import decode_u8, philox_normal

VIDEO, PACKED = (4, 3, 2, 4), (6, 8)


def network(x_in: Tensor, timestep: Tensor, cond: hs.Conditioning) -> Tensor:
    per_sample = timestep.to(x_in.dtype) / 1000 + cond.context.mean((1, 2))
    return torch.tanh(x_in * 0.7 + per_sample.view(-1, *[1] * (x_in.ndim - 1)))


class FirstPixels:
    """A codec of any latents: the first 12 numbers of each as a picture [3, 2, 2]."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents.flatten(1)[:, :12].unflatten(1, (3, 2, 2)).tanh()

    def encode(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError


def check_trajectory(stand: Stand, shape: tuple[int, ...], update: Update) -> None:
    """One launch leaves the bits of the sampler, row by row, and of the decoder."""
    table = hybrid(1, 2, guidance=3.0, update=update)
    networks = {"base": network, "distilled": lambda *args: network(*args) * 0.5}
    cond, uncond, noise = stand.words(2), stand.words(2, 1), hs.Philox([3, 2**64 - 1])
    graph, options = TrajectoryGraph(networks, FirstPixels(), site=stand.site), {"uncond": uncond}
    with stand.launching():
        got = graph(table, cond, noise, shape=shape, keep_x0=True, **options)
    states = list(hs.sample(table, networks, cond, noise, shape=shape, **options))
    assert torch.equal(got.latents, states[-1].x)
    assert torch.equal(got.x0, torch.stack([state.x0 for state in states]))
    assert torch.equal(got.rgb, decode_u8(FirstPixels().decode(states[-1].x)))


@pytest.mark.parametrize("update", [Update.EULER, Update.RENOISE])
@pytest.mark.parametrize("shape", [VIDEO, PACKED], ids=str)
def test_a_whole_run_of_any_shape_is_one_graph(
    stand: Any, shape: tuple[int, ...], update: Update
) -> None:
    check_trajectory(stand, shape, update)


@pytest.mark.parametrize("shape", [VIDEO, PACKED], ids=str)
def test_a_whole_run_of_any_shape_with_compiled_kernels(
    emulated_stand: Any, shape: tuple[int, ...]
) -> None:
    check_trajectory(emulated_stand, shape, Update.RENOISE)


def test_a_video_that_is_channels_last_has_a_graph_of_its_own(stand: Any) -> None:
    """What was captured for one form would be run on a copy in that form, and not as it came."""
    runner, cond = GraphRunner(network, stand.site), stand.words(2)
    x, timestep = philox_normal([1, 2], [0, 0], 0, VIDEO), torch.tensor([7, 7])
    last = x.contiguous(memory_format=torch.channels_last_3d)
    for form in (x, last, x, last):
        assert torch.equal(runner(form, timestep, cond), network(x, timestep, cond))
    assert stand.site.captures == 2
