"""The device of each part of an engine, from the option `device`.

"cuda" -> all parts
{"base": "cuda:0", "distilled": "cuda:1"} -> text with the base, the decoder with the distilled
    model: a latent is copied once, and neither device holds everything
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from headstart.errors import InputError

Device = str | Mapping[str, str]
"""A name, or one for each of the two models."""


def choose_devices(option: Device, models: Sequence[str]) -> dict[str, torch.device]:
    """Part ("text", each of `models`, "vae") -> device; one for each model if the
    option has one for each. Raises InputError for devices that are not there, or of two kinds.
    """
    if not isinstance(option, Mapping):
        return dict.fromkeys(("text", *models, "vae"), choose_device(option))
    if set(option) != set(models):
        raise InputError(
            f"device: expected one for all, or one for each of {', '.join(models)}, of which each "
            f"has a UNet of its own, got {dict(option)!r:.80}"
        )
    devices = {model: choose_device(option[model]) for model in models}
    if len({device.type for device in devices.values()}) > 1:
        raise InputError(
            f"device {dict(option)!r:.80}: both models run on one kind of device, because a runner "
            "and a dtype serve both: give two GPUs, or one device"
        )
    return {"text": devices[models[0]], **devices, "vae": devices[models[-1]]}


def first_device(option: Device) -> torch.device:
    """Where a run begins."""
    return choose_device(
        next(iter(option.values()), "auto") if isinstance(option, Mapping) else option
    )


def choose_device(name: str) -> torch.device:
    """ "auto" is a CUDA device where there is one, else the CPU. Raises InputError, also for
    torch's "meta", where nothing has a value."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("its tensors have no values")
        # Of a tensor, because "cuda" is one of the devices of that name.
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise InputError(
            f"device {name!r} cannot be used: {reason:.120}; give auto, cpu, cuda, cuda:N, "
            "mps or xpu"
        ) from error
