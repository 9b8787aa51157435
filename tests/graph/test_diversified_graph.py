"""Methods are outside of a captured network: with a graph they give the bits of an eager run."""

from __future__ import annotations

from typing import Any

import torch
from stand import SCHEDULE, SHAPE

import headstart as hs
from headstart.diversify.effect import Position, networks_of, noise_for
from headstart.diversify.method import Images
from headstart.diversify.methods import read_methods
from headstart.runner.batch import Chunked
from headstart.runner.runner import EagerRunner

METHODS = read_methods(["pink:1", "cads:0.5", "embedding-noise:1,until=0.6", "particles:8"])


def test_a_graph_with_methods_around_it_has_the_bits_of_the_network(stand: Any) -> None:
    """With SDXL's pooled text, a guided base step, two prompts, and three samples at once."""
    table = hs.preset("lightning", steps=4, base_guidance=3.0).compile(SCHEDULE)
    images = Images(("a", "b") * 3, (1, 1, 2, 3, 4, 5))
    cond, uncond = stand.words(6, 1), stand.words(6, 2)

    def states(runner: Any) -> list[hs.State]:
        position = Position(table, images)
        chunked = {model: Chunked(runner(model), 3) for model in table.models}
        return list(
            hs.sample(
                table, networks_of(chunked, METHODS, position), cond, noise_for(METHODS, images),
                uncond=uncond, shape=SHAPE, before_row=position.begin,
            )
        )  # fmt: skip

    expected = states(lambda model: EagerRunner(stand.denoisers[model]))
    for _ in range(2):
        got = states(stand.runner)
        assert all(torch.equal(a.x, b.x) for a, b in zip(got, expected, strict=True))
