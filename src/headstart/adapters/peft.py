"""PEFT's settings outside of the tensors: in a configuration file, or in the metadata.

scale = alpha/rank, or alpha/sqrt(rank) for rslora (arXiv:2312.03732)
R     = a series in Q or Cayley's formula, for OFTv2
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

from headstart.adapters.names import Network
from headstart.adapters.rotations import OftSettings
from headstart.checkpoint.header import parse_object
from headstart.errors import AdapterError, CheckpointError


class PeftScale(NamedTuple):
    """How PEFT scales a product; patterns are endings of module names."""

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


class Peft(NamedTuple):
    """The settings of one file.

    scales   by network; the key None is for all of them
    oft      how OFTv2 rotates; None where it is not set: as PEFT and OneTrainer do by default
    """

    scales: Mapping[Network | None, PeftScale] = {}
    oft: OftSettings | None = None

    def has_scale(self, network: Network | None) -> bool:
        """Whether there is a scale for it."""
        return network in self.scales or None in self.scales

    def scale(self, network: Network | None, module: str, rank: int | None) -> float:
        """1 where no scale is set."""
        settings = self.scales.get(network, self.scales.get(None))
        return 1.0 if settings is None else settings.of(module, rank)

    def oft_settings(self, name: str) -> OftSettings:
        """Of one module. PEFT's own names tell its files from OneTrainer's."""
        return self.oft or OftSettings(kernel=not name.startswith("base_model."))


def read_peft(metadata: Mapping[str, str], config_json: Mapping[str, object], path: Path) -> Peft:
    """From `adapter_config.json` beside the file, or diffusers' metadata.

    diffusers >= 0.35 writes the same configuration, prefixed by the network, as JSON into
    `lora_adapter_metadata`. Raises AdapterError for a configuration that cannot be followed.
    """
    config = dict(config_json)
    if text := metadata.get("lora_adapter_metadata"):
        try:
            config |= parse_object(text.encode(), path)
        except CheckpointError as error:
            raise AdapterError(f"metadata lora_adapter_metadata: {error}") from error
    scales: dict[Network | None, PeftScale] = {}
    for prefix, network in _PEFT_NETWORKS:
        _check_init(f"{prefix}init_lora_weights", config.get(f"{prefix}init_lora_weights"))
        alpha = config.get(f"{prefix}lora_alpha", config.get(f"{prefix}alpha"))
        if alpha is not None:
            scales[network] = PeftScale(
                _number(f"{prefix}lora_alpha", alpha),
                int(_number(f"{prefix}r", config.get(f"{prefix}r"))),
                config.get(f"{prefix}use_rslora") is True,
                _patterns(f"{prefix}alpha_pattern", config.get(f"{prefix}alpha_pattern")),
                _patterns(f"{prefix}rank_pattern", config.get(f"{prefix}rank_pattern")),
            )
    return Peft(scales, _oft_settings(config) if config.get("peft_type") == "OFT" else None)


def _check_init(name: str, value: object) -> None:
    """PEFT's docs, "PiSSA" and its relatives: they subtract their initial product from W."""
    if isinstance(value, str) and value.startswith(("pissa", "olora", "corda")):
        raise AdapterError(
            f"PEFT configuration {name}: {value!r:.40} changes the layer's own weights too, which "
            "is not implemented: save it with path_initial_model_for_weight_conversion, which "
            "makes a plain LoRA of it"
        )


def _oft_settings(config: Mapping[str, object]) -> OftSettings:
    if config.get("coft"):
        raise AdapterError("PEFT configuration coft: constrained OFT is not implemented")
    terms = _number("num_cayley_neumann_terms", config.get("num_cayley_neumann_terms", 5))
    if terms > _MOST_TERMS or terms != int(terms):
        raise _bad("num_cayley_neumann_terms", f"at most {_MOST_TERMS}", terms)
    series = config.get("use_cayley_neumann", True) is not False
    # A version before 0.18 does not say which it is (peft, tuners/oft/config.py `check_kwargs`).
    new = re.match(r"[1-9]|0\.(1[89]|[2-9][0-9])", str(config.get("peft_version", "")))
    return OftSettings(int(terms) if series else None, 1.0 if new else 2.0, kernel=False)


_MOST_TERMS = 64


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


def _bad(name: str, expected: str, actual: object) -> AdapterError:
    return AdapterError(f"PEFT configuration {name}: expected {expected}, got {actual!r:.120}")
