"""A run without its network: it hands out the calls that a table needs, and takes what comes back.

    run = Run(table, cond, noise, shape=(4, 64, 64))
    while (call := run.call) is not None:
        state = run.advance(network(call.x_in, call.timestep, call.cond))

    x0 = c_skip*x + c_out*F      x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n

So a network may be anywhere: in another thread or process, behind a queue that batches requests, in
the hands of another sampler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from headstart import fork
from headstart.by_level import cond_parts
from headstart.call import Call, checked_strengths, expand_cond, prepare_calls, row_conds
from headstart.errors import InputError, PlanError
from headstart.finite import Check, FiniteCheck
from headstart.interfaces import Conditioning, NoiseSource
from headstart.noise import Given, keys_of
from headstart.plan.leg import PRINTED
from headstart.plan.table import Step, StepTable
from headstart.prompt_cache import PromptCache
from headstart_kernels import Draw, LinearMap, Preview, Rows, Steps, scale_input


class State(NamedTuple):
    """What a row leaves behind: everything that going on from it needs.

    step  the row's number in the whole plan
    x     [B, ...] float32, the latent after the row, in sigma space
    x0    [B, ...] float32, what the row predicted
    rgb   [B, h, w, 3] uint8, its linear picture, where the run was given one to draw
    """

    step: int
    x: Tensor
    x0: Tensor
    rgb: Tensor | None = None


class Run:
    """One run of a table, from its start or from `resume`, that asks for its network's outputs.

    table      a StepTable, or a part of one
    cond       a Conditioning for B samples, or for one that all share; the run is on its device.
               Whatever else your network reads is handed on in `Call.cond` as it is. A ByLevel of
               either tells each row what holds at its level
    noise      B unit normals for the start and for each row that adds noise
    uncond     needed by rows with guidance other than 1, whose calls hold the 2B samples
               (uncond, cond); guidance 1 is conditional only, one pass
    resume     a State of this plan: goes on with the next row, to the same bits as the run that
               made it, on any part of the table
    shape      of one latent, without the batch: [C, h, w], video [C, T, h, w], packed tokens
               [L, C]; not needed with `resume` or with `Given` noise
    strengths  [rows of the table, B, A] float32: what each row sets as `Conditioning.strengths`
    dtypes     model -> the dtype of its x_in, looked up at every row; where it has none, that of
               cond.context, or float32
    check      when x0 is looked at for NaN and infinity; see `headstart.sample`
    picture    draw x0 by this map into `State.rgb`
    device     where the run is, if cond is no Conditioning; by default that of `resume`, or a CPU

    `call` is what to ask now, None at the end; `advance` takes the answer. A run may be left at any
    row, and leaves nothing behind. To steer, write to `state.x` with torch's own operators before
    the next call, or start another run from a changed State. Raises InputError for anything missing
    before the first call.
    """

    def __init__(
        self,
        table: StepTable,
        cond: object,
        noise: NoiseSource,
        *,
        uncond: object = None,
        resume: State | None = None,
        shape: Sequence[int] | None = None,
        strengths: Tensor | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        check: Check = "auto",
        picture: LinearMap | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        fork.check_threads()
        done = _rows_done(table, resume)
        batch = len(noise)
        cond = expand_cond(cond, batch)
        first = cond_parts(cond)[0]
        if isinstance(first, Conditioning):
            self._dtype, device = first.context.dtype, first.context.device
        else:
            self._dtype = torch.float32
            # Of a tensor, because "cuda" is one of the devices of that name.
            place = device or ("cpu" if resume is None else resume.x.device)
            device = torch.empty(0, device=place).device
        strengths = checked_strengths(strengths, table, cond, batch)
        told = row_conds(table, done, cond, uncond)
        latent = _latent_shape(shape, noise, resume)
        picture = _checked_picture(picture, latent, device)
        self.table, self.noise, self.latent, self.device = table, noise, latent, device
        self.prompts = PromptCache()
        self._calls = prepare_calls(table, told, strengths, batch, device, self.prompts)
        self._dtypes: Mapping[str, torch.dtype] = {} if dtypes is None else dtypes
        self._steps: Steps | None = None
        self._placed: Tensor | None = None
        self._draw: Draw | None = None
        self._watch, self.picture = FiniteCheck(check, device, (batch, *latent)), picture
        if resume is not None:
            _check_state(resume, (batch, *latent), device)
        self._state = resume
        self._index = 0 if resume is None else resume.step + 1 - table.first
        # The next network input, made by the step before: good while nobody writes to x. Molds are
        # shapes without memory: torch.empty_like takes half as long as torch.empty.
        self._x_in: Tensor | None = None
        self._version = 0
        self._molds: dict[tuple[int, torch.dtype], Tensor] = {}

    @property
    def state(self) -> State:
        """What the last row left; before the first, State(first - 1, x, x) of the start."""
        return self._state or self._begun()

    def _begun(self) -> State:
        """The start, drawn when it is first needed."""
        x = self.noise.initial(self.latent, self.device) * self.table.init_scale
        self._state = State(self.table.first - 1, x, x)
        return self._state

    def _read(self) -> Steps:
        """The table's rows, and noise that the steps draw themselves: all that is of keys."""
        rows = Rows(torch.tensor(self.table.coefficients()))
        self._steps = Steps(rows, (len(self.noise), *self.latent), self.device)
        keys = keys_of(self.noise)
        if keys is not None:
            self._draw = keys.draw(self.table.first, self.device)
        return self._steps

    @property
    def row(self) -> Step | None:
        """The row whose network is asked now, None at the end."""
        steps = self.table.steps
        return steps[self._index] if self._index < len(steps) else None

    @property
    def call(self) -> Call | None:
        """What is asked now, the same until `advance`; None at the end."""
        index, calls = self._index, self._calls
        if index >= len(calls):
            self.prompts.forget()
            return None
        if fork.forked:
            fork.check_threads()
        step, (copies, timestep, cond) = self.table.steps[index], calls[index]
        dtype, x_in = self._dtypes.get(step.model, self._dtype), self._x_in
        state = self._state or self.state
        if x_in is None or x_in.dtype is not dtype or state.x._version != self._version:
            x_in = self._scaled(copies, dtype)
        return Call(self.table.first + index, step.model, step.sigma, x_in, timestep, cond)

    def _scaled(self, copies: int, dtype: torch.dtype) -> Tensor:
        x = self.state.x
        with torch.no_grad():
            rows = (self._steps or self._read()).rows
            x_in = scale_input(x, rows, self._index, dtype, copies=copies)
        if not x.is_inference():  # such a tensor does not tell when it is written to
            self._x_in, self._version = x_in, x._version
        return x_in

    def advance(self, f: Tensor) -> State:
        """Take F, the network's answer to `call`, of the shape of its x_in; make the row's step.

        Raises ValueError for an answer of another shape or kind, and InputError for NaN or infinity
        (see `check`); then the run is where it was.
        """
        if self._index >= len(self._calls):
            raise self._ended()
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._step(f)
        return self._step(f)

    def _step(self, f: Tensor) -> State:
        index, state, table, watch = self._index, self.state, self.table, self._watch
        number, step, x, n = table.first + index, table.steps[index], state.x, None
        steps = self._steps or self._read()
        if step.add:
            n = self._draw or self.noise.step(number, self.latent, self.device)
        self._x_in = None  # before the next is made: the same memory serves again
        room, finite = self._room(index + 1), watch.flags()
        drawn = None if self.picture is None else self._drawn(x, self.picture)
        x, x0 = steps(
            index, x, f, noise=n, x0_prev=state.x0, x_in=room, preview=drawn, finite=finite
        )
        watch.look(number, step.model, finite, last=index == len(table.steps) - 1)
        self._index = index + 1
        self._state = state = State(number, x, x0, None if drawn is None else drawn.rgb)
        if room is not None:
            self._x_in, self._version = room, x._version
        return state

    def accept(self, x: Tensor, x0: Tensor, finite: Tensor) -> State | InputError:
        """Take the row's step, which was made elsewhere; or what the look for NaN says of it."""
        step, number = self.table.steps[self._index], self.table.first + self._index
        last = self._index == len(self.table) - 1
        try:
            self._watch.look(number, step.model, finite, last=last)
        except InputError as error:
            return error
        self._x_in, self._index = None, self._index + 1
        self._state = state = State(number, x, x0)
        return state

    @property
    def keyed(self) -> bool:
        """Whether noise that rows add is made from keys, wherever it is drawn."""
        return keys_of(self.noise) is not None

    def keys(self) -> tuple[Tensor, Tensor]:
        """Seeds and samples of keyed noise, int64 [B] on the run's device."""
        keys = keys_of(self.noise)
        assert keys is not None
        draw = keys.draw(self.table.first, self.device)
        return draw.seeds, draw.samples

    def coefficients(self) -> Tensor:
        """The table's rows on the run's device, float32 [N, 8]."""
        if self._placed is None:
            self._placed = torch.tensor(self.table.coefficients()).to(self.device)
        return self._placed

    def _ended(self) -> InputError:
        return InputError(
            f"this run of plan {self.table.name!r} is at its end: its `call` is None, and `state` "
            "is its last"
        )

    def output_of(self, x0: Tensor) -> Tensor:
        """F = (x0 - c_skip*x)/c_out, for `advance`, of an x0 that was predicted at `call`.

        x0   [B, ...], or [2B, ...] for a guided row, each at its level `call.sigma`
        """
        step, x = self.row, self.state.x
        if step is None:
            raise self._ended()
        if len(x0) == 2 * len(x):
            x = torch.cat((x, x))
        with torch.no_grad():
            return (x0.float() - step.c_skip * x) / step.c_out

    def _room(self, index: int) -> Tensor | None:
        """For what the network of a row will see; None where nothing could vouch for it."""
        if index >= len(self._calls) or torch.is_inference_mode_enabled():
            return None
        dtype = self._dtypes.get(self.table.steps[index].model, self._dtype)
        kind = self._calls[index].copies, dtype
        mold = self._molds.get(kind)
        if mold is None:
            shape = (kind[0] * len(self.noise), *self.latent)
            mold = torch.empty(1, dtype=dtype, device=self.device).expand(shape)
            self._molds[kind] = mold
        return torch.empty_like(mold, memory_format=torch.contiguous_format)

    def _drawn(self, x: Tensor, picture: LinearMap) -> Preview:
        """What the row fills with its picture: a tensor of the row's own."""
        batch, _, height, width = x.shape
        return Preview(x.new_empty((batch, height, width, 3), dtype=torch.uint8), *picture)


def from_latent(table: StepTable, x: Tensor, sigma: float) -> State:
    """Where a run starts that goes on from a latent of one's own, for `resume=`.

    x      [B, ...] float32 in sigma space, x0 + sigma*eps: a clean latent of which img2img starts
           is `latents + sigma*noise`
    sigma  its level, which must be that of a row: the run makes that row and those below it

    Raises PlanError for another level, with those that the table has.
    """
    levels = [step.sigma for step in table]
    found = next((n for n, own in enumerate(levels) if abs(own - sigma) <= PRINTED * own), None)
    if found is None:
        raise PlanError(
            f"no row of plan {table.name!r} starts at level {sigma:g}: give a latent at one of "
            f"{' '.join(f'{level:.4g}' for level in levels)}"
        )
    if table[found].carry:
        raise PlanError(
            f"row {table.first + found} of plan {table.name!r} looks back on the x0 before it, "
            "which a latent alone does not have: start at another row, or resume from a State"
        )
    return State(table.first + found - 1, x, x)


def _rows_done(table: StepTable, resume: State | None) -> int:
    """How many of the table's rows the run to resume has behind it."""
    if resume is None:
        if table.first:
            raise InputError(
                f"this part of a plan begins at row {table.first}: give resume=, the State of row "
                f"{table.first - 1}, or State({table.first - 1}, x, x) to start from a latent x"
            )
        return 0
    if not isinstance(cast("object", resume), State):
        raise InputError(
            f"resume: expected a headstart.State, got {type(resume).__name__}; of a latent of your "
            "own headstart.from_latent(table, x, sigma) makes one"
        )
    done = resume.step + 1 - table.first
    if not 0 <= done <= len(table):
        raise InputError(
            f"resume is a State of row {resume.step}, but the table has rows {table.first} to "
            f"{table.first + len(table) - 1}: give the State of one of these, or of the row before"
        )
    return done


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


def _checked_picture(
    picture: LinearMap | None, latent: tuple[int, ...], device: torch.device
) -> LinearMap | None:
    """The map as steps read it, which look at it no more."""
    if picture is None:
        return None
    if len(latent) != 3:
        raise InputError(
            f"picture: a linear picture needs latents [C, h, w], and these are {list(latent)}: "
            "leave picture out, and decode State.x0 with the model's own decoder"
        )
    for name, tensor, shape in zip(picture._fields, picture, ((latent[0], 3), (3,)), strict=True):
        fits = isinstance(cast("object", tensor), Tensor) and tensor.dtype == torch.float32
        if not fits or tuple(tensor.shape) != shape or tensor.device != device:
            came = type(tensor).__name__
            if isinstance(cast("object", tensor), Tensor):
                came = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise InputError(
                f"picture.{name}: expected a float32 tensor {list(shape)} on {device}, got {came}: "
                "its rows are the latent's channels, its columns red, green and blue"
            )
    return LinearMap(
        *(tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in picture)
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
