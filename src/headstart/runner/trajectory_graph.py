"""A whole run as one graph: rows, hand-off, rows, decode, uint8; one launch a batch.

`headstart.runner.trajectory_body` is the captured function.

Coefficients, timesteps and guidance are rows of a device table, read at a device-side step. Seeds,
noise, and every field of the conditioning are buffers too. So a new schedule, guidance, seed or
prompt is a copy. Another graph is needed for another model of a row, a row that is guided or draws
noise or has a whole timestep where the old one does not, and for other shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from headstart.by_level import ByLevel
from headstart.call import steady_models
from headstart.errors import InputError
from headstart.finite import require_finite
from headstart.interfaces import Conditioning, Denoiser, LatentCodec, NoiseSource
from headstart.plan.table import StepTable
from headstart.runner.capture import Program, Site, Tensors
from headstart.runner.graph import adapters_of
from headstart.runner.trajectory_body import TrajectoryBody


class Outcome(NamedTuple):
    """The results of a launch, on the device.

    rgb            [B, H, W, 3] uint8
    latents        [B, ...] float32, the state after the last row
    x0             [S, B, ...] float32, the prediction of every row; S is 0 unless `keep_x0`
    previews       [S, B, h, w, 3] uint8, the preview of every row; S is 0 without a map
    finite_rows    [S, B] bool, whether each row's x0 was finite
    finite_pixels  [B] bool, whether the decoder's pixels were
    """

    rgb: Tensor
    latents: Tensor
    x0: Tensor
    previews: Tensor
    finite_rows: Tensor
    finite_pixels: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TrajectoryGraph:
    """Runs tables as single launches.

    denoisers    the network of every model in the tables: the network itself, not a runner
    codec        turns latents into pixels [B, 3, H, W]; codec_dtype: the dtype that it takes
    site         holds the graphs; by default that of the conditioning's device
    preview      (factors [C, 3], bias [3]) float32, the linear map of `preview_rgb`: the fused step
                 of every row then also writes a preview of x0
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
                 on the run's device. On a CPU equal rows of a model are noticed: they read the
                 prompt once, in a graph of their own
        check    wait for the device at the end, and raise InputError for NaN or infinity, naming
                 row, model and samples. Without it nothing waits at all

        Raises InputError for what does not fit together, CaptureError for what cannot be captured.
        """
        program, inputs = self.request(
            table, cond, noise, shape=shape, uncond=uncond, by_row=by_row, keep_x0=keep_x0
        )
        site = self.site or Site.of(cond.context.device)
        outcome = Outcome(*site.run(program, inputs))
        outcome = outcome._replace(finite_rows=outcome.finite_rows.all(-1))
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
        """The program of a call, and its inputs: for `Site.prepare`, and for an audit."""
        if isinstance(cast("object", cond), ByLevel) or isinstance(cast("object", uncond), ByLevel):
            raise InputError(
                "one graph of a whole run has one Conditioning: give fields that change with "
                "the row as by_row=, or run a ByLevel with headstart.sample and graph runners"
            )
        adapters = {name: adapters_of(n, cond) for name, n in self.denoisers.items()}
        body = TrajectoryBody(
            self.denoisers, self.codec, self.codec_dtype, self.preview, table, tuple(shape),
            len(noise), uncond is not None, keep_x0, adapters, steady_models(table, by_row or {}),
        )  # fmt: skip
        return body.program(), body.inputs(cond, uncond, noise, by_row or {})


def _require_finite(outcome: Outcome, table: StepTable) -> None:
    for number, (step, finite) in enumerate(zip(table, outcome.finite_rows.cpu(), strict=True)):
        require_finite(number, step.model, finite)
    good = cast(list[bool], outcome.finite_pixels.tolist())  # pyright: ignore[reportUnknownMemberType]
    if bad := [sample for sample, is_good in enumerate(good) if not is_good]:
        raise InputError(
            f"the decoder gave NaN or infinity for sample(s) {bad}: a half-precision decoder "
            "overflowed; use float32 or bfloat16 for it"
        )
