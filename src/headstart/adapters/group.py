"""The tensors of one module of an adapter, checked against each other, and their delta.

scale = alpha/rank, or PEFT's (`headstart.adapters.peft`), or 1 where alpha is missing or 0; times
LyCORIS' `scalar`
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, NoReturn

from torch import Tensor

from headstart.adapters.delta import Delta, Dense, LowRank
from headstart.adapters.kind import Agreement, Kind, Shape, Shapes, Sides, same_weight
from headstart.adapters.kinds import (
    LORA,
    MODIFIERS,
    OFT_V2,
    ONE_NUMBER,
    SWITCHES,
    WHOLE,
    conflicting_operands,
    dimensions,
    kinds_of,
    missing_operands,
    rank_limit,
)
from headstart.adapters.names import AdapterForm, Key, Network, parse
from headstart.adapters.peft import Peft
from headstart.adapters.products import with_core
from headstart.adapters.rotations import oft_v2
from headstart.checkpoint.dtypes import FLOATS
from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import AdapterError

Layout = tuple[tuple[str, str, Shape], ...]
"""Key, dtype and shape of every tensor, from a file's header."""
_INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"})


class TensorEntry(NamedTuple):
    """One tensor in the header."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Group:
    """One module of a file: names and shapes, shared by files of the same layout.

    name    as the file spells it; `module` without the network's prefix
    kind    the formula of its tensors
    slots   operand -> key; operands are named as in `headstart.adapters.names`
    shapes  operand -> shape
    forms   which namings its keys have
    """

    name: str
    network: Network | None
    module: str
    kind: Kind
    slots: Mapping[str, str]
    shapes: Shapes
    forms: frozenset[AdapterForm]

    @property
    def rank(self) -> int | None:
        """The rank by which alpha is divided; None where alpha is no scale."""
        return self.kind.rank(self.shapes)

    def sides(self) -> Sides:
        """The weight's shape; LoHa and LoKr may write a convolution as [o, i*kh*kw]."""
        return self.kind.sides(self.shapes)

    def fits(self, layer: Shape) -> bool:
        """Whether this changes a weight [o, i(, kh, kw)], a norm's [c], or a bias of that layer."""
        biases = {"diff_b", "bias", "up_bias"} & self.slots.keys()
        if any(self.shapes[slot] != layer[:1] for slot in biases):
            return False
        if not self.slots.keys() - biases - MODIFIERS.keys():
            return True
        if self.kind.fits is not None:
            return self.kind.fits(self.shapes, layer)
        return same_weight(self.sides(), layer)

    def delta(
        self, checkpoint: Checkpoint, layer: Shape, peft: Peft, alpha: float | None = None
    ) -> Delta:
        """The change of a layer that it fits; `alpha` is the result of `Group.alpha`.

        Raises AdapterError for numbers that are not finite, and for a rank that no layer of that
        size has.
        """
        self._check_rank(layer)
        needed = self.slots.keys() - ({"alpha"} - self.kind.operands.keys())
        tensors = {slot: self._tensor(checkpoint, slot) for slot in self.slots if slot in needed}
        operands = {slot: t for slot, t in tensors.items() if slot in self.kind.operands}
        _check_agreements(self.name, self.kind.value_agreements(operands, layer))
        scale, magnitude = self._scale(tensors, peft, alpha), self._magnitude(tensors, layer)
        if self.kind is WHOLE:
            bias = operands.pop("bias", None)
            return Dense(WHOLE, operands, bias=bias)
        bias = self._bias(tensors, scale)
        if self.kind is LORA:
            down = operands["down"]
            if "mid" in operands:
                down = with_core(down, operands["mid"])
            operands = {
                "down": down.reshape(len(down), *layer[1:]),
                "up": operands["up"].flatten(1),
            }
            if magnitude is None and bias is None:
                return LowRank(operands["down"], operands["up"], scale)
        kind = oft_v2(peft.oft_settings(self.name)) if self.kind is OFT_V2 else self.kind
        return Dense(kind, operands, scale, magnitude, bias)

    def _check_rank(self, layer: Shape) -> None:
        """A factor's sides are the layer's, parts of them, and ranks."""
        if not self.kind.scaled:
            return
        largest = max(max(self.shapes[slot]) for slot in self.slots if slot in self.kind.operands)
        if largest > rank_limit(layer):
            _bad(self.name, f"a rank of at most {rank_limit(layer)} for {list(layer)}", largest)

    def alpha(self, checkpoint: Checkpoint) -> float | None:
        """The file's alpha, or None. Raises AdapterError for one that is not finite."""
        return _number(self._tensor(checkpoint, "alpha")) if "alpha" in self.slots else None

    def _tensor(self, checkpoint: Checkpoint, slot: str) -> Tensor:
        tensor = checkpoint.tensor(self.slots[slot])
        if not all_finite(tensor):
            raise AdapterError(
                f"{self.slots[slot]}: expected finite numbers, got NaN or infinity; the file is "
                "damaged or its training diverged"
            )
        return tensor

    def _scale(self, tensors: Mapping[str, Tensor], peft: Peft, alpha: float | None) -> float:
        scale = _number(tensors["scalar"]) if "scalar" in tensors else 1.0
        if alpha is not None:
            # sd-scripts and LyCORIS read an alpha of 0 as the rank: nobody trains a scale of 0.
            scale *= alpha / self.rank if self.rank and alpha else 1.0
        elif self.kind.scaled:
            scale *= peft.scale(self.network, self.module, self.rank)
        if not abs(scale) <= _LARGEST:
            _bad(self.name, f"a scale of at most {_LARGEST:.0e}", scale)
        return scale

    def _bias(self, tensors: Mapping[str, Tensor], scale: float) -> Tensor | None:
        """PEFT's `lora_bias` is scaled like the product; `diff_b` is not."""
        bias = tensors.get("diff_b")
        if "up_bias" not in tensors:
            return bias
        added = tensors["up_bias"].float() * scale
        return added if bias is None else added + bias.float()

    def _magnitude(self, tensors: Mapping[str, Tensor], layer: Shape) -> Tensor | None:
        """DoRA's m in a shape that broadcasts: PEFT's is of rows, LyCORIS' of rows or columns.

        The key tells which program it is, because PEFT writes [1, o, 1, 1] for a convolution.
        """
        slot = next((slot for slot in ("magnitude", "dora_scale") if slot in tensors), None)
        if slot is None:
            return None
        shape, magnitude = [1] * len(layer), tensors[slot]
        one_row = magnitude.ndim > 1 and magnitude.shape[0] == 1 and len(layer) > 1
        axis = 1 if slot == "dora_scale" and one_row else 0
        shape[axis] = layer[axis]
        if magnitude.numel() != math.prod(shape):
            _bad(self.name, f"a DoRA magnitude {shape}", list(magnitude.shape))
        return magnitude.reshape(shape)


_LARGEST = 1e30
"""A product of float32 numbers with it may still be one."""


def _group(key: Key, entries: Mapping[str, TensorEntry], forms: frozenset[AdapterForm]) -> Group:
    """Raises AdapterError where tensors are missing, of a wrong dtype, or do not agree."""
    name = key.name
    slots = {slot: entry.name for slot, entry in entries.items()}
    shapes = {slot: entry.shape for slot, entry in entries.items()}
    kinds, operands = kinds_of(shapes), ", ".join(sorted(slots))
    if not kinds:
        _bad(name, "a change too (the file is torn)", operands)
    if len(kinds) > 1:
        titles = " and ".join(kind.title for kind in kinds)
        _bad(name, f"one way to change its weight, not {titles}", operands)
    (kind,) = kinds
    if odd := next(conflicting_operands(kind, slots), None):
        alone = f"{kind.title} alone, because {kind.title} with {odd} is not implemented"
        _bad(name, "one way to change its weight" if odd in kind.operands else alone, operands)
    for slot, entry in entries.items():
        _check(kind, slot, entry)
    if missing := next(missing_operands(kind, slots), None):
        _bad(name, f"{missing} too (the file is torn)", operands)
    _check_agreements(name, kind.agreements(shapes))
    return Group(name, key.network, key.module, kind, slots, shapes, forms)


def _check(kind: Kind, slot: str, entry: TensorEntry) -> None:
    allowed = FLOATS | _INTEGERS if slot == "alpha" or slot in SWITCHES else FLOATS
    if entry.dtype not in allowed and not (slot in SWITCHES and entry.dtype == "BOOL"):
        _bad(entry.name, "floating point numbers", entry.dtype)
    if len(entry.shape) not in dimensions(kind, slot) or 0 in entry.shape:
        _bad(entry.name, f"{dimensions(kind, slot)} dimensions, none empty", list(entry.shape))
    if slot in ONE_NUMBER and math.prod(entry.shape) != 1:
        _bad(entry.name, "one number", list(entry.shape))


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, from the extremes: NaN is both of them where there is
    one. One pass, 20 times as fast as `isfinite().all()` on float16 (measured)."""
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    low, high = wide.aminmax()
    return bool(low.isfinite() & high.isfinite())


class Grouping(NamedTuple):
    """Module as the file spells it -> its checked group; strays are keys that no naming knows."""

    groups: Mapping[str, Group]
    strays: tuple[str, ...]


@lru_cache(maxsize=8)
def group_keys(layout: Layout) -> Grouping:
    """A file's keys by module. The same layout gives the same object, so that swapping adapters of
    the same layout parses no name. Raises AdapterError."""
    modules: dict[tuple[Network | None, str], list[tuple[Key, TensorEntry]]] = {}
    strays: list[str] = []
    factors = {name.removesuffix(_ON_INPUT) for name, *_ in layout if name.endswith(_ON_INPUT)}
    for entry in map(TensorEntry._make, layout):
        # Beside `on_input` a `weight` is (IA)^3's; elsewhere it is a network's.
        module = entry.name.removesuffix(".weight")
        is_factor = module != entry.name and module in factors
        key = parse(module + _ON_INPUT if is_factor else entry.name)
        if key is None:
            strays.append(entry.name)
            continue
        key = key._replace(slot="factors") if is_factor else key
        modules.setdefault((key.network, key.module), []).append((key, entry))
    groups: dict[str, Group] = {}
    # The names without their last part, and without their last two parts.
    unknown = {stray.rsplit(".", parts)[0] for stray in strays for parts in (1, 2)}
    for rows in modules.values():
        first = rows[0][0]
        entries: dict[str, TensorEntry] = {}
        for key, entry in rows:
            if key.slot in entries:
                raise AdapterError(
                    f"{entries[key.slot].name!r} and {entry.name!r} are the same part of "
                    f"{first.name}: expected it once; remove one of them"
                )
            entries[key.slot] = entry
        if entries.keys() <= MODIFIERS.keys() - {"diff_b"} and first.name in unknown:
            strays += [entry.name for entry in entries.values()]  # an alpha of an unknown change
        else:
            forms = frozenset(key.form for key, _ in rows if key.form)
            groups[first.name] = _group(first, entries, forms)
    return Grouping(groups, tuple(strays))


_ON_INPUT = ".on_input"


def _number(tensor: Tensor) -> float:
    return float(tensor.flatten()[0])


def _check_agreements(name: str, agreements: Iterable[Agreement]) -> None:
    for what, expected, actual in agreements:
        if expected != actual:
            _bad(name, f"{what} {expected}", actual)


def _bad(name: str, expected: str, actual: object) -> NoReturn:
    raise AdapterError(f"{name}: expected {expected}, got {actual!r:.120}")
