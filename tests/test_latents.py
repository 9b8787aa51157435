"""Latents of any shape with the batch first: images, video [C, T, h, w], packed tokens [L, C]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import patient
from torch import Tensor

import headstart as hs
from headstart.plan.table import StepTable
from headstart.runner.runner import EagerRunner, open_runner
from headstart_kernels import INITIAL, philox_normal

VIDEO, PACKED = (4, 3, 2, 5), (6, 8)
CPU = torch.device("cpu")
SEEDS = (3, 2**64 - 1)
RULES = ("euler", "renoise", "ancestral", "dpmpp_2m")
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)


def network(x_in: Tensor, timestep: Tensor, cond: hs.Conditioning) -> Tensor:
    """Depends on all of its inputs; treats every element alike, whatever the axes."""
    per_sample = timestep.to(x_in.dtype) / 1000 + cond.context.mean((1, 2))
    return torch.tanh(x_in * 0.7 + per_sample.view(-1, *[1] * (x_in.ndim - 1)))


def words(seed: int = 0, batch: int = 2) -> hs.Conditioning:
    return hs.Conditioning(philox_normal(range(batch), [seed] * batch, 0, (3, 4)))


def flow_table(rule: str = "renoise", steps: int = 4, guidance: float = 2.5) -> StepTable:
    """A guided base, then a student by `rule`: on a flow, where latents of other shapes live."""
    head = hs.Leg(model="base", timesteps=(1000.0,), guidance=guidance)
    tail = hs.Leg(model="distilled", steps=steps, skip=1, update=hs.Update(rule))
    flow = hs.NoiseSchedule.flow(3.0)
    return hs.Plan((head, tail)).compile(flow, prediction=hs.Prediction.FLOW)


def run(table: StepTable, shape: tuple[int, ...] | None, **options: Any) -> list[hs.State]:
    arguments = {"noise": hs.Philox(SEEDS), "uncond": words(1), "network": network} | options
    models = dict.fromkeys(table.models, arguments.pop("network"))
    return list(hs.sample(table, models, words(), shape=shape, **arguments))


def same(a: list[hs.State], b: list[hs.State]) -> bool:
    """Equal in every bit and in step and shape, row by row."""
    return len(a) == len(b) and all(
        s.step == t.step and torch.equal(s.x, t.x) and torch.equal(s.x0, t.x0)
        for s, t in zip(a, b, strict=True)
    )


@given(shape=shapes, rule=st.sampled_from(RULES), guidance=st.sampled_from([1.0, 2.5]))
@patient
def test_a_run_of_any_shape_has_the_bits_of_its_latents_as_one_row(
    shape: tuple[int, ...], rule: str, guidance: float
) -> None:
    """The sampler knows a latent's numbers, not its axes: states of [C, h, w] are [C*h*w] too."""
    table, flat = flow_table(rule, guidance=guidance), (torch.Size(shape).numel(),)
    states, rows = run(table, shape), run(table, flat)
    assert [state.step for state in states] == [0, 1, 2, 3]
    for state, row in zip(states, rows, strict=True):
        assert state.x.shape == state.x0.shape == (2, *shape)
        assert torch.equal(state.x.flatten(1), row.x) and torch.equal(state.x0.flatten(1), row.x0)
        assert state.x.isfinite().all() and state.x.std() > 0


@given(
    shape=shapes,
    rule=st.sampled_from(RULES),
    guidance=st.sampled_from([1.0, 2.5]),
    cut=st.integers(1, 3),
)
@patient
def test_a_split_run_of_any_shape_equals_the_unsplit_run(
    shape: tuple[int, ...], rule: str, guidance: float, cut: int
) -> None:
    table = flow_table(rule, guidance=guidance)
    whole = run(table, shape)
    head = run(table[:cut], shape)
    assert same(head, whole[:cut])
    assert same(run(table[cut:], None, resume=head[-1]), whole[cut:])


@given(shape=shapes, data=st.data(), row=st.sampled_from([INITIAL, 0, 7]))
@patient
def test_a_latent_in_other_axes_draws_the_same_numbers(
    shape: tuple[int, ...], data: st.DataObject, row: int
) -> None:
    """Two neighbouring axes as one, as [C, T, h, w] and [C, T*h, w]."""
    noise = hs.Philox(SEEDS)
    at = data.draw(st.integers(0, len(shape) - 1))
    joined = (*shape[:at], torch.Size(shape[at : at + 2]).numel(), *shape[at + 2 :])

    def latents_of(form: tuple[int, ...]) -> Tensor:
        return noise.initial(form, CPU) if row == INITIAL else noise.step(row, form, CPU)

    assert latents_of(shape).shape == (2, *shape)
    assert torch.equal(latents_of(shape).reshape(2, *joined), latents_of(joined))


def test_the_noise_of_an_image_is_what_it_always_was() -> None:
    """The first version's numbers: a latent of three axes may not draw others."""
    noise = hs.Philox([7]).initial((2, 1, 2), CPU).flatten()
    expected = [0.0002915674413088709, -0.30484697222709656, 1.7887572050094604, 1.0678725242614746]
    assert noise.tolist() == expected


@pytest.mark.parametrize("shape", [VIDEO, PACKED, (5,)], ids=str)
def test_given_noise_may_be_of_any_shape(shape: tuple[int, ...]) -> None:
    """In float64 too, and it tells the latent's size."""
    table, noise = flow_table(), hs.Philox(SEEDS)
    rows = [noise.step(row, shape, CPU).double() for row in range(3)]
    noise_source = hs.Given(noise.initial(shape, CPU).double(), [*rows, None])
    assert noise_source.shape == shape and len(noise_source) == 2
    assert same(run(table, None, noise=noise_source), run(table, shape))


@pytest.mark.parametrize("shape", [VIDEO, PACKED], ids=str)
@pytest.mark.parametrize("name", ["eager", "replay"])
def test_runners_take_any_shape(shape: tuple[int, ...], name: Any) -> None:
    table = flow_table()
    assert same(run(table, shape, network=open_runner(name, network)), run(table, shape))


def test_a_video_may_be_fed_channels_last() -> None:
    """As convolutions over time want it."""
    flags: list[bool] = []

    def watched(x_in: Tensor, timestep: Tensor, cond: hs.Conditioning) -> Tensor:
        flags.append(x_in.is_contiguous(memory_format=torch.channels_last_3d))
        return network(x_in, timestep, cond)

    runner = EagerRunner(watched, memory_format=torch.channels_last_3d)
    assert same(run(flow_table(), VIDEO, network=runner), run(flow_table(), VIDEO))
    assert flags == [True] * 4


def test_a_sample_of_a_video_with_nan_is_named() -> None:
    def bad(x_in: Tensor, timestep: Tensor, cond: hs.Conditioning) -> Tensor:
        f = network(x_in, timestep, cond)
        f[1, 2, 1, 0, 4] = float("nan")
        return f

    with pytest.raises(hs.InputError, match=r"step 0: the 'base' network .* \[1\] of 2"):
        run(flow_table(guidance=1.0), VIDEO, network=bad)


STATE = hs.State(0, torch.zeros(2, *VIDEO), torch.zeros(2, *VIDEO))
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"shape": (4, 3, 0, 5)}, r"sizes of one latent.*got \[4, 3, 0, 5\].*every axis a size"),
    ({"shape": None}, r"size is unknown: .*video \(C, T, h, w\) and packed tokens \(L, C\)"),
    ({"noise": hs.Philox([1, 2, 3])}, "conditioning for 2 samples cannot serve a batch of 3"),
    ({"shape": PACKED, "resume": STATE}, r"resume.x: expected float32 \[2, 6, 8\], got .*4, 3, 2"),
    ({"resume": STATE._replace(x0=STATE.x0.half())}, "resume.x0: expected float32 .*float16"),
    ({"resume": hs.State(0, torch.zeros(2), torch.zeros(2)), "shape": None}, r"got \[\]: leave"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_shape_is_explained_before_any_network_call(
    change: dict[str, Any], message: str
) -> None:
    def unused(*_: object) -> Tensor:
        raise AssertionError("a network was called")

    with pytest.raises(hs.InputError, match=message):
        run(flow_table(), **{"shape": VIDEO, "network": unused} | change)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_network_that_answers_in_other_axes_is_an_error(guidance: float) -> None:
    """[B, C, T, h, w] in, [B, C, T*h, w] out: as many numbers, and still not the same latent."""
    table = flow_table(guidance=guidance)
    with pytest.raises(ValueError, match=r"f_cond: expected the shape of x \[2, 4, 3, 2, 5\]"):
        run(table, VIDEO, network=lambda x, t, c: network(x, t, c).flatten(2, 3))
