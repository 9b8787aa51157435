"""Plans side by side, moving through the noise levels together: GIF or WebP.

moments = all distinct timesteps of all plans, falling; at each a plan shows its latest row there
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from headstart.pictures.lettering import FAINT, GREY, INK, PAPER, cut, write
from headstart.pictures.sheet import cell_px, scaled
from headstart.traces.filmstrip import model_colour
from headstart.traces.strip import Strip

_MARGIN, _GAP, _APART, _HEAD_PX, _TITLE_PX, _SMALL_PX = 28, 6, 28, 62, 26, 15
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
            palette = _montage(self.frames).quantize(256, dither=Image.Dither.NONE)
            first, *others = (
                frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames
            )
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
    begun = [i for i, step in enumerate(strip.steps) if step.timestep >= timestep]
    return begun[-1] if begun else None


def animate(strips: Sequence[Strip], *, title: str) -> Animation:
    """One frame a moment, then the finished images."""
    levels: list[float | None] = [*moments(strips), None]
    frames = tuple(_draw(strips, level, title) for level in levels)
    return Animation(frames, (*[STEP_MS] * (len(frames) - 1), LAST_MS))


def _draw(strips: Sequence[Strip], timestep: float | None, title: str) -> Image.Image:
    cell = cell_px(strips[0].final)
    across = [max(1, round(len(strip.seeds) ** 0.5)) for strip in strips]
    wide = [max(n * (cell + _GAP) - _GAP, _LEAST) for n in across]
    tall = max(
        -(-len(strip.seeds) // n) * (cell + _GAP) for strip, n in zip(strips, across, strict=True)
    )
    top = _MARGIN + _TITLE_PX + 20
    size = (2 * _MARGIN + sum(wide) + _APART * (len(strips) - 1), top + _HEAD_PX + tall + _MARGIN)
    frame = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(frame)
    write(pen, (_MARGIN, _MARGIN - 6), cut(title, _TITLE_PX, size[0] - 2 * _MARGIN), _TITLE_PX, INK)
    x = _MARGIN
    for strip, count, room in zip(strips, across, wide, strict=True):
        _draw_plan(frame, pen, strip, timestep, (x, top), (cell, count, room))
        x += room + _APART
    return frame


def _draw_plan(
    frame: Image.Image,
    pen: ImageDraw.ImageDraw,
    strip: Strip,
    timestep: float | None,
    at: tuple[int, int],
    sizes: tuple[int, int, int],
) -> None:
    (x, y), (cell, across, room) = at, sizes
    index = len(strip.rows) - 1 if timestep is None else row_at(strip, timestep)
    write(pen, (x, y), cut(strip.name, 20, room), 20, INK)
    if timestep is None:
        told, colour = "finished", GREY
    elif index is None:
        told, colour = "not begun", GREY
    else:
        step = strip.steps[index]
        told, colour = f"step {strip.rows[index]} · {step.model}", model_colour(step.model)
    write(pen, (x, y + 26), cut(told, _SMALL_PX, room), _SMALL_PX, colour)
    done = 1.0 if timestep is None else (0 if index is None else index + 1) / len(strip.rows)
    pen.rounded_rectangle((x, y + 48, x + room, y + 52), 2, FAINT)
    if done:
        pen.rounded_rectangle((x, y + 48, x + round(room * done), y + 52), 2, colour)
    if index is None:
        return
    pictures = strip.final if timestep is None else strip.frames[index]
    shown = np.ones(len(strip.seeds), bool) if timestep is None else strip.good[index]
    for number, picture in enumerate(scaled(pictures, cell)):
        line, column = divmod(number, across)
        corner = (x + column * (cell + _GAP), y + _HEAD_PX + line * (cell + _GAP))
        if shown[number]:
            frame.paste(picture, corner)
        else:
            pen.rectangle((*corner, corner[0] + cell - 1, corner[1] + cell - 1), FAINT)


def _montage(frames: Sequence[Image.Image]) -> Image.Image:
    """A few frames under each other, for a palette that fits them all."""
    picks = [frames[i] for i in sorted({*range(0, len(frames), 6), len(frames) - 1})]
    width, height = frames[0].size
    whole = Image.new("RGB", (width, height * len(picks)))
    for number, frame in enumerate(picks):
        whole.paste(frame, (0, number * height))
    return whole
