"""How many bytes each stage of a run takes besides the weights, and how many samples fit at once.

states = B*(C*h*w*(8 + x0_rows)*4 + H*W*3*5)         of the whole batch, in every stage
text   = texts * pieces * text_values * itemsize
rows   = chunk * passes * latent_values*h*w * itemsize
decode = decode_chunk * decode_bytes(bands)

Guidance doubles the rows of a UNet and nothing of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import NamedTuple, SupportsIndex, cast

from headstart.checkpoint.decoding import decode_bytes
from headstart.checkpoint.params import ClipParams, UNetParams, VaeParams
from headstart.errors import InputError, counted

SAFE_SHARE = 0.8
"""Of the free memory that is used at most: allocators fragment, and the estimate counts tensors."""
BANDS = (1, 2, 4, 8, 16)
"""Into how many bands of rows a decode may be cut, where a whole one does not fit."""


class Shape(NamedTuple):
    """Sizes of a run: batch, one sample's latents [C, h, w], pixels [H, W]; rows whose x0 stays."""

    batch: int
    channels: int
    latent: tuple[int, int]
    pixels: tuple[int, int]
    x0_rows: int = 0

    @property
    def state_bytes(self) -> int:
        """x, x0, noise and a step's intermediates, float32; pixels as float32 and as uint8."""
        cells, pixels = self.latent[0] * self.latent[1], self.pixels[0] * self.pixels[1]
        return self.batch * (self.channels * cells * (8 + self.x0_rows) * 4 + pixels * 3 * 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What the networks hold at once besides their weights.

    latent_values  values of a UNet pass for one latent cell of one row; itemsize: bytes of each
    vae            the decoder; vae_itemsize: bytes of each of its values
    text_values    of the text encoders, for one piece of one text
    """

    latent_values: float
    vae: VaeParams
    itemsize: int = 4
    vae_itemsize: int = 4
    text_values: float = 0.0

    def row_bytes(self, shape: Shape) -> int:
        """Of one row in a UNet; a guided sample has two rows."""
        return int(self.latent_values * shape.latent[0] * shape.latent[1] * self.itemsize)

    def decode_bytes(self, shape: Shape, bands: int = 1) -> int:
        """Of one sample in the decoder, decoded in that many bands of rows."""
        return decode_bytes(self.vae, shape.latent, self.vae_itemsize, bands)

    def text_bytes(self, texts: int, tokens: int) -> int:
        """Of all texts of a call: they are encoded together, long ones piece by piece."""
        return int(self.text_values * texts * -(-tokens // 77) * self.itemsize)


class Chunks(NamedTuple):
    """How many samples a UNet and the decoder take at once, and the bands of a decode."""

    networks: int
    decode: int
    bands: int = 1

    @property
    def decode_chunks(self) -> tuple[int, int] | None:
        """(decode, bands); None where the decoder takes as many samples as a UNet, in one band."""
        sizes = self.decode, self.bands
        return None if sizes == (self.networks, 1) else sizes


class Free(NamedTuple):
    """Free bytes, None where unknown: for UNets, which may use the pools of captured graphs,
    and for the decoder, which cannot."""

    networks: int | None
    decode: int | None


class BatchSizes(NamedTuple):
    """The option `batch` of a call; None: as many as fit."""

    networks: int | None = None
    decode: int | None = None
    bands: int | None = None

    @classmethod
    def of(cls, batch: int | Sequence[int] | None) -> BatchSizes:
        """From a number of samples in a UNet, or up to three numbers. Raises InputError unless they
        are whole numbers of at least 1."""
        is_list = isinstance(batch, Sequence) and not isinstance(batch, str)
        values = tuple(cast("Sequence[SupportsIndex | None]", batch if is_list else (batch,)))
        try:
            counts = tuple(None if value is None else index(value) for value in values)
        except TypeError:
            counts = ()
        positive = all(count is None or count > 0 for count in counts)
        if not 1 <= len(counts) <= 3 or not positive or any(isinstance(v, bool) for v in values):
            raise InputError(
                "batch: expected a whole number of at least 1, of samples in a network at once, or "
                "up to three, (samples in a network, in the decoder, bands of a decode), such as "
                f"(8, 2, 16), got {batch!r:.60}"
            )
        return cls(*counts)


_ALL = BatchSizes()


def chunks(
    shape: Shape,
    values: Footprint,
    passes: int,
    free: Free,
    batch: BatchSizes = _ALL,
    *,
    device: str = "cpu",
) -> Chunks:
    """As many samples at once as fit: all of them, else halves, then a decode in bands.

    passes  2 where guidance doubles the rows of a UNet
    batch   what the call asks for, which is never made smaller

    Raises InputError where not even one sample fits.
    """
    states, row = shape.state_bytes, passes * values.row_bytes(shape)
    most = min(batch.networks or shape.batch, shape.batch)
    networks = _cut(most, row, _budget(free.networks, states), batch.networks)
    if networks is None:
        size = 1 if batch.networks is None else most
        raise InputError(_refusal(shape, size, size * row, free.networks or 0, device, "UNet"))
    most, budget = min(batch.decode or networks, shape.batch), _budget(free.decode, states)
    sample = 0
    for bands in BANDS if batch.bands is None else (batch.bands,):
        sample = values.decode_bytes(shape, bands)
        if bands == 1:
            if (size := _cut(most, sample, budget, batch.decode)) is not None:
                return Chunks(networks, size)
        elif budget is None or sample <= budget:  # one sample after the other
            return Chunks(networks, most, bands)
    raise InputError(_refusal(shape, 1, sample, free.decode or 0, device, "decoder"))


def spare_bytes(
    shape: Shape, values: Footprint, passes: int, free: Free, sizes: Chunks
) -> int | None:
    """Bytes that these chunks leave for caches that live from row to row, such as a prompt's keys
    and values; None where that is unknown."""
    budget, rows = _budget(free.networks, shape.state_bytes), passes * values.row_bytes(shape)
    return None if budget is None else max(0, int(budget - sizes.networks * rows))


def _budget(free: int | None, states: int) -> float | None:
    return None if free is None else SAFE_SHARE * free - states


def _cut(size: int, sample: int, budget: float | None, fixed: int | None) -> int | None:
    """`size`, halved until that many samples fit, of `sample` bytes each; None where not one fits,
    or a `fixed` size does not."""
    while budget is not None and size * sample > budget:
        if size == 1 or fixed is not None:
            return None
        size = (size + 1) // 2
    return size


def unet_values(params: UNetParams) -> float:
    """Skips of all levels, and the widest working set: 20 widths of a level, 28 with attention.

    The demo's UNet was measured to take 0.9 of this at 512 and 1024 px.
    """
    levels = list(enumerate(params.down))
    skips = sum((len(s.depths) + s.resample) * s.channels / 4**level for level, s in levels)
    working = max((28.0 if any(s.depths) else 20.0) * s.channels / 4**level for level, s in levels)
    return skips + working


def text_values(params: ClipParams) -> float:
    """The hidden states of all layers, and the widest values of one MLP."""
    return params.positions * (params.width * (params.layers + 8) + 2 * params.mlp_width)


def check_texts_fit(
    values: Footprint, texts: int, tokens: int, free: int | None, device: str
) -> None:
    """Raise InputError where the texts of a call cannot be encoded at once."""
    need = values.text_bytes(texts, tokens)
    if free is not None and need > SAFE_SHARE * free:
        raise InputError(
            f"{texts} texts of {tokens} tokens need about {need / 1e9:.1f} GB in the text encoders "
            f"at once; {free / 1e9:.1f} GB are free on {device} and {SAFE_SHARE:.0%} of that is "
            "used at most: ask for fewer prompts a call, or shorter ones"
        )


def _refusal(shape: Shape, size: int, need: int, free: int, device: str, network: str) -> str:
    height, width = shape.pixels
    advice = (
        f"; or load with plan_size=({height}, {width}) (--size) and without memory='none', so that "
        "enough of the weights take turns, or with dtype='float8' (--dtype)"
    ) * device.startswith("cuda")
    return (
        f"{counted(shape.batch, 'image')} of {height}x{width} would need about "
        f"{(need + shape.state_bytes) / 1e9:.1f} GB besides the weights, with {size} in the "
        f"{network} at a time; {free / 1e9:.1f} GB are free on {device} and {SAFE_SHARE:.0%} of "
        "that is used at most: ask for a smaller size, fewer seeds a call, or a smaller batch"
        f"{advice}"
    )
