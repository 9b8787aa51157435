"""What a run was, as JSON: enough to repeat it, and to say what differs when it does not repeat.

record = request + exact table + weights + machine + SHA-256 of every image and latent
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart.adapters.snapshot import ROLE
from headstart.adapters.strength import Strength
from headstart.diversify.methods import read_methods
from headstart.engine.digests import Identity, digest
from headstart.errors import InputError
from headstart.input import check_shape, read_json
from headstart.networks.prompt_style import PROMPT_STYLES, Exclamation
from headstart.plan.table import StepTable

FORMAT = "headstart.record/2"
FIRST = "headstart.record/1"
"""Its prompts are letters alone (no `->`, no tags) of one piece of tokens, and its empty negative
prompt is none."""
RECORD = "the record.json that sampling wrote"
_PLAIN = (None, str, float, bool)
_SHAPE = {
    "format": str,
    "prompts": [str],
    "seeds": [int],
    "negative": (str, None, [(None, str)]),
    "size": [int],
    "chunk": int,
    "decode?": {"chunk": int, "bands": int},
    "table": {},
    "weights": {"": {"file": str, "sha256": str}},
    "machine": {
        **{"": _PLAIN, "dtype?": str, "vae_dtype?": str, "embedded_guidance?": (None, float)},
        **{"exclamation?": str, "ema?": bool, "allow?": [str], "packed?": (bool, str)},
    },
    "results": {"": [str]},
    "adapters?": {"": {"to": [str], "allow": [str], "strength": {"models?": [str]}}},
    "lineage?": (None, str),
    "diversify?": [str],
    "chosen?": [int],
    "reading?": {
        **{name + "?": (str, [(None, str)]) for name in ("second", "negative_second")},
        **{name + "?": [int] for name in ("original_size", "crop", "target_size")},
        **{"style?": str, "clip_skip?": int, "literal?": bool},
    },
    "given?": {"": str},
    "position?": {name: int for name in ("image", "images", "text", "texts", "tokens")},
}
Json = dict[str, Any]
Files = tuple[str, tuple[Path, ...]]
WeightFiles = Mapping[str, Files]
"""Role -> (the name to record, the files on disk)."""


MOST_IMAGES = 4096
"""Of the largest run that one of its pictures repeats: a picture may come from a stranger."""


class Position(NamedTuple):
    """Where a picture was in its run, on which its rounding depends.

    image, images   its number, and how many there were
    text, texts     the same of its prompt among those that were encoded at once
    tokens          of each of them, 0 where none was encoded
    """

    image: int
    images: int
    text: int
    texts: int
    tokens: int

    @classmethod
    def of(cls, values: Mapping[str, int], record: Mapping[str, Any]) -> Position:
        """What a picture's record says. Raises ValueError for a position that no picture has."""
        position = cls(*(values[name] for name in cls._fields))
        prompts: Sequence[str] = record["prompts"]
        image = 0 <= position.image < position.images <= MOST_IMAGES
        text = 0 <= position.text < position.texts <= position.images
        if not (image and text and position.tokens >= 0):
            raise ValueError(f"no picture is at position {values}")
        if len(prompts) not in (1, position.images) or len(prompts) != len(record["seeds"]):
            raise ValueError(f"expected 1 or {position.images} prompts, and as many seeds")
        return position


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A record as values, its fields in the order in which they are written."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative: str | Sequence[str | None] | None
    size: tuple[int, int]
    chunk: int
    lineage: str | None = None
    """The family whose images these are; None where the weights do not say."""
    table: StepTable
    weights: Mapping[str, Mapping[str, str]]
    machine: Mapping[str, object]
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Name -> models, names that were allowed, strength; their files are among the weights."""
    results: Mapping[str, list[str]]
    diversify: tuple[str, ...] = ()
    chosen: tuple[int, ...] | None = None
    """Seeds that a method chose, of which these are the images."""
    reading: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How prompts are read, where it is not the usual way: arguments of `Engine.sample`."""
    given: Mapping[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of the caller's tensors, which a record does not hold."""
    decode: tuple[int, int] | None = None
    """Samples that were in the decoder at once, and its bands; None: as many as `chunk`, whole."""
    position: Position | None = None
    """Of a picture, whose record this is: results are of it alone. None: of a whole run."""
    first: bool = False
    """Whether it is of the first format."""


def weigh(files: WeightFiles) -> Json:
    """Role -> {file, sha256}; digests of large files are kept on disk: see `engine.digests`."""
    return {
        role: {
            "file": name,
            "sha256": _digest_of(tuple((path, Identity.of(path.stat())) for path in paths)),
        }
        for role, (name, paths) in files.items()
    }


def machine(
    device: torch.device,
    dtype: torch.dtype | str,
    runner: str,
    guidance: float | None = None,
    exclamation: Exclamation = "openclip",
    ema: bool | None = None,
    allow: Sequence[str] = (),
    vae_dtype: torch.dtype = torch.float32,
    packed: bool | str = False,
) -> Json:
    """What rounding may depend on, and what a difference is explained by; `guidance`: embedded,
    `exclamation`: how "!" is read, where it is not as usual; `allow`: what of the files was
    ignored; `vae_dtype`: where not all is float32; `packed`: weights laid out for a CPU, all,
    without tiles ("direct"), or the decoder's alone ("decoder").
    """
    plain = dtype == vae_dtype == torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "device_name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "runner": runner,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in ("headstart", "torch", "numpy", "transformers")},
        **({} if guidance is None else {"embedded_guidance": guidance}),
        **({} if ema is None else {"ema": ema}),
        **({"allow": list(allow)} if allow else {}),
        **({"packed": packed} if packed else {}),
        **({} if plain else {"vae_dtype": str(vae_dtype).removeprefix("torch.")}),
        **({} if exclamation == "openclip" else {"exclamation": exclamation}),
    }


def digests(batch: Tensor) -> list[str]:
    """SHA-256 of each sample's bytes, as little-endian contiguous memory."""
    host = batch.detach().cpu().contiguous()
    return [hashlib.sha256(sample.numpy().tobytes()).hexdigest() for sample in host]


_OPTIONAL = ("diversify", "chosen", "reading", "given", "decode", "position")
"""Fields that a record has only where they are not empty."""


def describe(run: Recorded) -> Json:
    """The JSON-able record; floats survive json.dumps and json.loads exactly."""
    values = {f.name: getattr(run, f.name) for f in fields(run) if f.name != "first"}
    values["table"] = json.loads(run.table.to_json())
    if run.decode is not None:
        values["decode"] = dict(zip(("chunk", "bands"), run.decode, strict=True))
    if run.position is not None:
        values["position"] = run.position._asdict()
    entries = {name: value for name, value in values.items() if value or name not in _OPTIONAL}
    return json.loads(json.dumps({"format": FORMAT, **entries}, default=dict))  # tuples are lists


def parse(record: Mapping[str, Any], source: str = "the record") -> Recorded:
    """What `describe` wrote. Raises InputError, naming the `source`, for what is not a record."""
    if isinstance(kind := record.get("format"), str) and kind not in (FORMAT, FIRST):
        raise InputError(f"{source!r}: expected a record of format {FORMAT}, got {kind!r:.60}")
    check_shape(record, _SHAPE, source, RECORD)
    try:
        read_methods(diversify := record.get("diversify", []))
    except InputError as error:
        raise InputError(
            f"{source!r} cannot be run by headstart {_version('headstart')}, a newer one may know "
            f"its method: {error}"
        ) from error
    try:
        height, width = record["size"]
        adapters: Mapping[str, Mapping[str, Any]] = record.get("adapters", {})
        for name, adapter in adapters.items():
            Strength(**adapter["strength"])
            record["weights"][ROLE + name]  # its file
        return Recorded(
            prompts=tuple(record["prompts"]),
            seeds=tuple(record["seeds"]),
            negative=(record["negative"] or None) if kind == FIRST else record["negative"],
            size=(height, width),
            chunk=record["chunk"],
            table=StepTable.from_json(json.dumps(record["table"])),
            weights={role: dict(file) for role, file in record["weights"].items()},
            machine=dict(record["machine"]),
            results={name: list(digests) for name, digests in record["results"].items()},
            adapters={name: dict(adapter) for name, adapter in adapters.items()},
            lineage=record.get("lineage"),
            diversify=tuple(diversify),
            chosen=tuple(record["chosen"]) if "chosen" in record else None,
            reading={"literal": True} if kind == FIRST else _reading(record.get("reading", {})),
            given=dict(record.get("given", {})),
            decode=(d["chunk"], d["bands"]) if (d := record.get("decode")) else None,
            first=kind == FIRST,
            position=Position.of(values, record) if (values := record.get("position")) else None,
        )
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{source!r} is damaged, or not {RECORD}: {error!s:.200}") from error


def _reading(reading: Mapping[str, Any]) -> Json:
    """Lists as the tuples that they were. Raises KeyError for an option that is not known."""
    names = {name.removesuffix("?") for name in _SHAPE["reading?"]}  # pyright: ignore
    if unknown := sorted(set(reading) - names):
        raise KeyError(f"reading has {unknown[0]!r:.40}, which this version does not know")
    if (style := reading.get("style", "plain")) not in PROMPT_STYLES:
        raise ValueError(f"reading.style: expected {', '.join(PROMPT_STYLES)}, got {style!r:.40}")
    if (skip := reading.get("clip_skip", 1)) < 1:
        raise ValueError(f"reading.clip_skip: expected at least 1, got {skip!r:.40}")
    return {n: tuple(v) if isinstance(v, list) else v for n, v in reading.items()}  # pyright: ignore


def read_record(path: Path) -> Json:
    """The JSON object in a file. Raises InputError for a missing, unreadable or foreign file."""
    return read_json(path, RECORD, {})


def check_weights(recorded: Recorded, now: Mapping[str, Mapping[str, str]]) -> None:
    """Raise InputError unless every file the record names has the recorded bytes, and no adapter is
    attached besides."""
    if extra := sorted(r for r in now if r.startswith(ROLE) and r not in recorded.weights):
        raise InputError(f"the record was made without {', '.join(extra)}: detach it")
    for role, file in recorded.weights.items():
        other = now.get(role)
        if other is None or other["sha256"] != file["sha256"]:
            what = f"{other['file']} with sha256 {other['sha256'][:16]}…" if other else "none"
            raise InputError(
                f"the record was made with {role} {file['file']}, sha256 {file['sha256'][:16]}…; "
                f"this engine has {what}: load the recorded file"
            )


def first_difference(recorded: Recorded, now: Recorded) -> str | None:
    """Where the results part, and what of the machine differs; None where they are equal."""
    for name in dict.fromkeys((*recorded.given, *now.given)):
        if recorded.given.get(name) != now.given.get(name):
            return f"first difference: {name}, which was given, is not the recorded one"
    position = recorded.position
    for kind in ("latents", "rgb") if position is None else ("rgb",):
        before, after = recorded.results.get(kind, []), now.results[kind]
        for image, sha256 in enumerate(after):
            if len(before) != len(after) or before[image] != sha256:
                number = image if position is None else min(position.image, len(now.seeds) - 1)
                where = f"{kind} of image {number}, seed {now.seeds[number]}"
                return f"first difference: {where}, prompt {now.prompts[number]!r:.60}; " + (
                    _explanation(recorded.machine, now.machine, alone=position is not None)
                )
    return None


_SETTINGS = ("exclamation", "embedded_guidance", "ema")
"""Of a machine's entries those that change what is computed; absent means the usual."""


def _explanation(
    recorded: Mapping[str, object], now: Mapping[str, object], *, alone: bool = False
) -> str:
    changed = [
        f"{key} {recorded.get(key)!r} then, {now.get(key)!r} now"
        for key in {**now, **recorded}
        if recorded.get(key) != now.get(key)
    ]
    if changed:
        message = f"what differs: {'; '.join(changed)}. "
        if settings := [key for key in _SETTINGS if recorded.get(key) != now.get(key)]:
            return message + f"Load the weights with the recorded {' and '.join(settings)}"
        return message + "Networks round differently there"
    same = "machine, versions and settings are the recorded ones, "
    if alone:
        return same + "so its run may have been rounded otherwise: replay the run's record.json"
    return same + "so the results should be equal"


@lru_cache(maxsize=64)
def _digest_of(files: tuple[tuple[Path, Identity], ...]) -> str:
    """SHA-256 of the file, or of the shards' digests one after the other."""
    parts = [digest(path) for path, _ in files]
    joined = b"".join(map(bytes.fromhex, parts))
    return parts[0] if len(parts) == 1 else hashlib.sha256(joined).hexdigest()


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


@lru_cache(maxsize=8)
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
