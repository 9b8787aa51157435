"""The loop: x = init_scale*n, then for every row F = network(c_in*x, t) and one fused step.

x0 = c_skip*x + c_out*F      x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart.errors import InputError
from headstart.interfaces import Conditioning, Denoiser, NoiseSource
from headstart.noise import Given, Philox
from headstart.plan.table import Step, StepTable
from headstart.watch import Check, Watch
from headstart_kernels import Draw, LinearMap, Preview, Rows, fused_step, scale_input


class State(NamedTuple):
    """What a row leaves behind: everything that going on from it needs.

    step  the row's number in the whole plan
    x     [B, ...] float32, the latent after the row, in sigma space: [B, C, h, w], video
          [B, C, T, h, w], packed tokens [B, L, C], or any other shape with the batch first
    x0    [B, ...] float32, the shape of x, what the row predicted
    rgb   [B, h, w, 3] uint8, its linear picture, where `sample` was given one to draw
    """

    step: int
    x: Tensor
    x0: Tensor
    rgb: Tensor | None = None


def sample(
    table: StepTable,
    denoisers: Mapping[str, Denoiser],
    cond: Conditioning,
    noise: NoiseSource,
    *,
    uncond: Conditioning | None = None,
    resume: State | None = None,
    shape: Sequence[int] | None = None,
    before_row: Callable[[Step], None] | None = None,
    strengths: Tensor | None = None,
    check: Check = "auto",
    picture: LinearMap | None = None,
) -> Iterator[State]:
    """Run a table, one State a row; to stop iterating is to cancel, and leaves nothing behind.

    denoisers   the network of every model that the rows left to run name: any callable
                (x_in, timestep, cond) -> F. x_in is c_in*x in the dtype of its `dtype` attribute,
                else of cond.context; timestep [B] is int64 where the row's is whole, else float32
    cond        for B samples, or for one that all share; the run is on its device
    noise       B unit normals for the start and for each row that adds noise
    uncond      needed by rows with guidance other than 1, which make ONE call on the 2B samples
                (uncond, cond); guidance 1 is conditional only, one pass
    resume      a State of this plan: goes on with the next row, to the same bits as the run that
                made it, on any part of the table. State(first - 1, x, x) starts from a latent
    shape       of one latent, without the batch: (C, h, w), video (C, T, h, w), packed tokens
                (L, C), or any other; not needed with `resume` or with `Given` noise
    before_row  called with each row before its network: for progress, or to set the strengths of
                adapters that another engine holds
    strengths   [rows of the table, B, A] float32: what each row sets as `Conditioning.strengths`,
                of the A adapters that the networks have (`Engine.adapters.strengths`)
    check       a NaN or an infinity in x0 raises InputError naming step, model and samples: after
                "each" row, after the "last" row (naming the first bad one), or "never". "auto" is
                "each" on a CPU and "last" elsewhere, where each look would wait for the device
    picture     draw x0 by this map into `State.rgb`, on a GPU in the pass that computes it; for
                latents [B, C, h, w] alone

    Raises InputError for anything missing, before the first network call. Generators share
    nothing, so runs may be interleaved. To steer, resume from a changed State, or write to its x
    with torch's own operators before the next row; what torch does not see (a write through numpy)
    the next row's network would not see either.
    """
    steps = _rows_left(table, resume)
    _check_models(steps, denoisers, before_row is None and strengths is None)
    device, batch = cond.context.device, len(noise)
    cond = cond.expand(batch)
    strengths = _checked_strengths(strengths, table, batch, device)
    pair = _guided_pair(steps, cond, uncond)
    latent = _latent_shape(shape, noise, resume)
    if resume is not None:
        _check_state(resume, (batch, *latent), device)
    _check_picture(picture, latent)
    calls = _calls(table, cond, pair, strengths, device)
    run = _Run(table, calls, denoisers, cond, noise, latent, device, before_row, picture)
    return _loop(run, resume, Watch(check, device, batch))


class _Call(NamedTuple):
    """A row's call of its network, known before the run.

    copies    how often the network sees each sample: twice where it is guided
    timestep  [copies*B]: int64 where it is whole, else float32
    told      B samples, or 2B in the order (uncond, cond)
    """

    copies: int
    timestep: Tensor
    told: Conditioning


@dataclass(frozen=True, slots=True)
class _Run:
    table: StepTable
    calls: Sequence[_Call]
    denoisers: Mapping[str, Denoiser]
    cond: Conditioning
    noise: NoiseSource
    latent: tuple[int, ...]
    device: torch.device
    before_row: Callable[[Step], None] | None
    picture: LinearMap | None
    molds: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict[Any, Any])
    """What the networks see, without memory: torch.empty_like takes half as long as torch.empty."""

    def network(self, step: Step) -> tuple[Denoiser, torch.dtype]:
        """The network of a row, and what it is fed: its own dtype, else the conditioning's."""
        network = self.denoisers[step.model]
        return network, getattr(network, "dtype", self.cond.context.dtype)

    def room(self, row: int) -> Tensor | None:
        """For what the network of a row will see; None where nothing could vouch for it."""
        if row >= len(self.calls) or torch.is_inference_mode_enabled():
            return None
        copies = self.calls[row].copies
        kind = copies, self.network(self.table.steps[row])[1]
        mold = self.molds.get(kind)
        if mold is None:
            shape = (copies * len(self.noise), *self.latent)
            mold = torch.empty(1, dtype=kind[1], device=self.device).expand(shape)
            self.molds[kind] = mold
        return torch.empty_like(mold, memory_format=torch.contiguous_format)

    def inside(self) -> Draw | None:
        """Noise that a step draws itself: all of Philox's; None for that of another source."""
        if type(self.noise) is Philox:
            return self.noise.draw(self.table.first, self.device)
        return None


def _loop(run: _Run, state: State | None, watch: Watch) -> Iterator[State]:
    table, rows = run.table, Rows(torch.tensor(run.table.coefficients()))
    if state is None:
        x = run.noise.initial(run.latent, run.device) * table.init_scale
        state = State(table.first - 1, x, x)
    inside = run.inside()
    ahead: Tensor | None = None
    version, untracked, as_it_is = 0, torch.no_grad(), nullcontext()
    for number in range(state.step + 1, table.first + len(table)):
        row = number - table.first
        step, x = table.steps[row], state.x
        if run.before_row is not None:
            run.before_row(step)
        if ahead is not None and x._version != version:
            ahead = None  # somebody wrote to x since
        with untracked if torch.is_grad_enabled() else as_it_is:
            f = _predict(run, row, x, rows, ahead)
            n = None
            if step.add:
                n = inside or run.noise.step(number, run.latent, run.device)
            ahead = None  # before the next is made: the same memory serves again
            ahead, finite, drawn = run.room(row + 1), watch.flags(), _drawn(run.picture, x)
            x, x0 = fused_step(
                x,
                f,
                rows,
                row,
                noise=n,
                x0_prev=state.x0,
                x_in=ahead,
                preview=drawn,
                finite=finite,
            )
        watch.look(number, step.model, finite, last=row == len(table) - 1)
        state = State(number, x, x0, None if drawn is None else drawn.rgb)
        if ahead is not None:
            version = x._version
        yield state


def _predict(run: _Run, row: int, x: Tensor, rows: Rows, x_in: Tensor | None) -> Tensor:
    """F, of [B], or [2B] where the row is guided: one call of the network on c_in*x, which may
    have been made with x, in the dtype that the network had then."""
    copies, timestep, told = run.calls[row]
    network, dtype = run.network(run.table.steps[row])
    if x_in is None or x_in.dtype is not dtype:
        x_in = scale_input(x, rows, row, dtype, copies=copies)
    return network(x_in, timestep, told)


def _drawn(picture: LinearMap | None, x: Tensor) -> Preview | None:
    """What the row fills with its picture: a tensor of the row's own."""
    if picture is None:
        return None
    batch, _, height, width = x.shape
    return Preview(x.new_empty((batch, height, width, 3), dtype=torch.uint8), *picture)


def _calls(
    table: StepTable,
    cond: Conditioning,
    pair: Conditioning | None,
    strengths: Tensor | None,
    device: torch.device,
) -> list[_Call]:
    """Timesteps are made at once, each at a multiple of 32 bytes, to which compiled networks would
    else copy them."""
    calls: list[_Call] = []
    for (whole, copies), group in groupby(
        table.steps, lambda step: (step.timestep.is_integer(), step.passes)
    ):
        steps, count = list(group), copies * len(cond)
        dtype = torch.int64 if whole else torch.float32
        numbers = torch.tensor([step.timestep for step in steps], dtype=dtype, device=device)
        timesteps = numbers[:, None].repeat(1, -(-count // 8) * 8)[:, :count].unbind()
        for timestep in timesteps:
            told = cond if copies == 1 or pair is None else pair  # no pair: that row is done
            if strengths is not None:
                own = strengths[len(calls)]
                told = replace(told, strengths=torch.cat([own] * copies))
            calls.append(_Call(copies, timestep, told))
    return calls


def _rows_left(table: StepTable, resume: State | None) -> tuple[Step, ...]:
    if resume is None:
        if table.first:
            raise InputError(
                f"this part of a plan begins at row {table.first}: give resume=, the State of row "
                f"{table.first - 1}, or State({table.first - 1}, x, x) to start from a latent x"
            )
        return table.steps
    done = resume.step + 1 - table.first
    if not 0 <= done <= len(table):
        raise InputError(
            f"resume is a State of row {resume.step}, but the table has rows {table.first} to "
            f"{table.first + len(table) - 1}: give the State of one of these, or of the row before"
        )
    return table.steps[done:]


def _check_models(
    steps: Sequence[Step],
    denoisers: Mapping[str, Denoiser],
    unsteered: bool,
) -> None:
    unknown = sorted({step.model for step in steps} - set(denoisers))
    if unknown:
        raise InputError(
            f"the plan names model(s) {unknown}, but denoisers has {sorted(denoisers)}: add the "
            "missing network, or give the plan's legs the names it has"
        )
    adapters = sorted({name for step in steps for name, _ in step.adapters})
    if adapters and unsteered:
        raise InputError(
            f"rows of this plan set adapter(s) {adapters}: sample through an Engine that has them "
            "attached, or give strengths=, or before_row=, which sets those of `step.adapters`"
        )


def _checked_strengths(
    strengths: Tensor | None, table: StepTable, batch: int, device: torch.device
) -> Tensor | None:
    if strengths is None:
        return None
    if strengths.ndim != 3 or tuple(strengths.shape[:2]) != (len(table), batch):
        raise InputError(
            f"strengths: expected [{len(table)} rows, {batch} samples, adapters], got "
            f"{list(strengths.shape)}"
        )
    if not bool(torch.isfinite(strengths).all()):
        raise InputError("strengths: expected finite numbers, got NaN or infinity")
    return strengths.to(device=device, dtype=torch.float32)


def _guided_pair(
    steps: Sequence[Step], cond: Conditioning, uncond: Conditioning | None
) -> Conditioning | None:
    guided = next((step for step in steps if step.guidance != 1.0), None)
    if guided is None:
        return None
    if uncond is None:
        raise InputError(
            f"the {guided.model!r} row at timestep {guided.timestep:g} has guidance "
            f"{guided.guidance:g}, so it needs uncond=, the conditioning of the negative prompt; "
            "guidance 1.0 needs none"
        )
    uncond = uncond.expand(len(cond))
    if cond.strengths is not None and uncond.strengths is None:
        uncond = replace(uncond, strengths=cond.strengths)
    return Conditioning.cat((uncond, cond))


def _latent_shape(
    shape: Sequence[int] | None, noise: NoiseSource, resume: State | None
) -> tuple[int, ...]:
    if shape is None and resume is not None:
        shape = resume.x.shape[1:]
    if shape is None and isinstance(noise, Given):
        shape = noise.shape
    if shape is None:
        raise InputError(
            "the latent's size is unknown: give shape=(C, h, w), such as (4, 128, 128); video "
            "(C, T, h, w) and packed tokens (L, C) are latents too"
        )
    if min(shape, default=0) < 1:
        raise InputError(
            "shape: expected the sizes of one latent, each at least 1, such as (4, 128, 128), got "
            f"{list(shape)}: leave out the batch, and give every axis a size"
        )
    return tuple(shape)


def _check_picture(picture: LinearMap | None, latent: tuple[int, ...]) -> None:
    if picture is not None and len(latent) != 3:
        raise InputError(
            f"picture: a linear picture needs latents [C, h, w], and these are {list(latent)}: "
            "leave picture out, and decode State.x0 with the model's own decoder"
        )


def _check_state(state: State, shape: tuple[int, ...], device: torch.device) -> None:
    for name, tensor in (("x", state.x), ("x0", state.x0)):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise InputError(
                f"resume.{name}: expected float32 {list(shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)}: seeds, conditioning and State must be of the same batch"
            )
        if tensor.device != device:
            raise InputError(f"resume.{name} is on {tensor.device}, cond on {device}: move one")
