"""Unknown keyword arguments are refused with the valid names and a way to go on."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from tiny_pair import tiny_engine

import headstart as hs
from headstart.engine.options import SAMPLE_OPTIONS, LoadOptions
from headstart.keywords import DIFFUSERS

ENGINE = tiny_engine("sd15")


@pytest.mark.parametrize(
    ("call", "name", "hint"),
    [
        (ENGINE.sample, "num_inference_steps", r"give steps=\. It knows .*steps"),
        (ENGINE.sample, "image", "a run begins with noise, and there is no image-to-image"),
        (ENGINE.sample, "seed", r"did you mean seeds=\?"),
        (ENGINE.iterate, "guidance_scale", "give base_guidance= and distilled_guidance="),
        (ENGINE.begin, "generator", "give seeds=, whole numbers, one an image"),
        (ENGINE.compile, "num_inference_steps", "give steps="),
        (hs.Engine.load, "torch_dtype", "give dtype=, by name"),
        (hs.Engine.load, "distiled", r"did you mean distilled=\?"),
        (hs.Engine.demo, "scheduler", "give plan= to sample"),
        (hs.load_unet, "torch_dtype", "give dtype="),
        (hs.load_vae, "zzz", "it is not known here. It knows allow, device, dtype"),
        (hs.load_text, "subfolder", "files are local here"),
    ],
)
@pytest.mark.parametrize("value", [None, 3])
def test_an_unknown_name_is_refused_with_what_to_give_instead(
    call: Any, name: str, hint: str, value: object
) -> None:
    """Also with None, which loaders and plans once took for an option left out."""
    with pytest.raises(TypeError, match=rf"{call.__name__}\(\) has no keyword .*'{name}': {hint}"):
        call(**{name: value})


def test_a_preset_knows_diffusers_names_too() -> None:
    with pytest.raises(TypeError, match=r"preset\(\) has no keyword .*: give steps=\. It knows"):
        hs.preset("demo", num_inference_steps=4)  # type: ignore[call-arg]


def test_every_name_to_give_instead_is_a_name_here() -> None:
    functions: tuple[Any, ...] = (hs.Engine.sample, hs.Engine.load, hs.preset)
    known = {name for function in functions for name in inspect.signature(function).parameters}
    known |= SAMPLE_OPTIONS | set(LoadOptions.__annotations__)
    for hint in DIFFUSERS.values():
        words = hint.replace("(", " ").split()
        names = [word.split("=")[0] for word in words if "=" in word]
        assert set(names) <= known | {"eta", "pooled"}, hint
    assert not set(DIFFUSERS) & known - {"strength"}, "valid names need no hint"
