"""Whole runs whose kernels are PTX emitted for a GPU: recorded at the capture, executed at replays.

Eagerly, every number comes from torch's own operators; replayed, every step, noise, preview and
picture comes from emulated machine code. They agree in every bit.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from plans import VP_PREDICTIONS
from stand import MAP, SHAPE, Emulated, hybrid
from torch import Tensor

from evidence.fake_cuda import RaceError
from headstart.networks.fusion import fusion
from headstart.noise import Given, Philox
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.update import Update
from headstart.runner.runner import EagerRunner
from headstart_kernels import fused_step, preview_rgb

STEP = "fused_step_kernel"
T = torch.tensor


def launched(stand: Emulated) -> Counter[str]:
    assert stand.gpu is not None
    return Counter(name for name, _ in stand.gpu.launches)


@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_every_prediction_guided_or_not(
    emulated_stand: Emulated, prediction: Prediction, guidance: float
) -> None:
    emulated_stand.check(hybrid(guidance=guidance, prediction=prediction))
    once = {STEP: 3, "scale_input_kernel": 1, "philox_normal_kernel": 1, "decode_planes_kernel": 1}
    # Two warm-ups and one replay: a capture runs nothing.
    assert launched(emulated_stand) == {name: 3 * count for name, count in once.items()}


@pytest.mark.parametrize(("base", "distilled"), [(0, 3), (2, 1), (3, 0)])
def test_every_hand_off_point(emulated_stand: Emulated, base: int, distilled: int) -> None:
    emulated_stand.check(hybrid(base, distilled, guidance=3.0))


@pytest.mark.parametrize("update", [Update.RENOISE, Update.ANCESTRAL, Update.DPMPP_2M])
def test_noise_is_drawn_inside_the_step_that_adds_it(
    emulated_stand: Emulated, update: Update
) -> None:
    emulated_stand.check(hybrid(1, 3, update=update))
    assert launched(emulated_stand)["philox_normal_kernel"] == 3, "the start of each run, no more"


@pytest.mark.parametrize(("batch", "size"), [(1, (4, 8, 8)), (3, (4, 4, 12)), (2, (4, 4, 6))])
def test_batches_and_sizes(
    emulated_stand: Emulated, batch: int, size: tuple[int, int, int]
) -> None:
    emulated_stand.check(hybrid(guidance=2.0, update=Update.RENOISE), batch=batch, size=size)


def test_new_numbers_are_copies_and_no_python_runs_through_a_network(
    emulated_stand: Emulated,
) -> None:
    """Another schedule, guidance, seed and prompt; then the first again, to the same bits."""
    stand, table = emulated_stand, hybrid(1, 2, guidance=4.0, update=Update.RENOISE)
    first = stand.check(table)
    plan = (
        Leg(model="base", timesteps=[900], guidance=7.5),
        Leg(model="distilled", timesteps=[600, 30], update=Update.RENOISE),
    )
    calls = stand.calls
    changed = stand.check(Plan(plan).compile(NoiseSchedule.scaled_linear(beta_end=0.02)), seed=11)
    assert stand.site.captures == 1 and not torch.equal(changed.latents, first.latents)
    assert stand.calls - calls == 3, "the three rows of the eager run, and no others"
    again = stand.check(table)
    assert stand.site.captures == 1 and torch.equal(again.latents, first.latents)


def test_noise_that_is_given_is_read(emulated_stand: Emulated) -> None:
    draws = [emulated_stand.latent(2, seed=seed) for seed in range(4)]
    noise, table = Given(draws[0], draws[1:]), hybrid(1, 2, update=Update.RENOISE)
    cond = emulated_stand.words(2)
    with emulated_stand.launching():
        got = emulated_stand.trajectory()(table, cond, noise, shape=SHAPE)
    expected = emulated_stand.eagerly(table, cond, noise, shape=SHAPE)
    assert torch.equal(got.latents, expected.latents) and torch.equal(
        got.previews, expected.previews
    )


def test_other_graphs_overwrite_the_pool_and_the_oldest_makes_room(
    emulated_stand: Emulated,
) -> None:
    """Before each replay every graph of the pool loses its memory."""
    stand, tables = emulated_stand, [hybrid(), hybrid(2, 1)]
    stand.site.max_graphs = 2
    got = [stand.check(table) for table in tables]
    for table, before in zip(tables, got, strict=True):
        assert torch.equal(stand.check(table).latents, before.latents)
    assert stand.site.captures == 2
    stand.check(hybrid(3, 0))
    stand.check(tables[1])
    assert (stand.site.captures, stand.site.graph_count) == (3, 2)
    stand.check(tables[0])
    assert stand.site.captures == 4


def test_layers_that_are_kernels_replay_to_their_own_bits(emulated_stand: Emulated) -> None:
    """GroupNorm + SiLU and GEGLU too; against the same kernels launched from Python."""
    network, cond, t = emulated_stand.denoisers["base"], emulated_stand.words(1), T([7])
    runner, plain = emulated_stand.runner(), EagerRunner(network)
    x = emulated_stand.latent(1)
    without = plain(x, t, cond)
    with emulated_stand.launching(), fusion(True):
        expected = plain(x, t, cond)
        assert launched(emulated_stand)["apply_kernel"] > 10
        assert launched(emulated_stand)["geglu_kernel"] > 2
        assert torch.equal(runner(x, t, cond), expected)
        assert torch.equal(runner(x * 2, t, cond), plain(x * 2, t, cond))
        assert emulated_stand.site.captures == 1
    torch.testing.assert_close(expected, without, rtol=1e-5, atol=1e-5)
    with emulated_stand.launching():
        assert torch.equal(runner(x, t, cond), without)
    assert emulated_stand.site.captures == 2, "the switch is built into a graph"


def test_a_launch_that_nothing_orders_is_a_race(emulated_stand: Emulated) -> None:
    """The check that all tests here run under: kernels are accesses like any other."""
    cuda, table = emulated_stand.cuda, T(hybrid().coefficients())
    x, step, side = emulated_stand.latent(1), T(0), cuda.Stream(emulated_stand.site.device)
    with emulated_stand.launching():
        with (
            cuda.stream(side),
            pytest.raises(RaceError, match=f"{STEP} on stream 1 reads memory that default wrote"),
        ):
            fused_step(x, x, table, step)
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            x_next, _ = fused_step(x, x, table, step)
        with pytest.raises(RaceError, match="preview_rgb_kernel on default reads memory that str"):
            preview_rgb(x_next, *MAP)


def test_a_step_past_the_table_is_an_illegal_address(emulated_stand: Emulated) -> None:
    """What a forgotten reset of the device-side step would do."""

    graph, words = emulated_stand.trajectory(), emulated_stand.words(1)
    program, inputs = graph.request(hybrid(), words, Philox([3]), shape=SHAPE)
    with emulated_stand.launching():
        emulated_stand.site.run(program, inputs)
        late: dict[str, Tensor] = {**inputs, "step": T(3)}
        with pytest.raises((RuntimeError, IndexError), match=r"illegal address|out of range"):
            emulated_stand.site.run(program, late)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 120])
@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("split", [(0, 3), (1, 2), (2, 1), (3, 0)])
@pytest.mark.parametrize(("batch", "size"), [(1, (4, 8, 8)), (3, (4, 4, 12))])
@pytest.mark.parametrize("update", [Update.EULER, Update.RENOISE])
def test_every_combination(
    emulated_stand: Emulated,
    arch: int,
    prediction: Prediction,
    guidance: float,
    split: tuple[int, int],
    batch: int,
    size: tuple[int, int, int],
    update: Update,
) -> None:
    emulated_stand.arch = arch
    table = hybrid(*split, guidance=guidance, prediction=prediction, update=update)
    emulated_stand.check(table, batch=batch, size=size)
