"""How much of an adapter's file was attached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from headstart.adapters.file import AdapterFile
from headstart.adapters.resolution import Resolution
from headstart.adapters.textual_inversion import Embedding


class Coverage(NamedTuple):
    """How much of a file changes one model and the text encoders.

    layers      network ("unet", "text", "text_2") -> number of changed layers
    matched     number of keys of the file that change them
    mismatched  modules whose layer has another shape; unmatched: keys that belong to no layer.
                Each of them was allowed by name: any other is an error
    """

    layers: Mapping[str, int]
    matched: int
    mismatched: tuple[str, ...]
    unmatched: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """The result of attaching a file.

    form      the naming scheme of the file; rank: the largest, 0 where nothing has one
    models    "base" and/or "distilled" -> how much of the file changes it
    live      strengths may differ between samples and rows; else it is merged at one strength
    notes     what the file does not say, and how it is read
    in_place  it uses the buffers of the adapter that it replaced, so captured graphs stay valid
    tokens    learned tokens of the file, which prompts may use now
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
        how = f"rank {self.rank}, live" if self.live else "merged"
        lines = [f"{self.name}: {self.form}, {how}"]
        for model, coverage in self.models.items():
            layers = ", ".join(f"{n} of {network}" for network, n in coverage.layers.items())
            lines.append(
                f"  {model}: {coverage.matched} keys in layers {layers}; "
                f"{len(coverage.mismatched)} of another shape, {len(coverage.unmatched)} unmatched"
            )
        if not any("unet" in coverage.layers for coverage in self.models.values()):
            lines.append("  it changes the text alone, which all models read")
        if self.tokens:
            lines.append(f"  prompts know {', '.join(f'{token:.80}' for token in self.tokens)}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def to_json(self) -> dict[str, Any]:
        models = {name: coverage._asdict() for name, coverage in self.models.items()}
        return asdict(self) | {"path": str(self.path), "models": models}


def report_of(
    name: str,
    file: AdapterFile,
    resolutions: Mapping[str, Resolution],
    live: bool,
    tokens: tuple[Embedding, ...] = (),
    skipped: tuple[str, ...] = (),
) -> AdapterReport:
    """The report of a file that was resolved on each model.

    skipped  keys of its tokens that are allowed to have no use
    """
    first = next(iter(resolutions.values()))
    models = {
        model: Coverage(
            layers=dict(Counter(network for network, _ in resolution.deltas)),
            matched=len(resolution.matched),
            mismatched=tuple(entry.name for entry in resolution.mismatched),
            unmatched=(*resolution.unmatched, *skipped),
        )
        for model, resolution in resolutions.items()
    }
    return AdapterReport(
        name=name,
        path=file.path,
        form=first.form.value,
        rank=first.rank,
        models=models,
        live=live,
        notes=first.notes,
        tokens=tuple(token.token for token in tokens),
    )
