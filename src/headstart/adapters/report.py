"""What of an adapter's file found its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from headstart.adapters.file import AdapterFile
from headstart.adapters.resolution import Resolved
from headstart.adapters.textual_inversion import Embedding


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

    form      the naming that was recognised; rank: the largest, 0 where nothing has one
    models    "base" and/or "distilled" -> what was found there
    live      strengths may differ between samples and rows; else it is merged at one strength
    notes     what the file does not say and how it is read
    in_place  the buffers of the adapter it replaced were kept, so captured graphs stay valid
    tokens    learned tokens of its file, which prompts know now
    """

    name: str
    path: Path
    form: str
    rank: int
    models: Mapping[str, Coverage]
    live: bool = True
    in_place: bool = False
    notes: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()

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
        if not any("unet" in told.layers for told in self.models.values()):
            lines.append("  it changes the text alone, which all models read")
        if self.tokens:
            lines.append(f"  prompts know {', '.join(f'{token:.80}' for token in self.tokens)}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def to_json(self) -> dict[str, Any]:
        models = {name: told._asdict() for name, told in self.models.items()}
        return asdict(self) | {"path": str(self.path), "models": models}


def report_of(
    name: str,
    file: AdapterFile,
    resolved: Mapping[str, Resolved],
    live: bool,
    tokens: tuple[Embedding, ...] = (),
    left: tuple[str, ...] = (),
) -> AdapterReport:
    """What `resolved`, model -> what the file is there, says of a file; `left`: its tokens' keys
    that were let be."""
    first = next(iter(resolved.values()))
    return AdapterReport(
        name=name,
        path=file.path,
        form=first.form.value,
        rank=first.rank,
        models={model: _coverage(told, left) for model, told in resolved.items()},
        live=live,
        notes=first.notes,
        tokens=tuple(token.token for token in tokens),
    )


def _coverage(told: Resolved, left: tuple[str, ...]) -> Coverage:
    return Coverage(
        layers=dict(Counter(network for network, _ in told.deltas)),
        matched=len(told.matched),
        mismatched=tuple(entry.name for entry in told.mismatched),
        unmatched=(*told.unmatched, *left),
    )
