"""One attached adapter: what of its file found its place, and how strongly it acts from now on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

from headstart.adapters.file import AdapterFile, Resolved
from headstart.adapters.slots import Host
from headstart.adapters.strength import Asked, Strength, as_strength
from headstart.errors import InputError


class Coverage(NamedTuple):
    """What of a file found its place in one model and the text encoders.

    layers      network ("unet", "text", "text_2") -> layers that are changed
    matched     keys of the file that went into them
    mismatched  modules whose layer has another shape; unmatched: keys that mean no layer.
                Only what was allowed by name: anything else is an error
    """

    layers: Mapping[str, int]
    matched: int
    mismatched: tuple[str, ...]
    unmatched: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """What attaching a file did.

    form      the naming that was recognised; rank: the largest, 0 where nothing is low-rank
    models    "base" and/or "distilled" -> what was found there
    live      strengths may differ between samples and rows; else it is merged at one strength
    in_place  the buffers of the adapter it replaced were kept, so captured graphs stay valid
    """

    name: str
    path: Path
    form: str
    rank: int
    models: Mapping[str, Coverage]
    live: bool = True
    in_place: bool = False

    def __str__(self) -> str:
        kind = f"rank {self.rank}, live" if self.live else "merged"
        lines = [f"{self.name}: {self.form}, {kind}"]
        for model, told in self.models.items():
            layers = ", ".join(f"{count} of {where}" for where, count in told.layers.items())
            odd = len(told.mismatched), len(told.unmatched)
            lines.append(
                f"  {model}: {told.matched} keys in layers {layers}; {odd[0]} of another shape, "
                f"{odd[1]} unmatched"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        models = {name: told._asdict() for name, told in self.models.items()}
        return asdict(self) | {"path": str(self.path), "models": models}


@final
class Adapter:
    """One attached adapter. Its strength may be set at any time, and holds from the next run on."""

    def __init__(
        self, report: AdapterReport, to: tuple[str, ...], allow: tuple[str, ...], texts: bool
    ) -> None:
        self.report, self.to, self.allow, self.texts = report, to, allow, texts
        self.hosts: tuple[Host, ...] = ()
        self._strength = Strength()

    @property
    def name(self) -> str:
        return self.report.name

    @property
    def strength(self) -> Strength:
        return self._strength

    @strength.setter
    def strength(self, asked: Asked) -> None:
        strength = as_strength(asked)
        if not self.report.live:
            value = self.one_number(strength)
            for host in self.hosts:
                host.merge_again(self.name, value)
        self._strength = strength

    def for_run(self, asked: Asked | None) -> Strength:
        """What holds in one run. Raises InputError where the adapter is merged at another."""
        strength = self._strength if asked is None else as_strength(asked)
        if not self.report.live and strength != self._strength:
            self.one_number(strength)
            raise InputError(
                f"adapter {self.name!r} is merged at strength {self._strength.constant:g}, and "
                f"this run asks for {strength.constant:g}: other runs share the weights, so set "
                f"engine.adapters[{self.name!r}].strength first"
            )
        return strength

    def one_number(self, strength: Strength) -> float:
        """The strength of a merged adapter. Raises InputError where it is not one for all."""
        if strength.constant is None:
            raise InputError(
                f"adapter {self.name!r} ({self.report.form}) is merged into the weights, because "
                "no low-rank path computes it exactly; the weights serve all samples and rows, so "
                "its strength is one number for all"
            )
        return strength.constant


def report_of(
    name: str, file: AdapterFile, resolved: Mapping[str, Resolved], live: bool, in_place: bool
) -> AdapterReport:
    """What `resolved`, model -> what the file is there, says of a file."""
    first = next(iter(resolved.values()))
    return AdapterReport(
        name=name,
        path=file.path,
        form=first.form.value,
        rank=first.rank,
        models={model: _coverage(told) for model, told in resolved.items()},
        live=live,
        in_place=in_place,
    )


def _coverage(told: Resolved) -> Coverage:
    return Coverage(
        layers=dict(Counter(network for network, _ in told.deltas)),
        matched=len(told.matched),
        mismatched=tuple(entry.name for entry in told.mismatched),
        unmatched=told.unmatched,
    )
