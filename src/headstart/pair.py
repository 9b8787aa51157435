"""The weights of an engine: a base, a distilled model, and what both share.

text, vae   from their own files, else from the base's, else from the distilled's
schedule    the base's, which the distilled model was made from
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

import headstart_weights
from headstart.checkpoint import read_family
from headstart.errors import CheckpointError, InputError
from headstart.families import Family
from headstart.interfaces import Denoiser, LatentCodec
from headstart.load import load_text, load_tiny, load_unet, load_vae
from headstart.memory import Footprint, footprint
from headstart.prediction import Prediction
from headstart.record import Files
from headstart.schedule import NoiseSchedule
from headstart.tensors import Checkpoint, PartName
from headstart.text import ClipText

FilePath = str | Path
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """Networks on their device.

    denoisers    "base" and/or "distilled"
    text, vae    serve both; preview: a small decoder, or None
    schedule     the noise schedule of both; predictions: what each network predicts
    image_size   the model's own, in pixels; downscale: pixels a latent cell
    lineage      the family whose latents these are, or None where the weights do not say
    preset       the pair's name in `headstart.preset`, or None where the weights do not say
    dtype        of the networks; vae_dtype: of the decoder
    footprint    how much memory a sample takes, or None: then it is not checked
    files        role -> (name, files) of the weights, for the record
    """

    denoisers: Mapping[str, Denoiser]
    text: ClipText
    vae: LatentCodec
    schedule: NoiseSchedule
    predictions: Mapping[str, Prediction]
    image_size: int
    downscale: int
    latent_channels: int = 4
    preview: LatentCodec | None = None
    lineage: str | None = None
    preset: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    vae_dtype: torch.dtype = torch.float32
    footprint: Footprint | None = None
    files: Mapping[str, Files] = field(default_factory=dict[str, Files])


def load_pair(
    base: FilePath | None,
    distilled: FilePath | None,
    *,
    vae: FilePath | None = None,
    text: FilePath | None = None,
    tokenizer: FilePath | None = None,
    preview: FilePath | None = None,
    preset: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Pair:
    """Read the files. Raises CheckpointError, or InputError for a device that is not there.

    One of `base` and `distilled` may be None; then plans that need it are refused. dtype "auto" is
    float32 on a CPU and each file's own on a GPU. SDXL's decoder overflows in float16, so where
    the networks are float16 it takes what its file and family allow.
    """
    paths = {role: p for role, p in (("base", base), ("distilled", distilled)) if p is not None}
    if not paths:
        raise InputError("no weights: give base=, distilled= or both, or use Engine.demo()")
    families = {role: read_family(path) for role, path in paths.items()}
    _check_same_latents(families)
    first = next(iter(families.values()))
    place, kind = choose_device(device), _choose_dtype(dtype)
    unets = {role: load_unet(path, device=place, dtype=kind) for role, path in paths.items()}
    coded = None if kind == torch.float16 else kind
    codec = load_vae(vae or _holder("vae", paths), device=place, dtype=coded)
    # Decoding 16 demo images takes 0.13 s this way and 0.20 s in the default format (2 CPU cores).
    nn.Module.to(codec, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    words = load_text(text or _holder("text", paths), device=place, dtype=kind, tokenizer=tokenizer)
    given = {"vae": vae, "text": text, "preview": preview}
    named = paths | {role: path for role, path in given.items() if path is not None}
    dtypes = [_dtype_of(module) for module in (*unets.values(), codec)]
    return Pair(
        denoisers=unets,
        text=words,
        vae=codec,
        schedule=first.schedule,
        predictions={role: family.prediction for role, family in families.items()},
        image_size=first.image_size,
        downscale=codec.params.downscale,
        latent_channels=codec.params.latent_channels,
        preview=None if preview is None else load_tiny(preview, device=place),
        lineage=first.lineage,
        preset=preset or ("demo" if first.lineage == "demo" else None),
        device=place,
        dtype=dtypes[0],
        vae_dtype=dtypes[-1],
        footprint=footprint(
            [unet.params for unet in unets.values()],
            codec.params,
            max(kind.itemsize for kind in dtypes),
        ),
        files={role: (str(path), _files(path, role)) for role, path in named.items()},
    )


def load_demo(*, device: str = "auto", dtype: str = "auto") -> Pair:
    """The bundled pair. Raises CheckpointError for a file that is missing or damaged."""
    try:
        paths = {role: headstart_weights.path(role) for role in ("base", "distilled")}
        preview = headstart_weights.path("tiny_decoder")
    except headstart_weights.WeightsError as error:
        raise CheckpointError(f"the bundled pair cannot be used: {error}") from error
    pair = load_pair(**paths, preview=preview, preset="demo", device=device, dtype=dtype)
    files = {role: (f"headstart_weights/{path.name}", (path,)) for role, path in paths.items()}
    return replace(pair, files=files)


def one_network(pair: Pair, lora: FilePath) -> Pair:
    """A pair whose distilled model is its base, to be told apart by the strength of a LoRA.

    The LoRA is named for the record; attaching it is the engine's part.
    """
    if list(pair.denoisers) != ["base"]:
        raise InputError(
            "a distilled LoRA needs the base it was made for, and takes the place of the distilled "
            "model: give base=, and distilled_lora= instead of distilled="
        )
    network, prediction = pair.denoisers["base"], pair.predictions["base"]
    return replace(
        pair,
        denoisers={"base": network, "distilled": network},
        predictions={"base": prediction, "distilled": prediction},
        files={**pair.files, "distilled_lora": (str(lora), Checkpoint.open(lora).files)},
    )


def choose_device(name: str) -> torch.device:
    """ "auto" is a CUDA device where there is one, else the CPU. Raises InputError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device {name!r} cannot be used: {reason}; give auto, cpu, cuda or cuda:N"
        ) from error
    return device


def _choose_dtype(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    if name not in DTYPES:
        raise InputError(f"dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _holder(part: PartName, paths: Mapping[str, FilePath]) -> FilePath:
    """The first of the models' files that has the part; the first of all where none has."""
    for path in paths.values():
        try:
            if part in Checkpoint.open(path, part).parts():
                return path
        except CheckpointError:  # a folder without that component
            continue
    return next(iter(paths.values()))


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _check_same_latents(families: Mapping[str, Family]) -> None:
    """Only models of one lineage and one noise schedule can hand a latent to each other."""
    if len(families) < 2:
        return
    base, distilled = families["base"], families["distilled"]
    if base.lineage != distilled.lineage:
        raise CheckpointError(
            f"the base is {base.name} and the distilled model {distilled.name}: expected two "
            "models of one family, because the latent passes from one to the other"
        )
    stated = "schedule" in distilled.declared and "schedule" in base.declared
    if stated and base.schedule.fingerprint() != distilled.schedule.fingerprint():
        raise CheckpointError(
            f"the base's noise schedule ({base.schedule!r}) is not the distilled model's "
            f"({distilled.schedule!r}): expected a model distilled from this base"
        )


def _files(path: FilePath, role: str) -> tuple[Path, ...]:
    """The files a digest identifies; of a diffusers folder, those of its UNet stand for it."""
    parts: dict[str, PartName] = {"vae": "vae", "text": "text", "preview": "tiny"}
    return Checkpoint.open(path, parts.get(role, "unet")).files
