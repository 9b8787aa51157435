"""Unknown keyword arguments: the valid names, the nearest one, and what diffusers' names are here.

Engine.load() has no keyword argument 'torch_dtype': give dtype=, by name, such as "bfloat16"
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_SIZE = "give size=(height, width)"
_NOISE = "a run begins with noise, and there is no image-to-image: give noise= for its start"
_FILES = "files are local here: give the path of one, or of a diffusers folder"
DIFFUSERS: Mapping[str, str] = {
    "num_inference_steps": "give steps=",
    "guidance_scale": "give base_guidance= and distilled_guidance=, where 1 is no guidance",
    "negative_prompt": "give negative=",
    "prompt": 'it is the first argument: engine.sample("a fox")',
    "prompt_2": "give second=",
    "negative_prompt_2": "give negative_second=",
    "generator": "give seeds=, whole numbers, one an image",
    "num_images_per_prompt": "give one seed an image, such as seeds=range(4)",
    "height": _SIZE,
    "width": _SIZE,
    "crops_coords_top_left": "give crop=(top, left)",
    "eta": "give plan=, a headstart.Plan whose legs have eta=",
    "denoising_end": "give handoff=, a noise level, or plan=",
    "denoising_start": "give handoff=, a noise level, or plan=",
    "latents": "give noise=, unit normals [B, C, h, w]",
    "prompt_embeds": "give cond=, a headstart.Conditioning",
    "pooled_prompt_embeds": "give cond=, a headstart.Conditioning with pooled=",
    "negative_prompt_embeds": "give uncond=, a headstart.Conditioning",
    "negative_pooled_prompt_embeds": "give uncond=, a headstart.Conditioning with pooled=",
    "image": _NOISE,
    "strength": _NOISE,
    "mask_image": _NOISE,
    "ip_adapter_image": "adapters that read images are not known here",
    "cross_attention_kwargs": "give adapters={name: strength}, after engine.attach(path)",
    "output_type": "a Trajectory has rgb and latents: leave it out",
    "return_dict": "a Trajectory is what comes back: leave it out",
    "callback": "give on_step=, called with each State",
    "callback_on_step_end": "give on_step=, called with each State",
    "torch_dtype": 'give dtype=, by name, such as "bfloat16"',
    "device_map": 'give device=, one or {"base": ..., "distilled": ...}, and memory=',
    "unet": "give base= and distilled=",
    "text_encoder": "give text=",
    "text_encoder_2": "give text=, a folder with both text encoders",
    "scheduler": "give plan= to sample: a plan holds the noise levels and update rules",
    "safety_checker": "there is none: leave it out",
    "variant": _FILES,
    "subfolder": _FILES,
    "revision": _FILES,
    "cache_dir": _FILES,
    "local_files_only": _FILES,
    "use_safetensors": "give .safetensors files; `headstart convert` makes them of pickles",
}
"""Name in diffusers -> what to do here."""


def check_keywords(
    function: Callable[..., object],
    supplied: Iterable[str],
    options: Collection[str] = (),
) -> None:
    """Raise TypeError for a keyword argument that is neither a parameter of `function` nor one of
    `options`."""
    for name in supplied:
        if name not in options and name not in _parameters(function):
            _refuse(function, name, [*_parameters(function), *options])


def with_known_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, whose TypeError for an unknown keyword argument helps."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_keywords(function, kwargs)
        return function(*args, **kwargs)

    return call


def _parameters(function: Callable[..., object]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _refuse(function: Callable[..., Any], name: str, valid: list[str]) -> NoReturn:
    from difflib import get_close_matches  # seldom needed

    names = get_close_matches(name, valid, 1)
    guess = f"did you mean {names[0]}=?" if names else "it is not known here"
    hint = DIFFUSERS.get(name) or guess
    raise TypeError(
        f"{function.__qualname__}() has no keyword argument {name!r}: {hint}. It knows "
        f"{', '.join(sorted(set(valid) - {'self', 'cls'}))}"
    )
