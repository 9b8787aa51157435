"""The weights of an engine: a base, a distilled model, and what both share.

text, vae   from their own files, else from the base's, else from the distilled's
schedules   each model's own, as its file states it; where it does not, its family's
dtype       in which networks compute; on a CPU, weights in half precision may stay so. They are
            then widened layer by layer (`headstart.networks.casting`), and results are the same
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Unpack

import torch

import headstart_weights
from headstart.adapters.textual_inversion import EMBEDDING, with_tokens
from headstart.checkpoint.distillation import Guess
from headstart.checkpoint.mapped_files import headers_cached
from headstart.checkpoint.tensors import Checkpoint, PartName
from headstart.engine.devices import choose_devices
from headstart.engine.dtypes import Precision, choose_precision
from headstart.engine.models import (
    FilePath,
    check_vae,
    choose_averages,
    holder,
    one_file,
    read_headers,
)
from headstart.engine.options import LoadOptions
from headstart.engine.parts import check_channels, check_context, decoder_dtype, preview_of, vae_of
from headstart.engine.record import Files
from headstart.errors import CheckpointError, InputError
from headstart.interfaces import Conditioning, Denoiser, LatentCodec
from headstart.memory.budget import Footprint, text_values, unet_values
from headstart.memory.planning import Sources, loading_device, notes, plan_residency, settle
from headstart.memory.residency import Residency
from headstart.networks.assembly import Dtype, Packed, loading_for
from headstart.networks.casting import compute_dtype
from headstart.networks.load import load_text, load_unet
from headstart.networks.numbers import guidance_embedding
from headstart.networks.packed import is_packed
from headstart.networks.text import ClipText
from headstart.networks.tower import Tower
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae
from headstart.plan.prediction import Prediction
from headstart.plan.spacing import Process

EMBEDDED_GUIDANCE = 8.0
"""The guidance that an LCM imitates: w = 7 of its own scale. It was distilled for w in 2 .. 14
(arXiv:2310.04378, section 5.1), and its model card runs it at 8. The notebooks of arXiv:2503.10637
pass guidance 0, so w = -1, which it was not trained for."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """Networks on their device.

    denoisers    "base" and/or "distilled"
    text, vae    shared by both; preview: a small decoder, or None
    schedules    the noise schedule of each model; predictions: what each network predicts
    image_size   the model's own, in pixels; downscale: pixels of a latent cell's side
    lineage      the family whose latents these are, or None where the weights do not say
    preset       the pair's name in `headstart.preset`, or None where the weights do not say
    guesses      role -> what its file probably is, where only its name suggests it
    embedded_guidance  the guidance that an LCM imitates, and `guidance_dim`, the width of its
                 embedding; None where no network reads one
    notes        lines for a person: what was guessed or decided, and how to set it by hand
    dtype        in which networks compute; vae_dtype: the decoder; float8: whether weights are
                 stored so; packed: whether they are laid out for a CPU's products,
                 all, without tiles, or the decoder's alone
    ema, allow   the options of that name
    footprint    how much memory a sample takes, or None: then it is not checked
    device       where a run begins; residency: the device of each part, and which take turns
    files        role -> (name, files) of the weights, for the record
    """

    denoisers: Mapping[str, Denoiser]
    text: ClipText
    vae: LatentCodec
    schedules: Mapping[str, Process]
    predictions: Mapping[str, Prediction]
    image_size: int
    downscale: int
    latent_channels: int = 4
    preview: LatentCodec | None = None
    lineage: str | None = None
    preset: str | None = None
    guesses: Mapping[str, Guess] = field(default_factory=dict[str, Guess])
    embedded_guidance: float | None = None
    guidance_dim: int | None = None
    notes: tuple[str, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    vae_dtype: torch.dtype = torch.float32
    float8: bool = False
    packed: bool | Literal["direct", "decoder"] = False
    ema: bool | None = None
    allow: tuple[str, ...] = ()
    footprint: Footprint | None = None
    residency: Residency = field(default_factory=Residency)
    files: Mapping[str, Files] = field(default_factory=dict[str, Files])

    def with_guidance(self, cond: Conditioning) -> Conditioning:
        """Add the guidance that an LCM imitates; a network without `cond_proj` does not read it."""
        if self.embedded_guidance is None or self.guidance_dim is None:
            return cond
        if cond.guidance_embedding is not None:  # the caller's
            return cond
        values = torch.full((len(cond),), self.embedded_guidance, device=cond.context.device)
        return replace(cond, guidance_embedding=guidance_embedding(values, self.guidance_dim))


@headers_cached()
def load_pair(
    base: FilePath | None,
    distilled: FilePath | None,
    *,
    distilled_lora: FilePath | None = None,
    **options: Unpack[LoadOptions],
) -> Pair:
    """Read the files. Raises CheckpointError, or InputError for a device that is not there.

    With a distilled LoRA one network is both models; the engine attaches the LoRA.
    One of `base` and `distilled` may be None; then plans that need it are refused. For dtype "auto"
    see `dtypes.choose_precision` and `parts.decoder_dtype`.
    """
    roles = [r for r, path in (("base", base), ("distilled", distilled)) if path is not None]
    devices = choose_devices(options.get("device", "auto"), roles)
    allow = options.get("allow", ())
    headers = read_headers(
        *(base, distilled, distilled_lora),
        prediction=options.get("prediction"),
        preset=options.get("preset"),
        allow=allow,
    )
    models = headers.models
    paths = {role: model.path for role, model in models.items()}
    first = next(iter(models.values()))
    vae, preview = options.get("vae") or holder("vae", models), options.get("preview")
    text = options.get("text") or holder("text", models)
    check_vae(vae, first)
    ema = choose_averages(models, options.get("ema"))
    sources = Sources(paths, vae, text, ema.of, first.family, first.image_size, options)
    precision = choose_precision(
        options.get("dtype", "auto"), options.get("packed"), devices["text"], sources
    )
    dtype, packed = precision.dtype, precision.packed
    vae_dtype = decoder_dtype(options.get("vae_dtype", "auto"), dtype, devices["vae"])
    residency = plan_residency(sources, devices, options.get("memory", "auto"), dtype, vae_dtype)
    # Text first: a tokenizer that does not fit is refused before the larger networks are read.
    with loading_for(devices["text"]):
        encoders = _load_text(text, loading_device(residency, "text"), dtype, options)
    decoder = vae_of(vae, devices["vae"], vae_dtype, first.family, allow, packed)
    unets = _load_unets(sources, residency, precision, encoders)
    check_channels(vae, decoder, paths, unets)
    residency = settle(residency, encoders, unets)
    decisions = (one_file(base, distilled), precision.note, *ema.notes, *notes(residency))
    encoders, embeddings = with_tokens(encoders, options.get("embeddings", ()))
    optional = ((role, options.get(role)) for role in ("vae", "text", "preview"))
    all_paths = paths | {role: path for role, path in optional if path is not None}
    dtypes = [compute_dtype(module) for module in (*unets.values(), decoder)]
    dims = (unet.params.guidance_dim for unet in unets.values())
    guidance_dim = next(filter(None, dims), None)
    files = _files(all_paths, ema.of) | embeddings
    if distilled_lora is not None:
        files["distilled_lora"] = (str(distilled_lora), Checkpoint.open(distilled_lora).files)
    return Pair(
        denoisers=dict.fromkeys(headers.denoisers, unets["base"]) if distilled_lora else unets,
        text=encoders,
        vae=decoder,
        schedules=headers.schedules,
        predictions=headers.predictions,
        image_size=first.image_size,
        downscale=decoder.params.downscale,
        latent_channels=decoder.params.latent_channels,
        preview=None if preview is None else preview_of(preview, devices["vae"], allow),
        lineage=first.family.lineage,
        preset=headers.preset,
        guesses=headers.guesses,
        embedded_guidance=_embedded_guidance(options.get("embedded_guidance"), guidance_dim),
        guidance_dim=guidance_dim,
        notes=(*headers.notes, *filter(None, decisions)),
        device=devices["text"],
        dtype=dtypes[0],
        vae_dtype=dtypes[-1],
        float8=dtype == "float8",
        packed=_packed(unets, decoder, packed),
        footprint=_footprint(unets, decoder, encoders),
        residency=replace(residency, one_network=True) if distilled_lora else residency,
        ema=options.get("ema"),
        allow=tuple(allow),
        files=files,
    )


def load_demo(**options: Unpack[LoadOptions]) -> Pair:
    """The bundled pair. Raises CheckpointError for a file that is missing or damaged."""
    try:
        paths = {role: headstart_weights.path(role) for role in ("base", "distilled")}
        preview = headstart_weights.path("tiny_decoder")
    except headstart_weights.WeightsError as error:
        raise CheckpointError(f"the bundled pair cannot be used: {error}") from error
    base, distilled = paths["base"], paths["distilled"]
    shared: LoadOptions = {**options, "preview": preview, "preset": "demo"}
    pair = load_pair(base, distilled, **shared)
    files = {role: (f"headstart_weights/{path.name}", (path,)) for role, path in paths.items()}
    embeddings = {role: file for role, file in pair.files.items() if role.startswith(EMBEDDING)}
    return replace(pair, files=files | embeddings)


def _footprint(unets: Mapping[str, UNet], vae: Vae, text: ClipText) -> Footprint:
    towers = [tower.params for tower in text.towers if isinstance(tower, Tower)]
    return Footprint(
        latent_values=max(unet_values(unet.params) for unet in unets.values()),
        vae=vae.params,
        itemsize=max(compute_dtype(unet).itemsize for unet in unets.values()),
        vae_itemsize=compute_dtype(vae).itemsize,
        text_values=sum(map(text_values, towers)),
    )


def _packed(
    unets: Mapping[str, Denoiser], decoder: Vae, packed: Packed
) -> bool | Literal["direct", "decoder"]:
    """As the record of a run has it."""
    direct = packed == "direct" and is_packed(decoder)
    if direct or any(map(is_packed, unets.values())):
        return packed or True
    return "decoder" if is_packed(decoder) else False


def _embedded_guidance(guidance: float | None, dim: int | None) -> float | None:
    if guidance is None:
        return EMBEDDED_GUIDANCE if dim else None
    if dim is None:
        raise InputError(
            f"embedded_guidance={guidance:g} is for a network that reads it (LCM's cond_proj), and "
            "none of these does: leave it out, or set the plan's distilled_guidance="
        )
    if not math.isfinite(guidance):
        raise InputError(f"embedded_guidance must be a finite number, got {guidance!r}")
    return float(guidance)


def _load_text(
    path: FilePath, device: torch.device, dtype: Dtype, options: LoadOptions
) -> ClipText:
    return load_text(
        path,
        device=device,
        dtype=dtype,
        head_dim=options.get("text_head_dim"),
        tokenizer=options.get("tokenizer"),
        exclamation=options.get("exclamation", "openclip"),
        allow=options.get("allow", ()),
    )


def _load_unets(
    sources: Sources, residency: Residency, precision: Precision, text: ClipText
) -> dict[str, UNet]:
    unets: dict[str, UNet] = {}
    for role, path in sources.unets.items():
        with loading_for(residency.devices[role]):
            unets[role] = load_unet(
                path,
                device=loading_device(residency, role),
                dtype=precision.dtype,
                head_dim=sources.options.get("head_dim"),
                ema=sources.ema[role],
                allow=sources.options.get("allow", ()),
                packed=precision.packed,
            )
            check_context(path, text, sources.text, unets[role])
    return unets


def _files(paths: Mapping[str, FilePath], ema: Mapping[str, bool | None]) -> dict[str, Files]:
    """Role -> files for the digests of a record; of a diffusers folder those of its UNet alone."""
    parts: dict[str, PartName] = {"vae": "vae", "text": "text", "preview": "tiny"}
    return {
        role: (str(path), Checkpoint.open(path, parts.get(role, "unet"), ema=ema.get(role)).files)
        for role, path in paths.items()
    }
