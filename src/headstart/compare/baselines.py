"""Other ways to varied samples at inference time, on the same engine: none changes the sampler.

conditioning  CADS: the prompt under falling noise                    a network around a network
guidance      interval guidance: only between two noise levels        a table from a table
x0            particle guidance: samples of a batch push apart        a network around a network
noise         pink initial noise                                      a noise source
candidates    many first steps, the most different ones go on         rows of the loop
hand-off      how long the base runs, chosen for each prompt          rows of the loop
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.engine.engine import Engine
from headstart.errors import InputError
from headstart.interfaces import Conditioning, Denoiser, NoiseSource
from headstart.noise import Philox
from headstart.plan.table import StepTable
from headstart.runner.batch import Chunked
from headstart.runner.runner import EagerRunner
from headstart.sampler import State, sample
from headstart_kernels import decode_u8, philox_normal

TRAIN_STEPS = 1000.0
CHUNK = 64
"""Samples in a network at once; what pushes samples apart still sees all of them."""
CADS_SAMPLE = 2**31
"""Noise of the prompt is drawn as a sample of its own, far from those of images."""


class Cads(NamedTuple):
    """Condition-annealed sampling (arXiv:2310.17347): a network whose prompt is noised.

        y' = sqrt(g)*y + scale*sqrt(1 - g)*n,   n ~ N(0, I)
        y* = mix*(mean(y) + std(y)*(y' - mean(y'))/std(y')) + (1 - mix)*y'
        g  = 1 for t <= low;  (high - t)/(high - low);  0 for t >= high       t in 0 .. 1

    g falls with t: at the start of sampling (t = 1) the prompt is noise, at the end it is whole.
    (One public port divides by low - high, which makes g negative and its root NaN.) The defaults
    are the paper's for Stable Diffusion. n depends on (seed, row) alone. Of a guided call's two
    halves the second is conditional, and only that one is noised.
    """

    network: Denoiser
    seeds: tuple[int, ...]
    low: float = 0.6
    high: float = 0.9
    scale: float = 0.25
    mix: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.network)

    def gamma(self, t: float) -> float:
        """How much of the prompt is left at time t in 0 .. 1."""
        return min(1.0, max(0.0, (self.high - t) / (self.high - self.low)))

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        left = self.gamma(float(timestep[0]) / TRAIN_STEPS)
        if left < 1.0:
            kept = len(cond) - len(self.seeds)
            noised = self._noised(cond.context[kept:], left, int(timestep[0]))
            context = torch.cat((cond.context[:kept], noised.to(cond.context.dtype)))
            cond = replace(cond, context=context)
        return self.network(x_in, timestep, cond)

    def _noised(self, y: Tensor, left: float, row: int) -> Tensor:
        shape = (1, *y.shape[1:])
        n = philox_normal(self.seeds, [CADS_SAMPLE] * len(y), row, shape, y.device)[:, 0]
        noised = math.sqrt(left) * y.float() + self.scale * math.sqrt(1.0 - left) * n
        own, new = (_moments(v) for v in (y.float(), noised))
        rescaled = own[0] + own[1] * (noised - new[0]) / new[1]
        return self.mix * rescaled + (1.0 - self.mix) * noised


class Repelled(NamedTuple):
    """Particle guidance in latent space (arXiv:2310.13102): samples of a prompt push apart.

        x0* = x0 + sigma^2 * strength * sum_j (2/h) k(x_i, x_j) (x_i - x_j)
        k   = exp(-|x_i - x_j|^2 / h),   h = median of |x_i - x_j|^2 over i != j, over log n

    h is that of arXiv:1608.04471. The score s = (x0 - x)/sigma^2 gains strength * grad log
    potential, which is that change of x0, and F the same over c_out. Rows with sigma < `above` are
    left alone. It needs all samples of the prompt in one call, and n >= 3. A guided call's halves
    both get it, so that it is not multiplied by the guidance.
    """

    network: Denoiser
    table: StepTable
    strength: float
    above: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.network)

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        f = self.network(x_in, timestep, cond)
        step = next(s for s in self.table if s.timestep == float(timestep[0]))
        if step.sigma < self.above:
            return f
        halves = step.passes
        x = x_in.float()[: len(x_in) // halves] / step.c_in
        push = repulsion(x) * (self.strength * step.sigma**2 / step.c_out)
        return f + push.repeat(halves, 1, 1, 1).to(f.dtype)


class Pink(NamedTuple):
    """Initial noise with power 1/f^exponent over spatial frequency, each channel of unit variance.

    exponent 0 is white, 2 Brownian. The mean of a channel (f = 0) keeps the power of the lowest
    other frequency. Noise of later rows stays white. Pink starts before optimisation:
    arXiv:2601.00090.
    """

    white: NoiseSource
    exponent: float

    def __len__(self) -> int:
        return len(self.white)

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
        white = self.white.initial(shape, device)
        height, width = white.shape[-2:]
        rows = (torch.arange(height, device=device) + height // 2) % height - height // 2
        columns = torch.arange(width // 2 + 1, device=device)
        radius = torch.hypot(rows[:, None] / height, columns / width)  # cycles a cell
        lowest = 1.0 / max(height, width)
        gain = radius.clamp_min(lowest).pow(-self.exponent / 2.0)
        # Parseval: columns other than the first and the Nyquist one stand for two.
        twice = torch.full((gain.shape[1],), 2.0, device=device)
        twice[0] = 1.0
        if width % 2 == 0:
            twice[-1] = 1.0
        power = (gain.square() * twice).sum() / (height * width)
        spectrum = torch.fft.rfft2(white) * gain / power.sqrt()  # pyright: ignore
        shaped = torch.fft.irfft2(spectrum, s=(height, width))  # pyright: ignore
        return torch.as_tensor(shaped)  # pyright: ignore[reportUnknownArgumentType]

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.white.step(index, shape, device)


class Drawn(NamedTuple):
    """Images uint8 [n, H, W, 3], and network passes an image, first steps of candidates included.

    k: rows that the base took, where it was chosen
    """

    rgb: Tensor
    passes: float
    k: int | None = None


def guided_between(table: StepTable, low: float, high: float) -> StepTable:
    """Interval guidance: guidance only on rows with low < sigma <= high (arXiv:2404.07724).

    The paper's interval for SDXL is (0.28, 5.42]. The rows outside cost one pass, not two.
    """
    rows = (
        step if low < step.sigma <= high else step._replace(guidance=1.0) for step in table.steps
    )
    return replace(table, steps=tuple(rows), name=f"{table.name}, guided in ({low:g}, {high:g}]")


def draw(
    engine: Engine,
    prompt: str,
    seeds: Sequence[int],
    table: StepTable,
    *,
    noise: Callable[[NoiseSource], NoiseSource] = lambda noise: noise,
    network: Callable[[Denoiser], Denoiser] = lambda network: network,
) -> Drawn:
    """A plan with its noise or its networks changed, all seeds of a prompt in one batch."""
    states = _states(engine, prompt, seeds, table, noise=noise, network=network)
    return Drawn(_decoded(engine, states), float(table.passes()))


def draw_selected(
    engine: Engine, prompt: str, seeds: Sequence[int], candidates: Sequence[int], table: StepTable
) -> Drawn:
    """Of many first steps the len(seeds) most different go on (SGI's idea, arXiv:2508.15773).

    `candidates` are more seeds of the prompt; `seeds` only says how many images there are. The
    difference is of pooled x0 of the first row. Passes count the first rows of all candidates.
    """
    if len(candidates) < len(seeds):
        raise InputError(
            f"{len(candidates)} candidates for {len(seeds)} images: give at least as many"
        )
    first = next(_states(engine, prompt, candidates, table))
    chosen = farthest(pooled(first.x0), len(seeds))
    rows = torch.tensor(chosen, device=first.x.device)
    state = State(first.step, first.x[rows], first.x0[rows])
    own = [candidates[row] for row in chosen]
    rest = _states(engine, prompt, own, table, resume=state)
    extra = table[0].passes * (len(candidates) - len(seeds)) / len(seeds)
    return Drawn(_decoded(engine, rest), table.passes() + extra)


def draw_adaptive(
    engine: Engine,
    prompt: str,
    seeds: Sequence[int],
    tables: Mapping[int, StepTable],
    threshold: float,
) -> Drawn:
    """The base runs until x0 of the seeds has come apart, then the distilled model takes over.

    k = the first row after which spread(x0) >= threshold, at most the largest of `tables`, which
    map k to the hybrid of that k. Their first rows agree, so no step is run twice, and where the
    base is not guided every k costs the same. One k for all prompts is a limit that
    arXiv:2503.10637 states itself.
    """
    longest = max(tables)
    for state in _states(engine, prompt, seeds, tables[longest]):
        k = state.step + 1
        if k == longest or (k in tables and spread(pooled(state.x0)) >= threshold):
            rest = _states(engine, prompt, seeds, tables[k], resume=state)
            return Drawn(_decoded(engine, rest), float(tables[k].passes()), k)
    raise InputError(f"the hybrid of k = {longest} has fewer than {longest} rows")


def farthest(features: Tensor, count: int) -> list[int]:
    """Greedy max-min: from the pair farthest apart, each next is farthest from its nearest chosen.

    features [n, d]; at least half as far apart as the best choice (Gonzalez, 1985). Ties go to the
    lower number.
    """
    apart = torch.cdist(features.double(), features.double())
    chosen = [int(apart.amax(1).argmax())]
    nearest = apart[chosen[0]].clone()
    while len(chosen) < count:
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, apart[chosen[-1]])
    return sorted(chosen)


def spread(features: Tensor) -> float:
    """Mean over the features [n, d] of their unbiased variance over the n seeds."""
    return float(features.double().var(0).mean())


def pooled(x0: Tensor, side: int = 4) -> Tensor:
    """x0 [B, C, h, w] averaged to side x side cells: [B, C*side*side]."""
    return F.adaptive_avg_pool2d(x0, side).flatten(1)


def repulsion(x: Tensor) -> Tensor:
    """sum_j (2/h) k(x_i, x_j) (x_i - x_j) for x [n, C, h, w], see Repelled."""
    flat = x.flatten(1).double()
    count = len(flat)
    if count < 3:
        raise InputError(f"particle guidance needs at least 3 samples of a prompt, got {count}")
    squares = torch.cdist(flat, flat).square()
    others = squares[~torch.eye(count, dtype=torch.bool, device=x.device)]
    h = others.median() / math.log(count)
    weights = (2.0 / h) * torch.exp(-squares / h)
    push = weights.sum(1, keepdim=True) * flat - weights @ flat
    return push.reshape(x.shape).to(x.dtype)


def dtype_of(network: Denoiser) -> torch.dtype:
    """What a network wants its input in, float32 where it does not say."""
    return getattr(network, "dtype", torch.float32)


def _states(
    engine: Engine,
    prompt: str,
    seeds: Sequence[int],
    table: StepTable,
    *,
    noise: Callable[[NoiseSource], NoiseSource] = lambda noise: noise,
    network: Callable[[Denoiser], Denoiser] = lambda network: network,
    resume: State | None = None,
) -> Iterator[State]:
    """The engine's loop from its parts, with the noise and the networks as they were asked."""
    pair = engine.weights
    table = engine.compile(table)  # refuses a table of another schedule
    cond, uncond = engine.text.encode([prompt]), None
    if any(step.guidance != 1.0 for step in table):
        cond, uncond = engine.text.encode([prompt], "")
    cells = pair.image_size // pair.downscale
    return sample(
        table,
        {m: network(Chunked(EagerRunner(engine.denoisers[m]), CHUNK)) for m in table.models},
        cond,
        noise(Philox(tuple(seeds))),
        uncond=uncond,
        resume=resume,
        shape=(pair.latent_channels, cells, cells),
    )


def _decoded(engine: Engine, states: Iterator[State]) -> Tensor:
    """Run to the end, and the images."""
    *_, last = states
    with torch.inference_mode():
        return decode_u8(engine.vae.decode(last.x.to(engine.weights.vae_dtype)))


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each sample, [B, 1, 1]."""
    return values.mean((1, 2), keepdim=True), values.std((1, 2), keepdim=True)
