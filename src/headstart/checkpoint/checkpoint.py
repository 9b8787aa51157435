"""`inspect_checkpoint`: what a checkpoint is, from its header; and its family."""

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
from headstart.checkpoint.folder import COMPONENTS
from headstart.checkpoint.keymap import PARTS, PartName
from headstart.checkpoint.network_info import NetworkInfo, Overrides
from headstart.checkpoint.scales import SCALED
from headstart.checkpoint.tensors import Checkpoint
from headstart.checkpoint.verdict import ADAPTER, FIXES, Verdict, judge, next_of, notes_of

if TYPE_CHECKING:
    from headstart.checkpoint.census import Census

Layout = Literal[
    "ldm", "diffusers", "single", "unet", "vae", "text", "tiny", "adapter", "embedding", "unknown"
]


def read_family(path: str | Path) -> Family:
    """The family of the checkpoint at `path`, with all that the file and its folder declare.

    This includes prediction, schedule, scale factor, image size and attention rule; `declared`
    lists those that are in the file itself. Raises CheckpointError if no family fits.
    """
    return unet_family(Path(path), Checkpoint.open(path, "unet"))


def unet_family(path: Path, checkpoint: Checkpoint, overrides: Overrides | None = None) -> Family:
    """As `read_family` for an open checkpoint.

    Raises CheckpointError if its UNet cannot be loaded. Options that the caller must give may be
    missing.
    """
    family = judge(path, checkpoint, overrides).require("unet", needs=False).family
    assert family is not None  # a UNet without a family has a problem
    return family


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What the headers of a checkpoint say; `problems` is empty if it can be loaded.

    family      name in `families.FAMILIES`, or "unknown"; `exact` False: scaled down
    parts       of unet, vae, text, text_2, tiny
    prediction  eps, v or x0; `prediction_declared` False: guessed from the name, or the family's
    distillation  "Lightning", "DMD2", ... and the `preset` that runs it, guessed; None: unknown
    dtype       the dtype of most bytes, in safetensors' names, or a block format of GGUF
    scheme      the format of quantized weights, or None
    weights     part -> its number of parameters
    embedding   for a textual inversion: its tokens, their vectors, its family
    next        the options that take the file, and other options that it needs; None: problems
    census      with `deep`: the tensors with NaN or infinities, and those with nothing but zeros
    notes       what to know before using it: an option that it needs, an unusual input
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
    """What a file is and whether it can be loaded, from headers alone: no weight is read, torch is
    not imported. Every loader decides the same, with the same messages (`verdict`).

    deep      read every number too, a few MB at a time: NaN and infinities are problems, tensors of
              zeros a note; `on_bytes` gets the bytes read so far and their total
    allow     names of tensors that may be ignored, with `*` and `?` for any text

    Raises CheckpointError for a file that cannot be read at all (truncated, hostile, a pickle).
    """
    path = Path(path)
    folders: list[PartName] = [name for name in COMPONENTS if (path / COMPONENTS[name]).is_dir()]
    names: list[PartName] = folders or [PARTS[0]]
    checkpoints = dict[PartName, Checkpoint]((name, Checkpoint.open(path, name)) for name in names)
    verdicts: dict[PartName, Verdict] = {  # one for both text encoders, which are read together
        name: judge(
            path,
            checkpoint,
            Overrides(allow=allow),
            second=checkpoints.get("text_2") if name == "text" else None,
        )
        for name, checkpoint in checkpoints.items()
        if name != "text_2" or "text" not in checkpoints
    }
    first, verdict = checkpoints[names[0]], verdicts[names[0]]
    networks: dict[PartName, NetworkInfo] = {
        name: info for each in verdicts.values() for name, info in each.networks.items()
    }
    problems = [*verdict.problems()]
    if folders:
        refusals = [each.refusal(name) for name, each in verdicts.items()]
        problems = [refusal for refusal in refusals if refusal is not None]
    family = verdict.family
    declared = family is not None and "prediction" in family.declared
    guessed = guess(path, first, family.lineage) if family and "unet" in networks else Guess()
    prediction = family and ((not declared and guessed.prediction) or family.prediction)
    distillation = guessed.distillation
    notes = [*_notes(verdict, networks, guessed)]
    if (average := averages_note(first.main_of(path))) is not None:
        notes.append(f"unet: {average}")
    census = _census(checkpoints, on_bytes) if deep else None
    if census is not None:
        problems += census.problems()
        notes += census.notes()
    largest = max(checkpoints.values(), key=lambda checkpoint: checkpoint.size_bytes)
    shapes = [shape for checkpoint in checkpoints.values() for shape in checkpoint.shapes.values()]
    return CheckpointInfo(
        path=str(path),
        family=family.name if family else "unknown",
        exact=family.exact if family else False,
        layout="diffusers" if folders else _layout(verdict),
        parts=tuple(networks),
        prediction=prediction.value if prediction else None,
        prediction_declared=declared,
        distillation=distillation.name if distillation else None,
        preset=guessed.preset,
        dtype=SCALED.get(largest.dtype, largest.dtype),
        scheme=largest.scheme,
        size_bytes=sum(checkpoint.size_bytes for checkpoint in checkpoints.values()),
        tensors=len(shapes),
        parameters=sum(math.prod(shape) for shape in shapes),
        weights={
            name: sum(map(math.prod, network.part.shapes.values()))
            for name, network in networks.items()
        },
        census=census,
        embedding=verdict.embedding,
        notes=tuple(notes),
        problems=tuple(dict.fromkeys(problems)),
        next=None if problems else next_of(path, verdict, networks),
    )


def _layout(verdict: Verdict) -> Layout:
    if verdict.what is not None:
        return "adapter" if verdict.what == ADAPTER else "embedding"
    if any(network.part.prefixed for network in verdict.networks.values()):
        return "ldm"
    if len(verdict.networks) > 1:
        return "single"
    name = next(iter(verdict.networks), None)
    return "unknown" if name is None else "text" if name == "text_2" else name


def _census(
    checkpoints: Mapping[PartName, Checkpoint], on_bytes: Callable[[int, int], object] | None
) -> Census:
    from headstart.checkpoint.census import Census, take

    census, bytes_read = Census(), 0
    total = sum(checkpoint.size_bytes for checkpoint in checkpoints.values())

    def count(size_bytes: int) -> None:
        nonlocal bytes_read
        bytes_read += size_bytes
        if on_bytes is not None:
            on_bytes(bytes_read, total)

    for checkpoint in checkpoints.values():
        take(checkpoint, census, count)
    return census


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
    declared = "prediction" in family.declared
    if (note := guessed.note(without_prediction=declared)) is not None:
        yield note
    if family.name == "sd21" and not declared and guessed.prediction is None:
        yield "prediction v is assumed; SD2.1-base and SD-Turbo look the same and predict eps"
