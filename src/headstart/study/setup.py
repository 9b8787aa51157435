"""A study from an engine and a request: its cases, its judge, its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headstart.engine import record
from headstart.engine.engine import Engine
from headstart.errors import InputError, PlanError
from headstart.metrics.judges import PictureSource, choose_judge
from headstart.plan.by_name import PlanSettings, named_pair
from headstart.plan.request import check_size
from headstart.spaces.extractor import Judge
from headstart.study.cases import DIALS, METHODS, PARTS, Case, Grids, Part, cases_of
from headstart.study.experiments import Attachable, experiments_of
from headstart.study.lab import Lab, small
from headstart.study.store import FORMAT
from headstart.study.study import Study
from headstart.sweep.gallery import load_rgb, read_pictures
from headstart.sweep.gallery_features import read_reference

BUNDLED = "bundled"
REQUIRED = ("base", "distilled")
"""The models, and the plans, that all others are measured against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A user's request for a study.

    settings   the preset and the distilled model's own grid, as `Engine.compile` takes them
    parts      of cases.PARTS and the experiments; None: all that these weights allow
    features   names of spaces, the main one first; None: those valid for the pictures
    reference  a folder of pictures, or "bundled"
    controls   adapters, and the edit that each should make
    loading    how the files were read where they do not say it: heads, a tokenizer's digest
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: PlanSettings = field(default_factory=PlanSettings)
    size: int | tuple[int, int] | None = None
    parts: Sequence[str] | None = None
    grids: Grids = field(default_factory=dict[Part, Sequence[Any]])
    features: Sequence[str] | None = None
    reference: str | None = None
    keep: int = 16
    controls: Sequence[Attachable] = ()
    loading: Mapping[str, Any] = field(default_factory=dict[str, Any])


def study_of(engine: Engine, request: Request) -> tuple[Study, tuple[str, ...]]:
    """The study, and notes for the user.

    Raises InputError or PlanError for anything that a case would refuse, before any is sampled.
    """
    if missing := sorted(set(REQUIRED) - set(engine.denoisers)):
        raise InputError(f"a study compares two models, and {missing[0]!r} is not loaded: give it")
    side = check_size(request.size, engine.weights.image_size, engine.weights.downscale)
    source = PictureSource("these weights", engine.weights.lineage, frozenset({side}))
    judge, notes = choose_judge([source], request.features)
    reference, pictures, spaces = request.reference, None, judge.spaces
    if reference == BUNDLED:  # moments alone, without pictures, and of one space
        spaces = spaces[:1]
    elif reference is not None:
        rgb = load_rgb(read_pictures(Path(reference)))
        pictures = np.concatenate([*map(small, rgb)])
    lab = Lab(
        engine=engine,
        judge=judge,
        prompts=request.prompts,
        seeds=request.seeds,
        settings=request.settings,
        size=side,
        keep=request.keep,
        reference=pictures,
        weights=digests_of(engine),
    )
    cases, omissions = _possible(lab, _cases(engine, request), request.grids)
    experiments, skips = experiments_of(lab, cases, request.parts, request.controls)
    references = {
        space.name: read_reference(reference, Judge((space,)))
        for space in spaces
        if reference is not None and not space.wide  # a wide space has no Gaussian
    }
    study = Study(lab, cases, request.prompts, experiments, references)
    return study, (*notes, *omissions, *skips)


def settings_of(engine: Engine, study: Study, request: Request) -> dict[str, Any]:
    """The contents of study.json, which is written before a study begins; see `store.FIXED`."""
    weights, seeds = engine.weights, request.seeds
    attached = engine.adapters.now()
    strengths = attached.run_strengths(None)
    guidance = weights.embedded_guidance
    loading = {**request.loading, **({} if guidance is None else {"embedded_guidance": guidance})}
    return {
        "format": FORMAT,
        "pair": {
            "preset": weights.preset,
            "lineage": weights.lineage,
            "weights": record.weigh(weights.files),
        },
        "weights": digests_of(engine),
        "adapters": {name: dict(entry) for name, entry in attached.describe(strengths).items()},
        "prompts": list(request.prompts),
        "seeds": {"first": seeds[0], "last": seeds[-1], "count": len(seeds)},
        "numbers": [str(seed) for seed in seeds],
        "size": list(study.lab.size or ()),
        "dtype": str(weights.dtype).removeprefix("torch."),
        "loading": loading or None,
        "machine": record.machine(engine.device, weights.dtype, engine.runner, guidance),
        "cases": list(study.cases),
    }


def reference_of(study: Study, request: Request) -> dict[str, Any] | None:
    """The name of the reference, and its number of pictures, None for moments alone."""
    if request.reference is None:
        return None
    pictures = study.lab.reference
    name = next((reference.name for reference in study.references.values()), request.reference)
    return {"name": name, "images": None if pictures is None else len(pictures)}


def digests_of(engine: Engine) -> dict[str, str]:
    """Role -> SHA-256 of the files that decide the pictures, adapters too."""
    files = record.weigh({**engine.weights.files, **engine.adapters.now().files()})
    return {role: str(file["sha256"]) for role, file in files.items()}


def _cases(engine: Engine, request: Request) -> dict[str, Case]:
    pair = named_pair("distilled", request.settings, engine.weights.preset)
    steps = len(engine.compile("distilled", **request.settings))
    parts: list[Part] = [p for p in PARTS if request.parts is None or p in request.parts]
    is_lora = engine.denoisers["base"] is engine.denoisers["distilled"]
    methods = (*METHODS, *(DIALS if is_lora else ()))
    schedule = engine.weights.schedules["distilled"]
    return cases_of(pair, steps, schedule, request.grids, parts, methods)


def _possible(
    lab: Lab, cases: Mapping[str, Case], grids: Grids
) -> tuple[dict[str, Case], tuple[str, ...]]:
    """The cases that can be sampled, and why others cannot.

    Some of the usual values make no plan on some pairs, such as k = 2 of one step. A value that the
    user gives must make one.
    """
    possible: dict[str, Case] = {}
    omissions: dict[str, list[str]] = {}
    for name, case in cases.items():
        try:
            lab.check(case)
            possible[name] = case
        except (InputError, PlanError) as error:
            if name in REQUIRED or (case.part != "plans" and case.part in grids):
                raise
            line = str(error).splitlines()[0]  # "preset('turbo', n=2): reason", of many cases
            omissions.setdefault(line.partition("): ")[2] or line, []).append(name)
    return possible, tuple(
        f"left out: {', '.join(names)}: {reason}" for reason, names in omissions.items()
    )
