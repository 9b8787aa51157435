"""Warm weights: prompt in, trajectory out.

text -> table -> rows of x' = x0 + keep*(x - x0) + add*n -> latents -> pixels -> rgb
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Unpack, final

import torch

from headstart.adapters.adapters import AdapterSet
from headstart.adapters.report import AdapterReport
from headstart.adapters.strength import StrengthLike
from headstart.adapters.textual_inversion import Embeddings
from headstart.batch import MOST_SAMPLES, Batch, doubling
from headstart.conditioning.texts import Prompts, Seeds, check_clip_skip, check_style
from headstart.diversify.methods import Diversify
from headstart.engine.clock import Clock
from headstart.engine.denoising import DenoisingLoop, encode
from headstart.engine.devices import Device, first_device
from headstart.engine.execution import execute
from headstart.engine.options import SAMPLE_OPTIONS, LoadOptions, SampleOptions
from headstart.engine.pair import FilePath, Pair, load_demo, load_pair
from headstart.engine.prompts import check_lengths
from headstart.engine.request import Request, check_texts_memory, prepare
from headstart.engine.tables import compile_for
from headstart.engine.trajectory import Trajectory
from headstart.interfaces import Denoiser, LatentCodec
from headstart.keywords import check_keywords, with_known_keywords
from headstart.memory.available import Memory
from headstart.networks.assembly import Packed
from headstart.networks.casting import compute_dtype
from headstart.networks.prompt_style import PromptStyle
from headstart.networks.text import ClipText
from headstart.noise import Philox, noise_on
from headstart.plan.by_name import PlanSettings
from headstart.plan.plan import Plan
from headstart.plan.spacing import Process
from headstart.plan.table import StepTable
from headstart.run import Run
from headstart.runner.runner import RunnerName, choose_runner, open_runner
from headstart.state import State


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Engine:
    """Networks held warm. An engine has no state of a run, so threads may sample on it at once.

    weights   the networks, see `headstart.engine.pair.Pair`
    runner    how a network is called: "eager", "compiled", "graph", "replay", "openvino"; or how a
              whole run is, in `sample`, where nothing looks at its rows: "trajectory"
    reading   how prompts are read where a call does not say: see `with_reading`
    adapters  what is attached to them; a run keeps those that it began with
    """

    weights: Pair
    runner: RunnerName = "eager"
    reading: Mapping[str, Any] = field(default_factory=dict[str, Any])
    adapters: AdapterSet = field(init=False)

    def __post_init__(self) -> None:
        adapters = AdapterSet(self.weights.denoisers, self.weights.text)
        object.__setattr__(self, "adapters", adapters)

    @classmethod
    def load(
        cls,
        base: FilePath | None = None,
        distilled: FilePath | None = None,
        *,
        distilled_lora: FilePath | None = None,
        runner: RunnerName = "auto",
        **options: Unpack[LoadOptions],
    ) -> Engine:
        """Read checkpoints in any known layout.

        One text encoder and one VAE serve both networks: those of `text=` and `vae=`, else the
        base's, else the distilled's; so a distilled file with a UNet alone is enough. One of the
        two models may be left out. `headstart.engine.options.LoadOptions` has all options; of them:

        device      "auto", "cpu", "cuda", "cuda:1", or one for each model: {"base": "cuda:0",
                    "distilled": "cuda:1"}, text with the base, the decoder with the distilled model
        memory      "auto": what is free of the GPU. "8GB", or bytes: no more of it. Where weights
                    do not fit, parts of them wait in the host's memory for their turn;
                    `weights.notes` says which, and what it costs. "none": all stays on the GPU
        plan_size   the size of picture, 1536 or (height, width), that this leaves room for; by
                    default the model's own. A larger one may then be refused
        dtype       "auto": float32 on a CPU, the files' own on a GPU. "float32", "float16",
                    "bfloat16" to compute in. "stored": half-precision weights stay mapped on a
                    CPU and are widened to float32 layer by layer, to the bits of float32; chosen
                    for you where nothing larger fits in the free memory, bfloat16 before it.
                    "float8": half of float16's memory for the UNets and SDXL's large text encoder,
                    widened layer by layer; weights are rounded to 4 bits: images are near

        `distilled_lora` is a distilled model that is a LoRA (LCM, Lightning, DMD2, Hyper-SD): one
        UNet in memory is both models, with the LoRA at strength 0 on the base's rows and 1 on the
        distilled model's. `engine.adapters["distilled-lora"].strength` is the dial between them.

        Raises CheckpointError for files that are absent, damaged or do not belong together, and
        InputError for a device, dtype or runner that does not exist.
        """
        check_keywords(cls.load, options, LoadOptions.__annotations__)
        runner = choose_runner(runner, first_device(options.get("device", "auto"))).name
        engine = cls(load_pair(base, distilled, distilled_lora=distilled_lora, **options), runner)
        if distilled_lora is not None:
            engine.adapters.attach_distilled(distilled_lora)
        return engine

    @classmethod
    @with_known_keywords
    def demo(
        cls,
        *,
        device: Device = "auto",
        memory: Memory = "auto",
        dtype: str = "auto",
        vae_dtype: str = "auto",
        packed: Packed = None,
        runner: RunnerName = "auto",
        embeddings: Embeddings = (),
    ) -> Engine:
        """The bundled pair: 64 px, made for a CPU. Raises CheckpointError if a file is damaged."""
        runner = choose_runner(runner, first_device(device)).name
        pair = load_demo(
            device=device, memory=memory, dtype=dtype, vae_dtype=vae_dtype, packed=packed,
            embeddings=embeddings,
        )  # fmt: skip
        return cls(pair, runner)

    @property
    def denoisers(self) -> Mapping[str, Denoiser]:
        """ "base" and "distilled": (x_in, timestep, cond) -> F."""
        return self.weights.denoisers

    @property
    def text(self) -> ClipText:
        """What reads prompts, with the tokens of the adapters that are attached now."""
        return self.adapters.look().text_encoder or self.weights.text

    @property
    def vae(self) -> LatentCodec:
        return self.weights.vae

    @property
    def schedule(self) -> Process:
        """The noise schedule of the base, or of the one model that there is."""
        return next(iter(self.weights.schedules.values()))

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def __repr__(self) -> str:
        pair = self.weights
        return (
            f"Engine({' + '.join(pair.denoisers)}, {pair.image_size} px, preset {pair.preset!r}, "
            f"{pair.device}, {str(pair.dtype).removeprefix('torch.')}, {self.runner})"
        )

    def with_runner(self, runner: RunnerName) -> Engine:
        """The same weights and adapters, called another way; what is warm stays warm for both.

        Raises CaptureError for a runner that the device cannot have, InputError for no runner.
        """
        other = copy(self)
        object.__setattr__(other, "runner", choose_runner(runner, self.device).name)
        return other

    def with_reading(
        self, style: PromptStyle | None = None, clip_skip: int | None = None
    ) -> Engine:
        """The same weights and adapters, reading prompts this way where a call does not say.

        Raises InputError for a style or a layer that the text encoders do not have.
        """
        options = {"style": check_style(style), "clip_skip": check_clip_skip(clip_skip, self.text)}
        reading = {name: value for name, value in options.items() if value not in (None, "plain")}
        other = copy(self)
        object.__setattr__(other, "reading", reading)
        return other

    def attach(
        self,
        path: FilePath,
        strength: StrengthLike = 1.0,
        to: Sequence[str] | None = None,
        *,
        name: str | None = None,
        allow: Sequence[str] = (),
        replace: bool = False,
    ) -> AdapterReport:
        """Attach a LoRA, slider or other adapter to both models and the text encoders. Prompts know
        the learned tokens that lie in its file, at any strength, until it is detached.

        strength  a number, one for each sample, [rows][samples], or a `headstart.Strength`; set it
                  later with `engine.adapters[name].strength = ...`, or give sample(adapters=...)
        to        the models it acts on; None: all that the engine has. The text serves all of them,
                  so an adapter of the text alone is attached to all
        name      by which plans and runs name it; None: the file's, without its suffix
        allow     modules and keys that may find no place, `*` and `?` for any text
        replace   swap the adapter of that name. One of no larger rank on the same layers is copied
                  into the buffers that are there, so captured graphs stay valid

        Raises AdapterError for a file that is not an adapter or does not fit, listing what does
        not; then nothing has been changed. InputError for a strength that the form cannot have.
        """
        return self.adapters.attach(path, strength, to=to, name=name, allow=allow, replace=replace)

    def detach(self, name: str) -> None:
        """Take an adapter out; with the last one the outputs are to the bit what they were."""
        self.adapters.detach(name)

    def compile(
        self, plan: str | Plan | StepTable = "hybrid", **settings: Unpack[PlanSettings]
    ) -> StepTable:
        """The table a run of `plan` would follow. See `headstart.plan.request.PlanSettings`.

        plan   a mode ("hybrid", "base", "distilled", "skip-first", "replace-final"), a preset's
               name for its hybrid, a Plan, or a compiled table
        A plan given by name for a model that states its step count has that many steps. Warns
        (UserWarning) where the plan is not what a model was trained for, as far as its file tells.
        Raises PlanError, also for a model that this engine has no network for.
        """
        check_keywords(self.compile, settings, PlanSettings.__annotations__)
        return compile_for(self.weights, plan, settings)

    def sample(
        self,
        prompts: Prompts = None,
        *,
        plan: str | Plan | StepTable = "hybrid",
        seeds: Seeds = 0,
        keep_x0: bool = False,
        batch: int | Sequence[int] | None = None,
        diversify: Diversify = (),
        on_step: Callable[[State], object] | None = None,
        **options: Unpack[SampleOptions],
    ) -> Trajectory:
        """Sample and decode.

        prompts, seeds  one prompt with S seeds is S images, P prompts with one seed are P images
                        that share it, P prompts with P seeds are pairs. A seed is an image: the
                        same in any batch up to the networks' rounding, its noise to the bit. An
                        empty prompt samples without text.
                        `a cat -> a dog below sigma 3`, or `at the hand-off`: another text from the
                        row on that starts at this level or below it; `<lora:NAME:0.8>`: an attached
                        adapter at this image's own strength; literal=True reads neither
        plan, settings  as in `compile`: a mode, a preset's name, a Plan or a table; steps=, k=, n=,
                        base_guidance=, distilled_guidance=, preset= belong to a plan given by name
        keep_x0         keep what every row predicted, [S, B, C, h, w]
        batch           samples in a UNet at once; None: as many as memory holds. (8, 2, 1) says too
                        how many in the decoder, and in how many bands of rows each is decoded
        diversify       other ways to variety, "cads:0.1" or ["pink:1", "select:4"], in this order;
                        `headstart.diversify.methods` has them all. Some act across the images of
                        each prompt of the call; an image does not depend on the other prompts
        on_step         called with each State, such as a `headstart.Preview`; raise in it to
                        cancel. Where all rows are one launch (runner="trajectory") its method
                        `rows` gets their number; without that method the run goes row by row
        options         negative=, size=, adapters=, style=, clip_skip=, second=, cond=, noise= and
                        more: `headstart.engine.options.SampleOptions` has them all

        Raises PlanError, or InputError for a request that cannot be served: both before anything
        is allocated. InputError also for a network that gives NaN or infinity.
        """
        clock = Clock(self.device)
        if check := getattr(on_step, "check_space", None):  # a preview's decoder has a family too
            check(self.weights.lineage)
        request = self._prepared(
            self.sample, prompts, options, plan=plan, seeds=seeds, batch=batch, diversify=diversify,
            keep_x0=keep_x0,
        )  # fmt: skip
        picture = getattr(on_step, "picture", None)
        loop = DenoisingLoop(self.weights, self.runner, request, clock, picture)
        return execute(loop, keep_x0=keep_x0, on_step=on_step)

    def iterate(
        self,
        prompts: Prompts = None,
        *,
        plan: str | Plan | StepTable = "hybrid",
        seeds: Seeds = 0,
        batch: int | Sequence[int] | None = None,
        diversify: Diversify = (),
        resume: State | None = None,
        **options: Unpack[SampleOptions],
    ) -> Iterator[State]:
        """The same run as a generator of State, one a row; to stop iterating is to cancel.

        resume   a State of these prompts and seeds: goes on with the row after it, to the bits of
                 the run that made it where nothing is changed. Its x is an ordinary tensor, and
                 the plan, the prompts and the seeds of what follows may be others

        The request is checked at once, the text encoded and networks run as it is iterated.
        """
        request = self._prepared(
            self.iterate, prompts, options, plan=plan, seeds=seeds, batch=batch,
            diversify=diversify, resume=resume,
        )  # fmt: skip
        return DenoisingLoop(self.weights, self.runner, request, Clock(self.device)).states(resume)

    def begin(
        self,
        prompts: Prompts = None,
        *,
        plan: str | Plan | StepTable = "hybrid",
        seeds: Seeds = 0,
        **options: Unpack[SampleOptions],
    ) -> Run:
        """The same run without its networks, for `batch`."""
        request = self._prepared(self.begin, prompts, options, plan=plan, seeds=seeds)
        cond, uncond = encode(self.weights, request)
        dtypes = {model: compute_dtype(network) for model, network in self.denoisers.items()}
        noise = Philox.shared(request.images.seeds) if request.noise is None else request.noise
        return Run(
            request.table, cond, noise_on(self.device, noise), uncond=uncond, shape=request.latent,
            strengths=request.strengths, dtypes=dtypes,
        )  # fmt: skip

    def _prepared(
        self, method: Callable[..., object], prompts: Prompts, options: SampleOptions, **call: Any
    ) -> Request:
        """The request of a method, with the engine's own `reading` where the options have none."""
        check_keywords(method, set(options) - {"diversify"}, SAMPLE_OPTIONS)  # see `prepare`
        now = self.adapters.now()
        request = prepare(self.weights, now, prompts, options=options, reading=self.reading, **call)
        tokens = check_lengths(self.weights.text, request)
        check_texts_memory(self.weights, request, tokens)
        return replace(request, tokens=tokens)

    def batch(self, *, most: int = MOST_SAMPLES) -> Batch:
        """Runs of `begin` that share calls of the networks, made as `runner` says."""
        runners = {
            model: self.weights.residency.runner(open_runner(self.runner, network), model)
            for model, network in self.denoisers.items()
        }
        sizes = () if self.runner == "eager" else (*doubling(most),)  # one graph a shape
        return Batch(runners, most=most, buckets=sizes)
