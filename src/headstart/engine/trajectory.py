"""What one run gave: images, latents, where its time went, and the record that repeats it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from headstart.diversify.effect import passes_of
from headstart.diversify.method import Method
from headstart.engine import record
from headstart.plan.table import StepTable


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Trajectory:
    """One entry an image; tensors are on the engine's device.

    rgb         uint8 [B, H, W, 3]
    latents     float32 [B, C, h, w], at noise level 0
    x0          float32 [S, B, C, h, w], what each row predicted, or None unless keep_x0 was given
    table       the rows that ran
    latency_ms  text, base, distilled, decode: time on the device, of this run alone. A run that was
                one launch stands under the model of its last row, decoder and all
    chunk       samples that were in a network at once; decode: in the decoder, and its bands, where
                they are not as many, and one
    lineage     the family whose latents these are, or None where the weights do not say
    files       role -> (name, files) of the weights; machine: what rounding may depend on
    adapters    name -> what was attached, and how strongly it acted
    negative    one for all images, None for none, or one an image; reading: how they and the
                prompts are read, as arguments of `Engine.sample`, where it is not the usual way
    given       SHA-256 of what conditioning and noise were the caller's own
    diversify   the methods that acted, in their order
    chosen      the seeds whose images these are, where a method chose them for `seeds`: each alone
                gives its image without that method
    """

    rgb: Tensor
    latents: Tensor
    x0: Tensor | None
    table: StepTable
    latency_ms: Mapping[str, float]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative: str | Sequence[str | None] | None
    size: tuple[int, int]
    chunk: int
    lineage: str | None = None
    files: record.WeightFiles = field(default_factory=dict[str, record.Files])
    machine: Mapping[str, Any] = field(default_factory=dict[str, Any])
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    diversify: tuple[Method, ...] = ()
    chosen: tuple[int, ...] | None = None
    reading: Mapping[str, Any] = field(default_factory=dict[str, Any])
    given: Mapping[str, str] = field(default_factory=dict[str, str])
    decode: tuple[int, int] | None = None

    @property
    def passes(self) -> int:
        """Network passes an image: of the table, two for a guided row, and of candidates."""
        return passes_of(self.diversify, self.table)

    def __len__(self) -> int:
        return len(self.seeds)

    def __repr__(self) -> str:
        took = ", ".join(f"{stage} {ms:.0f}" for stage, ms in self.latency_ms.items())
        return (
            f"Trajectory({len(self)} images {self.size[0]}x{self.size[1]}, plan "
            f"{self.table.name!r}, {self.passes} passes, ms: {took})"
        )

    def record(self) -> dict[str, Any]:
        """Everything that repeats this run, and SHA-256 of its images, as JSON-able values.

        The first record of these weight files reads them through, for their digests, which are kept
        in the user's cache folder (HEADSTART_CACHE moves it, "off" is none) while a file's size,
        times and inode stay the same. Of tensors that were the caller's own it has digests alone:
        see `headstart.replay`.
        """
        return record.describe(self.recorded())

    def recorded(self) -> record.Recorded:
        """The record as values."""
        return record.Recorded(
            prompts=self.prompts,
            seeds=self.seeds,
            negative=self.negative,
            size=self.size,
            chunk=self.chunk,
            table=self.table,
            weights=record.weigh(self.files),
            machine=self.machine,
            adapters=self.adapters,
            lineage=self.lineage,
            diversify=tuple(map(str, self.diversify)),
            chosen=self.chosen,
            reading=self.reading,
            given=self.given,
            decode=self.decode,
            results={
                "latents": record.digests(self.latents),
                "rgb": record.digests(self.rgb),
            },
        )
