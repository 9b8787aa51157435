"""`headstart sample` with files of every layout: the same numbers give the same bits.

The files are made by `checkpoints`, so all of this runs in a plain clone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoints import LAYOUTS, LINEAGES, WHOLE, Model

from headstart.checkpoint.checkpoint import inspect_checkpoint
from headstart.cli import main

Written = Callable[[str, str, str], Path]
NAMES = {"base": "v2-1_768", "distilled": "v2-1_768_lightning_4step"}


class Run(NamedTuple):
    latents: str
    """SHA-256 of the final latents."""
    images: tuple[bytes, ...]
    told: str


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """written(lineage, role, layout) -> that model's file or folder, made once."""
    folder = tmp_path_factory.mktemp("layouts")

    @cache
    def model(lineage: str, role: str) -> Model:
        return Model.of(lineage, seed=list(NAMES).index(role))

    @cache
    def write(lineage: str, role: str, layout: str) -> Path:
        bare = role == "distilled" and layout in WHOLE[1:]
        path = folder / lineage / layout / NAMES[role]
        return model(lineage, role).write(layout, path, bare=bare)

    yield write


@pytest.fixture(scope="module")
def sampled(
    written: Written, small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], Run]:
    """sampled(lineage, layout of the base, layout of the distilled) -> what the command did."""

    @cache
    def run(lineage: str, first: str, second: str) -> Run:
        out = tmp_path_factory.mktemp("run") / "out"
        base, distilled = written(lineage, "base", first), written(lineage, "distilled", second)
        asked = ["sample", "a fox", "--seeds", "3,4", "--size", "64", "--out", str(out)]
        asked += ["--base", str(base), "--distilled", str(distilled)]
        asked += ["--tokenizer", str(small_tokenizer)]
        if first == "ldm":  # no config.json beside it
            asked += ["--text-head-dim", "32"]
        if not {first, second} <= set(WHOLE[1:]) and lineage != "sd15":
            asked += ["--head-dim", "16"]
        assert main(asked) == 0
        record = json.loads((out / "record.json").read_text())
        images = tuple((out / f"00000{i}.png").read_bytes() for i in (0, 1))
        return Run(json.dumps(record["results"]), images, json.dumps(record["table"]))

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lineage", LINEAGES)
def test_every_layout_of_either_model_gives_the_same_bits(
    sampled: Callable[[str, str, str], Run], lineage: str, layout: str
) -> None:
    expected = sampled(lineage, "ldm", "ldm")
    assert expected.images[0] != expected.images[1]
    base = WHOLE[(LAYOUTS.index(layout) + 1) % len(WHOLE)]
    assert sampled(lineage, base, layout) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lineage", LINEAGES)
def test_inspection_names_every_layout(written: Written, lineage: str, layout: str) -> None:
    info = inspect_checkpoint(written(lineage, "distilled", layout))
    assert info.ok, info.problems
    kinds = {"ldm": "ldm", "bare": "unet", "bare-ldm": "unet"}
    assert info.layout == kinds.get(layout, "diffusers")
    texts = ("text", "text_2") if lineage == "sdxl" else ("text",)
    assert info.parts == (("unet", "vae", *texts) if layout == "ldm" else ("unet",))
    assert (info.family, info.exact, info.dtype) == (lineage, False, "F16")
    assert (info.distillation, info.preset) == ("Lightning", "lightning")
    assert info.prediction == ("v" if lineage == "sd21" else "eps")
