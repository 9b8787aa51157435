"""What an adapter's header tells, as `headstart inspect` prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from headstart.adapters.file import read_adapter
from headstart.adapters.names import other_family


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What an adapter's header tells.

    family    lineage whose text its cross-attention reads, or an architecture that its names tell;
              None where they tell none
    ranks     smallest and largest rank of its low-rank factors; None where there are none
    modules   number of changed modules: unet, text, text_2, and "" where names do not say which
    dtype     the dtype most bytes have
    strays    keys that no naming knows
    notes     what the file does not say and how it is read
    tokens    learned tokens that prompts know while it is attached
    """

    path: str
    form: str
    family: str | None
    ranks: tuple[int, int] | None
    modules: Mapping[str, int]
    dtype: str
    size_bytes: int
    tensors: int
    strays: tuple[str, ...]
    notes: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def describe_adapter(path: str | Path) -> AdapterInfo:
    """Triage of an adapter from its header; only alphas are read. Raises AdapterError."""
    file = read_adapter(path)
    checkpoint = file.checkpoint
    ranks = [group.rank for group in file.groups.values() if group.rank is not None]
    return AdapterInfo(
        path=str(path),
        form=file.form.value,
        family=file.family or other_family(file.groups),
        ranks=(min(ranks), max(ranks)) if ranks else None,
        modules=dict(Counter(group.network or "" for group in file.groups.values())),
        dtype=checkpoint.dtype,
        size_bytes=checkpoint.size_bytes,
        tensors=len(checkpoint.names),
        strays=file.strays if file.tokens_problem is None else file.grouping.strays,
        notes=file.notes({name: group.alpha(checkpoint) for name, group in file.groups.items()}),
        tokens=tuple(token.name for token in file.tokens),
    )
