"""A contact sheet of one run: a row for each prompt, a column for each seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from headstart.diversify.method import Images
from headstart.errors import counted
from headstart.pictures.lettering import FAINT
from headstart.pictures.sheet import Row, draw_sheet


def draw_contact_sheet(
    images: NDArray[np.uint8], prompts: Sequence[str], seeds: Sequence[int], *, plan: str
) -> Image.Image:
    """rgb uint8 [B, H, W, 3], with a prompt and a seed each.

    Columns have seeds above them where all prompts have the same ones; otherwise each row notes
    its seeds. More than 8 columns wrap inside their row.
    """
    rows = Images(tuple(prompts), tuple(seeds)).by_prompt
    by_row = [tuple(seeds[image] for image in numbers) for numbers in rows.values()]
    across = max(map(len, by_row))
    same = len(set(by_row)) == 1
    has_notes = not same or across > 8  # then no label stands above a column
    return draw_sheet(
        [
            Row(
                name=prompt,
                images=_cells(images[numbers], across),
                notes=(f"seed{'s' * (len(row) > 1)} {_ranges(row)}",) if has_notes else (),
            )
            for (prompt, numbers), row in zip(rows.items(), by_row, strict=True)
        ],
        title=prompts[0] if len(rows) == 1 else f"{len(rows)} prompts",
        subtitle=f"plan {plan} · {counted(len(images), 'image')} of {images.shape[2]} x "
        f"{images.shape[1]}",
        columns=[f"seed {seed}" for seed in by_row[0]] if same else [""] * across,
        footer="",
    )


def _cells(images: NDArray[np.uint8], across: int) -> NDArray[np.uint8]:
    """A row of the sheet; cells without an image are faint."""
    cells = np.empty((across, *images.shape[1:]), np.uint8)
    cells[:] = ImageColor.getrgb(FAINT)
    cells[: len(images)] = images
    return cells


def _ranges(seeds: Sequence[int]) -> str:
    """`0-3, 8`, as seeds are typed."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
