"""Which layers the modules of an adapter's file change, and which modules have no layer."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headstart.adapters.delta import Delta
from headstart.adapters.group import Group
from headstart.adapters.kind import Shape, Sides
from headstart.adapters.names import AdapterForm, Network, why_unmatched
from headstart.adapters.tuners import tuner_of
from headstart.checkpoint.fit import first_few
from headstart.checkpoint.leftovers import is_allowed
from headstart.errors import AdapterError


class Mismatch(NamedTuple):
    """A module of the file whose layer has another shape: `expected` is the layer's, `actual` the
    file's, with None for a side that its tensors do not tell."""

    name: str
    expected: Shape
    actual: Sides

    def __str__(self) -> str:
        actual = ", ".join("any" if side is None else str(side) for side in self.actual)
        return f"{self.name} [{actual}] instead of {list(self.expected)}"


class Match(NamedTuple):
    """The layer of each module of a file, from names and shapes alone.

    owners      layer -> the module that changes it; mismatched, unmatched: as in `Resolution`
    """

    owners: Mapping[tuple[Network, str], Group]
    mismatched: tuple[Mismatch, ...]
    unmatched: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What a file changes: one delta a layer, and everything in the file that has no layer.

    deltas      (network, module path) -> LowRank | Dense
    matched     keys of the file that became deltas
    mismatched  modules whose layer has another shape
    unmatched   keys that belong to no layer of these networks
    rank        the largest rank by which an alpha is divided; 0 where there is none
    notes       what the file does not say, and how it is read
    """

    deltas: Mapping[tuple[Network, str], Delta]
    form: AdapterForm
    rank: int
    matched: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def require(self, allow: Collection[str] = ()) -> Resolution:
        """Itself, if every key has a layer or is allowed to have none.

        `allow` holds names of modules or keys as the file spells them, `*` and `?` for any text:
        `lora_te_*`, or `*` for everything. Raises AdapterError that counts the others, with
        examples; `mismatched` and `unmatched` have all names.
        """
        misshapen = [m for m in self.mismatched if not is_allowed(m.name, allow)]
        unknown = [name for name in self.unmatched if not is_allowed(name, allow)]
        problems: dict[str, list[str]] = {"of another shape": [*map(str, misshapen)]}
        for name in unknown:
            tuner = tuner_of(name)
            reason = f"of {tuner}, which is not implemented" if tuner else why_unmatched(name)
            problems.setdefault(reason, []).append(name)
        lines = [f"{len(n)} {why}: {first_few(n)}" for why, n in problems.items() if n]
        if lines:
            patterns = _patterns([mismatch.name for mismatch in misshapen] + unknown)
            raise AdapterError(
                f"{len(self.matched)} keys of the adapter ({self.form.value}) fit, but "
                f"{'; '.join(lines[:5])}. Attach it to the network it was made for, or let these "
                f"be: {patterns} (allow=[...] in Python)"
            )
        return self


def _patterns(names: Sequence[str]) -> str:
    """The options that allow these names: one for each common beginning, or `*`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name[:8], []).append(name)
    patterns = ["*"]
    if len(groups) <= 3:
        starts = {os.path.commonprefix(group): group for group in groups.values()}  # noqa: RUF071
        patterns = [s if len(group) == 1 else f"{s}*" for s, group in starts.items()]
    return " ".join(f"--allow '{pattern:.160}'" for pattern in patterns)
