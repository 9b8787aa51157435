"""What a method may change of a run, and what it knows of it.

table -> table                  before anything runs            interval
strengths -> strengths          of the adapters                 dial
noise source -> noise source    of the start and of the rows    pink
conditioning -> conditioning    before a network is called      cads, embedding-noise
F -> F                          after it                        particles
candidates -> those that go on  after the first row             select
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from headstart.adapters.snapshot import Snapshot
from headstart.adapters.strength import Strength
from headstart.errors import InputError
from headstart.interfaces import Conditioning, NoiseSource
from headstart.noise import Philox
from headstart.plan.table import Step, StepTable


class Limits(NamedTuple):
    """The numbers that a value may be: low to high, without low itself if `above`."""

    low: float
    high: float = math.inf
    above: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low = self.low < value if self.above else self.low <= value
        fits = low and value <= self.high and math.isfinite(value)
        return fits and (not self.whole or float(value).is_integer())

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        return f"{kind} {low}" + ("" if self.high == math.inf else f", at most {self.high:g}")


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """The images of one call: prompt and seed of each, and what methods draw for them."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    _noise: dict[int, NoiseSource] = field(default_factory=dict[int, NoiseSource], repr=False)
    _rows: dict[torch.device, list[Tensor]] = field(
        default_factory=dict[torch.device, list[Tensor]], repr=False
    )

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: Sequence[int]) -> Images:
        return Images(
            tuple(self.prompts[row] for row in rows), tuple(self.seeds[row] for row in rows)
        )

    @property
    def by_prompt(self) -> dict[str, list[int]]:
        """The images of each prompt, by number."""
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            rows.setdefault(prompt, []).append(row)
        return rows

    def rows(self, device: torch.device) -> list[Tensor]:
        """The same as int64 tensors, copied to the device once: a copy waits for it."""
        if device not in self._rows:
            groups = self.by_prompt.values()
            self._rows[device] = [torch.tensor(rows, device=device) for rows in groups]
        return self._rows[device]

    def noise(self, sample: int) -> NoiseSource:
        """Unit normals of a method's own, keyed by the seeds: the same in any batch. Samples from
        2^31 on are far from those of images."""
        if sample not in self._noise:
            self._noise[sample] = Philox.shared(self.seeds, [sample] * len(self))
        return self._noise[sample]


class Row(NamedTuple):
    """The row that runs: its number of `total`, its coefficients, and the images.

    tokens  how many tokens the text of each image has in this row; the context repeats them, to be
            as long as the others'. Empty: they are the whole context
    """

    number: int
    total: int
    step: Step
    images: Images
    tokens: tuple[int, ...] = ()


class Method(Protocol):
    """One way to more varied images, with its strength: frozen data, `str` of which is read back.

    name    how it is typed; limits: its fields, and what each may be
    least   images of a prompt that it needs; more than 1 where it acts across them
    """

    name: ClassVar[str]
    limits: ClassVar[Mapping[str, Limits]]
    least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Raise InputError unless every field is within its limits, or is its default, and `low`
        is below `high`."""
        for parameter in fields(self):  # pyright: ignore[reportArgumentType]
            value, limits = getattr(self, parameter.name), self.limits[parameter.name]
            if value not in limits and (parameter.default is MISSING or value != parameter.default):
                raise InputError(
                    f"diversify {self.name}: {parameter.name} is {limits}, got {value!r:.40}"
                )
        low, high = (getattr(self, name, None) for name in ("low", "high"))
        if low is not None and high is not None and not low < high:
            raise InputError(f"diversify {self.name}: low={low:g} is not below high={high:g}")

    def __str__(self) -> str:
        """`NAME:VALUE[,key=value...]`, without what is left at its default."""
        first, *others = fields(self)  # pyright: ignore[reportArgumentType]
        parts = [f"{self.name}:{_number(getattr(self, first.name))}"]
        for parameter in others:
            value: Any = getattr(self, parameter.name)
            if value != parameter.default:
                parts.append(f"{parameter.name}={_number(value)}")
        return ",".join(parts)

    def check(self, table: StepTable, /) -> None:
        """Raise InputError where it would change nothing of this plan, or cannot."""


@runtime_checkable
class ChangesTable(Protocol):
    def table(self, table: StepTable, /) -> StepTable:
        """The table to run; a table that it made before stays as it is."""
        ...


@runtime_checkable
class ChangesStrengths(Protocol):
    def strengths(
        self, acts: Mapping[str, Strength], attached: Snapshot, table: StepTable, /
    ) -> dict[str, Strength]: ...


@runtime_checkable
class ChangesNoise(Protocol):
    def noise(self, noise: NoiseSource, /) -> NoiseSource: ...


@runtime_checkable
class ChangesConditioning(Protocol):
    def conditioning(self, cond: Conditioning, row: Row, /) -> Conditioning:
        """Of B samples, or of 2B in the order (uncond, cond)."""
        ...


@runtime_checkable
class ChangesOutput(Protocol):
    def output(self, f: Tensor, x_in: Tensor, row: Row, /) -> Tensor:
        """F of B samples, or of 2B in the order (uncond, cond); x_in is the network's input."""
        ...


def _number(value: float) -> str:
    """The shortest text that is this number again."""
    return repr(float(value)).removesuffix(".0")


def change_conditional(values: Tensor, count: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`values`, with the last `count` rows changed in float32: a guided call's second half."""
    uncond, cond = values[: len(values) - count], values[len(values) - count :]
    return torch.cat((uncond, change(cond.float()).to(values.dtype)))


def change_tokens(context: Tensor, row: Row, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`context` [B or 2B, L, D] with the tokens of each image's text changed in the last B rows,
    and repeated as before, so that an image does not depend on how long the other texts are.

    change  [B, tokens, D] float32 -> the same shape; called once for each number of tokens
    """
    count, length = len(row.images), context.shape[1]
    by_count = {
        n: change_conditional(context[:, :n], count, change)[-count:].repeat(1, length // n, 1)
        for n in dict.fromkeys(row.tokens or (length,))
    }
    changed, *others = by_count.values()
    if others:
        changed = torch.stack([by_count[n][image] for image, n in enumerate(row.tokens)])
    return torch.cat((context[: len(context) - count], changed))
