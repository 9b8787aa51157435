"""Sampling: call the network of each row, then make the row's step.

x0 = c_skip*x + c_out*F      x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from headstart.by_level import ByLevel, cond_parts
from headstart.call import Call
from headstart.errors import InputError
from headstart.finite import Check
from headstart.interfaces import Conditioning, Denoiser, NoiseSource, X0Denoiser
from headstart.plan.table import Step, StepTable
from headstart.prompt_cache import cached_prompt
from headstart.run import Run
from headstart.state import State
from headstart_kernels import LinearMap

__all__ = ["State", "sample"]


def sample(
    table: StepTable,
    denoisers: Mapping[str, Denoiser],
    cond: Conditioning | ByLevel,
    noise: NoiseSource,
    *,
    uncond: Conditioning | ByLevel | None = None,
    resume: State | None = None,
    shape: Sequence[int] | None = None,
    before_row: Callable[[Step], None] | None = None,
    strengths: Tensor | None = None,
    check: Check = "auto",
    picture: LinearMap | None = None,
) -> Iterator[State]:
    """Run a table and yield a State after each row. To cancel, stop iterating.

    denoisers   model -> network, for every model of the rows left to run: an X0Denoiser, or any
                callable (x_in, timestep, cond) -> F. x_in is c_in*x in the dtype of its `dtype`
                attribute, else of cond.context; timestep [B] is int64 where the row's is whole,
                else float32
    cond        for B samples, or for one that all share; the run is on its device. A ByLevel
                changes it with the noise level. Both hold for uncond too
    noise       B unit normals for the start and for each row that adds noise
    uncond      needed by rows with guidance other than 1, which make ONE call on the 2B samples
                (uncond, cond); guidance 1 is conditional only, one pass
    resume      a State of this plan: the run goes on with the next row, to the same bits as the
                run that the State is from, on any part of the table. State(first - 1, x, x) starts
                from a latent
    shape       of one latent, without the batch: (C, h, w), video (C, T, h, w), packed tokens
                (L, C), or any other; not needed with `resume` or with `Given` noise
    before_row  called with each row before its network: for progress, or to set the strengths of
                adapters in another engine
    strengths   [rows of the table, B, A] float32: what each row sets as `Conditioning.strengths`,
                of the A adapters that the networks have (`Engine.adapters.strengths`)
    check       a NaN or an infinity in x0 raises InputError with step, model and samples: after
                "each" row, after the "last" row (with the first bad one), or "never". "auto" is
                "each" on a CPU and "last" elsewhere, where each check waits for the device
    picture     draw x0 by this map into `State.rgb`, on a GPU in the pass that computes it; only
                for latents [B, C, h, w]

    Raises InputError for anything missing, before the first network call. Generators share
    nothing, so runs may be interleaved. To steer, resume from a changed State, or write to its x
    with torch's own operators before the next row. A write through numpy is not noticed: the next
    row's network would still get the old x.
    """
    for part in cond_parts(cond):
        if not isinstance(part, Conditioning):
            raise InputError(
                f"cond: expected a headstart.Conditioning, got {type(part).__name__}; "
                "headstart.Run passes on whatever a network of yours reads"
            )
    _check_models(table, resume, denoisers, before_row is None and strengths is None)
    run = Run(
        table,
        cond,
        noise,
        uncond=uncond,
        resume=resume,
        shape=shape,
        strengths=strengths,
        dtypes=_Dtypes(denoisers),
        check=check,
        picture=picture,
    )
    return _loop(run, denoisers, before_row)


def _loop(
    run: Run, denoisers: Mapping[str, Denoiser], before_row: Callable[[Step], None] | None
) -> Iterator[State]:
    no_grad, unchanged = torch.no_grad(), nullcontext()
    while True:
        if before_row is not None and run.row is not None:
            before_row(run.row)
        call = run.call
        if call is None:
            return
        network = denoisers[call.model]
        with no_grad if torch.is_grad_enabled() else unchanged:
            if isinstance(network, X0Denoiser):
                f = _from_x0(run, network, call)
            else:
                f = network(call.x_in, call.timestep, cached_prompt(network, call.cond))
            del call  # the step writes the next x_in into its memory
            state = run.advance(f)
        yield state


def _from_x0(run: Run, network: X0Denoiser, call: Call) -> Tensor:
    x = run.state.x
    if len(call.x_in) == 2 * len(x):
        x = torch.cat((x, x))
    sigma = torch.full((len(x),), call.sigma, dtype=torch.float32, device=x.device)
    return run.output_of(network.denoise(x, sigma, call.cond))


class _Dtypes(Mapping[str, torch.dtype]):
    """Model -> the `dtype` of its network, if it has one; it may change during a run."""

    def __init__(self, denoisers: Mapping[str, Denoiser]) -> None:
        self._denoisers = denoisers

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self._denoisers[key], "dtype", default)

    def __getitem__(self, key: str) -> torch.dtype:
        return self._denoisers[key].dtype  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownMemberType]

    def __iter__(self) -> Iterator[str]:
        return (model for model, network in self._denoisers.items() if hasattr(network, "dtype"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _check_models(
    table: StepTable, resume: State | None, denoisers: Mapping[str, Denoiser], no_strengths: bool
) -> None:
    """Raise InputError unless the rows left to run have their networks and strengths."""
    start = 0 if resume is None else max(0, resume.step + 1 - table.first)
    steps = table.steps[start:]
    if unknown := sorted({step.model for step in steps} - set(denoisers)):
        raise InputError(
            f"the plan names model(s) {unknown}, but denoisers has {sorted(denoisers)}: add the "
            "missing network, or give the plan's legs the names it has"
        )
    for name in dict.fromkeys(step.model for step in steps):
        network = type(denoisers[name])
        if network.__module__.startswith(("diffusers.models.", "diffusers.pipelines.")):
            raise InputError(
                f"denoisers[{name!r}] is diffusers' {network.__name__}, not called as "
                "(x_in, timestep, cond): give headstart.bridges.diffusers.denoiser(pipe.unet) "
                "(or pipe.transformer)"
            )
    adapters = sorted({name for step in steps for name, _ in step.adapters})
    if adapters and no_strengths:
        raise InputError(
            f"rows of this plan set adapter(s) {adapters}: sample through an Engine that has them "
            "attached, or give strengths=, or before_row=, which sets those of `step.adapters`"
        )
