"""A cell of `bench/paper.py` is one case of one prompt: a file that is whole or absent.

    WORK/<case>/<prompt>.npz      what is measured of all seeds, the first pictures, what it is of

A cell says in `identity` what it is of (case, prompt, seeds, digests of the weights), so one of
other settings is drawn again and never mixed in. Ended at any moment, the next run goes on.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
from numpy.typing import NDArray
from paper_cases import Case, images

import headstart as hs
import headstart_weights
from headstart.adapters.extract import extract
from headstart.errors import InputError
from headstart.metrics.metrics import pixel_extractor
from headstart.metrics.scorer import Scorer, load_scorer

Array = NDArray[np.float64]
KEPT = 16
"""Pictures of a cell that are kept for the contact sheets."""
RANK = 128
"""No matrix of the pair's UNet has a higher rank; biases and norms are no adapter's business."""
STUDENTS = ("distilled", "distilled_unguided", "progressive", "lora")


class Cell(NamedTuple):
    """features [n, D] unit; pixels [n, 192]; score, right [n]; rgb uint8 [KEPT, H, W, 3]."""

    features: Array
    pixels: Array
    score: Array
    right: Array
    rgb: NDArray[np.uint8]
    spread: Array
    passes: float


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Where cells are, what they are of, and the networks, loaded when first used.

    names    everything the scorer ranks a picture among, the pair's 28
    prompts  what is drawn, some of them
    data     folder of the recipe: pictures, and students that are not bundled
    """

    work: Path
    data: Path
    names: Sequence[str]
    prompts: Sequence[str]
    seeds: Sequence[int]

    @cached_property
    def scorer(self) -> Scorer:
        return load_scorer(headstart_weights.path("scorer"))

    @cached_property
    def engines(self) -> dict[str, hs.Engine]:
        return {}

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every student's file that there is."""
        found = {name: self.file(name) for name in STUDENTS}
        return {name: harness.sha256(path) for name, path in found.items() if path.exists()}

    def file(self, student: str) -> Path:
        if student in ("distilled", "distilled_unguided"):
            return headstart_weights.path(student)
        return self.data / f"{student}.safetensors"

    def engine(self, student: str) -> hs.Engine:
        if student not in self.engines:
            base, file = headstart_weights.path("base"), self.file(student)
            if student == "lora":
                self.engines[student] = hs.Engine.load(base, distilled_lora=file, preset="demo")
            else:
                self.engines[student] = hs.Engine.load(
                    base, file, preset="demo", prediction="v", head_dim=32
                )
        return self.engines[student]

    def identity(self, case: Case, prompt: str) -> str:
        """What a cell is of, as text."""
        told: dict[str, Any] = asdict(case) | {
            "prompt": prompt,
            "seeds": [self.seeds[0], len(self.seeds)],
            "base": harness.sha256(headstart_weights.path("base")),
            "weights": self.digests[case.student],
        }
        told.pop("about")
        return json.dumps(told, sort_keys=True)

    def cell_path(self, name: str, prompt: str) -> Path:
        return self.work / name / f"{self.prompts.index(prompt):02d}.npz"

    def read(self, name: str, case: Case, prompt: str) -> Cell | None:
        """The finished cell; None where there is none, or one of other settings."""
        try:
            with self.cell_path(name, prompt).open("rb") as stream, np.load(stream) as held:
                if str(held["identity"]) != self.identity(case, prompt):
                    return None
                values = {field: held[field] for field in Cell._fields}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        wide = ("features", "pixels", "score", "right", "spread")
        values |= {field: values[field].astype(np.float64) for field in wide}
        return Cell(**{**values, "passes": float(values["passes"])})

    def measure(self, name: str, case: Case, prompt: str) -> None:
        """Draw one cell and put it in place."""
        drawn = images(self.engine(case.student), case, prompt, self.seeds)
        pixels = torch.from_numpy(drawn.rgb).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with torch.inference_mode():
            features = self.scorer.features(pixels).numpy()
            scores = self.scorer.score(pixels, self.names)
        own = list(self.names).index(prompt)
        _write(
            self.cell_path(name, prompt),
            identity=np.array(self.identity(case, prompt)),
            features=features.astype(np.float32),
            pixels=pixel_extractor(8).features(drawn.rgb).astype(np.float32),
            score=scores[:, own].numpy(),
            right=(scores.argmax(1) == own).numpy(),
            rgb=drawn.rgb[:KEPT],
            spread=np.array(drawn.spread),
            passes=np.array(drawn.passes),
        )

    def cells(self, name: str, case: Case) -> list[Cell] | None:
        """One a prompt, or None where any is missing."""
        if case.student not in self.digests:
            return None
        found = [self.read(name, case, prompt) for prompt in self.prompts]
        return None if None in found else [cell for cell in found if cell is not None]


def make_adapter(lab: Lab) -> Path:
    """The distilled model as a LoRA on the base, what a LoRA-distilled model is; made once."""
    path = lab.file("lora")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        extract(
            headstart_weights.path("base"), headstart_weights.path("distilled"), path, rank=RANK
        )
    return path


def read_pictures(data: Path, prompts: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
    """The recipe's pictures of these prompts: "training", and artwork that was "held-out".

    Raises InputError where the folder has none.
    """
    from headstart_weights.recipe.artwork import load_sprites
    from headstart_weights.recipe.dataset import Dataset, compose_caption, load_dataset

    try:
        training = load_dataset(data)
        held_out = Dataset.build(load_sprites(data, "held_out"), seed=1)
    except InputError as error:
        raise InputError(
            f"{error}: python -m headstart_weights.recipe data --work {data} (the extra `train`, "
            "npm, half a minute), or give --no-pictures"
        ) from error
    wanted = set(prompts)
    return {
        name: data_set.images[[compose_caption(i.concept) in wanted for i in data_set.items]]
        for name, data_set in (("training", training), ("held-out", held_out))
    }


def features_of(scorer: Scorer, rgb: NDArray[np.uint8]) -> Array:
    """Unit features [n, D] of pictures [n, H, W, 3]."""
    parts: list[Array] = []
    for begin in range(0, len(rgb), 128):
        pixels = torch.from_numpy(rgb[begin : begin + 128]).permute(0, 3, 1, 2).float()
        with torch.inference_mode():
            parts.append(scorer.features(pixels / 127.5 - 1.0).double().numpy())
    return np.concatenate(parts)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    _write(path, **arrays)


def _write(path: Path, **arrays: NDArray[Any]) -> None:
    """Aside, then renamed: a file is whole or absent, whenever the run is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
