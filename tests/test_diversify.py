"""Each method against its formula in float64 numpy, or against what the formula promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import headstart as hs
from headstart.diversify.cads import CONTEXT, POOLED, Cads
from headstart.diversify.effect import Diversified, Position
from headstart.diversify.embedding_noise import VALUE, WHERE, EmbeddingNoise
from headstart.diversify.interval import Interval
from headstart.diversify.method import Images, Method, Row
from headstart.diversify.particles import Particles, repulsion
from headstart.diversify.pink import Pink
from headstart.diversify.select import Select, farthest, pooled, seed_of
from headstart_kernels import INITIAL, philox_normal

Array = NDArray[np.float64]
SEEDS = tuple(range(6))
CPU = torch.device("cpu")


def table_of(**settings: object) -> hs.StepTable:
    plan = hs.preset("demo", **settings)  # pyright: ignore[reportArgumentType]
    return plan.compile(hs.NoiseSchedule.scaled_linear(), prediction="v")


def images_of(seeds: Sequence[int], prompts: Sequence[str] | None = None) -> Images:
    return Images(tuple(prompts or ["a fox"] * len(seeds)), tuple(seeds))


def row_at(timestep: float, images: Images, *, number: int = 0, total: int = 4) -> Row:
    step = table_of()[0]._replace(timestep=timestep)
    return Row(number, total, step, images)


def normals(seeds: Sequence[int], sample: int, row: int, shape: Sequence[int]) -> Array:
    return philox_normal(seeds, [sample] * len(seeds), row, shape).double().numpy()


def text(rows: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed)) * 3 + 2


def cads_oracle(y: Array, n: Array, cads: Cads, t: float) -> Array:
    """arXiv:2310.17347, algorithm 1, each image by itself."""
    g = float(np.clip((cads.high - t) / (cads.high - cads.low), 0.0, 1.0))
    expected = np.empty_like(y)
    for i, row in enumerate(y):
        noised = math.sqrt(g) * row + cads.scale * math.sqrt(1 - g) * n[i]
        rescaled = (noised - noised.mean()) / noised.std(ddof=1) * row.std(ddof=1) + row.mean()
        expected[i] = cads.mix * rescaled + (1 - cads.mix) * noised
    return expected


@pytest.mark.parametrize("cads", [Cads(0.25), Cads(2.0, low=0.2, high=0.95, mix=0.3), Cads(0.1)])
@pytest.mark.parametrize("timestep", [999.0, 749.0, 650.5])
def test_cads_is_its_formula_for_the_tokens_and_the_pooled_text(
    cads: Cads, timestep: float
) -> None:
    """Errors: float32 operations on values of at most 12, and a mean and deviation of 40."""
    cond = hs.Conditioning(text(6, 5, 8), text(6, 8, seed=2), time_ids=torch.ones(6, 6))
    result = cads.conditioning(cond, row_at(timestep, images_of(SEEDS), number=3))
    for tensor, before, sample in (
        (result.context, cond.context, CONTEXT),
        (result.pooled, cond.pooled, POOLED),
    ):
        assert tensor is not None and before is not None
        n = normals(SEEDS, sample, 3, before.shape[1:])
        expected = cads_oracle(before.double().numpy(), n, cads, timestep / 1000)
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(result.context[2:4], cads.conditioning(
        cond[2:4], row_at(timestep, images_of(SEEDS[2:4]), number=3)).context)  # fmt: skip
    assert result.time_ids is cond.time_ids


def test_cads_gamma_falls_from_1_to_0_and_is_never_negative() -> None:
    gammas = [Cads(0.25).gamma(t) for t in (0.0, 0.6, 0.75, 0.9, 1.0)]
    assert gammas == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])


def test_cads_leaves_a_prompt_alone_at_low_noise_and_takes_one_row_for_all() -> None:
    cond, images = hs.Conditioning(text(1, 5, 8)), images_of(SEEDS)
    assert Cads(0.25).conditioning(cond, row_at(499, images)) is cond
    shared = Cads(0.25).conditioning(cond, row_at(999, images)).context
    each = Cads(0.25).conditioning(cond.expand(6), row_at(999, images)).context
    assert torch.equal(shared, each) and not torch.isclose(shared[:1], shared[1:]).all(2).any()


@pytest.mark.parametrize("method", [Cads(0.25), EmbeddingNoise(1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_conditional_half_of_a_guided_call_alone_is_noised(
    method: Cads | EmbeddingNoise, dtype: torch.dtype
) -> None:
    cond = hs.Conditioning(text(12, 5, 8).to(dtype), text(12, 8).to(dtype))
    result = method.conditioning(cond, row_at(999, images_of(SEEDS)))
    assert result.context.dtype == dtype and result.pooled is not None and cond.pooled is not None
    assert torch.equal(result.context[:6], cond.context[:6])
    assert torch.equal(result.pooled[:6], cond.pooled[:6])
    assert (result.context[6:] != cond.context[6:]).flatten(1).any(1).all()
    assert torch.equal(result.pooled, cond.pooled) == isinstance(method, EmbeddingNoise)


@pytest.mark.parametrize("method", [EmbeddingNoise(0.1), EmbeddingNoise(2.0, share=0.25, until=1)])
def test_embedding_noise_is_its_formula(method: EmbeddingNoise) -> None:
    y = text(6, 77, 64)
    result = method.conditioning(hs.Conditioning(y), row_at(999, images_of(SEEDS))).context
    n, position = (normals(SEEDS, sample, INITIAL, (77, 64)) for sample in (VALUE, WHERE))
    u = np.vectorize(math.erf)(n / math.sqrt(2.0))
    values = y.double().numpy()
    std = values.std(axis=(1, 2), ddof=1, keepdims=True)
    cut = np.quantile(
        position, method.share
    )  # what noise is drawn from is normal: so is its quantile
    m = (result != y).numpy()
    expected = values + method.strength * std * m * u
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=2e-6, atol=1e-5)
    deviation = math.sqrt(method.share * (1 - method.share) / m.size)
    assert abs(m.mean() - method.share) < 5 * deviation
    assert position[m].max() < cut + 0.02 and position[~m].min() > cut - 0.02
    noise = (result.double().numpy() - values)[m] / np.broadcast_to(method.strength * std, m.shape)[
        m
    ]
    counts, _ = np.histogram(noise, bins=10, range=(-1.0, 1.0))
    assert np.abs(noise).max() <= 1.0 + 1e-4  # of its strength, and uniform up to there
    assert np.abs(counts - len(noise) / 10).max() < 5 * math.sqrt(len(noise) / 10)


def test_embedding_noise_is_off_after_its_part_of_the_rows_and_the_same_in_all_before() -> None:
    cond, images = hs.Conditioning(text(6, 5, 8)), images_of(SEEDS)
    method = EmbeddingNoise(1.0, until=0.5, share=1.0)
    rows = [method.conditioning(cond, row_at(999 - i, images, number=i, total=7)) for i in range(7)]
    assert [row is cond for row in rows] == [False] * 4 + [True] * 3
    assert all(torch.equal(row.context, rows[0].context) for row in rows[:4])
    assert (rows[0].context != cond.context).all()
    four = [EmbeddingNoise(1.0).conditioning(cond, row_at(9, images, number=i)) for i in range(4)]
    assert [row is cond for row in four] == [False, True, True, True]  # the node's 20 %


def repulsion_oracle(x: Array) -> Array:
    flat = x.reshape(len(x), -1)
    squares = np.array([[((a - b) ** 2).sum() for b in flat] for a in flat])
    others = sorted(squares[~np.eye(len(x), dtype=bool)])
    h = others[(len(others) - 1) // 2] / math.log(len(x))
    push = np.zeros_like(flat)
    for i, j in np.argwhere(~np.eye(len(x), dtype=bool)):
        push[i] += 2 / h * math.exp(-squares[i, j] / h) * (flat[i] - flat[j])
    return push.reshape(x.shape)


@pytest.mark.parametrize("count", [3, 4, 7, 30])
def test_repulsion_is_its_sum(count: int) -> None:
    x = torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(2)).double() * 5
    push = repulsion(x)
    np.testing.assert_allclose(push.numpy(), repulsion_oracle(x.numpy()), rtol=1e-9, atol=1e-12)
    assert push.sum(0).abs().max() < 1e-12  # it moves no mean


def test_repulsion_is_minus_the_gradient_of_the_kernel_sum() -> None:
    """With h held: the gradient of -sum_j exp(-|x_i - x_j|^2/h) over x_i, by autograd."""
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    squares = torch.cdist(x.flatten(1), x.flatten(1)).square()
    h = torch.stack([squares[i, j] for i, j in combinations(range(5), 2)] * 2).median()
    h = h / math.log(5)
    push = repulsion(x)
    for i in range(5):
        point = x[i].clone().requires_grad_(True)
        others = torch.cat((x[:i], x[i + 1 :])).detach()
        total = -torch.exp(-(others - point).square().flatten(1).sum(1) / h).sum()
        (gradient,) = torch.autograd.grad(total, point)
        torch.testing.assert_close(push[i], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_particles_move_x0_by_sigma_squared_times_the_push_within_each_prompt(
    guidance: float,
) -> None:
    """x0 = c_skip*x + c_out*F, so that F moves by the push over c_out, in both halves alike."""
    images = images_of(range(7), ["a", "b", "a", "b", "b", "a", "b"])
    x = torch.randn(7, 4, 4, 4, generator=torch.Generator().manual_seed(3)) * 9
    method = Particles(0.7, above=1.0)
    for number, step in enumerate(table_of(base_guidance=guidance)):
        f = torch.randn(step.passes * 7, 4, 4, 4)
        x_in = (step.c_in * x).repeat(step.passes, 1, 1, 1)
        result = method.output(f, x_in, Row(number, 4, step, images))
        moved = (step.c_out * (result - f)).double().numpy().reshape(step.passes, *x.shape)
        expected = np.zeros(x.shape)
        if step.sigma >= 1.0:
            for rows in ([0, 2, 5], [1, 3, 4, 6]):
                push = repulsion_oracle(x.double().numpy()[rows])
                expected[rows] = 0.7 * step.sigma**2 * push
        for half in moved:
            np.testing.assert_allclose(half, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [16, 15])
def test_pink_noise_has_unit_variance_and_the_spectrum_it_says(size: int) -> None:
    white = hs.Philox(tuple(range(400)))
    noise = Pink(1.5).noise(white)
    pink = noise.initial((4, size, size), CPU)
    assert pink.shape == (400, 4, size, size) and len(noise) == 400
    assert pink.square().mean() == pytest.approx(1.0, abs=0.03)
    power = torch.fft.fft2(pink).abs().square().mean((0, 1))
    assert power[0, 4] / power[0, 1] == pytest.approx(4.0**-1.5, rel=0.15)
    assert power[0, 0] > power[0, 4]
    near = Pink(1e-9).noise(white).initial((4, size, size), CPU)
    torch.testing.assert_close(near, white.initial((4, size, size), CPU), rtol=0, atol=1e-5)
    step = Pink(1.0).noise(white).step(2, (4, 8, 8), CPU)
    assert torch.equal(step, white.step(2, (4, 8, 8), CPU))


def test_pink_noise_is_white_noise_filtered_by_its_gain() -> None:
    white = hs.Philox((4,))
    noise = Pink(1.0).noise(white).initial((2, 8, 12), CPU).double().numpy()
    n = white.initial((2, 8, 12), CPU).double().numpy()
    radius = np.hypot(np.fft.fftfreq(8)[:, None], np.fft.fftfreq(12)[None])
    gain = np.maximum(radius, 1 / 12) ** -0.5
    gain /= math.sqrt((gain**2).mean())  # over all frequencies: unit variance
    expected = np.fft.ifft2(np.fft.fft2(n) * gain).real
    np.testing.assert_allclose(noise, expected, rtol=1e-5, atol=1e-5)


def test_interval_guidance_is_a_table_with_fewer_guided_rows() -> None:
    table = table_of(mode="base", steps=10, base_guidance=2.0)
    method = Interval(0.28, 5.42)
    method.check(table)
    inside = method.table(table)
    for before, after in zip(table, inside, strict=True):
        expected = 2.0 if 0.28 < before.sigma <= 5.42 else 1.0
        assert after == before._replace(guidance=expected)
    assert table.passes() - inside.passes() == sum(not 0.28 < step.sigma <= 5.42 for step in table)
    method.check(inside)
    assert method.table(inside) is inside  # as a record has it


def test_farthest_is_greedy_max_min() -> None:
    line = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    assert [farthest(line, n) for n in (1, 2, 3)] == [[0], [0, 4], [0, 2, 4]]
    assert farthest(line, 5) == [0, 1, 2, 3, 4]
    points = torch.randn(9, 3, generator=torch.Generator().manual_seed(5))
    best = max(
        min(float((points[i] - points[j]).norm()) for i, j in combinations(subset, 2))
        for subset in combinations(range(9), 4)
    )
    chosen = farthest(points, 4)
    worst = min(float((points[i] - points[j]).norm()) for i, j in combinations(chosen, 2))
    assert worst >= best / 2  # Gonzalez's bound


def test_candidates_are_the_own_seed_and_others_far_away_and_the_pool_is_of_each_prompt() -> None:
    images = images_of([3, 7, 3, 8], ["a", "a", "b", "b"])
    owners, candidates = Select(3).candidates(images)
    assert owners == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert candidates.seeds[::3] == images.seeds and candidates.seeds[:3] == candidates.seeds[6:9]
    assert len(set(candidates.seeds)) == 9
    assert min(s for s in candidates.seeds if s not in images.seeds) > 2**50
    assert seed_of(3, 1) == 0x02925AFD44E2946E  # printf 3/1 | sha256sum
    x0 = torch.zeros(12, 1, 4, 4)
    for row, level in ((1, 9.0), (5, -9.0), (6, 1.0), (11, 2.0)):
        x0[row] = level
    assert Select(3).choose(x0, candidates, images) == [1, 5, 7, 11]
    alone = Select(3).choose(x0[:6], candidates[range(6)], images[range(2)])
    assert alone == [1, 5]  # whatever the other prompt is
    assert pooled(torch.arange(64.0).reshape(1, 1, 8, 8), 2).tolist() == [[13.5, 17.5, 45.5, 49.5]]


class Read(TorchDispatchMode):
    """Counts operators for which a host waits for its device, or copies from itself."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name, masks = func.overloadpacket.__name__, args[1] if len(args) > 1 else ()
        masked = name == "index" and any(mask.dtype == torch.bool for mask in masks)
        if masked or name in self.waits:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Echo:
    dtype = torch.float32

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: hs.Conditioning) -> Tensor:
        return x_in + cond.context[:, 0].mean()


@pytest.mark.parametrize("method", [Cads(0.25), EmbeddingNoise(1.0), Particles(8.0)])
def test_no_method_reads_a_tensor_back_to_the_host(method: Method) -> None:
    table, images = table_of(base_guidance=2.0), images_of(SEEDS, ["a", "b"] * 3)
    position = Position(table, images)
    network = Diversified(Echo(), (method,), position)  # type: ignore[arg-type]
    with Read() as planted:
        float(torch.ones(1))
        torch.ones(2)[torch.ones(2) > 0]
        torch.tensor([1, 2])
    assert len(planted.found) == 3
    changed: list[bool] = []
    for step in (table[0], *table):  # once more: a run's seeds and groups are copied once
        position.begin(step)
        count = 6 * step.passes
        x_in, cond = torch.randn(count, 4, 8, 8), hs.Conditioning(text(count, 5, 8))
        with Read() as result:
            f = network(x_in, torch.full((count,), 7), cond)
        assert (result.found == [] or not changed) and position.row.step == step
        changed.append(not torch.equal(f, Echo()(x_in, f, cond)))
    assert changed[:2] == [True, True]
