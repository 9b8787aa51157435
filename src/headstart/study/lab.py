"""An engine with a judge, and the cells of cases: the pictures of one prompt as numbers.

diversity@SPACE  [1 + R]  of all seeds, then of R draws of the seeds
vendi@SPACE      []       effective number of different pictures; NaN where cosines mean nothing
features@SPACE   [n, d]   float32, where a Gaussian of them means something
score, nearest   [n]      of each picture; where a judge has text, and where there is a reference
scored_by        []       the scorer's name: a folder may be measured again with another one
chosen           [n]      seeds that a method chose instead of the run's
images, passes, networks, seconds []    passes and wall seconds of one picture; UNets in memory
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from headstart.conditioning.texts import final_text
from headstart.engine.engine import Engine
from headstart.engine.picture import picture_texts
from headstart.metrics.gram import group_features
from headstart.metrics.metrics import vendi
from headstart.metrics.resample import measure_diversity
from headstart.pictures.png import encode_png
from headstart.plan.by_name import PlanSettings
from headstart.plan.table import StepTable
from headstart.spaces.extractor import Array, Judge, Rgb
from headstart.study.cases import Case
from headstart.study.store import Arrays, CellKey, Store

NEAREST_SIDE = 64
"""Pictures are compared with the reference at this size, as a copy is a copy at any."""


@dataclass(frozen=True, kw_only=True)
class Lab:
    """An engine, a judge, and what is sampled.

    settings   of plans by name: the preset, the distilled model's grid
    size       (height, width) in pixels; None: the model's own
    keep       pictures of each cell that are saved as files
    weights    role -> SHA-256 of what is loaded, adapters too
    reference  rgb [m, 64, 64, 3] that pictures are compared with one by one
    """

    engine: Engine
    judge: Judge
    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: PlanSettings = field(default_factory=PlanSettings)
    size: tuple[int, int] | None = None
    keep: int = 16
    reference: Rgb | None = None
    weights: Mapping[str, str] = field(default_factory=dict[str, str])

    @cached_property
    def reference_digest(self) -> str | None:
        """SHA-256 of the reference pictures."""
        return None if self.reference is None else sha256(self.reference.tobytes()).hexdigest()

    @cached_property
    def tables(self) -> dict[str, StepTable]:
        """The tables compiled so far, by the case's name."""
        return {}

    def table(self, case: Case) -> StepTable:
        """The rows of a case, without a warning where a grid leaves what a model was trained for:
        that is its purpose."""
        if case.name not in self.tables:
            settings: dict[str, Any] = {**self.settings} if isinstance(case.plan, str) else {}
            if case.plan == "base":
                settings = {"preset": settings.get("preset")}
            with warnings.catch_warnings():
                if case.part != "plans":
                    warnings.simplefilter("ignore", UserWarning)
                table = self.engine.compile(case.plan, **{**settings, **case.settings})
            self.tables[case.name] = table
        return self.tables[case.name]

    def check(self, case: Case) -> None:
        """Raise what the engine would raise for this case, and run nothing."""
        self.engine.iterate(
            self.prompts[0], plan=self.table(case), seeds=self.seeds, size=self.size,
            diversify=case.diversify,
        )  # fmt: skip

    def identity(self, case: Case, number: int) -> str:
        """What decides a case's cell; its spaces are not part of it, as `read` looks for them."""
        return self.cell_of(
            number,
            self.seeds,
            table=json.loads(self.table(case).to_json()),
            diversify=list(case.diversify),
            reference=self.reference_digest,
            **({"reading": dict(self.engine.reading)} if self.engine.reading else {}),
        )

    def cell_of(self, number: int, seeds: Sequence[int], **of: Any) -> str:
        """What decides a cell, as text: a prompt, seeds, size and weights, and `of`."""
        shared = {
            "prompt": self.prompts[number],
            "seeds": [str(seed) for seed in seeds],
            "size": self.size,
            "weights": dict(self.weights),
        }
        return json.dumps({**shared, **of}, sort_keys=True)

    def passes(self, case: Case) -> float:
        """Network passes of all the pictures of one cell, without what methods add."""
        return float(self.table(case).passes() * len(self.seeds))

    def read(self, store: Store, case: Case, number: int) -> Arrays | None:
        """The finished cell, if it has every space of the judge, and scores by this one."""
        cell = store.read(CellKey(case.part, case.name, number), self.identity(case, number))
        if cell is None or any(f"diversity@{s.name}" not in cell for s in self.judge.spaces):
            return None
        scored_by = str(cell.get("scored_by", self.judge.scored_by))
        if self.judge.score and ("score" not in cell or scored_by != self.judge.scored_by):
            return None
        return cell

    def measure(self, store: Store, case: Case, number: int) -> None:
        """Sample one cell, or measure its saved pictures again, and write it."""
        prompt, key = self.prompts[number], CellKey(case.part, case.name, number)
        identity = self.identity(case, number)
        before = store.read(key, identity)
        rgb = None if before is None else store.pictures(case.name, number, self.seeds)
        if before is None or rgb is None:
            rgb, pngs, cost = self._sample(case, prompt)
            store.keep(case.name, number, self.seeds, pngs)
        else:
            cost = {name: before[name] for name in COST if name in before}
        numbers = measurements(rgb, prompt, self.judge, self.reference)
        store.write(key, identity, {**cost, **numbers})

    def _sample(self, case: Case, prompt: str) -> tuple[Rgb, list[bytes], dict[str, NDArray[Any]]]:
        """Pixels, the PNGs to save, each with its record, and what they cost."""
        begin = time.perf_counter()
        table = self.table(case)
        run = self.engine.sample(
            prompt, plan=table, seeds=self.seeds, size=self.size, diversify=case.diversify
        )
        rgb = run.rgb.cpu().numpy()
        cost: dict[str, NDArray[Any]] = {
            "images": np.array(float(len(rgb))),
            "passes": np.array(float(run.passes)),
            "networks": np.array(float(len({id(self.engine.denoisers[m]) for m in table.models}))),
            "seconds": np.array((time.perf_counter() - begin) / len(rgb)),
        }
        if run.chosen is not None:
            cost["chosen"] = np.array(run.chosen, np.uint64)
        recorded = run.recorded()
        pngs = [
            encode_png(image, picture_texts(recorded, number, run.tokens))
            for number, image in enumerate(rgb[: self.keep])
        ]
        return rgb, pngs, cost


COST = ("images", "passes", "networks", "seconds", "chosen")


def measurements(
    rgb: Rgb, prompt: str, judge: Judge, reference: Rgb | None = None
) -> dict[str, NDArray[Any]]:
    """The arrays listed above of pictures of one prompt, without what they cost."""
    arrays: dict[str, NDArray[Any]] = {}
    for space in judge.spaces:
        features = group_features(space, rgb)
        diversity = np.array([np.nan])
        if len(features) > 1:
            values, draws = measure_diversity([features], space.distance)
            diversity = np.concatenate((values, draws.ravel()))
        cosine = space.distance == "cosine"
        arrays[f"diversity@{space.name}"] = diversity
        arrays[f"vendi@{space.name}"] = np.array(vendi(features) if cosine else np.nan)
        if not space.wide:
            arrays[f"features@{space.name}"] = features.astype(np.float32)
    if judge.score is not None:
        arrays["score"] = judge.score(rgb, [final_text(prompt)] * len(rgb)).astype(np.float64)
        arrays["scored_by"] = np.array(judge.scored_by)
    if reference is not None:
        arrays["nearest"] = nearest(rgb, reference)
    return arrays


def nearest(rgb: Rgb, reference: Rgb) -> Array:
    """[n]: root mean square, in levels of 255, to the nearest of the reference [m, 64, 64, 3]."""
    a, b = (torch.as_tensor(pixels).flatten(1).float() for pixels in (small(rgb), reference))
    return (torch.cdist(a, b).amin(1) / a.shape[1] ** 0.5).double().numpy()


def small(rgb: Rgb) -> Rgb:
    """Pictures [n, H, W, 3] reduced to [n, 64, 64, 3], each pixel the mean of its area."""
    size = (NEAREST_SIDE, NEAREST_SIDE)
    box = Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(image).resize(size, box)) for image in rgb])
