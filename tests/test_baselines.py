"""Each baseline against its closed form, and on the bundled pair."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

import headstart as hs
import headstart_weights
from headstart.compare.baselines import (
    Cads,
    Pink,
    Repelled,
    draw,
    draw_adaptive,
    draw_selected,
    farthest,
    guided_between,
    pooled,
    repulsion,
    spread,
)

needs_pair = pytest.mark.skipif(
    not (Path(headstart_weights.__file__).parent / headstart_weights.MANIFEST).is_file(),
    reason="needs the bundled pair",
)
SEEDS = tuple(range(6))


class Seen:
    """A network that keeps the context it was given and returns its input."""

    dtype = torch.float32

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: hs.Conditioning) -> Tensor:
        self.context = cond.context
        return x_in


def called(cads: Cads, context: Tensor, timestep: int) -> Tensor:
    network = cads.network
    assert isinstance(network, Seen)
    rows = len(context)
    cads(torch.zeros(rows, 1, 2, 2), torch.full((rows,), timestep), hs.Conditioning(context))
    return network.context


def test_cads_gamma_falls_from_1_to_0_and_is_never_negative() -> None:
    cads = Cads(Seen(), SEEDS)
    assert [cads.gamma(t) for t in (0.0, 0.6, 0.75, 0.9, 1.0)] == pytest.approx(
        [1.0, 1.0, 0.5, 0.0, 0.0]
    )
    assert cads.gamma(0.749) == pytest.approx((0.9 - 0.749) / 0.3)


def test_cads_leaves_the_prompt_alone_at_low_noise_and_replaces_it_at_high() -> None:
    context = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1)) * 3 + 2
    cads = Cads(Seen(), SEEDS, scale=1.0)
    assert called(cads, context, 499) is context
    noise = called(cads, context, 999)
    for own, before in zip(noise, context, strict=True):
        # rescaled: mean and deviation of the prompt, and nothing else of it
        assert float(own.mean()) == pytest.approx(float(before.mean()), abs=1e-5)
        assert float(own.std()) == pytest.approx(float(before.std()), rel=1e-5)
        assert abs(torch.corrcoef(torch.stack((own.flatten(), before.flatten())))[0, 1]) < 0.6
    assert torch.equal(noise[2:4], called(Cads(Seen(), SEEDS[2:4], scale=1.0), context[2:4], 999))


def test_cads_noise_has_the_weights_of_its_formula() -> None:
    context = torch.zeros(2000, 1, 8) + torch.arange(8.0)
    cads = Cads(Seen(), tuple(range(2000)), scale=0.25, mix=0.0)
    noised = called(cads, context, 750)
    gamma = 0.5
    error = 6 * 0.25 * math.sqrt(1 - gamma) / math.sqrt(2000)
    assert (noised.mean(0)[0] - math.sqrt(gamma) * torch.arange(8.0)).abs().max() < error
    assert noised.std(0).mean() == pytest.approx(0.25 * math.sqrt(1 - gamma), rel=0.03)


def test_cads_noises_the_conditional_half_of_a_guided_call_alone() -> None:
    context = torch.randn(12, 5, 8)
    noised = called(Cads(Seen(), SEEDS), context, 999)
    assert torch.equal(noised[:6], context[:6])
    assert not torch.isclose(noised[6:], context[6:]).any(2).all()


def test_repulsion_is_minus_the_gradient_of_the_kernel_sum() -> None:
    """With h held: the gradient of -sum_j exp(-|x_i - x_j|^2/h) over x_i, by autograd."""
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    squares = torch.cdist(x.flatten(1), x.flatten(1)).square()
    h = torch.stack([squares[i, j] for i, j in combinations(range(5), 2)] * 2).median()
    h = h / math.log(5)
    found = repulsion(x)
    for i in range(5):
        own = x[i].clone().requires_grad_(True)
        others = torch.cat((x[:i], x[i + 1 :])).detach()
        total = -torch.exp(-(others - own).square().flatten(1).sum(1) / h).sum()
        (gradient,) = torch.autograd.grad(total, own)
        torch.testing.assert_close(found[i], gradient, rtol=1e-9, atol=1e-12)
    assert found.sum(0).abs().max() < 1e-12  # it moves no mean


def test_particle_guidance_moves_x0_by_sigma_squared_times_the_push() -> None:
    table = hs.preset("demo").compile(hs.NoiseSchedule.scaled_linear(), prediction="v")
    x = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(3)) * 9
    for step in table:
        guided = Repelled(Seen(), table, strength=0.7, above=1.0)
        x_in = step.c_in * x
        f = guided(x_in, torch.full((4,), int(step.timestep)), hs.Conditioning(x.flatten(1)[None]))
        moved = step.c_out * (f - x_in)
        expected = 0.7 * step.sigma**2 * repulsion(x) if step.sigma >= 1.0 else 0 * x
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(hs.InputError, match="at least 3"):
        repulsion(x[:2])


def test_both_halves_of_a_guided_call_are_pushed_alike() -> None:
    table = hs.preset("demo", base_guidance=2.0)
    table = table.compile(hs.NoiseSchedule.scaled_linear(), prediction="v")
    x_in = torch.randn(3, 4, 4, 4).repeat(2, 1, 1, 1)
    f = Repelled(Seen(), table, 1.0)(x_in, torch.full((6,), 999), hs.Conditioning(x_in.flatten(1)))
    assert torch.equal(f[:3], f[3:]) and not torch.equal(f, x_in)


@pytest.mark.parametrize("size", [16, 15])
def test_pink_noise_has_unit_variance_and_the_spectrum_it_says(size: int) -> None:
    white = hs.Philox(tuple(range(400)))
    device = torch.device("cpu")
    pink = Pink(white, 1.5).initial((4, size, size), device)
    assert pink.shape == (400, 4, size, size) and len(Pink(white, 1.0)) == 400
    assert pink.square().mean() == pytest.approx(1.0, abs=0.03)
    power = torch.fft.fft2(pink).abs().square().mean((0, 1))
    ratio = power[0, 4] / power[0, 1]
    assert ratio == pytest.approx(4.0**-1.5, rel=0.15)
    assert power[0, 0] > power[0, 4]
    same = Pink(white, 0.0).initial((4, size, size), device)
    torch.testing.assert_close(same, white.initial((4, size, size), device), rtol=0, atol=1e-5)
    assert torch.equal(
        Pink(white, 1.0).step(2, (4, 8, 8), device), white.step(2, (4, 8, 8), device)
    )


def test_interval_guidance_is_a_table_with_fewer_guided_rows() -> None:
    plan = hs.preset("demo", mode="base", steps=10, base_guidance=2.0)
    table = plan.compile(hs.NoiseSchedule.scaled_linear(), prediction="v")
    inside = guided_between(table, 0.28, 5.42)
    for before, after in zip(table, inside, strict=True):
        expected = 2.0 if 0.28 < before.sigma <= 5.42 else 1.0
        assert after == before._replace(guidance=expected)
    assert table.passes() - inside.passes() == sum(not 0.28 < step.sigma <= 5.42 for step in table)
    assert guided_between(table, 0.0, math.inf).steps == table.steps


def test_farthest_is_greedy_max_min() -> None:
    line = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    assert farthest(line, 1) == [0]
    assert farthest(line, 2) == [0, 4]
    assert farthest(line, 3) == [0, 2, 4]
    assert farthest(line, 5) == [0, 1, 2, 3, 4]
    points = torch.randn(9, 3, generator=torch.Generator().manual_seed(5))
    best = max(
        min(float((points[i] - points[j]).norm()) for i, j in combinations(own, 2))
        for own in combinations(range(9), 4)
    )
    found = farthest(points, 4)
    worst = min(float((points[i] - points[j]).norm()) for i, j in combinations(found, 2))
    assert worst >= best / 2  # Gonzalez's bound


def test_spread_is_the_variance_over_seeds() -> None:
    assert spread(torch.tensor([[0.0, 5.0], [2.0, 5.0]])) == 1.0
    assert pooled(torch.arange(64.0).reshape(1, 1, 8, 8), 2).tolist() == [[13.5, 17.5, 45.5, 49.5]]


@pytest.fixture(scope="module")
def engine() -> hs.Engine:
    return hs.Engine.demo(device="cpu")


@needs_pair
def test_with_nothing_changed_a_draw_is_the_engines_own(engine: hs.Engine) -> None:
    table = engine.compile("hybrid", base_guidance=2.0)
    drawn = draw(engine, "a fox", SEEDS, table)
    assert torch.equal(drawn.rgb, engine.sample("a fox", plan=table, seeds=SEEDS).rgb)
    assert drawn.passes == 5


@needs_pair
def test_choosing_all_candidates_changes_nothing_and_more_of_them_cost_first_steps(
    engine: hs.Engine,
) -> None:
    table = engine.compile("hybrid")
    plain = draw(engine, "a fox", SEEDS, table)
    same = draw_selected(engine, "a fox", SEEDS, SEEDS, table)
    assert torch.equal(same.rgb, plain.rgb) and same.passes == 4
    more = draw_selected(engine, "a fox", SEEDS[:3], range(12), table)
    assert more.passes == 4 + 9 / 3 and len(more.rgb) == 3
    alone = torch.cat([draw(engine, "a fox", [s], table).rgb for s in range(12)])
    for image in more.rgb:  # each is the image of one of the candidates
        assert (alone.int() - image.int()).abs().amax((1, 2, 3)).min() <= 1
    with pytest.raises(hs.InputError, match="2 candidates for 3 images"):
        draw_selected(engine, "a fox", SEEDS[:3], range(2), table)


@needs_pair
def test_the_adaptive_hand_off_is_one_of_the_fixed_ones_to_the_bit(engine: hs.Engine) -> None:
    tables = {k: engine.compile("hybrid", k=k) for k in (1, 2, 3)}
    for threshold, k in ((0.0, 1), (math.inf, 3)):
        drawn = draw_adaptive(engine, "an owl", SEEDS, tables, threshold)
        assert drawn.k == k and drawn.passes == 4
        assert torch.equal(drawn.rgb, engine.sample("an owl", plan=tables[k], seeds=SEEDS).rgb)
    x0 = engine.sample("an owl", plan=tables[3], seeds=SEEDS, keep_x0=True).x0
    assert x0 is not None
    apart = [spread(pooled(x0[row])) for row in range(2)]
    middle = draw_adaptive(engine, "an owl", SEEDS, tables, (apart[0] + apart[1]) / 2)
    assert middle.k == (2 if apart[0] < apart[1] else 1)


@needs_pair
def test_every_baseline_runs_on_the_pair_and_changes_the_images(engine: hs.Engine) -> None:
    table = engine.compile("distilled")
    plain = draw(engine, "a frog", SEEDS, table).rgb
    changed = (
        draw(engine, "a frog", SEEDS, table, network=lambda n: Cads(n, SEEDS)),
        draw(engine, "a frog", SEEDS, table, network=lambda n: Repelled(n, table, 4.0)),
        draw(engine, "a frog", SEEDS, table, noise=lambda n: Pink(n, 1.0)),
    )
    for drawn in changed:
        assert drawn.rgb.shape == plain.shape and drawn.passes == 4
        assert not torch.equal(drawn.rgb, plain)
    other = replace(table, schedule="another")
    with pytest.raises(hs.PlanError, match="noise schedule"):
        draw(engine, "a frog", SEEDS, other)
