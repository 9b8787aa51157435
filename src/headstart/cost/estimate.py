"""A run's stages against a card's roofs: an estimate, not a measurement.

an operator takes max(FLOPs/peak, bytes/bandwidth), a stage the sum; a host that launches operators
one after the other may take longer than that, and a captured graph a little for each kernel
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from headstart.cost.cards import Card
from headstart.cost.operators import Kind, Operator, Tally, by_kind
from headstart.cost.sizes import Sizes
from headstart.cost.stages import Stage, stages_of
from headstart.errors import InputError
from headstart.plan.table import StepTable

EAGER_US = 6.0
"""The host's time for one of torch's operators on CUDA, from Python to the driver: assumed, for a
machine of 2023."""
TRITON_US = 50.0
"""The same for one of our kernels, which Triton launches from Python: 48 us `groupnorm_silu`,
58 us `fused_step`, on two Zen 3 cores over an emulated driver."""
GRAPH_US = 1.0
"""Between two kernels: an assumption. 0.5 us on a V100 ("Getting Started with CUDA
Graphs", NVIDIA developer blog, 2019), where kernels did not wait for each other's memory."""
_NAME = 24
"""Characters of a stage's name, such as "distilled prompt of 16"."""
_TRITON_KERNELS = frozenset(
    {"groupnorm_silu", "add_layernorm", "geglu", "low_rank_add", "fused_step_into", "scale_input"}
    | {"philox_normal", "decode_u8", "preview_rgb"}
)
ASSUMPTIONS = (
    "an estimate, not a measurement: no kernel reaches its roof, and no figure here was timed",
    "a line is all its `times` together, its share that of device ms; the lines below the table "
    "are of one time",
    "device ms: every operator reads its inputs and writes its outputs once, as eager kernels do; "
    "floor ms: the products, convolutions and attentions alone, all else within their kernels",
    f"eager ms: the host, {EAGER_US:g} us an operator and {TRITON_US:g} us one of ours by Triton; "
    f"graph ms: {GRAPH_US:g} us between two kernels; a run takes device plus graph, or eager where "
    "that is more and nothing is captured",
    "text: prompts of one piece of 75 tokens; prompt: its keys and values, which a network reads "
    "once",
    "not counted: caches that hold a tensor from one operator to the next, layouts that cuDNN "
    "changes within its kernels, adapters, previews, reading weights from disk",
)


class Line(NamedTuple):
    """One stage, all its `times` together.

    device_ms  at the roofs, as it runs; floor_ms: without all that could be fused away
    eager_ms   the host's launches; graph_ms: the gaps between kernels, all that a graph leaves
    """

    stage: str
    times: int
    rows: int
    tally: Tally
    device_ms: float
    floor_ms: float
    eager_ms: float
    graph_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One plan on one card. `kinds`: stage -> kind -> (tally, device_ms) of one of its passes."""

    card: Card
    family: str
    plan: str
    pixels: tuple[int, int]
    batch: int
    dtype: torch.dtype
    decode_dtype: torch.dtype
    lines: tuple[Line, ...]
    kinds: Mapping[str, Mapping[Kind, tuple[Tally, float]]]

    @property
    def total(self) -> Line:
        tally = Tally(*map(sum, zip(*(line.tally for line in self.lines), strict=True)))
        times = zip(*(line[4:] for line in self.lines), strict=True)
        return Line("total", 1, 0, tally, *map(sum, times))

    @property
    def eager_ms(self) -> float:
        """The whole run, launched by the host: each stage takes the longer of the two."""
        return sum(max(line.device_ms + line.graph_ms, line.eager_ms) for line in self.lines)

    @property
    def graph_ms(self) -> float:
        """The whole run as captured graphs."""
        return self.total.device_ms + self.total.graph_ms

    def to_json(self) -> dict[str, Any]:
        return {
            "card": self.card._asdict(),
            "family": self.family,
            "plan": self.plan,
            "size": list(self.pixels),
            "batch": self.batch,
            "dtype": _name(self.dtype),
            "decode_dtype": _name(self.decode_dtype),
            "stages": [_line_json(line) for line in self.lines],
            "total": _line_json(self.total),
            "eager_ms": self.eager_ms,
            "graph_ms": self.graph_ms,
            "floor_ms": self.total.floor_ms,
            "kinds": {
                stage: {
                    k.value: {**_tally_json(t), "device_ms": ms} for k, (t, ms) in tallies.items()
                }
                for stage, tallies in self.kinds.items()
            },
        }

    def __str__(self) -> str:
        height, width = self.pixels
        peak = peak_of(self.card, self.dtype, Kind.GEMM)
        head = (
            f"{self.family}, plan {self.plan}, {self.batch} x {height}x{width}, "
            f"{_name(self.dtype)} (decode {_name(self.decode_dtype)}) on {self.card.title}: "
            f"{peak:g} TFLOP/s, {self.card.gbytes_s:g} GB/s ({self.card.source})"
        )
        columns = f"{'stage':<{_NAME}}{'times':>6}{'TFLOP':>12}{'GB':>10}{'launches':>10}"
        columns += "".join(f"{name:>11}" for name in ("device ms", "floor ms", "eager ms"))
        columns += f"{'graph ms':>10}{'share':>7}"
        total, floor = self.total, self.total.floor_ms
        lines = [_text(line, total.device_ms) for line in (*self.lines, total)]
        run = (
            f"a run: {self.graph_ms:.1f} ms as graphs, {self.eager_ms:.1f} ms eager, floor "
            f"{floor:.1f} ms: {self.graph_ms / floor:.2f} times the floor"
        )
        return "\n".join([head, "", columns, *lines, "", *self._kinds(), "", run])

    def _kinds(self) -> list[str]:
        """Where one of each stage's passes goes; those that are alike in one line."""
        stages_of_text: dict[str, list[str]] = {}
        for stage, tallies in self.kinds.items():
            parts = (
                f"{kind.value} {tally.operators} ({ms:.2f} ms)"
                for kind, (tally, ms) in sorted(tallies.items(), key=lambda item: -item[1][1])
            )
            stages_of_text.setdefault(", ".join(parts), []).append(f"one {stage}")
        return [f"{', '.join(stages)}: {text}" for text, stages in stages_of_text.items()]


def estimate(
    models: Mapping[str, Sizes],
    table: StepTable,
    card: Card,
    *,
    pixels: tuple[int, int],
    batch: int = 1,
    chunks: tuple[int | None, int | None, int] = (None, None, 1),
    dtype: torch.dtype = torch.float16,
    vae_dtype: torch.dtype | None = None,
) -> Estimate:
    """What a run of `table` costs on `card`: see `stages.stages_of` for the arguments; vae_dtype
    None is what `decode_dtype` says.

    Raises InputError for a dtype that the card's matrix units do not have.
    """
    vae_dtype = vae_dtype or decode_dtype(card, dtype)
    peak_of(card, dtype, Kind.GEMM)
    peak_of(card, vae_dtype, Kind.CONV)
    stages = stages_of(
        models, table, pixels=pixels, batch=batch, chunks=chunks, dtype=dtype, vae_dtype=vae_dtype
    )
    return Estimate(
        card=card,
        family=next(iter(models.values())).family.name,
        plan=table.name,
        pixels=pixels,
        batch=batch,
        dtype=dtype,
        decode_dtype=vae_dtype,
        lines=tuple(_line(stage, card) for stage in stages),
        kinds={stage.name: _kinds_of(stage, card) for stage in stages if stage.rows},
    )


def _kinds_of(stage: Stage, card: Card) -> dict[Kind, tuple[Tally, float]]:
    return {
        kind: (tally, device_ms((o for o in stage.operators if o.kind is kind), card))
        for kind, tally in by_kind(stage.operators).items()
    }


def decode_dtype(card: Card, dtype: torch.dtype) -> torch.dtype:
    """What the decoder is on `card` beside networks in `dtype`: `engine.parts.decoder_dtype`."""
    if dtype == torch.float32 or card.bfloat16 is None:
        return dtype if dtype == torch.bfloat16 else torch.float32
    return torch.bfloat16


def device_ms(operators: Iterable[Operator], card: Card) -> float:
    """Every operator at the higher of its roofs, one after the other."""
    return sum(_roof_ms(operator, operator.moved, card) for operator in operators)


def floor_ms(operators: Iterable[Operator], card: Card) -> float:
    """Products, convolutions and attentions alone, each operand read and each result written once:
    what stays however well the rest is fused."""
    heavy = (operator for operator in operators if operator.kind.heavy)
    return sum(_roof_ms(operator, operator.least, card) for operator in heavy)


def peak_of(card: Card, dtype: torch.dtype, kind: Kind) -> float:
    """TFLOP/s. In float32 torch runs convolutions as TF32, and products and attentions in float32
    (`torch.backends.cudnn.allow_tf32` is True, `torch.backends.cuda.matmul.allow_tf32` False).

    Raises InputError for bfloat16 on a card without it.
    """
    if dtype == torch.bfloat16:
        if card.bfloat16 is None:
            raise InputError(
                f"{card.title} has no matrix units for bfloat16: give --dtype float16 or float32"
            )
        return card.bfloat16
    if dtype == torch.float16:
        return card.float16
    return card.tf32 if kind is Kind.CONV and card.tf32 is not None else card.float32


def _roof_ms(operator: Operator, moved_bytes: int, card: Card) -> float:
    transfer_ms = moved_bytes / (card.gbytes_s * 1e6)
    if not operator.flops:
        return transfer_ms
    peak = peak_of(card, operator.dtype, operator.kind)
    return max(operator.flops / (peak * 1e9), transfer_ms)


def _line(stage: Stage, card: Card) -> Line:
    operators, times = stage.operators, stage.times
    tally, names = Tally.of(operators), [operator.name for operator in operators]
    host_us = sum(TRITON_US if name in _TRITON_KERNELS else EAGER_US for name in names)
    return Line(
        stage.name,
        times,
        stage.rows,
        Tally(*(times * value for value in tally)),
        times * device_ms(operators, card),
        times * floor_ms(operators, card),
        times * host_us / 1e3,
        times * tally.launches * GRAPH_US / 1e3,
    )


def _text(line: Line, total_ms: float) -> str:
    tally = line.tally
    return (
        f"{line.stage:<{_NAME}}{line.times:>6}{tally.flops / 1e12:>12.3f}{tally.moved / 1e9:>10.2f}"
        f"{tally.launches:>10}{line.device_ms:>11.2f}{line.floor_ms:>11.2f}{line.eager_ms:>11.2f}"
        f"{line.graph_ms:>10.2f}{line.device_ms / total_ms:>7.0%}"
    )


def _line_json(line: Line) -> dict[str, Any]:
    fields = line._asdict()
    tally = fields.pop("tally")
    return {**fields, **_tally_json(tally)}


def _tally_json(tally: Tally) -> dict[str, int]:
    names = ("operators", "launches", "flops", "bytes", "least_bytes")
    return dict(zip(names, tally, strict=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
