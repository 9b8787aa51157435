"""An engine runs by any runner of its device, to the same bits, from several threads."""

from __future__ import annotations

import threading

import pytest
import torch

import headstart as hs
import headstart_weights


@pytest.fixture(scope="module")
def eager() -> hs.Engine:
    return hs.Engine.demo(runner="eager")


@pytest.fixture(scope="module")
def replayed(eager: hs.Engine) -> hs.Engine:
    return hs.Engine(eager.weights, "replay")


def test_the_bundled_pair_replayed_has_the_bits_of_eager(
    eager: hs.Engine, replayed: hs.Engine
) -> None:
    options = {"seeds": (3, 4), "base_guidance": 3.0}
    one, other = (engine.sample("a red fox", **options) for engine in (eager, replayed))
    assert torch.equal(one.latents, other.latents) and torch.equal(one.rgb, other.rgb)
    assert (eager.runner, replayed.runner) == ("eager", "replay")
    assert replayed.sample("a fox").record()["machine"]["runner"] == "replay"


def test_adapters_act_in_replays_at_any_strength(eager: hs.Engine, replayed: hs.Engine) -> None:
    """Of one graph, also where every strength is 0, which an eager run on a CPU leaves out."""
    yellow = headstart_weights.path("yellow")
    for strength in (0.0, 1.0, [0.5, -1.0]):
        latents: list[torch.Tensor] = []
        for engine in (eager, replayed):
            engine.attach(yellow, strength)
            latents.append(engine.sample("a fox", seeds=(3, 4)).latents)
            engine.detach("yellow")
        assert torch.equal(*latents)


def test_a_replayed_engine_may_be_used_by_threads_at_once(
    eager: hs.Engine, replayed: hs.Engine
) -> None:
    expected = [eager.sample("a fox", seeds=seed).latents for seed in (1, 2, 3)]
    got: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        got[number] = replayed.sample("a fox", seeds=number + 1).latents

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[number], expected[number]) for number in range(3))


def test_auto_on_a_cpu_is_eager() -> None:
    assert hs.Engine.demo(device="cpu").runner == "eager"
