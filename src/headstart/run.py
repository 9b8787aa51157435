"""A run without its network: it gives out the network calls of a table and takes their outputs.

    run = Run(table, cond, noise, shape=(4, 64, 64))
    while (call := run.call) is not None:
        state = run.advance(network(call.x_in, call.timestep, call.cond))

    x0 = c_skip*x + c_out*F      x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n

So a network may be anywhere: in another thread or process, behind a queue that batches requests, or
inside another sampler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from headstart import fork
from headstart.by_level import cond_parts
from headstart.call import Call, checked_strengths, expand_cond, prepare_calls, row_conds
from headstart.errors import InputError
from headstart.finite import Check, FiniteCheck
from headstart.interfaces import Conditioning, NoiseSource
from headstart.noise import Given, keys_of
from headstart.plan.table import Step, StepTable
from headstart.prompt_cache import PromptCache
from headstart.state import State, check_latent, check_state, start_index
from headstart_kernels import Draw, LinearMap, Preview, Rows, Steps, scale_input


class Run:
    """One run of a table, from its start or from `resume`; the caller runs the networks.

    table      a StepTable, or a part of one
    cond       a Conditioning for B samples, or for one that all share; the run is on its device.
               Whatever else your network reads is passed on in `Call.cond` as it is. A ByLevel of
               either changes with the row's level
    dtypes     model -> the dtype of its x_in, looked up at every row; the default is that of
               cond.context, or float32
    device     where the run is, if cond is no Conditioning; by default that of `resume`, or a CPU
    noise, uncond, resume, shape, strengths, check, picture    as in `headstart.sample`

    `call` is the next network call, None at the end; `advance` takes its output. A run may be
    dropped at any row; there is nothing to clean up. To steer, write to `state.x` with torch's own
    operators before the next call, or start another run from a changed State. Raises InputError for
    anything missing before the first call.
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
        self._index, batch = start_index(table, resume), len(noise)
        cond = expand_cond(cond, batch)
        first = cond_parts(cond)[0]
        if isinstance(first, Conditioning):
            self._dtype, device = first.context.dtype, first.context.device
        else:
            self._dtype = torch.float32
            device = device or ("cpu" if resume is None else resume.x.device)
            device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        strengths = checked_strengths(strengths, table, cond, batch)
        conds = row_conds(table, self._index, cond, uncond)
        latent = _latent_shape(shape, noise, resume)
        self.picture = _checked_picture(picture, latent, device)
        self.table, self.noise, self.latent, self.device = table, noise, latent, device
        self.prompt_cache = PromptCache()
        self._calls = prepare_calls(table, conds, strengths, batch, device, self.prompt_cache)
        self._dtypes: Mapping[str, torch.dtype] = {} if dtypes is None else dtypes
        self._steps: Steps | None = None
        self._coefficients: Tensor | None = None
        self._draw: Draw | None = None
        self._check = FiniteCheck(check, device, (batch, *latent))
        if resume is not None:
            check_state(resume, (batch, *latent), device)
        self._state = resume
        # The next network input, written by the step before; valid while nobody writes to x.
        self._x_in: Tensor | None = None
        self._version = 0
        # Expanded tensors without memory: torch.empty_like takes half as long as torch.empty.
        self._like: dict[tuple[int, torch.dtype], Tensor] = {}

    @property
    def state(self) -> State:
        """The state after the last row; before the first, State(first - 1, x, x) of the start."""
        if self._state is None:
            x = self.noise.initial(self.latent, self.device) * self.table.init_scale
            self._state = State(self.table.first - 1, x, x)
        return self._state

    def _compiled(self) -> Steps:
        """The table's rows on the device, and the keys of noise that the steps draw themselves."""
        rows = Rows(torch.tensor(self.table.coefficients()))
        self._steps = Steps(rows, (len(self.noise), *self.latent), self.device)
        if (keys := keys_of(self.noise)) is not None:
            self._draw = keys.draw(self.table.first, self.device)
        return self._steps

    @property
    def row(self) -> Step | None:
        """The row of the next call, None at the end."""
        steps = self.table.steps
        return steps[self._index] if self._index < len(steps) else None

    @property
    def call(self) -> Call | None:
        """The next network call, the same until `advance`; None at the end."""
        index, calls = self._index, self._calls
        if index >= len(calls):
            self.prompt_cache.forget()
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
            rows = (self._steps or self._compiled()).rows
            x_in = scale_input(x, rows, self._index, dtype, copies=copies)
        if not x.is_inference():  # torch counts no writes to such a tensor
            self._x_in, self._version = x_in, x._version
        return x_in

    def advance(self, f: Tensor) -> State:
        """Make the row's step with F, the network's output for `call`, of the shape of its x_in.

        Raises ValueError for an output of another shape or dtype, and InputError for NaN or
        infinity (see `check`); then the run stays where it was.
        """
        if self._index >= len(self._calls):
            raise self._end_error()
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._step(f)
        return self._step(f)

    def _step(self, f: Tensor) -> State:
        index, state, table, check = self._index, self.state, self.table, self._check
        number, step, x, n = table.first + index, table.steps[index], state.x, None
        steps = self._steps or self._compiled()
        if step.add:
            n = self._draw or self.noise.step(number, self.latent, self.device)
        self._x_in = None  # frees its memory before the next is allocated
        x_in, finite = self._empty_x_in(index + 1), check.flags()
        preview = None if self.picture is None else self._preview(x, self.picture)
        x, x0 = steps(
            index, x, f, noise=n, x0_prev=state.x0, x_in=x_in, preview=preview, finite=finite
        )
        check.read(number, step.model, finite, last=index == len(table.steps) - 1)
        self._index = index + 1
        self._state = state = State(number, x, x0, None if preview is None else preview.rgb)
        if x_in is not None:
            self._x_in, self._version = x_in, x._version
        return state

    def accept(self, x: Tensor, x0: Tensor, finite: Tensor) -> State | InputError:
        """Take the row's step from elsewhere; the error instead where it is not finite."""
        step, number = self.table.steps[self._index], self.table.first + self._index
        last = self._index == len(self.table) - 1
        try:
            self._check.read(number, step.model, finite, last=last)
        except InputError as error:
            return error
        self._x_in, self._index = None, self._index + 1
        self._state = state = State(number, x, x0)
        return state

    @property
    def keyed(self) -> bool:
        """Whether the noise of the rows is drawn from keys."""
        return keys_of(self.noise) is not None

    def keys(self) -> tuple[Tensor, Tensor]:
        """Seeds and samples of keyed noise, int64 [B] on the run's device."""
        keys = keys_of(self.noise)
        assert keys is not None
        return keys.draw(self.table.first, self.device)[:2]

    def coefficients(self) -> Tensor:
        """The table's rows on the run's device, float32 [N, 8]."""
        if self._coefficients is None:
            self._coefficients = torch.tensor(self.table.coefficients()).to(self.device)
        return self._coefficients

    def _end_error(self) -> InputError:
        return InputError(
            f"this run of plan {self.table.name!r} is at its end: its `call` is None, and `state` "
            "is its last"
        )

    def output_of(self, x0: Tensor) -> Tensor:
        """F = (x0 - c_skip*x)/c_out for `advance`, from an x0 that was predicted at `call`.

        x0   [B, ...], or [2B, ...] for a guided row, each at its level `call.sigma`
        """
        step, x = self.row, self.state.x
        if step is None:
            raise self._end_error()
        if len(x0) == 2 * len(x):
            x = torch.cat((x, x))
        with torch.no_grad():
            return (x0.float() - step.c_skip * x) / step.c_out

    def _empty_x_in(self, index: int) -> Tensor | None:
        """Memory for a row's x_in; None in inference mode, where writes to x are not counted."""
        if index >= len(self._calls) or torch.is_inference_mode_enabled():
            return None
        dtype = self._dtypes.get(self.table.steps[index].model, self._dtype)
        copies = self._calls[index].copies
        if (like := self._like.get((copies, dtype))) is None:
            shape = (copies * len(self.noise), *self.latent)
            like = torch.empty(1, dtype=dtype, device=self.device).expand(shape)
            self._like[copies, dtype] = like
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def _preview(self, x: Tensor, picture: LinearMap) -> Preview:
        """What the step draws its picture into: each row has a tensor of its own."""
        batch, _, height, width = x.shape
        return Preview(x.new_empty((batch, height, width, 3), dtype=torch.uint8), *picture)


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
    check_latent(shape)
    return tuple(shape)


def _checked_picture(
    picture: LinearMap | None, latent: tuple[int, ...], device: torch.device
) -> LinearMap | None:
    """A contiguous copy of the map; the steps do not check it again."""
    if picture is None:
        return None
    if len(latent) != 3:
        raise InputError(
            f"picture: a linear picture needs latents [C, h, w], and these are {list(latent)}: "
            "leave picture out, and decode State.x0 with the model's own decoder"
        )
    for name, tensor, shape in zip(picture._fields, picture, ((latent[0], 3), (3,)), strict=True):
        is_tensor = isinstance(cast("object", tensor), Tensor)
        fits = is_tensor and tensor.dtype == torch.float32 and tensor.device == device
        if not fits or tuple(tensor.shape) != shape:
            actual = type(tensor).__name__
            if is_tensor:
                actual = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise InputError(
                f"picture.{name}: expected a float32 tensor {list(shape)} on {device}, got "
                f"{actual}: its rows are the latent's channels, its columns red, green and blue"
            )
    return LinearMap(
        *(tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in picture)
    )
