"""The weights of an engine: a base, a distilled model, and what both share.

text, vae   from their own files, else from the base's, else from the distilled's
schedules   each model's own, as its file states it; where it does not, its family's
dtype       what networks compute in; weights in half precision may stay so on a CPU, and are then
            widened layer by layer (`headstart.networks.casting`), with the same bits as result
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict, Unpack

import torch

import headstart_weights
from headstart.adapters.textual_inversion import EMBEDDING, Embeddings, taught
from headstart.checkpoint.distillation import Guess
from headstart.checkpoint.mapped_files import headers_cached
from headstart.checkpoint.tensors import Checkpoint, PartName
from headstart.engine.budget import Footprint
from headstart.engine.devices import Device, choose_devices
from headstart.engine.dtypes import Kept, keep
from headstart.engine.fitting import Sources, bed, notes, plan_homes, settled
from headstart.engine.homes import Homes
from headstart.engine.memory import Memory
from headstart.engine.models import (
    FilePath,
    Model,
    Predictions,
    averaged,
    check_belong,
    check_vae,
    distilled_by,
    holder,
    predictions,
    preset_of,
    schedules,
    swapped,
    two_schedules,
)
from headstart.engine.parts import check_channels, codec_of, decoder_dtype, preview_of, unet_of
from headstart.engine.record import Files
from headstart.errors import CheckpointError, InputError
from headstart.interfaces import Conditioning, Denoiser, LatentCodec
from headstart.networks.assembly import Dtype, Packed, bound_for
from headstart.networks.casting import compute_dtype
from headstart.networks.load import load_text
from headstart.networks.numbers import guidance_embedding
from headstart.networks.packed import is_packed
from headstart.networks.prompt_style import Exclamation
from headstart.networks.text import ClipText
from headstart.networks.tower import Tower
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae
from headstart.plan.prediction import Prediction
from headstart.plan.spacing import Process

EMBEDDED_GUIDANCE = 8.0
"""What an LCM is asked to imitate: w = 7 of its own scale. It was distilled for w in 2 .. 14
(arXiv:2310.04378, section 5.1) and its model card runs it at 8. The notebooks of arXiv:2503.10637
pass guidance 0, so w = -1, which it never saw."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """Networks on their device.

    denoisers    "base" and/or "distilled"
    text, vae    serve both; preview: a small decoder, or None
    schedules    the noise schedule of each model; predictions: what each network predicts
    image_size   the model's own, in pixels; downscale: pixels a latent cell
    lineage      the family whose latents these are, or None where the weights do not say
    preset       the pair's name in `headstart.preset`, or None where the weights do not say
    guesses      role -> what its file probably is, where only its name tells
    embedded_guidance  the guidance an LCM's networks are told to imitate, and `guidance_dim`, the
                 width of its embedding; None where no network reads one
    notes        lines for a person: what was guessed or decided, and how to set it by hand
    dtype        that networks compute in; vae_dtype: the decoder; float8: weights are kept so;
                 packed: laid out for a CPU's products
    ema          whether averaged weights were asked for, or None; allow: what was let be
    footprint    how much memory a sample takes, or None: then it is not checked
    device       where a run begins; homes: where each part lives, and which parts take turns
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
    packed: bool | Literal["direct"] = False
    ema: bool | None = None
    allow: tuple[str, ...] = ()
    footprint: Footprint | None = None
    homes: Homes = field(default_factory=Homes)
    files: Mapping[str, Files] = field(default_factory=dict[str, Files])

    def told(self, cond: Conditioning) -> Conditioning:
        """With the guidance that an LCM imitates; a network without `cond_proj` never reads it."""
        if self.embedded_guidance is None or self.guidance_dim is None:
            return cond
        if cond.guidance_embedding is not None:  # a caller's own
            return cond
        values = torch.full((len(cond),), self.embedded_guidance, device=cond.context.device)
        return replace(cond, guidance_embedding=guidance_embedding(values, self.guidance_dim))


class Options(TypedDict, total=False):
    """How files are read; every one has a default. See `headstart.engine.engine.Engine.load`.

    vae, text, tokenizer, preview  files of their own
    preset             the pair's name; by default what the distilled file's name says
    prediction         "eps", "v" or "x0", for both models or {"base": ..., "distilled": ...}
    embedded_guidance  what an LCM imitates, 8.0 by default
    ema                averaged weights or those that were trained, where a file has both
    head_dim           width of a UNet's attention heads, and text_head_dim of the text encoders',
                       for scaled-down models whose files do not say it
    embeddings         files of learned tokens, or (file, token)
    exclamation        "openclip", or "transformers" for "!" as diffusers has it with SD 2 and SDXL
    allow              tensors of the files that may be left aside, `*` and `?` for any text
    device             "auto", a name, or one for each model: {"base": ..., "distilled": ...}
    dtype              "auto", or a name; vae_dtype: of the decoder, see `parts.decoder_dtype`
    packed             whether weights are laid out for a CPU's products (`networks.packed`); None:
                       those of full-size networks, where memory holds the layouts; "direct": those
                       without the ones for tiles
    memory             "auto", "none", or how much of a GPU may be had, such as "8GB"
    plan_size          pixels of the picture that it is planned for; the model's own by default
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


@headers_cached()
def load_pair(
    base: FilePath | None,
    distilled: FilePath | None,
    *,
    distilled_lora: FilePath | None = None,
    **options: Unpack[Options],
) -> Pair:
    """Read the files. Raises CheckpointError, or InputError for a device that is not there.

    With a distilled LoRA one network is both models; attaching it is the engine's part.
    One of `base` and `distilled` may be None; then plans that need it are refused. What "auto" is
    for networks and the decoder: `dtypes.keep`, `parts.decoder_dtype`.
    """
    paths = {role: p for role, p in (("base", base), ("distilled", distilled)) if p is not None}
    if not paths:
        raise InputError("no weights: give base=, distilled= or both, or use Engine.demo()")
    devices = choose_devices(options.get("device", "auto"), tuple(paths))
    place = devices["text"]
    allow = options.get("allow", ())
    models = {role: Model.of(path, allow) for role, path in paths.items()}
    check_belong(models)
    first = next(iter(models.values()))
    lora = None if distilled_lora is None else distilled_by(distilled_lora, models)
    vae, preview = options.get("vae") or holder("vae", models), options.get("preview")
    text = options.get("text") or holder("text", models)
    known = predictions(options.get("prediction"), models)
    found = schedules(models, known)
    check_vae(vae, first)
    ema = averaged(models, options.get("ema"))
    wish = options.get("dtype", "auto"), options.get("packed")
    kept = keep(*wish, place, paths, vae, text, ema.of, first.image_size // 8)
    kind = kept.dtype
    decodes = decoder_dtype(options.get("vae_dtype", "auto"), kind, devices["vae"])
    sources = Sources(paths, vae, text, ema.of, first.family, first.image_size, options)
    homes = plan_homes(sources, devices, options.get("memory", "auto"), kind, decodes)
    # Text first: a tokenizer that does not fit is told before the larger networks are read.
    with bound_for(devices["text"]):
        words = _load_words(text, bed(homes, "text"), kind, options)
    codec = codec_of(vae, devices["vae"], decodes, first.family, allow, kept.packed)
    unets = _load_unets(sources, homes, kept, words)
    check_channels(vae, codec, paths, unets)
    homes = settled(homes, words, unets)
    decided = (two_schedules(found), kept.note, *ema.notes, *notes(homes))
    words, learned = taught(words, options.get("embeddings", ()))
    given = ((role, options.get(role)) for role in ("vae", "text", "preview"))
    named = paths | {role: path for role, path in given if path is not None}
    dtypes = [compute_dtype(module) for module in (*unets.values(), codec)]
    dims = (unet.params.guidance_dim for unet in unets.values())
    guidance_dim = next(filter(None, dims), None)
    pair = Pair(
        denoisers=unets,
        text=words,
        vae=codec,
        schedules=found,
        predictions=known,
        image_size=first.image_size,
        downscale=codec.params.downscale,
        latent_channels=codec.params.latent_channels,
        preview=None if preview is None else preview_of(preview, devices["vae"], allow),
        lineage=first.family.lineage,
        preset=options.get("preset") or preset_of(models),
        guesses={role: model.guess for role, model in models.items()},
        embedded_guidance=_embedded_guidance(options.get("embedded_guidance"), guidance_dim),
        guidance_dim=guidance_dim,
        notes=_notes(models, options.get("prediction"), swapped(models, lora), *decided),
        device=place,
        dtype=dtypes[0],
        vae_dtype=dtypes[-1],
        float8=kind == "float8",
        packed=any(map(is_packed, (*unets.values(), codec))) and (kept.packed or True),
        footprint=_footprint(unets, codec, words),
        homes=homes,
        ema=options.get("ema"),
        allow=tuple(allow),
        files=_files(named, ema.of) | learned,
    )
    if lora is None or distilled_lora is None:
        return pair
    return _one_network(pair, distilled_lora, lora)


def load_demo(**options: Unpack[Options]) -> Pair:
    """The bundled pair. Raises CheckpointError for a file that is missing or damaged."""
    try:
        paths = {role: headstart_weights.path(role) for role in ("base", "distilled")}
        preview = headstart_weights.path("tiny_decoder")
    except headstart_weights.WeightsError as error:
        raise CheckpointError(f"the bundled pair cannot be used: {error}") from error
    base, distilled = paths["base"], paths["distilled"]
    shared: Options = {**options, "preview": preview, "preset": "demo"}
    pair = load_pair(base, distilled, **shared)
    files = {role: (f"headstart_weights/{path.name}", (path,)) for role, path in paths.items()}
    learned = {role: told for role, told in pair.files.items() if role.startswith(EMBEDDING)}
    return replace(pair, files=files | learned)


def _one_network(pair: Pair, lora: FilePath, found: Guess) -> Pair:
    """A pair whose distilled model is its base, to be told apart by the strength of a LoRA.

    The LoRA is named for the record; attaching it is the engine's part.
    """
    network, prediction = pair.denoisers["base"], pair.predictions["base"]
    note = found.note()
    return replace(
        pair,
        denoisers={"base": network, "distilled": network},
        predictions={"base": prediction, "distilled": prediction},
        schedules=dict.fromkeys(("base", "distilled"), pair.schedules["base"]),
        homes=replace(pair.homes, one=True),
        preset=pair.preset or found.preset,
        guesses={**pair.guesses, "distilled": found},
        notes=(*pair.notes, *([] if note is None else [f"distilled: {note}"])),
        files={**pair.files, "distilled_lora": (str(lora), Checkpoint.open(lora).files)},
    )


def _footprint(unets: Mapping[str, UNet], codec: Vae, words: ClipText) -> Footprint:
    towers = [tower.params for tower in words.towers if isinstance(tower, Tower)]
    itemsize = max(compute_dtype(unet).itemsize for unet in unets.values())
    params = [unet.params for unet in unets.values()]
    return Footprint.of(params, codec.params, towers, itemsize, compute_dtype(codec).itemsize)


def _embedded_guidance(given: float | None, dim: int | None) -> float | None:
    if given is None:
        return EMBEDDED_GUIDANCE if dim else None
    if dim is None:
        raise InputError(
            f"embedded_guidance={given:g} is for a network that reads it (LCM's cond_proj), and "
            "none of these does: leave it out, or set the plan's distilled_guidance="
        )
    if not math.isfinite(given):
        raise InputError(f"embedded_guidance must be a finite number, got {given!r}")
    return float(given)


def _notes(
    models: Mapping[str, Model], given: Predictions | None, *others: str | None
) -> tuple[str, ...]:
    settled = set(given) if isinstance(given, Mapping) else set(models) if given else set[str]()
    told = [model.note(role, role in settled) for role, model in models.items()]
    return tuple(line for line in (*told, *others) if line)


def _load_words(path: FilePath, place: torch.device, kind: Dtype, options: Options) -> ClipText:
    return load_text(
        path,
        device=place,
        dtype=kind,
        head_dim=options.get("text_head_dim"),
        tokenizer=options.get("tokenizer"),
        exclamation=options.get("exclamation", "openclip"),
        allow=options.get("allow", ()),
    )


def _load_unets(sources: Sources, homes: Homes, kept: Kept, words: ClipText) -> dict[str, UNet]:
    found: dict[str, UNet] = {}
    allow, head_dim = sources.options.get("allow", ()), sources.options.get("head_dim")
    for role, path in sources.unets.items():
        with bound_for(homes.devices[role]):
            found[role] = unet_of(
                path, bed(homes, role), kept.dtype, head_dim, sources.ema[role], words,
                sources.text, allow, kept.packed,
            )  # fmt: skip
    return found


def _files(paths: Mapping[str, FilePath], ema: Mapping[str, bool | None]) -> dict[str, Files]:
    """The files a digest identifies; of a diffusers folder, those of its UNet stand for it."""
    parts: dict[str, PartName] = {"vae": "vae", "text": "text", "preview": "tiny"}
    return {
        role: (str(path), Checkpoint.open(path, parts.get(role, "unet"), ema=ema.get(role)).files)
        for role, path in paths.items()
    }
