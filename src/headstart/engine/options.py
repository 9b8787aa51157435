"""The keyword options of an engine: of its files, and of a run."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypedDict

from headstart.adapters.snapshot import AdapterOptions
from headstart.adapters.textual_inversion import Embeddings
from headstart.conditioning.inputs import Cond, Noise
from headstart.conditioning.texts import Size, Texts
from headstart.engine.devices import Device
from headstart.engine.models import FilePath, Predictions
from headstart.memory.available import Memory
from headstart.networks.assembly import Packed
from headstart.networks.prompt_style import Exclamation, PromptStyle
from headstart.plan.by_name import PlanSettings


class LoadOptions(TypedDict, total=False):
    """Of `Engine.load`, which describes `device`, `memory`, `plan_size` and `dtype`. All have a
    default.

    vae, text, preview  files of their own; preview: a small decoder
    tokenizer   for files that hold none, as LDM single files do. By default CLIP's own
    preset      names the pair for plans given by name. By default what the distilled file
                says, or what its name suggests; see `weights.notes`
    prediction  "eps", "v" or "x0", for both or as {"base": ..., "distilled": ...}. By default
                what the file says, what its name suggests, what its family predicts
    embedded_guidance  what an LCM imitates, 8.0 by default; only for networks that read it
    head_dim, text_head_dim  attention widths of scaled-down models whose files do not say
    ema         True: the averaged weights (EMA) of every model that has them beside its own;
                False: those that were trained. By default each file's main ones
    embeddings  files of learned tokens (textual inversion), or (file, token)
    exclamation what "!" becomes with SD 2 and SDXL: "openclip", as their text encoders were
                trained, or "transformers", as diffusers' pictures have it
    allow       tensors of the files that may be left aside, `*` and `?` for any text
    packed      lay weights out for a CPU's products when they are first used, which takes
                seconds once and a third or more off every pass. None: full-size models, and
                every decoder
    vae_dtype   of the decoder. "auto": bfloat16 on a GPU that computes in it, else float32; on
                a CPU what the UNets have, float32 for their float16
    """

    vae: FilePath | None
    text: FilePath | None
    tokenizer: FilePath | None
    preview: FilePath | None
    preset: str | None
    prediction: Predictions | None
    embedded_guidance: float | None
    ema: bool | None
    head_dim: int | None
    text_head_dim: int | None
    embeddings: Embeddings
    exclamation: Exclamation
    allow: Collection[str]
    device: Device
    dtype: str
    packed: Packed
    memory: Memory
    plan_size: int | tuple[int, int] | None
    vae_dtype: str


class SampleOptions(PlanSettings, total=False):
    """Of `sample`, `iterate` and `begin`. All have a default, and None means the default; for those
    of a plan given by name see `headstart.plan.by_name.PlanSettings`.

    negative        what guidance moves away from: one text for all, or one an image. None: no
                    negative prompt, which is zeros where the family was trained so (SDXL) and the
                    encoding of "" elsewhere; "": encoded. For plans with guidance other than 1, and
                    refused elsewhere
    size            pixels, a number or (height, width); None: the model's own, or the noise's
    adapters        strengths of attached adapters in this run, by name, or the names of those that
                    act; None: all as attached. Multiplied by what the plan's legs say
    style           how a prompt is read: "plain", or with weights as "a1111" or "comfyui" do
    clip_skip       the text encoders' layer that is read, counted from the last, which is 1
    second          the prompt of SDXL's second text encoder, one for all or one an image (None: the
                    prompt), and negative_second
    original_size, crop, target_size
                    SDXL's time_ids: (height, width), (top, left), (height, width); by default
                    size, (0, 0) and size
    literal         prompts are plain text: `->` and `<lora:...>` have no meaning
    cond, uncond    a Conditioning (or ByLevel of them) in place of prompts and negative, for all
                    images or one an image; prompts are then only names of the images, and may be
                    left out
    noise           unit normals [B, C, h, w] for the start, where rows that add noise draw from the
                    seeds; or a NoiseSource, such as `headstart.Given`, for all of it
    """

    negative: Texts
    size: Size
    adapters: AdapterOptions
    style: PromptStyle | None
    clip_skip: int | None
    second: Texts
    negative_second: Texts
    original_size: Size
    crop: tuple[int, int] | None
    target_size: Size
    literal: bool
    cond: Cond | None
    uncond: Cond | None
    noise: Noise | None


SAMPLE_OPTIONS = frozenset(SampleOptions.__annotations__)
RUN_OPTIONS = SAMPLE_OPTIONS - frozenset(PlanSettings.__annotations__)
