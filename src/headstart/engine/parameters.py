"""A picture's settings as AUTOMATIC1111's web UI writes them, which many programs read.

    PROMPT <lora:NAME:STRENGTH>
    Negative prompt: NEGATIVE
    Steps: 4, Sampler: Euler, CFG scale: 1, Seed: 7, Size: WIDTHxHEIGHT, Model hash: ..., ...

The last line is read as pairs, at least three of them: `Name: value`, where a value with a comma, a
colon or a line break is in quotes, as JSON (its modules/infotext_utils.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

from headstart.adapters.adapters import DISTILLED_LORA
from headstart.engine.record import Recorded
from headstart.plan.table import Step, StepTable

PARAMETERS = "parameters"
"""The keyword of the text in a PNG."""


def parameters(run: Recorded) -> str:
    """Of the first image of a record, or of the picture whose record it is.

    A second model is what is called a refiner there, and takes over at a share of the steps; the
    CFG scale is the largest of the rows, and names of samplers are those for what the rows do.
    """
    table, image = run.table, 0 if run.position is None else run.position.image % len(run.prompts)
    first, *others = table.models
    values: dict[str, object] = {
        "Steps": len(table),
        "Sampler": " + ".join(dict.fromkeys(_samplers(table))) or "Euler",
        "CFG scale": f"{max(step.guidance for step in table):g}",
        "Seed": (run.chosen or run.seeds)[image],
        "Size": f"{run.size[1]}x{run.size[0]}",
    }
    if (file := run.weights.get(first)) is not None:
        values |= {"Model hash": file["sha256"][:10], "Model": _stem(file)}
    if (skip := run.reading.get("clip_skip")) is not None:
        values["Clip skip"] = skip
    for model in others[:1]:
        if (file := run.weights.get(model, run.weights.get("distilled_lora"))) is not None:
            values["Refiner"] = f"{_stem(file)} [{file['sha256'][:10]}]"
            values["Refiner switch at"] = f"{table.handoffs[0] / len(table):.3g}"
    if run.diversify:
        values["Diversify"] = ", ".join(run.diversify)
    values |= {"Plan": table.name, "Version": f"headstart {run.machine.get('headstart', '')}"}
    negative = run.negative if isinstance(run.negative, str | None) else run.negative[image]
    prompt = " ".join([run.prompts[image], *_tags(run, image)])
    lines = [prompt, f"Negative prompt: {negative}" if negative else ""]
    last = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items())
    return "\n".join([*filter(None, lines), last])


def _tags(run: Recorded, image: int) -> list[str]:
    """`<lora:NAME:STRENGTH>` of each adapter that the prompt does not name itself; a strength that
    changes with the row is the largest."""
    tags: list[str] = []
    for name, adapter in run.adapters.items():
        value = _of_image(adapter["strength"].get("value", 1.0), image)
        text = _of_image(adapter["strength"].get("text", value), image)
        tag = rf"<\s*(lora|lyco)\s*:\s*{re.escape(name)}\s*[:.>]"
        if name != DISTILLED_LORA and (value or text) and not re.search(tag, run.prompts[image]):
            strength = f"{value:g}" if text == value else f"{text:g}:{value:g}"
            tags.append(f"<lora:{name}:{strength}>")
    return tags


def _of_image(value: Any, image: int) -> float:
    """Of one number, one for each image, or [rows][images]."""
    if not isinstance(value, list | tuple):
        return value
    values = cast("Sequence[Any]", value)
    if isinstance(values[0], list | tuple):
        return max((row[image] for row in values), key=abs)
    return values[image]


def _stem(file: Mapping[str, str]) -> str:
    return PurePosixPath(file["file"]).stem


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search('[,:"\n]', value) else value


def _samplers(table: StepTable) -> list[str]:
    """Its names for what the rows of each model do; to level 0 all of them do the same."""
    names: list[str] = []
    for model in table.models:
        rows = [step for step in table if step.model == model and step.sigma_next > 0]
        if any(step.carry for step in rows):  # whose first row has nothing to carry
            names.append("DPM++ 2M SDE" if any(step.add for step in rows) else "DPM++ 2M")
        else:
            names += map(_sampler, rows)
    return names


def _sampler(step: Step) -> str:
    q = step.sigma_next / step.sigma
    if not step.add:
        return "Euler"
    if not step.keep:
        return "LCM"
    return "Euler a" if abs(step.keep - q * q) <= 1e-6 * q else "DDIM"
