"""Text on a picture: the palette, and lines in Pillow's built-in font that fit into their room.

width(text, size) <= room, else the text is cut, or wrapped between its parts
"""

from __future__ import annotations

import unicodedata

from PIL import ImageFont

PAPER, INK, GREY, FAINT, ACCENT = "#fbfaf7", "#1c1b1a", "#6f6b66", "#e4e0d9", "#c2410c"
_DRAWABLE = {chr(code) for code in range(32, 127)} | set("·±…“”‘’")  # what the built-in font has


def width(text: str, size_px: int) -> float:
    """Pixels that the text takes on one line."""
    return ImageFont.load_default(size=size_px).getlength(drawable(text))


def cut(text: str, size_px: int, room: int) -> str:
    """One line: as much of `text` as fits, ended by an ellipsis where some was cut."""
    line = " ".join(text[:400].split())
    if width(line, size_px) <= room:
        return line
    count = next(n for n in range(len(line), -1, -1) if width(line[:n] + "…", size_px) <= room)
    return line[:count].rstrip() + "…"


def wrapped(
    text: str, size_px: int, room: int, *, between: str = " · ", most: int | None = None
) -> list[str]:
    """Lines of whole parts, which `between` divides; the last of at most `most` lines is cut."""
    lines = [""]
    for part in text.split(between):
        longer = f"{lines[-1]}{between}{part}" if lines[-1] else part
        if lines[-1] and width(longer, size_px) > room and len(lines) != most:
            lines.append(part)
        else:
            lines[-1] = longer
    return [cut(line, size_px, room) for line in lines if line]


def drawable(text: str) -> str:
    """The text with what the font lacks as its base letter, or as "?"."""
    plain = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c in _DRAWABLE else "?" for c in plain)
