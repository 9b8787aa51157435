"""Which device each part of an engine is on, out of what was typed.

"cuda" -> all parts
{"base": "cuda:0", "distilled": "cuda:1"} -> text with the base, the decoder with the distilled
    model: a latent goes over once, and neither device has all of the rest
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from headstart.errors import InputError
from headstart.interfaces import NoiseSource

Device = str | Mapping[str, str]
"""A name, or one for each of the two models."""


def choose_devices(given: Device, models: Sequence[str]) -> dict[str, torch.device]:
    """Part ("text", each of `models`, "vae") -> device; a device of its own for each model if so
    given. Raises InputError for devices that are not there, or of two kinds.
    """
    if isinstance(given, str):
        return dict.fromkeys(("text", *models, "vae"), choose_device(given))
    if set(given) != set(models):
        raise InputError(
            f"device: expected one for all, or one for each of {', '.join(models)}, got "
            f"{dict(given)!r:.80}"
        )
    found = {model: choose_device(given[model]) for model in models}
    if len({place.type for place in found.values()}) > 1:
        raise InputError(
            f"device {dict(given)!r:.80}: both models run on one kind of device, because a runner "
            "and a dtype serve both: give two GPUs, or one device"
        )
    return {"text": found[models[0]], **found, "vae": found[models[-1]]}


def first_device(given: Device) -> torch.device:
    """Where a run begins."""
    return choose_device(given if isinstance(given, str) else next(iter(given.values()), "auto"))


def choose_device(name: str) -> torch.device:
    """ "auto" is a CUDA device where there is one, else the CPU. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Of a tensor, because "cuda" is one of the devices of that name.
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device {name!r} cannot be used: {reason}; give auto, cpu, cuda, cuda:N, mps or xpu"
        ) from error


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: Apple's (`mps`) does not ("the MPS framework doesn't
    support float64", torch's own error), Intel's (`xpu`) in some."""
    if device.type == "xpu":
        properties = cast("object", torch.xpu.get_device_properties(device))  # pyright: ignore
        return bool(getattr(properties, "has_fp64", False))
    return device.type != "mps"


class OnHost(NamedTuple):
    """Noise that is drawn on the host, to the same bits: Philox's normals go through float64, which
    nothing else of a run does. 256 KB a picture of SDXL and row."""

    source: NoiseSource

    def __len__(self) -> int:
        return len(self.source)

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.source.initial(shape, _HOST).to(device)

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.source.step(index, shape, _HOST).to(device)


def noise_on(device: torch.device, source: NoiseSource) -> NoiseSource:
    """The noise of a run on a device."""
    return source if has_float64(device) else OnHost(source)


_HOST = torch.device("cpu")
