"""What one run gave: images, latents, where its time went, and the record that repeats it."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from headstart.diversify.effect import passes_of
from headstart.diversify.method import Method
from headstart.engine import record
from headstart.engine.contact_sheet import draw_contact_sheet
from headstart.engine.picture import picture_texts
from headstart.errors import InputError, counted
from headstart.output import GRID, PNG, RECORD, check_run, numbered, write_folder
from headstart.pictures.inline import data_uri
from headstart.pictures.png import encode_png
from headstart.plan.table import StepTable

_RECORDED = (
    *("prompts", "seeds", "negative", "size", "chunk", "lineage", "table", "machine", "adapters"),
    *("chosen", "reading", "given", "decode"),
)
"""Fields that the record of a run has as they are."""
_LARGEST_PX = 1600
"""Of a sheet in a notebook."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Trajectory:
    """One entry an image; tensors are on the engine's device.

    rgb         uint8 [B, H, W, 3]
    latents     float32 [B, C, h, w], at noise level 0
    x0          float32 [S, B, C, h, w], what each row predicted, or None unless keep_x0 was given
    table       the rows that ran
    latency_ms  text, base, distilled, decode: time on the device, of this run alone. A run that was
                one launch counts for the model of its last row, its decoder too
    chunk       samples that were in a network at once; decode: in the decoder, and its bands, where
                they are not as many, and one
    lineage     the family whose latents these are, or None where the weights do not say
    files       role -> (name, files) of the weights; machine: what rounding may depend on
    adapters    name -> what was attached, and how strongly it acted
    negative    one for all images, None for none, or one an image; reading: how they and the
                prompts are read, as arguments of `Engine.sample`, where it is not the usual way
    given       SHA-256 of the caller's conditioning and noise
    diversify   the methods that acted, in their order
    chosen      the seeds whose images these are, where a method chose them for `seeds`: each alone
                gives its image without that method
    tokens      of each text that was encoded, 0 where none was
    source      the record of one picture, where it was replayed
    """

    rgb: Tensor
    latents: Tensor
    x0: Tensor | None
    table: StepTable
    latency_ms: Mapping[str, float]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative: str | Sequence[str | None] | None
    size: tuple[int, int]
    chunk: int
    lineage: str | None = None
    files: record.WeightFiles = field(default_factory=dict[str, record.Files])
    machine: Mapping[str, Any] = field(default_factory=dict[str, Any])
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    diversify: tuple[Method, ...] = ()
    chosen: tuple[int, ...] | None = None
    reading: Mapping[str, Any] = field(default_factory=dict[str, Any])
    given: Mapping[str, str] = field(default_factory=dict[str, str])
    decode: tuple[int, int] | None = None
    tokens: int = 0
    source: record.Recorded | None = None

    @property
    def images(self) -> list[Image.Image]:
        """As Pillow has them, RGB."""
        return [*map(Image.fromarray, self._rgb)]

    @property
    def passes(self) -> int:
        """Network passes an image: of the table, two for a guided row, and of candidates."""
        return passes_of(self.diversify, self.table)

    def __len__(self) -> int:
        return len(self.seeds)

    def __repr__(self) -> str:
        times = ", ".join(f"{stage} {ms:.0f}" for stage, ms in self.latency_ms.items())
        return (
            f"Trajectory({counted(len(self), 'image')} {self.size[0]}x{self.size[1]}, plan "
            f"{self.table.name!r}, {self.passes} passes, ms: {times})"
        )

    def record(self) -> dict[str, Any]:
        """Everything that repeats this run, and SHA-256 of its images, as JSON-able values.

        The first record of these weight files reads them through, for their digests, which are kept
        in the user's cache folder (HEADSTART_CACHE moves it, "off" is none) while a file's size,
        times and inode stay the same. Of the caller's tensors it has digests alone: see
        `headstart.replay`.
        """
        return record.describe(self.recorded())

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        metadata: bool = True,
        grid: bool = False,
    ) -> list[Path]:
        """Write what `headstart sample` writes, and return the images' paths.

        path       a folder, for NNNNNN.png and record.json; or NAME.png for one image, which is
                   then the only file. Folders are made; files are whole or absent
        overwrite  replace what is there; of a longer run in the folder nothing is left
        metadata   whether a PNG holds its parameters, as AUTOMATIC1111's web UI writes them, and
                   its record, which `headstart replay NAME.png` runs again
        grid       also grid.png in the folder: all images, a row for each prompt

        Raises InputError for a path that holds a run or a file already, or cannot be written.
        """
        if not os.fspath(path):
            raise InputError("""path is empty: give a folder or NAME.png; "." is this folder""")
        target = Path(path)
        check_run(target, len(self), overwrite=overwrite, grid=grid)
        pngs = self.pngs(metadata=metadata)
        if target.suffix.lower() == PNG:
            write_folder(target.parent, {target.name: pngs[0]})
            return [target]
        images = {numbered(image): png for image, png in enumerate(pngs)}
        files = images | ({GRID: encode_png(self._sheet())} if grid else {})
        files[RECORD] = (json.dumps(self.record(), indent=1) + "\n").encode()
        write_folder(target, files)
        for stale in [*target.glob("[0-9]" * 6 + PNG), target / GRID]:
            if stale.name not in files:  # of the run that was overwritten
                stale.unlink(missing_ok=True)
        return [target / name for name in images]

    def pngs(self, *, metadata: bool = True) -> list[bytes]:
        """The files that `save` writes, one an image."""
        run = self.recorded() if metadata else None
        return [
            encode_png(rgb, None if run is None else picture_texts(run, image, self.tokens))
            for image, rgb in enumerate(self._rgb)
        ]

    def _repr_png_(self) -> bytes:
        return encode_png(self._sheet())

    def _repr_html_(self) -> str:
        """For notebooks: the contact sheet, and what can be copied from it as text."""
        lines = [repr(self), *map(repr, dict.fromkeys(self.prompts))]
        text = "<br>".join(map(html.escape, lines))
        sheet = data_uri(self._sheet(), _LARGEST_PX)
        return f'<figure><img src="{sheet}"><figcaption>{text}</figcaption></figure>'

    @property
    def _rgb(self) -> NDArray[np.uint8]:
        return self.rgb.cpu().numpy()

    def _sheet(self) -> Image.Image:
        return draw_contact_sheet(
            self._rgb, self.prompts, self.chosen or self.seeds, plan=self.table.name
        )

    def recorded(self) -> record.Recorded:
        """The record as values."""
        weights = record.weigh(self.files)
        results = {"latents": record.digests(self.latents), "rgb": record.digests(self.rgb)}
        if self.source is not None:
            return replace(self.source, machine=self.machine, weights=weights, results=results)
        values = {name: getattr(self, name) for name in _RECORDED}
        methods = tuple(map(str, self.diversify))
        return record.Recorded(**values, weights=weights, results=results, diversify=methods)
