"""One HTML file to scrub through a trace: pictures, numbers, style and script are all inside it.

page.html is the template, page.css its {{style}}, page_charts.js and page.js its {{script}};
{{title}} is escaped text, {{data}} is JSON with every "<" escaped.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headstart.pictures.inline import data_uri
from headstart.traces.strip import Strip
from headstart.traces.structure import plain

LARGEST_PX = 256
"""Pictures are reduced to this; a page of 38 steps x 4 seeds at 256 px is about 2 MB."""


def write_page(strips: Sequence[Strip], *, prompt: str, footer: str) -> str:
    """The page's text. It asks nothing of a server and runs from a file."""
    data = {
        "prompt": prompt,
        "footer": footer,
        "pixels": min(LARGEST_PX, max(strips[0].final.shape[1:3])),
        "plans": [_plan(strip) for strip in strips],
    }
    # "</script>" in a prompt would end the data; JSON may spell any character as an escape.
    told = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    values = {
        "title": html.escape(f"{prompt[:120]} · headstart trace"),
        "data": told,
        "style": _part("page.css"),
        "script": _part("page_charts.js") + _part("page.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], _part("page.html"))


def _part(name: str) -> str:
    return files("headstart.traces").joinpath(name).read_text(encoding="utf-8")


def _plan(strip: Strip) -> dict[str, Any]:
    timeline = strip.timeline
    return {
        "name": strip.name,
        "seeds": [str(seed) for seed in strip.seeds],  # beyond 2^53 JavaScript has no integers
        "from_step": strip.from_step,
        "moved": None if strip.moved is None else [plain(part) for part in strip.moved],
        "steps": [
            {**figures.to_json(), "guidance": step.guidance}
            for figures, step in zip(strip.measured.figures, strip.steps, strict=True)
        ],
        "share_by_seed": [
            [round(value, 4) if np.isfinite(value) else None for value in row]
            for row in strip.measured.share.tolist()
        ],
        "images": [
            [_uri(picture) if fine else None for picture, fine in zip(row, good, strict=True)]
            for row, good in zip(strip.frames, strip.good, strict=True)
        ],
        "final": [_uri(picture) for picture in strip.final],
        "timeline": None if timeline is None else timeline.to_json(strip.seeds, strip.rows),
    }


def _uri(rgb: NDArray[np.uint8]) -> str:
    return data_uri(Image.fromarray(rgb), LARGEST_PX)
