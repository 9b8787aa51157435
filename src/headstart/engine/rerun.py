"""A record, or the picture that holds one, run again, every bit compared."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from headstart.conditioning.inputs import Cond, Noise
from headstart.conditioning.texts import check_clip_skip
from headstart.engine import record as recording
from headstart.engine.engine import Engine
from headstart.engine.picture import KEYWORD, rerun_of
from headstart.engine.record import Recorded
from headstart.engine.trajectory import Trajectory
from headstart.errors import InputError
from headstart.input import check_shape, loads
from headstart.output import GRID, PNG, RECORD
from headstart.pictures.png import SIGNATURE, read_png, read_rgb
from headstart.sampler import State

_FOREIGN = {
    "parameters": "AUTOMATIC1111's web UI, or a program that writes as it does",
    "workflow": "ComfyUI",
    "prompt": "ComfyUI",
    "invokeai_metadata": "InvokeAI",
    "sd-metadata": "InvokeAI",
}
"""Keyword of a PNG's text -> the program that writes it."""
_SHEET = ": it shows all images of a run: replay one of them, or the record.json beside it"
_PICTURE = "a PNG that `headstart sample` or Trajectory.save wrote"


class Source(NamedTuple):
    """A record as it was read, and the pixels of the picture that held it."""

    record: Mapping[str, Any]
    recorded: Recorded
    name: str = "the record"
    rgb: NDArray[np.uint8] | None = None


def open_source(path: Path) -> Source:
    """A record.json or its folder, or a picture with its record in it.

    Raises InputError for any other file, and for a picture whose pixels are no longer those that
    its record is of.
    """
    if path.is_dir():
        path /= RECORD
    if path.suffix.lower() != PNG and not _begins(path, SIGNATURE):
        record = recording.read_record(path)
        return Source(record, recording.parse(record, str(path)), str(path))
    png = read_png(path, KEYWORD)
    if png.text is None:
        why = _SHEET if path.name == GRID else _reason(png.keywords)
        raise InputError(f"{str(path)!r} has no record of headstart in it{why}")
    try:
        record = loads(png.text.encode())
        check_shape(record, {}, str(path), f"the record of {_PICTURE}")
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the record in {str(path)!r} is damaged: {error!s:.200}") from error
    record = cast("dict[str, Any]", record)
    recorded = recording.parse(record, str(path))
    if recorded.position is None:
        raise InputError(f"the record in {str(path)!r} is damaged: it is not of one picture")
    rgb, digests = None, recorded.results.get("rgb", ())
    if png.size == recorded.size:
        rgb = read_rgb(path)
    if rgb is None or hashlib.sha256(rgb.tobytes()).hexdigest() not in digests:
        raise InputError(
            f"{str(path)!r} was edited, or written again with other pixels: they are not those of "
            "the record in it. Replay the file that was written first"
        )
    return Source(record, recorded, str(path), rgb)


def _reason(keywords: Sequence[str]) -> str:
    if programs := [_FOREIGN[keyword] for keyword in keywords if keyword in _FOREIGN]:
        return f": what it says of itself was written by {programs[0]}; expected {_PICTURE}"
    return (
        ": it was written with --no-metadata, or by another program; replay the record.json beside "
        f"it, or give {_PICTURE}"
    )


def _begins(path: Path, signature: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(signature)) == signature
    except OSError:
        return False  # `read_record` raises the error


def replay(
    record: Mapping[str, Any] | str | os.PathLike[str],
    engine: Engine,
    *,
    on_step: Callable[[State], object] | None = None,
    cond: Cond | None = None,
    uncond: Cond | None = None,
    noise: Noise | None = None,
) -> Trajectory:
    """Run a record again and compare SHA-256 of every latent and image.

    record                what Trajectory.record() gave, or the path of a record.json, of its folder
                          or of a PNG that `headstart sample` or Trajectory.save wrote. Of a picture
                          its pixels are compared; the Trajectory holds it alone
    cond, uncond, noise   the tensors of the run, which the record does not hold

    Digests of weights may come from the cache on disk (`engine.digests`), so a replay trusts the
    files' size, times and inode; with HEADSTART_CACHE=off it reads them through.

    Raises InputError for a record of other weights, and for a result that is not equal, with the
    first image that differs and what differs of the machine. A network's rounding depends on
    device, versions, thread count and batch, so only the same of these promise the same bits; with
    graphs on a GPU also on what cuDNN found fastest, unless torch.backends.cudnn.deterministic.
    """
    if isinstance(record, Mapping):
        source = Source(record, recording.parse(record))
    elif isinstance(cast("object", record), str | os.PathLike):
        source = open_source(Path(record))
    else:
        raise InputError(
            f"replay(record, engine): record is what Trajectory.record() gave, or the path of a "
            f"record.json, its folder or a picture, got {type(record).__name__}"
        )
    recorded = source.recorded
    tensors = {"cond": cond, "uncond": uncond, "noise": noise}
    check_tensors(recorded, [name for name, value in tensors.items() if value is not None])
    _check_lengths(recorded, engine)
    adapters = engine.adapters.look()
    files = {**engine.weights.files, **adapters.files()}
    recording.check_weights(recorded, recording.weigh(files))
    try:
        check_clip_skip(recorded.reading.get("clip_skip"), engine.text)
    except InputError as error:
        raise InputError(f"the record cannot be run by these weights: its {error}") from error
    with warnings.catch_warnings():
        # The first run warned of what a prompt could mean; in a replay it cannot be changed.
        warnings.filterwarnings("ignore", r"prompt style .* as letters|.*is read as text;")
        run, image = rerun_of(recorded, engine.text)
        again = engine.with_reading().sample(
            run.prompts,
            **{**run.reading, **tensors},  # pyright: ignore[reportArgumentType]
            plan=run.table,
            seeds=run.seeds,
            negative=run.negative,
            size=run.size,
            batch=(run.chunk, *(run.decode or (run.chunk, 1))),
            adapters=adapters.recorded_strengths(run.adapters),
            diversify=run.diversify,
            on_step=on_step,
        )
    if recorded.position is not None:
        again = _only(again, image, recorded)
    if difference := recording.first_difference(recorded, again.recorded()):
        raise InputError(
            f"the replay is not equal to the record: {difference}{_pixels(source, again)}"
        )
    return again


def _only(run: Trajectory, image: int, recorded: Recorded) -> Trajectory:
    """One image of a run, with the record that it was drawn by."""
    part, first = slice(image, image + 1), 0 if len(recorded.prompts) == 1 else image
    return replace(
        run,
        rgb=run.rgb[part],
        latents=run.latents[part],
        prompts=recorded.prompts[first : first + 1],
        seeds=recorded.seeds[first : first + 1],
        chosen=None if run.chosen is None else run.chosen[part],
        source=replace(recorded, given=run.given),
    )


def _pixels(source: Source, again: Trajectory) -> str:
    """How far the picture of a replay is from the one of the record."""
    if source.rgb is None:
        return ""
    distance = np.abs(again.rgb[0].cpu().numpy().astype(np.int16) - source.rgb).max(-1)
    count, most = np.count_nonzero(distance), distance.max()
    return f". {count} of {distance.size} pixels differ, by {most} of 255 at most"


def check_tensors(recorded: Recorded, names: Sequence[str]) -> None:
    """Raise InputError unless `names` are the options that the run had as tensors."""
    expected = list(dict.fromkeys(re.split(r"[.\[]", name)[0] for name in recorded.given))
    if missing := [name for name in expected if name not in names]:
        options = ", ".join(f"{name}=..." for name in missing)
        raise InputError(
            f"the run was given {' and '.join(f'{name}=' for name in missing)} as tensors, of "
            "which its record has digests alone, so nothing but their owner can run it again: in "
            f"Python, headstart.replay(record, engine, {options})"
        )
    if extra := [name for name in names if name not in expected]:
        raise InputError(f"the run was not given {extra[0]}=: leave it out")


def _check_lengths(recorded: Recorded, engine: Engine) -> None:
    """Raise InputError for a longer text in a record of the first format, whose version read one
    piece of each."""
    if not recorded.first:
        return
    room, tokenizer = engine.text.length - 2, engine.text.tokenizer
    negative = recorded.negative if isinstance(recorded.negative, str) else ""
    for text in (*recorded.prompts, negative):
        if len(tokenizer.tokens(text)) > room:
            raise InputError(
                f"the record was made by a version that cut prompts to {room} tokens, and "
                f"{text!r:.60} has more, all of which are read now: sample it anew, or shorten it "
                "to what was read"
            )
