"""Pages of one file each: their common frame, and pictures inside them as data: URIs.

frame.html has the head, with page.css of the room; page.html of the room has the body. Both are
Jinja2 templates, in which all text is escaped, as prompts and names of files may hold markup.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from PIL import Image


def render(room: str, values: Mapping[str, Any], scripts: tuple[str, ...] = ()) -> str:
    """The text of a room's page. `title` is among the values; scripts are files of the room."""
    import jinja2

    def read(name: str) -> str:
        package = "headstart.pictures" if name == "frame.html" else f"headstart.{room}"
        return files(package).joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FunctionLoader(read)
    )
    style, script = read("page.css"), "".join(map(read, scripts))
    return environment.get_template("page.html").render(values, style=style, script=script)


def data_uri(picture: Image.Image, largest_px: int) -> str:
    """The picture as WebP, made smaller where a side is longer than `largest_px`."""
    if max(picture.size) > largest_px:
        picture = picture.copy()
        picture.thumbnail((largest_px, largest_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=90, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
