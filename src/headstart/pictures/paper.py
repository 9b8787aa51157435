"""The elements of every sheet: paper with a heading and small print, bars, and pictures.

cell px = image px * round(target / image px)   whole multiples only, so that pixels stay crisp
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from headstart.pictures import lettering
from headstart.pictures.lettering import FAINT, GREY, INK, PAPER, cut, drawable, wrapped

MARGIN, GAP = 64, 6
_TITLE_PX, _LONG_TITLE_PX, NOTE_PX, SMALL_PX, TINY_PX = 48, 30, 20, 17, 15
_SUBTITLE, _BODY, _LINE_PX = 8, 72, 25  # below the title; a line of small print
_TARGET_PX, _LARGEST_PX = 128, 192


class Paper(NamedTuple):
    """A picture that is being drawn."""

    image: Image.Image
    pen: ImageDraw.ImageDraw

    @classmethod
    def of(cls, size: tuple[int, int]) -> Paper:
        image = Image.new("RGB", size, PAPER)
        return cls(image, ImageDraw.Draw(image))

    def write(
        self,
        at: tuple[float, float],
        text: str,
        size_px: int,
        colour: str = GREY,
        *,
        anchor: str = "la",
        room: int | None = None,
    ) -> None:
        """One line, cut to `room`; `anchor` names the point of it at `at`, as in Pillow."""
        line = drawable(text if room is None else cut(text, size_px, room))
        self.pen.text(at, line, colour, ImageFont.load_default(size=size_px), anchor=anchor)

    def bar(
        self, at: tuple[int, int], length: int, share: float, colour: str = GREY, tall: int = 4
    ) -> None:
        """A faint bar, of which `share`, 0 to 1, is in colour."""
        x, y = at
        self.pen.rounded_rectangle((x, y, x + length, y + tall), 2, FAINT)
        if (filled := round(length * min(max(share, 0.0), 1.0))) > 3:
            self.pen.rounded_rectangle((x, y, x + filled, y + tall), 2, colour)

    def picture(self, at: tuple[int, int], picture: Image.Image | None, cell: int) -> None:
        """A picture in the middle of its cell; None: an empty cell."""
        x, y = at
        if picture is None:
            self.pen.rectangle((x, y, x + cell - 1, y + cell - 1), FAINT)
        else:
            inside = (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2)
            self.image.paste(picture, inside)

    def pictures(
        self, at: tuple[int, int], pictures: Sequence[Image.Image | None], cell: int, across: int
    ) -> None:
        """Pictures in rows of `across`."""
        for number, picture in enumerate(pictures):
            line, column = divmod(number, across)
            corner = (at[0] + column * (cell + GAP), at[1] + line * (cell + GAP))
            self.picture(corner, picture, cell)


def framed(width: int, body: int, *, title: str, subtitle: str, footer: str) -> tuple[Paper, int]:
    """Paper around a body that is `body` px tall, and where that begins.

    A title that is too long for one line is written smaller, on three lines at most.
    """
    room = width - 2 * MARGIN
    size_px = _TITLE_PX if lettering.width(title, _TITLE_PX) <= room else _LONG_TITLE_PX
    lines = wrapped(title[:400], size_px, room, between=" ", most=3) or [""]
    step = round(1.25 * size_px)
    below = MARGIN - 10 + len(lines) * step
    small_print = wrapped(footer, SMALL_PX, room)
    bottom = below + _BODY + body
    paper = Paper.of((width, bottom + len(small_print) * _LINE_PX + MARGIN - 8))
    for number, line in enumerate(lines):
        paper.write((MARGIN, MARGIN - 10 + number * step), line, size_px, INK)
    paper.write((MARGIN, below + _SUBTITLE), subtitle, NOTE_PX, room=room)
    for number, line in enumerate(small_print):
        paper.write((MARGIN, bottom + number * _LINE_PX), line, SMALL_PX)
    return paper, below + _BODY


def cell_px(images: NDArray[np.uint8]) -> int:
    """Side in px of one drawn image: a whole multiple of a small one, 192 px for a large one."""
    longest = max(images.shape[1:3])
    if longest > _LARGEST_PX:
        return _LARGEST_PX
    return longest * max(1, round(_TARGET_PX / longest))


def scaled(images: NDArray[np.uint8], cell: int) -> Iterator[Image.Image]:
    """uint8 [n, H, W, 3] with the longer side drawn `cell` px long; enlarged, pixels stay crisp."""
    longest = max(images.shape[1:3])
    size = (images.shape[2] * cell // longest, images.shape[1] * cell // longest)
    crisp = cell >= longest
    for image in images:
        resample = Image.Resampling.NEAREST if crisp else Image.Resampling.LANCZOS
        yield Image.fromarray(image).resize(size, resample)
