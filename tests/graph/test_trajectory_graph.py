"""A whole run as one graph has the bits of the sampler and the decoder, for every kind of plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from plans import VP_PREDICTIONS
from stand import SCHEDULE, SHAPE, hybrid
from torch import Tensor

import headstart as hs
from headstart.diversify.pink import PinkNoise
from headstart.errors import InputError
from headstart.noise import Given, Philox
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.update import Update
from headstart.runner.runner import EagerRunner
from headstart.sampler import sample


@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_every_prediction_guided_or_not(
    stand: Any, prediction: Prediction, guidance: float
) -> None:
    stand.check(hybrid(guidance=guidance, prediction=prediction))


@pytest.mark.parametrize(("base", "distilled"), [(0, 3), (1, 2), (2, 1), (3, 0)])
def test_every_hand_off_point(stand: Any, base: int, distilled: int) -> None:
    stand.check(hybrid(base, distilled, guidance=3.0))


@pytest.mark.parametrize("update", [Update.RENOISE, Update.ANCESTRAL, Update.DPMPP_2M])
def test_rows_that_draw_noise_and_rows_that_look_back(stand: Any, update: Update) -> None:
    got = stand.check(hybrid(1, 3, update=update))
    assert len(got.x0) == 4


@pytest.mark.parametrize(("batch", "size"), [(1, (4, 8, 8)), (3, (4, 4, 12))])
def test_batches_and_sizes(stand: Any, batch: int, size: tuple[int, int, int]) -> None:
    stand.check(hybrid(guidance=2.0), batch=batch, size=size)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("base", "distilled"), [(0, 3), (1, 2), (2, 1), (3, 0)])
@pytest.mark.parametrize(("batch", "size"), [(1, (4, 8, 8)), (3, (4, 4, 12))])
@pytest.mark.parametrize("update", [Update.EULER, Update.RENOISE])
def test_every_combination(
    stand: Any,
    prediction: Prediction,
    guidance: float,
    base: int,
    distilled: int,
    batch: int,
    size: tuple[int, int, int],
    update: Update,
) -> None:
    plan = {"guidance": guidance, "prediction": prediction, "update": update}
    stand.check(hybrid(base, distilled, **plan), batch=batch, size=size)


def test_fractional_timesteps_stay_fractional(stand: Any) -> None:
    table = hybrid()
    steps = (table[0]._replace(timestep=999.25), *table.steps[1:])
    stand.check(replace(table, steps=steps))


def test_new_numbers_are_copies_and_not_new_captures(stand: Any) -> None:
    """Another schedule, guidance, seed and prompt; then the first again, to the same bits."""
    table = hybrid(1, 2, guidance=4.0, update=Update.RENOISE)
    first = stand.check(table)
    calls = stand.calls
    steeper = NoiseSchedule.scaled_linear(beta_end=0.02)
    plan = (
        Leg(model="base", timesteps=[900], guidance=7.5),
        Leg(model="distilled", timesteps=[600, 30], update=Update.RENOISE),
    )
    other = Plan(plan).compile(steeper)
    changed = stand.check(other, seed=11)
    assert stand.site.captures == 1
    assert stand.calls - calls == 3, "the three rows of the eager run, and no others"
    assert not torch.equal(first.latents, changed.latents)
    again = stand.trajectory()(
        table, stand.words(2, 3), Philox([3, 4]), shape=SHAPE, uncond=stand.words(2, 4),
        keep_x0=True,
    )  # fmt: skip
    assert torch.equal(again.latents, first.latents) and stand.site.captures == 1


def test_weights_in_place_and_bound_anew(stand: Any) -> None:
    table = hybrid()
    stand.check(table)
    with torch.no_grad():
        stand.vae.decoder.conv_out.weight.mul_(0.5)
        stand.denoisers["distilled"].conv_out.weight.mul_(0.5)
    stand.check(table)
    assert stand.site.captures == 1
    stand.vae.decoder.conv_out = torch.nn.Conv2d(8, 3, 3, padding=1)
    stand.check(table)
    assert stand.site.captures == 2


def test_it_shares_its_pool_with_graphs_of_networks(stand: Any) -> None:
    """Each launch overwrites the memory of the others; what was returned stays."""
    runner, x = stand.runner(), stand.latent(2)
    f = runner(x, torch.tensor([7, 7]), stand.words(2))
    copy = f.clone()
    got = stand.check(hybrid())
    latents = got.latents.clone()
    runner(x * 2, torch.tensor([7, 7]), stand.words(2))
    assert torch.equal(f, copy) and torch.equal(got.latents, latents)
    assert {event.detail[0] for event in stand.cuda.happened("capture")} == {(0, 1)}


@pytest.mark.parametrize("kind", ["given", "shared", "samples", "start"])
def test_every_source_of_noise(stand: Any, kind: str) -> None:
    draws = [stand.latent(2, seed=seed) for seed in range(4)]
    noise = {
        "given": Given(draws[0], draws[1:]),
        "start": PinkNoise(Philox([3, 4]), 1.0),
        "shared": Philox.shared([5, 5]),
        "samples": Philox([2**64 - 1, 5], samples=[2**32 - 1, 0]),
    }[kind]
    table, cond = hybrid(1, 2, update=Update.RENOISE), stand.words(2)
    got = stand.trajectory()(table, cond, noise, shape=SHAPE)
    expected = stand.eagerly(table, cond, noise, shape=SHAPE)
    assert torch.equal(got.latents, expected.latents) and torch.equal(got.rgb, expected.rgb)
    assert got.x0.shape == (0, 2, *SHAPE)


def test_a_field_of_the_conditioning_may_change_with_the_row(stand: Any) -> None:
    """Read at the device-side step: the strengths of adapters are such a field."""
    table, cond, noise = hybrid(1, 2, guidance=3.0), stand.words(2), Philox([3, 4])
    uncond, column = stand.words(2, 9), torch.stack([stand.words(2, n).pooled for n in range(3)])

    def in_turn(number: int) -> Any:
        runner = EagerRunner(stand.denoisers[table[number].model])

        def denoise(x_in: Tensor, timestep: Tensor, cond: Any) -> Tensor:
            copies = len(x_in) // 2
            return runner(x_in, timestep, replace(cond, pooled=column[number].repeat(copies, 1)))

        return denoise

    states = [None]
    for number in range(3):
        run = {table[number].model: in_turn(number)}
        part = table[number : number + 1]
        states += sample(part, run, cond, noise, uncond=uncond, resume=states[-1], shape=SHAPE)
    for scale in (1.0, 2.0):
        got = stand.trajectory()(
            table, cond, noise, uncond=uncond, shape=SHAPE, by_row={"pooled": column * scale}
        )
        assert torch.equal(got.latents, states[-1].x) == (scale == 1.0)
    assert stand.site.captures == 1


def test_a_nan_is_found_after_the_run_and_named(stand: Any) -> None:
    table, cond, noise = hybrid(), stand.words(2), Philox([3, 4])
    with torch.no_grad():
        stand.denoisers["distilled"].conv_out.bias.fill_(float("nan"))
    graph = stand.trajectory()
    with pytest.raises(InputError, match=r"step 1: the 'distilled' network .* \[0, 1\] of 2"):
        graph(table, cond, noise, shape=SHAPE)
    assert graph(table, cond, noise, shape=SHAPE, check=False).latents.isnan().all()


def test_a_decoder_that_overflows_is_named(stand: Any) -> None:
    with torch.no_grad():
        stand.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(InputError, match=r"decoder gave NaN or infinity for sample\(s\) \[0, 1\]"):
        stand.trajectory()(hybrid(), stand.words(2), Philox([3, 4]), shape=SHAPE)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"table": hybrid(guidance=2.0), "uncond": None}, "needs uncond="),
    ({"table": hybrid()[1:]}, "begins at row 1"),
    ({"table": Plan((Leg(model="third", steps=2),)).compile(SCHEDULE)}, r"model\(s\) \['third'\]"),
    ({"shape": (4, 0, 8)}, r"sizes of one latent.*got \[4, 0, 8\]"),
    ({"shape": (4, 3, 8, 8)}, r"picture needs latents \[C, h, w\].*\[4, 3, 8, 8\]"),
    ({"by_row": {"pooled": torch.zeros(2, 2, 8)}}, r"by_row\['pooled'\]: expected \[3, 2, ...\]"),
    (
        {"table": Plan((Leg(model="base", steps=2, adapters=(("age", 1.0),)),)).compile(SCHEDULE)},
        r"set adapter\(s\) \['age'\].*by_row=",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_what_does_not_fit_is_an_error_before_any_network_runs(
    stand: Any, change: dict[str, Any], message: str
) -> None:
    options = {"table": hybrid(), "uncond": stand.words(2, 1), "shape": SHAPE} | change
    with pytest.raises(hs.InputError, match=message):
        stand.trajectory()(options.pop("table"), stand.words(2), Philox([3, 4]), **options)
    assert stand.calls == 0
