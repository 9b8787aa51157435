"""A picture inside an HTML page, as a data: URI."""

from __future__ import annotations

import base64
import io

from PIL import Image


def data_uri(picture: Image.Image, largest_px: int) -> str:
    """The picture as WebP, made smaller where a side is longer than `largest_px`."""
    if max(picture.size) > largest_px:
        picture = picture.copy()
        picture.thumbnail((largest_px, largest_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=90, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
