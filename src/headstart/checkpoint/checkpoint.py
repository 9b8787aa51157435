"""What a checkpoint is: its family with all that it declares, and triage from its header alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from headstart.checkpoint.distillation import Guess, guess
from headstart.checkpoint.ema import averages_note
from headstart.checkpoint.embeddings import EmbeddingInfo
from headstart.checkpoint.families import FAMILIES, Family
from headstart.checkpoint.fit import some
from headstart.checkpoint.folder import COMPONENTS
from headstart.checkpoint.keymap import PARTS, PartName
from headstart.checkpoint.lineage import family_of
from headstart.checkpoint.network_info import NetworkInfo, Overrides
from headstart.checkpoint.scales import SCALED
from headstart.checkpoint.tensors import Checkpoint
from headstart.checkpoint.verdict import (
    ADAPTER,
    FIXES,
    Verdict,
    judge,
    next_of,
    notes_of,
)

if TYPE_CHECKING:
    from headstart.checkpoint.census import Census

__all__ = ["CheckpointInfo", "family_of", "inspect_checkpoint", "read_family", "unet_family"]

Layout = Literal[
    "ldm", "diffusers", "single", "unet", "vae", "text", "tiny", "adapter", "embedding", "unknown"
]


def read_family(path: str | Path) -> Family:
    """The family of the checkpoint at `path`, with all that the file and its folder declare.

    Prediction, schedule, scale factor, image size and attention rule are resolved; `declared` tells
    which of them the file itself states. Raises CheckpointError if no family fits.
    """
    return unet_family(Path(path), Checkpoint.open(path, "unet"))


def unet_family(path: Path, checkpoint: Checkpoint, given: Overrides | None = None) -> Family:
    """As `read_family` for an open checkpoint, whose UNet is judged: one that is refused is so
    here, with the same sentence; what the caller has to say may be missing.
    """
    family = judge(path, checkpoint, given).require("unet", needs=False).family
    assert family is not None  # a UNet of no family is refused
    return family


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What headers tell; `problems` is empty unless the checkpoint is torn or not a model.

    family      name in `families.FAMILIES`, or "unknown"; `exact` False: scaled down
    parts       of unet, vae, text, text_2, tiny
    prediction  eps, v or x0; `prediction_declared` False: guessed from the name, or the family's
    distillation  "Lightning", "DMD2", ... and `preset` that runs it, as guessed; None: not told
    dtype       the dtype most bytes have, in safetensors' names, or a block format of GGUF
    scheme      how weights of eight bits and fewer are written, or None
    weights     part -> how many numbers it has
    embedding   of learned tokens: what they are called, how many vectors, for which family
    next        what to do with it: the options that take it, and what they need; None: refused
    census      with `deep`: which tensors hold NaN, infinities or nothing but zeros
    notes       what to know before using it: an argument it needs, an unusual input
    """

    path: str
    family: str
    exact: bool
    layout: Layout
    parts: tuple[str, ...]
    prediction: str | None
    prediction_declared: bool
    distillation: str | None
    preset: str | None
    dtype: str
    scheme: str | None = None
    size_bytes: int
    tensors: int
    parameters: int
    weights: dict[str, int]
    census: Census | None = None
    embedding: EmbeddingInfo | None = None
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    next: str | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "ok": self.ok}


def inspect_checkpoint(
    path: str | Path,
    *,
    deep: bool = False,
    allow: Collection[str] = (),
    on_bytes: Callable[[int, int], object] | None = None,
) -> CheckpointInfo:
    """Triage from headers alone: no weight is read, torch is not imported. What it finds usable is
    loaded, and what it refuses is refused by every loader with the same sentence (`verdict`).

    `deep` reads every number too, a few MB at a time: NaN and infinities are problems, tensors of
    zeros a note; `on_bytes` is told how many bytes of how many are done. `allow` names tensors that
    may be left aside, `*` and `?` for any text.

    Raises CheckpointError for a file that cannot be read at all (truncated, hostile, a pickle).
    """
    path = Path(path)
    folders: list[PartName] = [name for name in COMPONENTS if (path / COMPONENTS[name]).is_dir()]
    wanted: list[PartName] = folders or [PARTS[0]]
    held = dict[PartName, Checkpoint]((name, Checkpoint.open(path, name)) for name in wanted)
    verdicts = _verdicts(path, held, Overrides(allow=allow))
    first, verdict = held[wanted[0]], verdicts[wanted[0]]
    networks: dict[PartName, NetworkInfo] = {}
    for own in verdicts.values():
        networks |= own.networks
    layout: Layout = "diffusers" if folders else _layout(verdict)
    if folders:
        problems = [told for name, own in verdicts.items() if (told := own.refusal(name))]
    else:
        problems = [*verdict.problems()]
    family = verdict.family
    stated = family is not None and "prediction" in family.declared
    guessed = guess(path, first, family.lineage) if family and "unet" in networks else Guess()
    row = guessed.distillation
    notes = [*_notes(verdict, networks, guessed), *_averages(path, first)]
    census = _census(held, on_bytes) if deep else None
    if census is not None:
        problems += _broken(census)
        notes += _hollow(census)
    largest = max(held.values(), key=lambda checkpoint: checkpoint.size_bytes)
    shapes = [shape for checkpoint in held.values() for shape in checkpoint.shapes.values()]
    return CheckpointInfo(
        path=str(path),
        family=family.name if family else "unknown",
        exact=family.exact if family else False,
        layout=layout,
        parts=tuple(networks),
        prediction=_prediction(family, guessed, stated),
        prediction_declared=stated,
        distillation=row.name if row else None,
        preset=guessed.preset,
        dtype=SCALED.get(largest.dtype, largest.dtype),
        scheme=largest.scheme,
        size_bytes=sum(checkpoint.size_bytes for checkpoint in held.values()),
        tensors=len(shapes),
        parameters=sum(math.prod(shape) for shape in shapes),
        weights={
            name: sum(map(math.prod, judged.part.shapes.values()))
            for name, judged in networks.items()
        },
        census=census,
        embedding=verdict.embedding,
        notes=tuple(notes),
        problems=tuple(dict.fromkeys(problems)),
        next=None if problems else next_of(path, verdict, networks),
    )


def _verdicts(
    path: Path, held: Mapping[PartName, Checkpoint], given: Overrides
) -> dict[PartName, Verdict]:
    """Of each component; of two text encoders one, as they are read together."""
    return {
        name: judge(path, own, given, second=held.get("text_2") if name == "text" else None)
        for name, own in held.items()
        if name != "text_2" or "text" not in held
    }


def _layout(verdict: Verdict) -> Layout:
    if verdict.what is not None:
        return "adapter" if verdict.what == ADAPTER else "embedding"
    if any(judged.part.prefixed for judged in verdict.networks.values()):
        return "ldm"
    if len(verdict.networks) > 1:
        return "single"
    name = next(iter(verdict.networks), None)
    return "unknown" if name is None else "text" if name == "text_2" else name


def _averages(path: Path, checkpoint: Checkpoint) -> Iterator[str]:
    if (told := averages_note(checkpoint.main_of(path))) is not None:
        yield f"unet: {told}"


def _census(
    held: Mapping[PartName, Checkpoint], on_bytes: Callable[[int, int], object] | None
) -> Census:
    from headstart.checkpoint.census import Census, take

    census, done = Census(), 0
    total = sum(checkpoint.size_bytes for checkpoint in held.values())

    def count(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        if on_bytes is not None:
            on_bytes(done, total)

    for checkpoint in held.values():
        census |= take(checkpoint, count)
    return census


def _broken(census: Census) -> Iterator[str]:
    for what, found in (("NaN", census.nan), ("infinity", census.inf)):
        if found:
            shown = [f"{name} ({count})" for name, count in found.items()]
            yield f"{len(found)} tensors hold {what}: {some(shown)}"


def _hollow(census: Census) -> Iterator[str]:
    if census.zero:
        yield f"{len(census.zero)} tensors hold nothing but zeros: {some(census.zero)}"
    if census.unread:
        yield f"{len(census.unread)} tensors could not be counted: {some(census.unread)}"


def _prediction(family: Family | None, guessed: Guess, stated: bool) -> str | None:
    if family is None:
        return None
    return (family.prediction if stated else guessed.prediction or family.prediction).value


def _notes(
    verdict: Verdict, networks: Mapping[PartName, NetworkInfo], guessed: Guess
) -> Iterator[str]:
    if verdict.what is not None:
        yield f"{verdict.what}: {FIXES[verdict.what]}"
    yield from notes_of(networks)
    family = verdict.family
    if "unet" not in networks or family is None:
        return
    ancestor = FAMILIES[family.lineage].signature
    if family.signature.width == ancestor.width and not family.exact:
        yield f"unet: {family.signature.tensors} tensors; {family.lineage} has {ancestor.tensors}"
    elif networks["unet"].needs and networks["unet"].problem is None:
        yield "scaled down: its attention head width is not in the file, so give --head-dim"
    if "time_embedding.cond_proj.weight" in networks["unet"].part.shapes:
        yield "unet: takes guidance as an input, as LCM does: a distilled model"
    stated = "prediction" in family.declared
    if (told := guessed.note(without_prediction=stated)) is not None:
        yield told
    if family.name == "sd21" and not stated and guessed.prediction is None:
        yield "prediction v is assumed; SD2.1-base and SD-Turbo look the same and predict eps"
