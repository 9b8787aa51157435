"""Warm weights: prompt in, trajectory out.

text -> table -> rows of x' = x0 + keep*(x - x0) + add*n -> latents -> pixels -> rgb
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex, Unpack, final

import torch
from torch import Tensor

from headstart import record as recording
from headstart.batch import Chunked, SharedNoise
from headstart.clock import Clock
from headstart.errors import InputError, PlanError
from headstart.interfaces import Conditioning, Denoiser, LatentCodec
from headstart.memory import Shape, plan_chunk
from headstart.pair import FilePath, Pair, load_demo, load_pair
from headstart.plan import Plan
from headstart.request import PlanSettings, check_size, named_plan, pair_up
from headstart.runner import EagerRunner, RunnerName, choose_runner
from headstart.sampler import State, sample
from headstart.schedule import NoiseSchedule
from headstart.table import StepTable
from headstart.text import ClipText
from headstart.trajectory import Trajectory
from headstart_kernels import decode_u8

Prompts = str | Sequence[str]
Seeds = SupportsIndex | Sequence[SupportsIndex]
Size = int | tuple[int, int] | None


class _Run(NamedTuple):
    """One checked request; nothing has been allocated for it."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative: str
    size: tuple[int, int]
    table: StepTable
    chunk: int
    latent: tuple[int, int, int]


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Engine:
    """Networks held warm. An engine has no state of a run, so threads may sample on it at once.

    weights   the networks, see `headstart.pair.Pair`
    runner    how a network is called: "eager"
    """

    weights: Pair
    runner: str = "eager"

    @classmethod
    def load(
        cls,
        base: FilePath | None = None,
        distilled: FilePath | None = None,
        *,
        vae: FilePath | None = None,
        text: FilePath | None = None,
        tokenizer: FilePath | None = None,
        preview: FilePath | None = None,
        preset: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        runner: RunnerName = "auto",
    ) -> Engine:
        """Read checkpoints in any known layout.

        One text encoder and one VAE serve both networks: those of `text` and `vae`, else the
        base's, else the distilled's; so a distilled file with a UNet alone is enough. One of the
        two models may be left out. `tokenizer` is for files that hold none, as LDM single files
        do. `preset` names the pair for plans given by name; the bundled pair says it itself. dtype
        "auto" is float32 on a CPU and the files' own on a GPU.

        Raises CheckpointError for files that are absent, damaged or do not belong together, and
        InputError for a device, dtype or runner that does not exist.
        """
        chosen = choose_runner(runner).name
        pair = load_pair(
            base,
            distilled,
            vae=vae,
            text=text,
            tokenizer=tokenizer,
            preview=preview,
            preset=preset,
            device=device,
            dtype=dtype,
        )
        return cls(pair, chosen)

    @classmethod
    def demo(
        cls, *, device: str = "auto", dtype: str = "auto", runner: RunnerName = "auto"
    ) -> Engine:
        """The bundled pair: 64 px, made for a CPU. Raises CheckpointError if a file is damaged."""
        chosen = choose_runner(runner).name
        return cls(load_demo(device=device, dtype=dtype), chosen)

    @property
    def denoisers(self) -> Mapping[str, Denoiser]:
        """ "base" and "distilled": (x_in, timestep, cond) -> F."""
        return self.weights.denoisers

    @property
    def text(self) -> ClipText:
        return self.weights.text

    @property
    def vae(self) -> LatentCodec:
        return self.weights.vae

    @property
    def schedule(self) -> NoiseSchedule:
        return self.weights.schedule

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def __repr__(self) -> str:
        pair = self.weights
        return (
            f"Engine({' + '.join(pair.denoisers)}, {pair.image_size} px, preset {pair.preset!r}, "
            f"{pair.device}, {str(pair.dtype).removeprefix('torch.')}, {self.runner})"
        )

    def compile(
        self, plan: str | Plan | StepTable = "hybrid", **settings: Unpack[PlanSettings]
    ) -> StepTable:
        """The table a run of `plan` would follow. See `headstart.request.PlanSettings`.

        plan   a mode ("hybrid", "base", "distilled", "skip-first", "replace-final"), a preset's
               name for its hybrid, a Plan, or a compiled table
        Raises PlanError, also for a model that this engine has no network for.
        """
        if not isinstance(plan, str) and any(value is not None for value in settings.values()):
            raise PlanError(
                f"{', '.join(settings)} belong to a plan given by name; a {type(plan).__name__} "
                "states its own"
            )
        if isinstance(plan, str):
            plan = named_plan(plan, settings, self.weights.preset)
        steps = plan.steps if isinstance(plan, StepTable) else plan.legs
        missing = sorted({step.model for step in steps} - set(self.denoisers))
        if missing:
            raise PlanError(
                f"plan {plan.name!r} runs {', '.join(map(repr, missing))}, and this engine has "
                f"{', '.join(map(repr, self.denoisers))}: load that model too, or choose a plan "
                "without it"
            )
        if isinstance(plan, Plan):
            return plan.compile(self.schedule, prediction=self.weights.predictions)
        self._check_table(plan)
        return plan

    def sample(
        self,
        prompts: Prompts,
        *,
        plan: str | Plan | StepTable = "hybrid",
        seeds: Seeds = 0,
        negative: str = "",
        size: Size = None,
        keep_x0: bool = False,
        batch: int | None = None,
        on_step: Callable[[State], object] | None = None,
        **settings: Unpack[PlanSettings],
    ) -> Trajectory:
        """Sample and decode.

        prompts, seeds  one prompt with S seeds is S images, P prompts with one seed are P images
                        that share it, P prompts with P seeds are pairs. A seed is an image: the
                        same in any batch up to the networks' rounding, its noise to the bit. An
                        empty prompt samples without text
        plan, settings  as in `compile`: a mode, a preset's name, a Plan or a table; steps=, k=, n=,
                        base_guidance=, distilled_guidance=, preset= belong to a plan given by name
        negative        what guidance moves away from; only for plans with guidance other than 1
        size            pixels, a number or (height, width); None: the model's own
        keep_x0         keep what every row predicted, [S, B, C, h, w]
        batch           samples in a network at once; None: as many as memory holds
        on_step         called with each State as it is there, such as a `headstart.Preview`; raise
                        in it to cancel

        Raises PlanError, or InputError for a request that cannot be served: both before anything
        is allocated. InputError also for a network that gives NaN or infinity.
        """
        clock = Clock(self.device)
        run = self._prepare(prompts, plan, seeds, negative, size, batch, settings, keep_x0)
        kept: list[Tensor] = []
        state: State | None = None
        for state in self._states(run, clock):
            if keep_x0:
                kept.append(state.x0)
            if on_step is not None:
                on_step(state)
        assert state is not None
        with clock("decode"):
            rgb = self._decode(state.x, run)
        return Trajectory(
            rgb=rgb,
            latents=state.x,
            x0=torch.stack(kept) if keep_x0 else None,
            table=run.table,
            latency_ms=clock.totals(("text", "base", "distilled", "decode")),
            prompts=run.prompts,
            seeds=run.seeds,
            negative=run.negative,
            size=run.size,
            chunk=run.chunk,
            lineage=self.weights.lineage,
            files=self.weights.files,
            machine=recording.machine(self.device, self.weights.dtype, self.runner),
        )

    def iterate(
        self,
        prompts: Prompts,
        *,
        plan: str | Plan | StepTable = "hybrid",
        seeds: Seeds = 0,
        negative: str = "",
        size: Size = None,
        batch: int | None = None,
        resume: State | None = None,
        **settings: Unpack[PlanSettings],
    ) -> Iterator[State]:
        """The same run as a generator of State, one a row; to stop iterating is to cancel.

        resume   a State of these prompts and seeds: goes on with the row after it, to the bits of
                 the run that made it where nothing is changed. Its x is an ordinary tensor, and
                 the plan, the prompts and the seeds of what follows may be others

        The request is checked at once, the text encoded and networks run as it is iterated.
        """
        run = self._prepare(prompts, plan, seeds, negative, size, batch, settings)
        if resume is not None:
            _check_resume(resume, run)
        return self._states(run, Clock(self.device), resume)

    def _check_table(self, table: StepTable) -> None:
        if table.schedule != self.schedule.fingerprint():
            raise PlanError(
                f"the table was compiled for noise schedule {table.schedule!r}, these weights have "
                f"{self.schedule.fingerprint()!r}: compile its plan with engine.compile(plan)"
            )
        if table.first or table[-1].sigma_next:
            raise PlanError(
                "an engine runs whole tables, from the first row down to sigma 0; run a part with "
                "headstart.sample"
            )

    def _prepare(
        self,
        prompts: Prompts,
        plan: str | Plan | StepTable,
        seeds: Seeds,
        negative: str,
        size: Size,
        batch: int | None,
        settings: PlanSettings,
        keep_x0: bool = False,
    ) -> _Run:
        texts, numbers = pair_up(prompts, seeds)
        table = self.compile(plan, **settings)
        pixels = check_size(size, self.weights.image_size, max(8, self.weights.downscale))
        guided = any(step.guidance != 1.0 for step in table)
        if negative and not guided:
            raise InputError(
                f"the negative prompt would do nothing: no row of plan {table.name!r} has guidance "
                "other than 1; leave it out, or give base_guidance= or distilled_guidance="
            )
        if batch is not None and batch < 1:
            raise InputError(f"batch must be at least 1 sample, got {batch}")
        latent = (
            self.weights.latent_channels,
            pixels[0] // self.weights.downscale,
            pixels[1] // self.weights.downscale,
        )
        shape = Shape(len(texts), latent[0], latent[1:], pixels, len(table) if keep_x0 else 0)
        chunk = min(batch or len(texts), len(texts))
        if self.weights.footprint is not None:
            chunk = plan_chunk(shape, self.weights.footprint, 1 + guided, self.device, batch)
        return _Run(texts, numbers, negative, pixels, table, chunk, latent)

    def _states(self, run: _Run, clock: Clock, resume: State | None = None) -> Iterator[State]:
        guided = any(step.guidance != 1.0 for step in run.table)
        with clock("text"):
            cond, uncond = self._encode(run, guided)
        rows = run.chunk * (1 + guided)
        denoisers = {
            model: Chunked(EagerRunner(self.denoisers[model]), rows) for model in run.table.models
        }
        states = sample(
            run.table, denoisers, cond, SharedNoise.of(run.seeds), uncond=uncond,
            shape=run.latent, resume=resume,
        )  # fmt: skip
        for step in run.table.steps[0 if resume is None else resume.step + 1 :]:
            with clock(step.model):
                state = next(states)
            yield state

    def _encode(self, run: _Run, guided: bool) -> tuple[Conditioning, Conditioning | None]:
        """Every distinct prompt once; its row is repeated for each of its images."""
        distinct = list(dict.fromkeys(run.prompts))
        rows = torch.tensor([distinct.index(p) for p in run.prompts], device=self.device)
        if not guided:
            return self.text.encode(distinct, size=run.size)[rows], None
        cond, uncond = self.text.encode(distinct, run.negative, size=run.size)
        return cond[rows], uncond[rows]

    def _decode(self, latents: Tensor, run: _Run) -> Tensor:
        latents = latents.to(self.weights.vae_dtype)
        parts: list[Tensor] = []
        finite: list[Tensor] = []
        with torch.inference_mode():
            for begin in range(0, len(latents), run.chunk):
                pixels = self.vae.decode(latents[begin : begin + run.chunk])
                finite.append(torch.isfinite(pixels).flatten(1).all(1))
                parts.append(decode_u8(pixels, check=False))
            good = torch.cat(finite).cpu().numpy()
        if not good.all():
            bad = [seed for seed, fine in zip(run.seeds, good, strict=True) if not fine]
            raise InputError(
                f"the decoder gave NaN or infinity for seed(s) {bad}: a half-precision decoder "
                "overflowed; load with dtype='float32' or 'bfloat16'"
            )
        return torch.cat(parts)


def _check_resume(state: State, run: _Run) -> None:
    expected = [len(run.seeds), *run.latent]
    if not 0 <= state.step < len(run.table) - 1:
        raise InputError(
            f"resume is a State of row {state.step}: expected one of row 0 to {len(run.table) - 2} "
            f"of plan {run.table.name!r}, so that a row is left to run"
        )
    if list(state.x.shape) != expected or list(state.x0.shape) != expected:
        raise InputError(
            f"resume: expected x and x0 {expected} for these prompts, seeds and size, got "
            f"{list(state.x.shape)} and {list(state.x0.shape)}: a State goes with its own batch"
        )


def replay(
    record: Mapping[str, Any],
    engine: Engine,
    *,
    on_step: Callable[[State], object] | None = None,
) -> Trajectory:
    """Run a record again and compare SHA-256 of every latent and image.

    Raises InputError for a record of other weights, and for a result that is not equal, with the
    first image that differs and what differs of the machine. A network's rounding depends on
    device, versions, thread count and batch, so only the same of these promise the same bits.
    """
    recorded = recording.parse(record)
    recording.check_weights(recorded, recording.weigh(engine.weights.files))
    again = engine.sample(
        recorded.prompts,
        plan=recorded.table,
        seeds=recorded.seeds,
        negative=recorded.negative,
        size=recorded.size,
        batch=recorded.chunk,
        on_step=on_step,
    )
    difference = recording.first_difference(recorded, again.recorded())
    if difference:
        raise InputError(f"the replay is not equal to the record: {difference}")
    return again
