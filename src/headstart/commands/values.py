"""The texts of options as values: pixels, devices, numbers, prompts. Other texts are errors."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from headstart.errors import InputError

WEIGHT_OPTIONS = (
    *("base", "distilled", "distilled_lora", "vae", "text", "tokenizer", "preview"),
    *("prediction", "embedded_guidance", "ema", "head_dim", "text_head_dim", "exclamation"),
)
"""Options of the user's weights, which the bundled pair does not have."""


def uses_bundled(args: argparse.Namespace) -> bool:
    """Whether no option names weights. Raises InputError for a lone --vae or --text."""
    options = [name for name in WEIGHT_OPTIONS if getattr(args, name, None) is not None]
    if options and not {"base", "distilled"} & set(options):
        option = options[0].replace("_", "-")
        raise InputError(f"--{option} alone: give --base and/or --distilled of your own too")
    return not options


def read_predictions(text: str | None) -> str | dict[str, str] | None:
    """`v`, or `base=v,distilled=eps`. Raises InputError for anything else."""
    return None if text is None else _by_model(text, "prediction", "eps, v, x0, flow, or base=v")


def read_device(text: str) -> str | dict[str, str]:
    """`cuda:1`, or `base=cuda:0,distilled=cuda:1`. Raises InputError for anything else."""
    return _by_model(text, "device", "auto, cpu, cuda, cuda:N, or base=cuda:0,distilled=cuda:1")


def _by_model(text: str, what: str, expected: str) -> str | dict[str, str]:
    if "=" not in text:
        return text
    pairs = [part.strip().partition("=") for part in text.split(",")]
    if any(not value for _, _, value in pairs) or len({role for role, *_ in pairs}) < len(pairs):
        raise InputError(f"{what} {text!r:.60}: expected {expected}")
    return {role: value for role, _, value in pairs}


def read_prompt(prompt: str) -> str:
    """The API takes an empty prompt for sampling without text; typed here, it is a mistake."""
    if not prompt.strip():
        raise InputError('the prompt is empty: say what to draw, such as "a fox"')
    with suppress(UnicodeError):  # UTF-8, typed where the locale is ASCII (PEP 383)
        return os.fsencode(prompt).decode()
    return prompt


def one_prompt(args: argparse.Namespace) -> tuple[str, tuple[int, ...]]:
    """The prompt and the seeds of `arguments.add_prompt`. Raises InputError."""
    from headstart.plan.request import pair_up, parse_seeds  # loads numpy

    prompt = read_prompt(args.prompt)
    return prompt, pair_up(prompt, parse_seeds(args.seeds))[1]


def read_size(text: str | None, what: str = "size") -> tuple[int, int] | None:
    """`512` or `HEIGHTxWIDTH`, in pixels. Raises InputError for anything else."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 9 for side in sides):
        raise InputError(f"{what} {text!r:.40}: expected pixels such as 512, or HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def read_texts(texts: Sequence[str]) -> str | list[str] | None:
    """An option that may be repeated: None where it was not given, one for all, or one an image."""
    return None if not texts else texts[0] if len(texts) == 1 else [*texts]


def text_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `arguments.add_texts` for a run, None for those that were not typed."""
    return {
        "negative": read_texts(args.negative),
        "second": read_texts(args.second_prompt),
        "negative_second": read_texts(args.second_negative),
        "original_size": read_size(args.original_size, "--original-size"),
        "target_size": read_size(args.target_size, "--target-size"),
        "crop": args.crop,
        "literal": args.literal or None,
    }


def output(text: str) -> Path:
    """A file or a folder to write, as the `type` of an option."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give a name, or . for this folder")
    return Path(text)


def offset(text: str) -> tuple[int, int]:
    """`TOP,LEFT` in pixels, as the `type` of an option."""
    sides = [part.strip() for part in text.split(",")]
    if len(sides) != 2 or not all(side.isdecimal() and len(side) < 9 for side in sides):
        expected = "TOP,LEFT in pixels, such as 0,0"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r:.40}")
    return int(sides[0]), int(sides[1])


def split_list(text: str) -> list[str]:
    """`a,b` -> its parts, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def count(text: str) -> int:
    """A whole number of at least 1, as the `type` of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r:.40}")
    return int(text)


def batch(text: str) -> int | tuple[int, ...]:
    """`8`, or `8,2,16`, as the `type` of an option."""
    sizes = tuple(map(count, text.split(",")))
    if len(sizes) > 3:
        expected = "samples in a network, in the decoder, and bands of a decode, such as 8,2,16"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r:.40}")
    return sizes[0] if len(sizes) == 1 else sizes


def numbers(text: str) -> list[float]:
    """`999,749` as the `type` of an option."""
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        expected = "numbers such as 999,749,499,249"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r:.60}") from None
