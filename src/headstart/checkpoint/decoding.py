"""How much memory a VAE takes to decode one image, known from its shape alone.

peak = max over layers of the values alive at once * itemsize        values: numbers of a tensor
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from headstart.checkpoint.params import VaeParams


class _Layer(NamedTuple):
    """A layer from `inputs` to `outputs` channels, at 2^level times the latent's side.

    For an upsampling that is the side of its output.
    """

    kind: Literal["resnet", "attention", "upsample"]
    level: int
    inputs: int
    outputs: int


def decode_bytes(params: VaeParams, latent: tuple[int, int], itemsize: int, bands: int = 1) -> int:
    """Peak bytes of one image's decode besides weights, latents [C, h, w] and rgb.

    itemsize   bytes a number of the dtype that the decoder computes in
    bands      as in `networks.vae.Vae.decode`. 1: the whole image at once, and a batch of c samples
               takes c times as much. Above 1: c samples take as much as one, because they are
               decoded one after the other

    Tensors only, without the workspace inside a convolution (cuDNN's). More bands lower it towards
    max(2 finest widths, the next finer's width) * H * W; from about 32 on the rows that bands share
    outweigh the gain.
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
    """The decoder from the latent to the image, without its first and last convolution."""
    widths = params.channels[::-1]
    yield _Layer("resnet", 0, widths[0], widths[0])
    yield _Layer("attention", 0, widths[0], widths[0])
    inputs = widths[0]
    for level, width in enumerate(widths):
        yield _Layer("resnet", level, inputs, width)
        yield _Layer("resnet", level, width, width)
        if level + 1 < len(widths):
            yield _Layer("upsample", level + 1, width, width)
        inputs = width


def _whole(layer: _Layer, pixels: int) -> int:
    """The input of a layer stays in memory beside its inner tensors."""
    if layer.kind == "upsample":  # input (a quarter), upsampled, output
        return layer.inputs * pixels // 4 + 2 * layer.outputs * pixels
    if layer.kind == "attention":  # input, normed tokens, q, k, v, their product, and
        # the values in the order of the CPU's kernel, or the projected product
        return 7 * layer.inputs * pixels
    return max(3 * layer.inputs, layer.inputs + 3 * layer.outputs) * pixels


def _banded(layer: _Layer, height: int, width: int, rows: int) -> int:
    """The parts of a layer's input and output in memory, and the bands that it works on.

    A band is freed one band late, together with its neighbouring rows.
    """
    if layer.kind == "attention":  # whole, queries in bands
        return 7 * layer.inputs * height * width
    band, count = min(rows, height) * width, -(-height // rows)
    padded = min(rows + 2, height) * width
    if layer.kind == "upsample":
        padded = min(rows + 4, height) * width
        return layer.outputs * (count + 2) * padded + 3 * layer.inputs * band // 4
    pixels, work = count * padded, 3 * layer.inputs * padded
    if layer.inputs == layer.outputs:
        return 2 * layer.outputs * pixels + work
    return max(layer.inputs * pixels + 2 * layer.outputs * band, 2 * layer.outputs * pixels) + work
