"""A record run again, every bit compared."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headstart.engine import record as recording
from headstart.engine.engine import Engine
from headstart.engine.given import Noise, Told
from headstart.engine.trajectory import Trajectory
from headstart.engine.words import check_clip_skip
from headstart.errors import InputError
from headstart.sampler import State


def replay(
    record: Mapping[str, Any],
    engine: Engine,
    *,
    on_step: Callable[[State], object] | None = None,
    cond: Told | None = None,
    uncond: Told | None = None,
    noise: Noise | None = None,
) -> Trajectory:
    """Run a record again and compare SHA-256 of every latent and image.

    cond, uncond, noise   what the run was given as tensors, which the record does not hold

    Digests of weights may be those that are kept on disk (`engine.digests`), so what a replay says
    of files rests on their size, times and inode; with HEADSTART_CACHE=off it reads them through.

    Raises InputError for a record of other weights, and for a result that is not equal, with the
    first image that differs and what differs of the machine. A network's rounding depends on
    device, versions, thread count and batch, so only the same of these promise the same bits; with
    graphs on a GPU also on what cuDNN found fastest, unless torch.backends.cudnn.deterministic.
    """
    recorded = recording.parse(record)
    own = {"cond": cond, "uncond": uncond, "noise": noise}
    check_own(recorded, [name for name, told in own.items() if told is not None])
    _check_whole(recorded, engine)
    adapters = engine.adapters.look()
    files = {**engine.weights.files, **adapters.files()}
    recording.check_weights(recorded, recording.weigh(files))
    try:
        check_clip_skip(recorded.reading.get("clip_skip"), engine.text)
    except InputError as error:
        raise InputError(f"the record cannot be run by these weights: its {error}") from error
    with warnings.catch_warnings():
        # What a prompt could mean was said when it was typed; here nobody can type it otherwise.
        warnings.filterwarnings("ignore", r"prompt style .* as letters|.*is read as text;")
        again = engine.with_reading().sample(
            recorded.prompts,
            **{**recorded.reading, **own},  # pyright: ignore[reportArgumentType]
            plan=recorded.table,
            seeds=recorded.seeds,
            negative=recorded.negative,
            size=recorded.size,
            batch=(recorded.chunk, *(recorded.decode or (recorded.chunk, 1))),
            adapters=adapters.recorded(recorded.adapters),
            diversify=recorded.diversify,
            on_step=on_step,
        )
    difference = recording.first_difference(recorded, again.recorded())
    if difference:
        raise InputError(f"the replay is not equal to the record: {difference}")
    return again


def check_own(recorded: recording.Recorded, have: Sequence[str]) -> None:
    """Raise InputError unless `have` is what the run was given as tensors."""
    wanted = list(dict.fromkeys(re.split(r"[.\[]", name)[0] for name in recorded.given))
    if missing := [name for name in wanted if name not in have]:
        asked = ", ".join(f"{name}=..." for name in missing)
        raise InputError(
            f"the run was given {' and '.join(f'{name}=' for name in missing)} as tensors, of "
            "which its record has digests alone, so nothing but their owner can run it again: in "
            f"Python, headstart.replay(record, engine, {asked})"
        )
    if extra := [name for name in have if name not in wanted]:
        raise InputError(f"the run was not given {extra[0]}=: leave it out")


def _check_whole(recorded: recording.Recorded, engine: Engine) -> None:
    """A record of the first format that a version made which read one piece of each text."""
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
