"""Where the modules of an adapter's file went, and what of it found no place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from headstart.adapters.delta import Delta
from headstart.adapters.group import Group
from headstart.adapters.kind import Shape, Sides
from headstart.adapters.names import AdapterForm, Network, why_unplaced
from headstart.adapters.tuners import tuner_of
from headstart.errors import AdapterError


class Mismatch(NamedTuple):
    """A module of the file whose layer has another shape: `expected` is ours, `came` the file's,
    with None for a side that its tensors do not tell."""

    name: str
    expected: Shape
    came: Sides

    def __str__(self) -> str:
        came = ", ".join("any" if side is None else str(side) for side in self.came)
        return f"{self.name} [{came}] instead of {list(self.expected)}"


class Match(NamedTuple):
    """Where the modules of a file go, from names and shapes alone.

    owners      layer -> the module that changes it; mismatched, unmatched: as in `Resolved`
    """

    owners: Mapping[tuple[Network, str], Group]
    mismatched: tuple[Mismatch, ...]
    unmatched: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What a file changes: one delta a layer, and everything of the file that found no layer.

    deltas      (network, module path) -> LowRank | Dense
    matched     keys of the file that went into deltas
    mismatched  modules whose layer exists with another shape
    unmatched   keys that mean no layer of these networks
    rank        the largest by which an alpha is divided; 0 where there is none
    notes       what the file does not say and how it is read
    """

    deltas: Mapping[tuple[Network, str], Delta]
    form: AdapterForm
    rank: int
    matched: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def require(self, allow: Collection[str] = ()) -> Resolved:
        """Itself, if the whole file found its place or what did not is allowed by name.

        `allow` holds names of modules or keys as the file spells them, `*` and `?` for any text:
        `lora_te_*`, or `*` for everything. Raises AdapterError that counts what is left, with
        examples; the names are all in `mismatched` and `unmatched`.
        """
        odd = [m for m in self.mismatched if not allowed(m.name, allow)]
        strange = [name for name in self.unmatched if not allowed(name, allow)]
        left: dict[str, list[str]] = {"of another shape": [str(mismatch) for mismatch in odd]}
        for name in strange:
            tuner = tuner_of(name)
            why = f"of {tuner}, which is not implemented" if tuner else why_unplaced(name)
            left.setdefault(why, []).append(name)
        counted = [f"{len(names)} {why}: {some(names)}" for why, names in left.items() if names]
        if counted:
            patterns = _patterns([mismatch.name for mismatch in odd] + strange)
            raise AdapterError(
                f"{len(self.matched)} keys of the adapter ({self.form.value}) fit, but "
                f"{'; '.join(counted[:5])}. Attach it to the network it was made for, or let these "
                f"be: {patterns} (allow=[...] in Python)"
            )
        return self


def allowed(name: str, allow: Collection[str]) -> bool:
    """Whether a module or key may find no place: `*` and `?` in a pattern are any text."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in allow)


def some(names: Sequence[str]) -> str:
    """Three examples."""
    return ", ".join(f"{name:.160}" for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _patterns(names: Sequence[str]) -> str:
    """Options that let these be: what each of a few heaps begins with, or everything."""
    heaps: dict[str, list[str]] = {}
    for name in names:
        heaps.setdefault(name[:8], []).append(name)
    found = ["*"] if len(heaps) > 3 else [_pattern(heap) for heap in heaps.values()]
    return " ".join(f"--allow '{pattern:.160}'" for pattern in found)


def _pattern(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    first, last = min(names), max(names)
    same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    return first[:same] + "*"
