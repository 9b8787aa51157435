"""The function that a trajectory graph captures, and its inputs.

x = init_scale*n;  each row: F = network(x_in, t), one fused step that draws its noise, and
writes the next x_in and the row's preview
rgb = decode(end_scale*x)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headstart.errors import InputError
from headstart.interfaces import Adapters, Conditioning, Denoiser, LatentCodec, NoiseSource
from headstart.networks.casting import compute_dtype
from headstart.networks.fusion import setting
from headstart.noise import keys_of
from headstart.plan.table import StepTable
from headstart.prompt_cache import PromptCache
from headstart.runner.capture import Program, Tensors
from headstart.runner.graph import named, unnamed
from headstart.state import check_latent
from headstart_kernels import COLUMNS, INITIAL, finite_flags, ops

_ROW = "row."
_MAP = ("factors", "bias")
_KEYS = ("seeds", "samples")
_INITIAL = "initial"
_END = "end_scale"
_TIMESTEP = COLUMNS.index("timestep")


class Row(NamedTuple):
    """The properties of a row that are constants in the graph; its numbers are not."""

    model: str
    guided: bool
    draws: bool
    whole_timestep: bool


@dataclass(frozen=True, slots=True)
class TrajectoryBody:
    """One call, checked: `body` is the function to capture, and `inputs` its tensors.

    steady   models whose rows have equal fields
    preview  the linear map of `preview_rgb`, or None
    """

    denoisers: Mapping[str, Denoiser]
    codec: LatentCodec
    codec_dtype: torch.dtype
    preview: tuple[Tensor, Tensor] | None
    table: StepTable
    shape: tuple[int, ...]
    batch: int
    has_uncond: bool
    keep_x0: bool
    adapters: Mapping[str, Adapters | None]
    steady: frozenset[str]
    rows: tuple[Row, ...] = field(init=False)

    def __post_init__(self) -> None:
        rows = tuple(
            Row(s.model, s.passes == 2, s.add != 0.0, s.timestep.is_integer()) for s in self.table
        )
        object.__setattr__(self, "rows", rows)
        if missing := sorted({row.model for row in rows} - set(self.denoisers)):
            raise InputError(
                f"the plan names model(s) {missing}, but there are networks for "
                f"{sorted(self.denoisers)}: add the missing one"
            )
        if self.guided and not self.has_uncond:
            raise InputError(
                "a row of this plan has guidance, so it needs uncond=, the conditioning of the "
                "negative prompt; guidance 1.0 needs none"
            )
        self._check_shape()
        if self.table.first:
            raise InputError(
                f"this part of a plan begins at row {self.table.first}: one graph runs a plan from "
                "its start; go on from a State with headstart.sample"
            )

    def _check_shape(self) -> None:
        check_latent(self.shape)
        if self.preview is not None and len(self.shape) != 3:
            raise InputError(
                f"preview: a linear picture needs latents [C, h, w], and these are "
                f"{list(self.shape)}: make the TrajectoryGraph without preview="
            )

    @property
    def guided(self) -> bool:
        return any(row.guided for row in self.rows)

    def program(self) -> Program:
        models = tuple(dict.fromkeys(row.model for row in self.rows))
        networks = [self.denoisers[model] for model in models]
        adapters = [self.adapters[model] for model in models]
        parts = [
            part
            for network, adapter in zip(networks, adapters, strict=True)
            for part in (() if adapter is None else adapter.parts(network))
        ]
        columns = tuple(None if adapter is None else adapter.columns for adapter in adapters)
        key = (self.rows, self.shape, self.codec_dtype, self.keep_x0, setting(), columns)
        networks = (*networks, self.codec, *parts)
        return Program("the trajectory", self.body, networks, (*key, self.steady))

    def inputs(
        self,
        cond: Conditioning,
        uncond: Conditioning | None,
        noise: NoiseSource,
        by_row: Mapping[str, Tensor],
    ) -> Tensors:
        device, table = cond.context.device, self.table
        names = sorted({name for step in table for name, _ in step.adapters})
        if names and not by_row:
            raise InputError(
                f"rows of this plan set adapter(s) {names}: give their strengths as a field of the "
                "conditioning in by_row=, or sample with an Engine that has them attached"
            )
        tensors = {
            "table": _to_device(table.coefficients(), device),
            "init_scale": _to_device(np.float32(table.init_scale), device),
            "step": _to_device(np.int64(0), device),
            **named(cond.expand(self.batch)),
            **self._noise(noise, device),
        }
        if table.end_scale != 1.0:
            tensors[_END] = _to_device(np.float32(table.end_scale), device)
        if self.preview is not None:
            tensors |= dict(zip(_MAP, self.preview, strict=True))
        if self.guided and uncond is not None:
            tensors |= named(uncond.expand(self.batch), "uncond.")
        for name, column in by_row.items():
            if column.shape[:2] != (len(table), self.batch):
                raise InputError(
                    f"by_row[{name!r}]: expected [{len(table)}, {self.batch}, ...], a value for "
                    f"each row and sample, got {list(column.shape)}"
                )
            tensors[_ROW + name] = column.to(device)
        return tensors

    def _noise(self, noise: NoiseSource, device: torch.device) -> Tensors:
        """Keys of counter-based noise, which the graph draws from; or the draws of another source.
        With keys for the rows, the start may still be another source's."""
        keys = keys_of(noise)
        if keys is not None:
            values = dict(zip(_KEYS, (keys.seeds, keys.samples), strict=True))
            tensors = {
                name: _to_device(np.array(numbers, np.uint64).astype(np.int64), device)
                for name, numbers in values.items()
            }
            initial = {} if noise is keys else {_INITIAL: noise.initial(self.shape, device)}
            return tensors | initial
        tensors = {_INITIAL: noise.initial(self.shape, device)}
        if rows := [number for number, row in enumerate(self.rows) if row.draws]:
            tensors["noise"] = torch.stack([noise.step(n, self.shape, device) for n in rows])
        return tensors

    def body(self, inputs: Tensors) -> tuple[Tensor, ...]:
        """The run, as it is captured: every number of the table comes from a buffer."""
        table, step = inputs["table"], inputs["step"]
        draws = iter(inputs["noise"].unbind()) if "noise" in inputs else None
        x = self._start(inputs) * inputs["init_scale"]
        x_in, before = self._first_input(x, table, step), x
        x0s, previews = list[Tensor](), self._preview_buffer(x)
        finite_rows = finite_flags((len(self.rows) * self.batch, *x.shape[1:]), x.device)
        finite_rows = finite_rows.view(len(self.rows), self.batch, -1)
        conds, prompts = dict[Hashable, Conditioning](), PromptCache()
        row_fields = dict[Hashable, Tensors]()
        for number, row in enumerate(self.rows):
            form, fields_key = (row.guided, x_in.dtype), (row.guided, row.model)
            if form not in conds:  # rows of one form share it, so that the prompt is read once
                conds[form] = self._conditioning(row, x_in, inputs)
            if fields_key not in row_fields or row.model not in self.steady:
                row_fields[fields_key] = self._row_fields(row, inputs)
            cond: Conditioning = replace(
                conds[form], **row_fields[fields_key], adapters=self.adapters[row.model]
            )
            f = self._predict(row, x_in, cond, prompts, inputs)
            f_uncond, f_cond = f.split_with_sizes([self.batch] * 2) if row.guided else (None, f)
            following, x0 = self._next_input(number, x), torch.empty_like(x)
            ops.fused_step_into(
                *(x, f_cond, table, step, x, x0, f_uncond, None),
                noise=next(draws) if row.draws and draws is not None else None,
                x0_prev=before,
                x_in=following,
                seeds=inputs.get("seeds") if row.draws else None,
                samples=inputs.get("samples") if row.draws else None,
                rgb=previews[number] if len(previews) else None,
                **{name: inputs.get(name) for name in _MAP},
                finite=finite_rows[number],
            )
            step.add_(1)
            before, x_in = x0, x if following is None else following
            if self.keep_x0:
                x0s.append(x0)
        last = x * inputs[_END] if _END in inputs else x
        pixels = self.codec.decode(last.to(self.codec_dtype))
        finite = torch.isfinite(pixels).flatten(1).all(1)
        stack = torch.stack(x0s) if x0s else x.new_empty((0, *x.shape))
        return ops.decode_u8(pixels), x, stack, previews, finite_rows, finite

    def _start(self, inputs: Tensors) -> Tensor:
        """The unit normals of the start."""
        if _INITIAL in inputs:
            return inputs[_INITIAL]
        seeds, samples = (inputs[name] for name in _KEYS)
        row = torch.full_like(inputs["step"], INITIAL)
        return ops.philox_normal(seeds, samples, row, self.shape)

    def _preview_buffer(self, x: Tensor) -> Tensor:
        rows = 0 if self.preview is None else len(self.rows)
        size = (rows, len(x), *x.shape[2:], 3)
        return torch.empty(size, dtype=torch.uint8, device=x.device)

    def _conditioning(self, row: Row, x_in: Tensor, inputs: Tensors) -> Conditioning:
        """The conditioning of all rows of this form, without the fields of `_row_fields`."""
        cond = unnamed(inputs)
        if row.guided:
            cond = Conditioning.cat((unnamed(inputs, "uncond."), cond))
        return cond if cond.context.dtype == x_in.dtype else cond.to(x_in.device, x_in.dtype)

    def _row_fields(self, row: Row, inputs: Tensors) -> dict[str, Tensor]:
        """The fields of the conditioning that change with the row."""
        step = inputs["step"].view(1)
        row_fields = {
            name.removeprefix(_ROW): column.index_select(0, step)[0]
            for name, column in inputs.items()
            if name.startswith(_ROW)
        }
        if row.guided:
            row_fields = {name: torch.cat((value, value)) for name, value in row_fields.items()}
        return row_fields

    def _predict(
        self, row: Row, x_in: Tensor, cond: Conditioning, prompts: PromptCache, inputs: Tensors
    ) -> Tensor:
        network, step = self.denoisers[row.model], inputs["step"].view(1)
        timestep = inputs["table"][:, _TIMESTEP].index_select(0, step).expand(len(x_in))
        timestep = timestep.to(torch.int64) if row.whole_timestep else timestep.contiguous()
        return network(x_in, timestep, prompts.of(network, cond))

    def _first_input(self, x: Tensor, table: Tensor, step: Tensor) -> Tensor:
        row = self.rows[0]
        x_in = ops.scale_input(x, table, step, self._dtype(row))
        return torch.cat((x_in, x_in)) if row.guided else x_in

    def _next_input(self, number: int, x: Tensor) -> Tensor | None:
        """Memory for the next row's x_in, which the fused step writes."""
        if number + 1 == len(self.rows):
            return None
        row = self.rows[number + 1]
        size = (len(x) * (1 + row.guided), *x.shape[1:])
        return torch.empty(size, dtype=self._dtype(row), device=x.device)

    def _dtype(self, row: Row) -> torch.dtype:
        network = self.denoisers[row.model]
        return getattr(network, "dtype", None) or compute_dtype(network)


def _to_device(values: object, device: torch.device) -> Tensor:
    """Numbers on the device, from pinned memory, so that nothing waits for the copy."""
    host = torch.tensor(values)
    if device.type == "cuda" and torch.cuda.is_available():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
