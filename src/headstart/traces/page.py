"""One HTML file to scrub through a trace: pictures, numbers, style and script are all inside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from PIL import Image

from headstart.pictures.inline import data_uri, render
from headstart.spaces.extractor import Rgb
from headstart.traces.strip import Strip

LARGEST_PX = 256
"""Pictures are reduced to this; a page of 38 steps x 4 seeds at 256 px is about 2 MB."""


def write_page(strips: Sequence[Strip], *, prompt: str, footer: str) -> str:
    """The page's text. It loads nothing else, and opens from a file."""
    data = {
        "prompt": prompt,
        "footer": footer,
        "pixels": min(LARGEST_PX, max(strips[0].final.shape[1:3])),
        "plans": [_plan(strip) for strip in strips],
    }
    # "</script>" in a prompt would end the data; JSON may spell any character as an escape.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    values = {"title": f"{prompt[:120]} · headstart trace", "data": text}
    return render("traces", values, ("page_charts.js", "page.js"))


def _plan(strip: Strip) -> dict[str, Any]:
    plan = strip.to_json()
    for row, step in zip(plan["steps"], strip.steps, strict=True):
        row["guidance"] = step.guidance
    return {
        **plan,
        "seeds": [str(seed) for seed in strip.seeds],  # beyond 2^53 JavaScript has no integers
        "images": [
            [_uri(picture) if is_good else None for picture, is_good in zip(row, good, strict=True)]
            for row, good in zip(strip.frames, strip.good, strict=True)
        ],
        "final": [_uri(picture) for picture in strip.final],
    }


def _uri(rgb: Rgb) -> str:
    return data_uri(Image.fromarray(rgb), LARGEST_PX)
