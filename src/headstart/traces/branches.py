"""Going on from a saved state with a change: another model, fresh noise or another prompt.

row K of the new run starts at x of row K - 1, or at x0 + sigma_K*n with n drawn from other seeds
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex, final

import torch
from torch import Tensor

from headstart.adapters.strength import Strength
from headstart.by_level import part_of_rows
from headstart.conditioning.stages import stages
from headstart.diversify.effect import methods_of_rest
from headstart.engine.engine import Engine
from headstart.engine.pair import Pair
from headstart.engine.pixels import decode_rgb, final_latents
from headstart.engine.trajectory import Trajectory
from headstart.errors import InputError, PlanError
from headstart.noise import Philox
from headstart.plan.plan import sigma_data_of
from headstart.plan.prediction import Scalings
from headstart.plan.request import pair_up
from headstart.plan.schedule import fingerprint_of
from headstart.plan.table import Step, StepTable
from headstart.plan.update import consistency_boundary
from headstart.sampler import State


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Branch:
    """The result of a run that went on with a change; tensors are on the engine's device.

    rgb        uint8 [B, H, W, 3];  latents float32 [B, C, h, w], at noise level 0
    x0         float32 [S, B, C, h, w] of all rows, those before the branch from the origin; None
               where the origin kept none
    table      all rows: those of the origin, and those that ran with the change
    from_step  the first row that ran with the change
    change     what is different, in words
    original   uint8 [B, H, W, 3], what each image was before the change
    """

    rgb: Tensor
    latents: Tensor
    x0: Tensor | None
    table: StepTable
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    from_step: int
    change: str
    original: Tensor
    chunk: int
    lineage: str | None


def branch(
    engine: Engine,
    origin: Trajectory,
    state: State,
    *,
    model: str | None = None,
    reseed: SupportsIndex | Sequence[SupportsIndex] | None = None,
    guidance: float | None = None,
    prompt: str | None = None,
    negative: str | Sequence[str | None] | None = None,
) -> Branch:
    """Go on from `state`, a State of the run `origin`, with these things changed.

        states: list[hs.State] = []
        origin = engine.sample("a fox", seeds=[1, 2], keep_x0=True, on_step=states.append)
        other = hs.branch(engine, origin, states[1], model="base")

    model     runs all rows left, on the same noise levels
    reseed    one seed an image; noise is drawn from these, and the start is drawn anew: what is
              predicted stays, under fresh noise. One image may go on under several seeds
    guidance  of all rows left; prompt, negative: of all rows left

    With nothing changed it gives the bits of the origin. Raises InputError or PlanError for a
    change that cannot be made, before a network runs.
    """
    first = state.step + 1
    if engine.weights.lineage != origin.lineage:
        raise InputError(
            f"the run is of {origin.lineage} latents, this engine's are {engine.weights.lineage} "
            "latents: branch off with the engine that sampled it"
        )
    if not 1 <= first < len(origin.table):
        raise InputError(
            f"a branch starts at row 1 to {len(origin.table) - 1} of plan {origin.table.name!r}, "
            f"not at row {first}: row 0 is another run, and there is no row after the last"
        )
    if origin.given:
        raise InputError(
            "the run was given tensors of its caller's (cond=, uncond=, noise=), which it does not "
            "keep: go on with engine.iterate(cond=..., noise=..., resume=state)"
        )
    change = _change(model, reseed, guidance, prompt, negative)
    table = changed(origin.table, first, engine.weights, model=model, guidance=guidance)
    if prompt is not None and not origin.reading.get("literal"):
        check_heard(prompt, table, first)
    seeds = (origin.chosen or origin.seeds) if reseed is None else pair_up("", reseed)[1]
    earlier = None if origin.x0 is None else origin.x0[:first]
    if reseed is not None:
        state = _renoised(state, table[first].sigma, seeds)
        earlier = None if earlier is None else _spread(earlier, len(seeds), 1)
    count = len(seeds)
    prompts = origin.prompts if prompt is None else (prompt,)
    prompts = prompts if len(prompts) == count else prompts[:1] * count
    chunk = min(origin.chunk, count)
    decode, bands = origin.decode or (chunk, 1)
    run = engine.with_reading().iterate(
        prompts, **origin.reading, plan=table, seeds=seeds, size=origin.size, batch=chunk,
        resume=state,
        negative=origin.negative if negative is None else negative,
        adapters=_strengths(engine, origin, count), diversify=methods_of_rest(origin.diversify),
    )  # fmt: skip
    x0s: list[Tensor] = []
    for state in run:
        if earlier is not None:
            x0s.append(state.x0)
    dtype, latents = engine.weights.vae_dtype, final_latents(table, state.x)
    return Branch(
        rgb=decode_rgb(engine.vae, latents, dtype=dtype, chunk=decode, seeds=seeds, bands=bands),
        latents=latents,
        x0=None if earlier is None else torch.cat((earlier, torch.stack(x0s))),
        table=replace(table, name=f"{origin.table.name} · {change}"),
        prompts=prompts,
        seeds=seeds,
        from_step=first,
        change=change,
        original=_spread(origin.rgb, count, 0),
        chunk=chunk,
        lineage=origin.lineage,
    )


def changed(
    table: StepTable,
    first: int,
    weights: Pair,
    *,
    model: str | None = None,
    guidance: float | None = None,
) -> StepTable:
    """The table with another model or guidance from row `first` on, at the same noise levels.

    A model on another noise schedule is called at its own timesteps of these levels. A row that
    looks back on the x0 of another model (`carry`) becomes first order, as a plan's first row of a
    leg is. Raises PlanError for an unknown model, a level that it has no timestep for, or a
    guidance below 0.
    """
    if model is not None and model not in weights.predictions:
        models = ", ".join(weights.predictions)
        raise PlanError(f"no model {model!r} to switch to: there is {models}")
    if guidance is not None and not 0.0 <= guidance < float("inf"):
        raise PlanError(f"guidance must be a finite number >= 0, not {guidance!r}")
    rows = list(table.steps[:first])
    for row in table.steps[first:]:
        if model is not None:
            row = _switched(row, model, weights)
        if guidance is not None:
            row = row._replace(guidance=float(guidance))
        if row.carry and rows[-1].model != row.model:
            row = row._replace(carry=0.0)
        rows.append(row)
    schedules = {row.model: weights.schedules[row.model] for row in rows}
    return replace(table, steps=tuple(rows), schedule=fingerprint_of(schedules))


def check_heard(prompt: str, table: StepTable, first: int) -> None:
    """Raise InputError for a part of a prompt that no row from `first` on reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the run itself warns
        parts = stages(prompt)
    numbers = part_of_rows([part.level for part in parts], table)[first:]
    if unused := [part.text for number, part in enumerate(parts) if number not in numbers]:
        raise InputError(
            f"prompt {prompt!r:.80}: {unused[0]!r:.60} is for rows before row {first}, from which "
            "on this prompt holds, so it would never be used: leave it out, or go on from an "
            "earlier row"
        )


def _switched(row: Step, model: str, weights: Pair) -> Step:
    """The row by another model; LCM's boundary stays folded in where it was."""
    timestep, schedule = row.timestep, weights.schedules[model]
    row_schedule, row_prediction = weights.schedules[row.model], weights.predictions[row.model]
    if schedule != row_schedule:
        timestep = schedule.timestep(row.sigma, "log")
    prediction = weights.predictions[model]
    if prediction is row_prediction and timestep == row.timestep:
        return row._replace(model=model)
    scalings = prediction.scalings(row.sigma, sigma_data_of(schedule))
    expected = row_prediction.scalings(row.sigma, sigma_data_of(row_schedule))
    if Scalings(row.c_in, row.c_skip, row.c_out) != expected:
        scalings = consistency_boundary(scalings, timestep)
    return row._replace(model=model, timestep=timestep, **scalings._asdict())


def _renoised(state: State, sigma: float, seeds: tuple[int, ...]) -> State:
    """x0 under fresh noise of the level at which the next row starts."""
    x0 = _spread(state.x0, len(seeds), 0)
    noise = Philox(seeds).step(state.step, x0.shape[1:], x0.device)
    return State(state.step, x0 + sigma * noise, x0)


def _spread(tensor: Tensor, count: int, axis: int) -> Tensor:
    if tensor.shape[axis] == count:
        return tensor
    if tensor.shape[axis] != 1:
        raise InputError(
            f"{count} new seeds for {tensor.shape[axis]} images: give one for each image, or "
            "branch off a single image"
        )
    return tensor.repeat_interleave(count, axis)


def _strengths(engine: Engine, origin: Trajectory, count: int) -> dict[str, Strength]:
    """How strongly adapters acted in the origin, which its call may decide and not the engine;
    those of a single image are those of all that go on from it."""
    strengths = engine.adapters.look().recorded_strengths(origin.adapters)
    if count == len(origin.seeds):
        return strengths
    return {name: _widened(strength, count) for name, strength in strengths.items()}


def _widened(strength: Strength, count: int) -> Strength:
    value, text = strength.value, strength.text
    if isinstance(value, tuple):
        rows = tuple(row * count for row in value if isinstance(row, tuple))
        value = rows or value * count
    return replace(strength, value=value, text=text * count if isinstance(text, tuple) else text)


def _change(
    model: str | None,
    reseed: object,
    guidance: float | None,
    prompt: str | None,
    negative: object,
) -> str:
    parts = [
        f"{model} from here" if model is not None else "",
        "fresh noise" if reseed is not None else "",
        f"guidance {guidance:g}" if guidance is not None else "",
        f"“{prompt}”" if prompt is not None else "",
        f"away from “{negative}”" if negative is not None else "",
    ]
    return ", ".join(filter(None, parts)) or "nothing changed"
