"""Sources of unit normal noise: n = philox_normal(seed, sample, row), or tensors of the caller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart.errors import InputError
from headstart.interfaces import NoiseSource
from headstart_kernels import INITIAL, Draw, philox_normal


@dataclass(frozen=True, slots=True)
class Philox:
    """Counter-based noise: image (seed, sample) has the same bits in any batch, on any device.

    seeds    one integer in [0, 2^64) for each image
    samples  one integer in [0, 2^32) for each image, all 0 by default: the images of one seed

    Philox 4x32-10 (Salmon et al., SC'11) with key = seed and counter = (element div 4, row + 1,
    sample, 0); row + 1 = 0 is the initial draw. A draw depends on its row, not on the draws before
    it, so a split run, a resumed run and a run on another machine see the same noise. The pair
    (seed, sample) names an image; twice the same pair raises InputError.

    An element is numbered by its flat index in one sample, the last axis fastest. So a draw depends
    on how many numbers a latent has, not on its axes: a video [C, T, h, w] and its reshape
    [C, T*h, w] hold the same bits in the same order. A pipeline that draws [C, h, w] and packs it
    into tokens [L, C] by a permutation has its numbers in another order: then draw [C, h, w] here
    too, pack it, and pass it as `Given`.
    """

    seeds: tuple[int, ...]
    samples: tuple[int, ...]
    _keys_on: dict[torch.device, tuple[Tensor, Tensor]] = field(
        init=False, repr=False, compare=False
    )

    def __init__(self, seeds: int | Sequence[int], samples: Sequence[int] | None = None) -> None:
        self._set(seeds, samples)
        self._check_distinct()

    @classmethod
    def shared(cls, seeds: Sequence[int], samples: Sequence[int] | None = None) -> Philox:
        """Allows equal (seed, sample) pairs: for images that differ only in their prompts."""
        noise = cls.__new__(cls)
        noise._set(seeds, samples)
        return noise

    def _set(self, seeds: int | Sequence[int], samples: Sequence[int] | None) -> None:
        seeds = tuple(seeds) if isinstance(seeds, Iterable) else (seeds,)
        samples = (0,) * len(seeds) if samples is None else tuple(samples)
        object.__setattr__(self, "seeds", _integers("seed", seeds, 64))
        object.__setattr__(self, "samples", _integers("sample", samples, 32))
        object.__setattr__(self, "_keys_on", {})
        if not self.seeds:
            raise InputError("no seeds: give one for each image, as in Philox([0, 1, 2, 3])")
        if len(self.samples) != len(self.seeds):
            raise InputError(
                f"{len(self.seeds)} seeds but {len(self.samples)} samples: give one of each for "
                "every image, or leave samples out"
            )

    def __len__(self) -> int:
        return len(self.seeds)

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return philox_normal(*self._keys(device), INITIAL, shape)

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return philox_normal(*self._keys(device), index, shape)

    def draw(self, first_row: int, device: torch.device) -> Draw:
        """The same noise for a step that draws it itself, without writing it to memory.

        first_row   the row of the whole plan that row 0 of the step's table is
        """
        return Draw(*self._keys(device), first_row)

    def _keys(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Seeds and samples on a device, copied once: each copy would wait for the device."""
        if device not in self._keys_on:
            signed = [seed - (seed >> 63 << 64) for seed in self.seeds]
            self._keys_on[device] = (
                torch.tensor(signed, dtype=torch.int64, device=device),
                torch.tensor(self.samples, dtype=torch.int64, device=device),
            )
        return self._keys_on[device]

    def _check_distinct(self) -> None:
        image_of: dict[tuple[int, int], int] = {}
        for image, pair in enumerate(zip(self.seeds, self.samples, strict=True)):
            first = image_of.setdefault(pair, image)
            if first != image:
                raise InputError(
                    f"images {first} and {image} have the same seed {pair[0]} and sample "
                    f"{pair[1]}, so they would be the same image: change a seed, or number them, "
                    f"as in Philox(seeds, samples=range({len(self.seeds)}))"
                )


def keys_of(noise: object) -> Philox | None:
    """The Philox that the rows of a source draw from, or None. Steps draw from it themselves.

    A source that only has a start of its own names the source of its rows by an attribute `rows`.
    """
    if isinstance(noise, Philox):
        return noise if type(noise) is Philox else None  # a subclass may draw other numbers
    rows: object = getattr(noise, "rows", None)
    return None if rows is None else keys_of(rows)


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """Noise as tensors of the caller, for parity with another implementation.

    initial  [B, ...] unit normals, any float dtype: [B, C, h, w], video [B, C, T, h, w], packed
             tokens [B, L, C], or any other latent with the batch first
    steps    one entry a row of the table: a tensor of the same shape, or None where the row adds no
             noise; missing entries are None

    Draws are float32 on the device of the run. Raises InputError for shapes that do not agree, for
    an empty axis, and for a row that needs noise and has none.
    """

    initial_noise: Tensor
    steps: tuple[Tensor | None, ...]

    def __init__(self, initial: Tensor, steps: Sequence[Tensor | None] = ()) -> None:
        object.__setattr__(self, "initial_noise", initial)
        object.__setattr__(self, "steps", tuple(steps))
        for name, tensor in (("initial", initial), *enumerate(self.steps)):
            if tensor is not None:
                self._check(f"row {name}" if isinstance(name, int) else name, tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: [C, h, w], or whatever the latents are."""
        return tuple(self.initial_noise.shape[1:])

    def __len__(self) -> int:
        return len(self.initial_noise)

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return self._draw(self.initial_noise, shape, device)

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        noise = self.steps[index] if index < len(self.steps) else None
        if noise is None:
            rows = [row for row, tensor in enumerate(self.steps) if tensor is not None]
            raise InputError(
                f"row {index} adds noise, but steps has a tensor only for rows {rows}: give "
                f"steps[{index}] as {list(self.initial_noise.shape)}"
            )
        return self._draw(noise, shape, device)

    def _check(self, name: str, tensor: Tensor) -> None:
        if tensor.ndim < 2 or tensor.numel() == 0 or not tensor.is_floating_point():
            raise InputError(
                f"{name}: expected float noise [B, ...], such as [B, C, h, w], got {tensor.dtype} "
                f"{list(tensor.shape)}: the batch is the first axis, at least one more follows, "
                "and none is empty"
            )
        if tensor.shape != self.initial_noise.shape:
            raise InputError(
                f"{name}: expected the shape of the initial noise "
                f"{list(self.initial_noise.shape)}, got {list(tensor.shape)}"
            )

    def _draw(self, tensor: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
        if tuple(shape) != self.shape:
            raise InputError(
                f"the run has latents {list(shape)}, but the noise in Given is for "
                f"{list(self.shape)}: give noise of that shape, or sample at this one"
            )
        return tensor.to(device=device, dtype=torch.float32)


def _integers(name: str, values: Sequence[int], bits: int) -> tuple[int, ...]:
    try:
        numbers = tuple(index(value) for value in values)
    except TypeError as error:
        raise InputError(f"{name}s are whole numbers, got {values!r}: {error}") from error
    for number in numbers:
        if not 0 <= number < 1 << bits:
            raise InputError(f"{name} {number} is outside [0, 2^{bits}): give one inside")
    return numbers


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64. Apple's (`mps`) does not ("the MPS framework doesn't
    support float64" is torch's error), and only some of Intel's (`xpu`) do."""
    if device.type == "xpu":
        xpu: Any = torch.xpu  # its properties have no annotations
        return bool(xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


class OnHost(NamedTuple):
    """Noise that is drawn on the CPU, to the same bits, and copied to the device.

    For devices without float64, which Philox's normals need and nothing else of a run does. A copy
    is 256 KB for each SDXL image and row.
    """

    source: NoiseSource

    def __len__(self) -> int:
        return len(self.source)

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.source.initial(shape, _CPU).to(device)

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.source.step(index, shape, _CPU).to(device)


def noise_on(device: torch.device, source: NoiseSource) -> NoiseSource:
    """`source`, drawn on the CPU where `device` has no float64."""
    return source if has_float64(device) else OnHost(source)


_CPU = torch.device("cpu")
