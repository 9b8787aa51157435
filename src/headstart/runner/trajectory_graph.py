"""A whole run as one graph: rows, hand-off, rows, decode, uint8; one launch a batch.

    x = init_scale*n;  each row: F = network(x_in, t), one fused step that draws its noise, and
    writes the next x_in and the row's preview
    rgb = decode(end_scale*x)

Coefficients, timesteps and guidance are rows of a device table read at a device-side step; seeds,
noise, and every field of the conditioning are buffers too. A new schedule, guidance, seed or prompt
is a copy. Only what shapes the work makes another graph: which model runs a row, whether it is
guided, whether it draws noise, whether its timestep is whole, and the shapes of all tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from headstart.by_level import ByLevel
from headstart.call import steady_models
from headstart.errors import InputError
from headstart.finite import require_finite
from headstart.interfaces import Adapters, Conditioning, Denoiser, LatentCodec, NoiseSource
from headstart.networks.casting import compute_dtype
from headstart.networks.fusion import setting
from headstart.noise import keys_of
from headstart.plan.table import StepTable
from headstart.prompt_cache import PromptCache
from headstart.runner.capture import Program, Site, Tensors
from headstart.runner.graph import adapters_of, named, unnamed
from headstart_kernels import COLUMNS, INITIAL, finite_flags, ops

_ROW = "row."
_MAP = ("factors", "bias")
_KEYS = ("seeds", "samples")
_INITIAL = "initial"
_END = "end_scale"
_TIMESTEP = COLUMNS.index("timestep")


class Row(NamedTuple):
    """What of a row is built into the graph; its numbers are not."""

    model: str
    guided: bool
    draws: bool
    whole: bool


class Outcome(NamedTuple):
    """What a launch leaves on the device.

    rgb      [B, H, W, 3] uint8
    latents  [B, ...] float32, the state after the last row
    x0       [S, B, ...] float32, what every row predicted; S is 0 unless kept
    shown    [S, B, h, w, 3] uint8, its preview in every row; S is 0 unless there is a map
    sound    [S, B] bool, whether each row's x0 was finite
    finite   [B] bool, whether the decoder's pixels were
    """

    rgb: Tensor
    latents: Tensor
    x0: Tensor
    shown: Tensor
    sound: Tensor
    finite: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TrajectoryGraph:
    """Runs tables as single launches.

    denoisers    the network of every model that the tables name: as they are, not runners
    codec        turns latents into pixels [B, 3, H, W]; codec_dtype: what it takes
    site         where the graphs live; by default that of the conditioning's device
    preview      (factors [C, 3], bias [3]) float32, the linear map of `preview_rgb`: every row's
                 fused step then fills a picture of x0 on the way
    """

    denoisers: Mapping[str, Denoiser]
    codec: LatentCodec
    codec_dtype: torch.dtype = torch.float32
    site: Site | None = None
    preview: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        table: StepTable,
        cond: Conditioning,
        noise: NoiseSource,
        *,
        shape: tuple[int, ...],
        uncond: Conditioning | None = None,
        by_row: Mapping[str, Tensor] | None = None,
        keep_x0: bool = False,
        check: bool = True,
    ) -> Outcome:
        """The bits of `sample` and decode, for B = len(noise) samples of latents `shape`.

        shape    of one latent, [C, h, w] or any other that networks and codec agree on, such as
                 packed tokens [L, C]. The codec gives pixels [B, 3, H, W], and a preview needs
                 [C, h, w]
        uncond   for rows with guidance other than 1
        by_row   fields of the conditioning that change with the row, [S, B, ...] each, on a CPU or
                 where the run is. Of those on a CPU it is seen where all rows of a model are alike:
                 then they share what it makes of its prompt, in a graph of their own
        check    wait for the device at the end, and raise InputError for NaN or infinity, naming
                 row, model and samples. Without it nothing waits at all

        Raises InputError for what does not fit together, CaptureError for what cannot be captured.
        """
        program, inputs = self.request(
            table, cond, noise, shape=shape, uncond=uncond, by_row=by_row, keep_x0=keep_x0
        )
        site = self.site or Site.of(cond.context.device)
        outcome = Outcome(*site.run(program, inputs))
        outcome = outcome._replace(sound=outcome.sound.all(-1))
        if check:
            _require_finite(outcome, table)
        return outcome

    def request(
        self,
        table: StepTable,
        cond: Conditioning,
        noise: NoiseSource,
        *,
        shape: tuple[int, ...],
        uncond: Conditioning | None = None,
        by_row: Mapping[str, Tensor] | None = None,
        keep_x0: bool = False,
    ) -> tuple[Program, Tensors]:
        """What a call would run, and on what: for `Site.prepare`, and for an audit."""
        if isinstance(cast("object", cond), ByLevel) or isinstance(cast("object", uncond), ByLevel):
            raise InputError(
                "one graph of a whole run is told one Conditioning: give fields that change with "
                "the row as by_row=, or run a ByLevel with headstart.sample and graph runners"
            )
        adapters = {name: adapters_of(n, cond) for name, n in self.denoisers.items()}
        asked = _Request(
            self, table, tuple(shape), len(noise), uncond is not None, keep_x0, adapters,
            steady_models(table, by_row or {}),
        )  # fmt: skip
        return asked.program(), asked.inputs(cond, uncond, noise, by_row or {})


@dataclass(frozen=True, slots=True)
class _Request:
    """One call, checked; `body` is what is captured. `steady`: models whose rows are all alike."""

    graph: TrajectoryGraph
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
            Row(s.model, s.guidance != 1.0, s.add != 0.0, s.timestep.is_integer())
            for s in self.table
        )
        object.__setattr__(self, "rows", rows)
        missing = sorted({row.model for row in rows} - set(self.graph.denoisers))
        if missing:
            raise InputError(
                f"the plan names model(s) {missing}, but there are networks for "
                f"{sorted(self.graph.denoisers)}: add the missing one"
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
        if min(self.shape, default=0) < 1:
            raise InputError(
                "shape: expected the sizes of one latent, each at least 1, such as (4, 128, 128), "
                f"got {list(self.shape)}: leave out the batch, and give every axis a size"
            )
        if self.graph.preview is not None and len(self.shape) != 3:
            raise InputError(
                f"preview: a linear picture needs latents [C, h, w], and these are "
                f"{list(self.shape)}: make the TrajectoryGraph without preview="
            )

    @property
    def guided(self) -> bool:
        return any(row.guided for row in self.rows)

    def program(self) -> Program:
        models = tuple(dict.fromkeys(row.model for row in self.rows))
        networks = [self.graph.denoisers[model] for model in models]
        adapters = [self.adapters[model] for model in models]
        parts = [
            part
            for network, own in zip(networks, adapters, strict=True)
            for part in (() if own is None else own.parts(network))
        ]
        columns = tuple(None if own is None else own.columns for own in adapters)
        key = (self.rows, self.shape, self.graph.codec_dtype, self.keep_x0, setting(), columns)
        key = *key, self.steady
        networks = (*networks, self.graph.codec, *parts)
        return Program("the trajectory", self.body, networks, key)

    def inputs(
        self,
        cond: Conditioning,
        uncond: Conditioning | None,
        noise: NoiseSource,
        by_row: Mapping[str, Tensor],
    ) -> Tensors:
        device, table = cond.context.device, self.table
        steps = sorted({name for step in table for name, _ in step.adapters})
        if steps and not by_row:
            raise InputError(
                f"rows of this plan set adapter(s) {steps}: give their strengths as a field of the "
                "conditioning in by_row=, or sample with an Engine that has them attached"
            )
        tensors = {
            "table": _placed(table.coefficients(), device),
            "init_scale": _placed(np.float32(table.init_scale), device),
            "step": _placed(np.int64(0), device),
            **named(cond.expand(self.batch)),
            **self._noise(noise, device),
        }
        if table.end_scale != 1.0:
            tensors[_END] = _placed(np.float32(table.end_scale), device)
        if self.graph.preview is not None:
            tensors |= dict(zip(_MAP, self.graph.preview, strict=True))
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
        """Keys of counter-based noise, which the graph draws; of another source, its draws. The
        start may be of its own where rows are of keys."""
        keys = keys_of(noise)
        if keys is not None:
            numbers = (np.array(k, np.uint64).astype(np.int64) for k in (keys.seeds, keys.samples))
            found = dict(zip(_KEYS, (_placed(own, device) for own in numbers), strict=True))
            own = {} if noise is keys else {_INITIAL: noise.initial(self.shape, device)}
            return found | own
        drawn = [i for i, row in enumerate(self.rows) if row.draws]
        found = {_INITIAL: noise.initial(self.shape, device)}
        if drawn:
            found["noise"] = torch.stack([noise.step(i, self.shape, device) for i in drawn])
        return found

    def body(self, inputs: Tensors) -> tuple[Tensor, ...]:
        """The run, as it is captured: no number in it comes from the table but through a buffer."""
        table, step = inputs["table"], inputs["step"]
        draws = iter(inputs["noise"].unbind()) if "noise" in inputs else None
        x = self._start(inputs) * inputs["init_scale"]
        x_in, before = self._first_input(x, table, step), x
        kept, shown = list[Tensor](), self._pictures(x)
        sound = finite_flags((len(self.rows) * self.batch, *x.shape[1:]), x.device)
        sound = sound.view(len(self.rows), self.batch, -1)
        told, prompts = dict[Hashable, Conditioning](), PromptCache()
        changes = dict[Hashable, Tensors]()
        for number, row in enumerate(self.rows):
            key, own = (row.guided, x_in.dtype), (row.guided, row.model)
            if key not in told:  # the same for all rows alike, so that it is read once
                told[key] = self._told(row, x_in, inputs)
            if own not in changes or row.model not in self.steady:
                changes[own] = self._changes(row, inputs)
            cond: Conditioning = replace(
                told[key], **changes[own], adapters=self.adapters[row.model]
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
                rgb=shown[number] if len(shown) else None,
                **{name: inputs.get(name) for name in _MAP},
                finite=sound[number],
            )
            step.add_(1)
            before, x_in = x0, x if following is None else following
            if self.keep_x0:
                kept.append(x0)
        last = x * inputs[_END] if _END in inputs else x
        pixels = self.graph.codec.decode(last.to(self.graph.codec_dtype))
        finite = torch.isfinite(pixels).flatten(1).all(1)
        stack = torch.stack(kept) if kept else x.new_empty((0, *x.shape))
        return ops.decode_u8(pixels), x, stack, shown, sound, finite

    def _start(self, inputs: Tensors) -> Tensor:
        """Unit normals of the start, given or drawn."""
        if _INITIAL in inputs:
            return inputs[_INITIAL]
        seeds, samples = (inputs[name] for name in _KEYS)
        row = torch.full_like(inputs["step"], INITIAL)
        return ops.philox_normal(seeds, samples, row, self.shape)

    def _pictures(self, x: Tensor) -> Tensor:
        rows = 0 if self.graph.preview is None else len(self.rows)
        size = (rows, len(x), *x.shape[2:], 3)
        return torch.empty(size, dtype=torch.uint8, device=x.device)

    def _told(self, row: Row, x_in: Tensor, inputs: Tensors) -> Conditioning:
        """What the rows like this one are told, but for what changes with the row."""
        cond = unnamed(inputs)
        if row.guided:
            cond = Conditioning.cat((unnamed(inputs, "uncond."), cond))
        return cond if cond.context.dtype == x_in.dtype else cond.to(x_in.device, x_in.dtype)

    def _changes(self, row: Row, inputs: Tensors) -> dict[str, Tensor]:
        """What changes with the row, for this one and those that are told the same."""
        step = inputs["step"].view(1)
        changes = {
            name.removeprefix(_ROW): column.index_select(0, step)[0]
            for name, column in inputs.items()
            if name.startswith(_ROW)
        }
        if row.guided:
            changes = {name: torch.cat((value, value)) for name, value in changes.items()}
        return changes

    def _predict(
        self, row: Row, x_in: Tensor, cond: Conditioning, prompts: PromptCache, inputs: Tensors
    ) -> Tensor:
        network, step = self.graph.denoisers[row.model], inputs["step"].view(1)
        timestep = inputs["table"][:, _TIMESTEP].index_select(0, step).expand(len(x_in))
        timestep = timestep.to(torch.int64) if row.whole else timestep.contiguous()
        return network(x_in, timestep, prompts.of(network, cond))

    def _first_input(self, x: Tensor, table: Tensor, step: Tensor) -> Tensor:
        row = self.rows[0]
        x_in = ops.scale_input(x, table, step, self._dtype(row))
        return torch.cat((x_in, x_in)) if row.guided else x_in

    def _next_input(self, number: int, x: Tensor) -> Tensor | None:
        """Memory for what the next row's network sees, which the fused step writes."""
        if number + 1 == len(self.rows):
            return None
        row = self.rows[number + 1]
        size = (len(x) * (1 + row.guided), *x.shape[1:])
        return torch.empty(size, dtype=self._dtype(row), device=x.device)

    def _dtype(self, row: Row) -> torch.dtype:
        network = self.graph.denoisers[row.model]
        return getattr(network, "dtype", None) or compute_dtype(network)


def _placed(values: object, device: torch.device) -> Tensor:
    """Numbers on the device; from pinned memory, so that the copy is not waited for."""
    host = torch.tensor(values)
    if device.type == "cuda" and torch.cuda.is_available():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _require_finite(outcome: Outcome, table: StepTable) -> None:
    for number, (step, sound) in enumerate(zip(table, outcome.sound.cpu(), strict=True)):
        require_finite(number, step.model, sound)
    good = cast(list[bool], outcome.finite.tolist())  # pyright: ignore[reportUnknownMemberType]
    bad = [sample for sample, fine in enumerate(good) if not fine]
    if bad:
        raise InputError(
            f"the decoder gave NaN or infinity for sample(s) {bad}: a half-precision decoder "
            "overflowed; use float32 or bfloat16 for it"
        )
