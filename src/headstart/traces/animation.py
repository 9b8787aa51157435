"""Plans side by side, moving through the noise levels together: GIF or WebP.

moments = all distinct timesteps of all plans, falling; at each a plan shows its latest row there
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from headstart.pictures.lettering import GREY, INK
from headstart.pictures.paper import GAP, TINY_PX, Paper, cell_px, scaled
from headstart.traces.filmstrip import model_colour
from headstart.traces.strip import Strip

_MARGIN, _APART, _HEAD_PX, _TITLE_PX, _NAME_PX = 28, 28, 62, 26, 20
_LEAST = 168
STEP_MS, LAST_MS = 320, 2400
Format = Literal["gif", "webp"]


class Animation(NamedTuple):
    """Frames of one size, and how long each stays, in milliseconds."""

    frames: tuple[Image.Image, ...]
    durations_ms: tuple[int, ...]

    def encode(self, kind: Format) -> bytes:
        """The file's bytes; it plays again and again."""
        first, *others = self.frames
        buffer = io.BytesIO()
        options: dict[str, object] = {"quality": 88, "method": 4} if kind == "webp" else {}
        if kind == "gif":  # one palette for all: else colours flicker, and the file is larger
            none = Image.Dither.NONE
            palette = _montage(self.frames).quantize(256, dither=none)
            first, *others = (f.quantize(palette=palette, dither=none) for f in self.frames)
        first.save(
            buffer,
            format=kind.upper(),
            save_all=True,
            append_images=others,
            duration=list(self.durations_ms),
            loop=0,
            **options,
        )
        return buffer.getvalue()


def moments(strips: Sequence[Strip]) -> list[float]:
    """Every timestep at which some plan takes a step, falling."""
    return sorted({step.timestep for strip in strips for step in strip.steps}, reverse=True)


def row_at(strip: Strip, timestep: float) -> int | None:
    """Index of the looked-at row that a plan is in at this level; None before its first."""
    indices = [i for i, step in enumerate(strip.steps) if step.timestep >= timestep]
    return indices[-1] if indices else None


def animate(strips: Sequence[Strip], *, title: str) -> Animation:
    """One frame a moment, then the finished images."""
    frames = tuple(_draw(strips, level, title) for level in (*moments(strips), None))
    return Animation(frames, (*[STEP_MS] * (len(frames) - 1), LAST_MS))


def _draw(strips: Sequence[Strip], timestep: float | None, title: str) -> Image.Image:
    cell, top, x = cell_px(strips[0].final), _MARGIN + _TITLE_PX + 20, _MARGIN
    across = [max(1, round(len(strip.seeds) ** 0.5)) for strip in strips]
    widths = [max(n * (cell + GAP) - GAP, _LEAST) for n in across]
    lines = max(-(-len(strip.seeds) // n) for strip, n in zip(strips, across, strict=True))
    inner = sum(widths) + _APART * (len(strips) - 1)
    height = top + _HEAD_PX + lines * (cell + GAP) + _MARGIN
    paper = Paper.of((inner + 2 * _MARGIN, height))
    paper.write((_MARGIN, _MARGIN - 6), title, _TITLE_PX, INK, room=inner)
    for strip, count, room in zip(strips, across, widths, strict=True):
        _draw_plan(paper, strip, timestep, (x, top), (cell, count, room))
        x += room + _APART
    return paper.image


def _draw_plan(
    paper: Paper,
    strip: Strip,
    timestep: float | None,
    corner: tuple[int, int],
    sizes: tuple[int, int, int],
) -> None:
    (x, y), (cell, across, room) = corner, sizes
    index = None if timestep is None else row_at(strip, timestep)
    state, colour, share = "finished", GREY, 1.0
    images, good = strip.final, np.ones(len(strip.seeds), bool)
    if index is not None:
        step = strip.steps[index]
        state, colour = f"step {strip.rows[index]} · {step.model}", model_colour(step.model)
        share, images, good = (index + 1) / len(strip.rows), strip.frames[index], strip.good[index]
    elif timestep is not None:
        state, share, images = "not begun", 0.0, images[:0]
    paper.write((x, y), strip.name, _NAME_PX, INK, room=room)
    paper.write((x, y + 26), state, TINY_PX, colour, room=room)
    paper.bar((x, y + 48), room, share, colour)
    pictures = [picture if good[n] else None for n, picture in enumerate(scaled(images, cell))]
    paper.pictures((x, y + _HEAD_PX), pictures, cell, across)


def _montage(frames: Sequence[Image.Image]) -> Image.Image:
    """A few frames under each other, for a palette that fits them all."""
    picks = [frames[i] for i in sorted({*range(0, len(frames), 6), len(frames) - 1})]
    return Image.fromarray(np.concatenate([np.asarray(frame) for frame in picks]))
