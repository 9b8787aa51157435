"""What a run may be asked for, besides its prompts and its plan: the options that three methods of
an engine share."""

from __future__ import annotations

from headstart.adapters.snapshot import AdapterOptions
from headstart.engine.given import Noise, Told
from headstart.engine.words import Size, Texts
from headstart.networks.prompt_style import PromptStyle
from headstart.plan.by_name import PlanSettings


class Asks(PlanSettings, total=False):
    """All have a default; None is the default too. See also `headstart.plan.by_name.PlanSettings`.

    negative        what guidance moves away from: one text for all, or one an image. None: no
                    negative prompt, which is zeros where the family was trained so (SDXL) and the
                    encoding of "" elsewhere; "": encoded. For plans with guidance other than 1, and
                    refused elsewhere
    size            pixels, a number or (height, width); None: the model's own, or the noise's
    adapters        strengths of attached adapters in this run, by name, or the names of those that
                    act; None: all as attached. Multiplied by what the plan's legs say
    style           how a prompt is read: "plain", or with weights as "a1111" or "comfyui" do
    clip_skip       the text encoders' layer that is read, counted from the last, which is 1
    second          what SDXL's second encoder reads, one for all or one an image (None: the
                    prompt), and negative_second
    original_size, crop, target_size
                    what SDXL is told of its training pictures: (height, width), (top, left),
                    (height, width); by default size, (0, 0) and size
    literal         prompts are text alone: `->` and `<lora:...>` mean nothing
    cond, uncond    a caller's own Conditioning (or ByLevel of them) in place of prompts and
                    negative, for all images or one an image; prompts are then names of the images,
                    and may be left out
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
    cond: Told | None
    uncond: Told | None
    noise: Noise | None


OWN = frozenset(Asks.__annotations__) - frozenset(PlanSettings.__annotations__)
