"""The library's messages in the command line's words: `preset='turbo'` is `--preset turbo`."""

from __future__ import annotations

import re

_PLAIN = (
    *("preset", "steps", "handoff", "base_guidance", "distilled_guidance", "timesteps", "sigmas"),
    *("update", "embedded_guidance", "ema", "dtype", "vae_dtype", "memory", "packed", "runner"),
    *("seeds", "negative", "head_dim", "text_head_dim", "batch", "size", "clip_skip", "literal"),
    *("prediction", "original_size", "target_size", "crop", "plan", "exclamation", "prompt_style"),
    *("base", "distilled", "distilled_lora", "vae", "text", "tokenizer", "preview", "device"),
)
_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in _PLAIN} | {
    "k": "--base-steps",
    "n": "--base-grid",
    "mode": "--plan",
    "style": "--prompt-style",
    "second": "--second-prompt",
    "negative_second": "--second-negative",
}
"""A keyword of `Engine.load`, `Engine.sample` or `preset`, and the option that sets it."""
_ROLES = ("base", "distilled")
_KEYWORD = re.compile(
    rf"(?<![\w./=,-])(?P<name>{'|'.join(sorted(_OPTIONS, key=len, reverse=True))})="
    r"(?:'(?P<quoted>[^']*)'|\"(?P<double>[^\"]*)\"|(?P<bare>[\w.+-]*[\w]))?"
)
_PYTHON = "Leg("
"""In a line with a whole plan, which no option is."""
_TWICE = re.compile(r"(--[\w-]+)(?: \(\1\)| or \1| \1)(?![\w-])")
_LISTED = re.compile(r"(--[\w-]+ [\w.-]+), (?=--)")


def in_options(message: str) -> str:
    """The message, its keyword arguments spelled as options."""
    lines = message.split("\n")
    return "\n".join(line if _PYTHON in line else _in_options(line) for line in lines)


def _in_options(line: str) -> str:
    return _LISTED.sub(r"\1 ", _TWICE.sub(r"\1", _KEYWORD.sub(_option, line)))


def _option(found: re.Match[str]) -> str:
    name, option = found["name"], _OPTIONS[found["name"]]
    value = next((own for own in found.group("quoted", "double", "bare") if own is not None), "")
    if name in _ROLES and value:  # `base=cuda:0,distilled=cpu` is typed so
        return found[0]
    if value in ("True", "False"):
        return option if value == "True" else option.replace("--", "--no-", 1)
    return f"{option} {value}".rstrip()
