"""Alpha as PEFT says it: outside of the tensors, in a configuration beside them or as metadata.

scale = alpha/rank, or alpha/sqrt(rank) for rslora (arXiv:2312.03732)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

from headstart.adapters.names import Network
from headstart.checkpoint.header import parse_object
from headstart.errors import AdapterError, CheckpointError


class PeftScale(NamedTuple):
    """What PEFT keeps outside of the tensors; patterns are endings of module names."""

    alpha: float
    rank: int
    rslora: bool = False
    alphas: Mapping[str, float] = {}
    ranks: Mapping[str, float] = {}

    def of(self, module: str, rank: int | None) -> float:
        alpha = _by_pattern(self.alphas, module, self.alpha)
        size = rank or _by_pattern(self.ranks, module, self.rank)
        return alpha / (math.sqrt(size) if self.rslora else size)


def _by_pattern(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    for pattern, value in patterns.items():
        exact = pattern.startswith("^")
        if module == pattern.lstrip("^") or (not exact and module.endswith("." + pattern)):
            return value
    return otherwise


_PEFT_NETWORKS: tuple[tuple[str, Network | None], ...] = (
    ("", None),
    ("unet.", "unet"),
    ("transformer.", "unet"),
    ("text_encoder.", "text"),
    ("text_encoder_2.", "text_2"),
)
_LITERAL = re.compile(r"\^?[\w.]{1,512}")


def peft_scales(
    metadata: Mapping[str, str], beside: Mapping[str, object], path: Path
) -> dict[Network | None, PeftScale]:
    """Alpha as PEFT says it: `adapter_config.json` beside the file, or diffusers' metadata.

    diffusers >= 0.35 writes the same configuration, prefixed by the network, as JSON into
    `lora_adapter_metadata`. Raises AdapterError for a configuration that cannot be followed.
    """
    said = dict(beside)
    if text := metadata.get("lora_adapter_metadata"):
        try:
            said |= parse_object(text.encode(), path)
        except CheckpointError as error:
            raise AdapterError(f"metadata lora_adapter_metadata: {error}") from error
    found: dict[Network | None, PeftScale] = {}
    for prefix, network in _PEFT_NETWORKS:
        alpha = said.get(f"{prefix}lora_alpha", said.get(f"{prefix}alpha"))
        if alpha is not None:
            found[network] = PeftScale(
                _number(f"{prefix}lora_alpha", alpha),
                int(_number(f"{prefix}r", said.get(f"{prefix}r"))),
                said.get(f"{prefix}use_rslora") is True,
                _patterns(f"{prefix}alpha_pattern", said.get(f"{prefix}alpha_pattern")),
                _patterns(f"{prefix}rank_pattern", said.get(f"{prefix}rank_pattern")),
            )
    return found


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
        raise _bad(name, "a positive number", value)
    return float(value)


def _patterns(name: str, value: object) -> dict[str, float]:
    if value is not None and not isinstance(value, dict):
        raise _bad(name, "an object", value)
    table = cast(dict[str, object], value or {})
    for pattern in table:
        if not _LITERAL.fullmatch(pattern):
            raise _bad(name, "plain names of modules", pattern)
    return {pattern: _number(name, number) for pattern, number in table.items()}


def _bad(name: str, expected: str, came: object) -> AdapterError:
    return AdapterError(f"PEFT configuration {name}: expected {expected}, got {came!r:.120}")
