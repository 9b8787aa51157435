"""How much memory a VAE takes to decode one image, known from its shape alone.

peak = max over layers of the values alive at once * itemsize        values: numbers of a tensor
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from headstart.checkpoint.params import VaeParams


class _Layer(NamedTuple):
    """A layer that reads `before` channels and gives `after`, at 2^level times the latent's side
    (an upsampling: of what it gives)."""

    kind: Literal["resnet", "attention", "upsample"]
    level: int
    before: int
    after: int


def decode_bytes(params: VaeParams, latent: tuple[int, int], itemsize: int, bands: int = 1) -> int:
    """Peak bytes of one image's decode besides weights, latents [C, h, w] and rgb.

    itemsize   bytes a number of the dtype that the decoder computes in
    bands      as in `networks.vae.Vae.decode`. 1: the whole image at once, and a batch of c samples
               takes c times as much. Above 1: c samples take as much as one, since they are decoded
               one after the other

    It counts tensors, not what a convolution takes inside of itself (cuDNN's workspace). With
    bands it falls towards max(2 finest widths, the next finer's width) * H * W, and from some 32 on
    the rows that bands share make up for the rest.
    """
    height, width = latent
    rows = max(1, -(-height * params.downscale // bands))
    peak = 0
    for layer in _layers(params):
        side = 2**layer.level
        if bands == 1:
            peak = max(peak, _whole(layer, height * side * width * side))
        else:
            peak = max(peak, _banded(layer, height * side, width * side, rows))
    return peak * itemsize


def _layers(params: VaeParams) -> Iterator[_Layer]:
    """The decoder from the latent to the image, its first and last convolution left out."""
    widths = params.channels[::-1]
    yield _Layer("resnet", 0, widths[0], widths[0])
    yield _Layer("attention", 0, widths[0], widths[0])
    before = widths[0]
    for level, after in enumerate(widths):
        yield _Layer("resnet", level, before, after)
        yield _Layer("resnet", level, after, after)
        if level + 1 < len(widths):
            yield _Layer("upsample", level + 1, after, after)
        before = after


def _whole(layer: _Layer, pixels: int) -> int:
    """The input of a layer stays while its inner tensors come and go."""
    if layer.kind == "upsample":  # the input, a quarter; what is convolved; the output
        return layer.before * pixels // 4 + 2 * layer.after * pixels
    if layer.kind == "attention":  # input, normed tokens, q, k, v, their product, and
        # the values as a CPU's kernel reads them, or what is made of the product
        return 7 * layer.before * pixels
    return max(3 * layer.before, layer.before + 3 * layer.after) * pixels


def _banded(layer: _Layer, height: int, width: int, rows: int) -> int:
    """What is held of a layer's input and output, and the bands that it works on.

    A band that was let go goes one band late, and carries the rows beside it until then.
    """
    if layer.kind == "attention":  # as a whole, queries apart
        return 7 * layer.before * height * width
    own, count = min(rows, height) * width, -(-height // rows)
    beside = min(rows + 2, height) * width
    if layer.kind == "upsample":
        beside = min(rows + 4, height) * width
        return layer.after * (count + 2) * beside + 3 * layer.before * own // 4
    held, work = count * beside, 3 * layer.before * beside
    if layer.before == layer.after:
        return 2 * layer.after * held + work
    return max(layer.before * held + 2 * layer.after * own, 2 * layer.after * held) + work
