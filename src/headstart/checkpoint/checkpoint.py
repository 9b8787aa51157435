"""What a checkpoint is: its family with all that it declares, and triage from its header alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from headstart.checkpoint import keymap
from headstart.checkpoint.declarations import Said, declared
from headstart.checkpoint.distillation import Guess, guess
from headstart.checkpoint.ema import averages_note
from headstart.checkpoint.families import FAMILIES, Family, recognise
from headstart.checkpoint.folder import COMPONENTS, json_in, root_of
from headstart.checkpoint.keymap import PARTS, PartName
from headstart.checkpoint.scales import SCALED
from headstart.checkpoint.tensors import FLOATS, UNREAD, Checkpoint, Part, unsupported
from headstart.errors import CheckpointError

if TYPE_CHECKING:
    from headstart.checkpoint.census import Census

Layout = Literal["ldm", "diffusers", "unet", "vae", "text", "tiny", "adapter", "unknown"]

# The relative rounding error of a schedule stored in that dtype.
_ROUNDING = {"F64": 2.0**-40, "F32": 2.0**-20, "F16": 2.0**-10, "BF16": 2.0**-7}


def read_family(path: str | Path) -> Family:
    """The family of the checkpoint at `path`, with all that the file and its folder declare.

    Prediction, schedule, scale factor, image size and attention rule are resolved; `declared` tells
    which of them the file itself states. Raises CheckpointError if no family fits.
    """
    return unet_family(Path(path), Checkpoint.open(path, "unet"))


def unet_family(path: Path, checkpoint: Checkpoint) -> Family:
    """As `read_family` for an open checkpoint."""
    if "unet" not in checkpoint.parts():
        raise CheckpointError(f"{path}: expected a UNet, found {checkpoint.found()}")
    if (family := family_of(path, checkpoint)) is None:
        raise CheckpointError(
            f"{path}: its UNet is of no known family ({', '.join(FAMILIES)}): expected "
            "`conv_in.weight` and cross-attention of one width"
        )
    return family


def family_of(path: Path, checkpoint: Checkpoint) -> Family | None:
    """As `read_family` for an open checkpoint; None where neither tensors nor folder tell."""
    root, parts = root_of(path), checkpoint.parts()
    if "unet" not in parts and root is not None and (root / "unet").is_dir():
        parts |= Checkpoint.open(root, "unet").parts()
    family = recognise({name: part.shapes for name, part in parts.items()}, checkpoint.metadata)
    if family is None:
        return None
    alphas = "alphas_cumprod"
    rounding = _ROUNDING.get(checkpoint.dtypes.get(alphas, ""))
    said = Said(
        path=path,
        metadata=checkpoint.metadata,
        unet=parts["unet"].config if "unet" in parts else {},
        vae=json_in(root, "vae/config.json"),
        scheduler=json_in(root, "scheduler/scheduler_config.json"),
        alphas=(checkpoint.numbers(alphas), rounding) if rounding else None,
        flags=frozenset({"v_pred", "ztsnr"} & set(checkpoint.names)),
    )
    return declared(family, said)


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
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "ok": self.ok}


def inspect_checkpoint(
    path: str | Path,
    *,
    deep: bool = False,
    on_bytes: Callable[[int, int], object] | None = None,
) -> CheckpointInfo:
    """Triage from headers alone: no tensor is read, torch is not imported.

    `deep` reads every number too, a few MB at a time: NaN and infinities are problems, tensors of
    zeros a note; `on_bytes` is told how many bytes of how many are done.

    Raises CheckpointError for a file that cannot be read at all (truncated, hostile, a pickle).
    """
    path = Path(path)
    folders: list[PartName] = [name for name in COMPONENTS if (path / COMPONENTS[name]).is_dir()]
    wanted: list[PartName] = folders or [PARTS[0]]
    held = dict[PartName, Checkpoint]((name, Checkpoint.open(path, name)) for name in wanted)
    first = next(iter(held.values()))
    parts: dict[PartName, Part] = first.parts()
    if folders:  # from inside, both text encoders look alike
        parts = {name: part for name in folders for part in [*held[name].parts().values()][:1]}
    layout: Layout = "diffusers" if folders else _layout(first, parts)
    problems = [problem for part in parts.values() for problem in _problems(part)]
    if not parts and layout != "adapter":
        problems.append("no network recognised")
    problems += [f"{name}: no network recognised" for name in folders if name not in parts]
    problems += [problem for checkpoint in held.values() for problem in _unreadable(checkpoint)]
    family = None
    try:
        family = family_of(path, first)
    except CheckpointError as error:
        problems.append(str(error))
    stated = family is not None and "prediction" in family.declared
    guessed = guess(path, first, family.lineage) if family and "unet" in parts else Guess()
    row = guessed.distillation
    notes = [*_notes(layout, family, parts, guessed), *_averages(path, first)]
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
        parts=tuple(parts),
        prediction=_prediction(family, guessed, stated),
        prediction_declared=stated,
        distillation=row.name if row else None,
        preset=guessed.preset,
        dtype=SCALED.get(largest.dtype, largest.dtype),
        scheme=largest.scheme,
        size_bytes=sum(checkpoint.size_bytes for checkpoint in held.values()),
        tensors=len(shapes),
        parameters=sum(math.prod(shape) for shape in shapes),
        weights={n: sum(map(math.prod, part.shapes.values())) for n, part in parts.items()},
        census=census,
        notes=tuple(notes),
        problems=tuple(dict.fromkeys(problems)),
    )


def _layout(checkpoint: Checkpoint, parts: Mapping[PartName, Part]) -> Layout:
    if "adapter" in checkpoint.split():
        return "adapter"
    if any(part.prefixed for part in parts.values()):
        return "ldm"
    name = next(iter(parts), None)
    return "unknown" if name is None else "text" if name == "text_2" else name


def _problems(part: Part) -> Iterator[str]:
    if part.strays:
        yield f"{len(part.strays)} tensors belong to no network: {_some(part.strays)}"
    if part.name != "tiny" and (missing := keymap.uneven(part.shapes)):
        yield f"{part.name}: {len(missing)} tensors are missing: {_some(missing)}"
    if odd := [name for name in part.shapes if part.dtype(name) not in FLOATS]:
        yield f"{part.name}: {len(odd)} tensors are not floating point: {_some(odd)}"
    for dtype in sorted(UNREAD & {part.dtype(name) for name in part.shapes}):
        held = [name for name in part.shapes if part.dtype(name) == dtype]
        yield f"{part.name}: {len(held)} tensors are {unsupported(dtype)}"
    if empty := [name for name, shape in part.shapes.items() if 0 in shape]:
        yield f"{part.name}: {len(empty)} tensors have no numbers in them: {_some(empty)}"


def _averages(path: Path, checkpoint: Checkpoint) -> Iterator[str]:
    if (told := averages_note(checkpoint.main_of(path))) is not None:
        yield f"unet: {told}"


def _unreadable(checkpoint: Checkpoint) -> Iterator[str]:
    try:
        checkpoint.check_numbers()
    except CheckpointError as error:
        yield str(error)


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
            yield f"{len(found)} tensors hold {what}: {_some(shown)}"


def _hollow(census: Census) -> Iterator[str]:
    if census.zero:
        yield f"{len(census.zero)} tensors hold nothing but zeros: {_some(census.zero)}"
    if census.unread:
        yield f"{len(census.unread)} tensors could not be counted: {_some(census.unread)}"


def _prediction(family: Family | None, guessed: Guess, stated: bool) -> str | None:
    if family is None:
        return None
    return (family.prediction if stated else guessed.prediction or family.prediction).value


def _notes(
    layout: Layout, family: Family | None, parts: Mapping[PartName, Part], guessed: Guess
) -> Iterator[str]:
    if layout == "adapter":
        yield "an adapter (LoRA), not a model: attach it to one"
    if "unet" not in parts:
        return
    if family is None:
        yield "the UNet is of no known family"
        return
    ancestor = FAMILIES[family.lineage].signature
    if family.signature.width == ancestor.width and not family.exact:
        yield f"unet: {family.signature.tensors} tensors; {family.lineage} has {ancestor.tensors}"
    elif not family.exact and family.heads is None and "head_dim" not in family.declared:
        yield "scaled down: its attention head width is not in the file, so give --head-dim"
    if "time_embedding.cond_proj.weight" in parts["unet"].shapes:
        yield "unet: takes guidance as an input, as LCM does: a distilled model"
    channels = parts["unet"].shapes["conv_in.weight"][1:2]
    if channels != (4,):
        yield f"unet: {channels} input channels, not (4,): it edits or fills in images"
    stated = "prediction" in family.declared
    if (told := guessed.note(without_prediction=stated)) is not None:
        yield told
    if family.name == "sd21" and not stated and guessed.prediction is None:
        yield "prediction v is assumed; SD2.1-base and SD-Turbo look the same and predict eps"


def _some(names: Sequence[str]) -> str:
    return ", ".join(name[:120] for name in names[:3]) + (", ..." if len(names) > 3 else "")
