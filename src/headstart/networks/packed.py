"""Weights laid out once as this processor's products read them.

    y = layer(x)      the layer's own formula, in oneDNN's order of sums

torch lays a convolution's weights out anew in every call: 2560 to 1280 channels at 8x8 take 93 ms,
of which the product is 31 (float32, one Zen 4 core), and its linear layers go to MKL, 84 GF/s there
where oneDNN's product has 104. The layouts are kept beside the weights; layers change their class
and nothing else, so names, hooks, parameters and `isinstance(layer, nn.Linear)` stay.

The operators are those that inductor's freezing emits. A layer takes them on a CPU, while no
gradient is recorded and no compiler, tracer, autocast or `torch.func` looks on; else it is what it
was. So is one whose weight was made in inference mode, of which torch counts no writes. Images are
channels-last from the first packed convolution on, because that is what these operators return.
"""

# oneDNN's operators are not annotated; a tensor's version is private.
# pyright: reportPrivateUsage=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, final

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from headstart.errors import InputError
from headstart.networks.bfloat16 import computes_bfloat16
from headstart.networks.casting import SCALE, StoredConv2d, StoredLinear, compute_dtype
from headstart.networks.convolution import Conv2d
from headstart_kernels.observers import differentiates, has_modes, transformed
from headstart_kernels.winograd import Filter, winograd_conv
from headstart_kernels.winograd import pays as pays_tiles

M = TypeVar("M", bound=nn.Module)
Form = tuple[Any, ...]
"""A convolution's padding, stride, dilation and groups; () is a linear layer's, or `_TILES`."""

DTYPES = (torch.float32, torch.bfloat16)
"""What oneDNN has products of on most processors; float16 needs AVX512-FP16 or AMX."""
FEW = 8
"""Rows below which a linear layer stays torch's own: reading the weight is the cost there, as in
projections of the timestep."""
WIDE = 256
"""Channels of the widest layer of a network that pays for its packing. The bundled pair has 128:
there oneDNN's calls cost 12 to 25 us more than torch's own, which is what they save."""
_GAIN = 2.0
"""How much faster a convolution has to be in tiles, whose weights take four times the memory."""
_NARROW, _NARROW_GAIN = 1 << 16, 0.7
"""The same of a weight of so few numbers. Its tiles take 1 MB, and `pays`, which counts outputs by
64, says too little: where it says 0.7 or more, the bundled decoder's convolutions are 1.6 to 3.1
times as fast (64 and 32 outputs at 16x16 to 64x64), and at 0.4 as fast (one Zen 4 core)."""
_HALF_GAIN, _HALF_WEIGHTS = 3.0, 2_400_000
"""The same of float32 for a convolution in bfloat16, whose direct products may take half of
float32's time and whose tiles, float32 too, take eight times the memory: of SD1.5's at 32x32
latents those of 320 outputs at 32x32, so that SDXL's packed UNet stays within 5.5 GB."""
_SAME, _TILES = ((1, 1), (1, 1), (1, 1), 1), ("tiles",)
"""The padding, stride, dilation and groups that tiles are for; and the name of their layout."""
_POINTS = ((0, 0), (1, 1), (1, 1), 1)
"""Those of a 1x1 convolution that is a linear layer of its pixels. As a convolution its layout
depends on the image's size, and a wrong one is laid out anew in every call: 2560 to 1280 channels
at 4x4 take 0.5 ms, and 184 with a layout for 32x32 (bfloat16, one Zen 4 core)."""
_OPS = (
    *("_reorder_linear_weight", "_linear_pointwise"),
    *("_reorder_convolution_weight", "_convolution_pointwise"),
)
_ROWS, _SIDE = 1024, 32
"""The product that a layout is made for. Any other gives the same bits with it, and with AVX-512 is
as fast within 5 % (measured: 2 to 4096 rows; 3x3 at 4x4 to 64x64)."""
_ANY_SIZE = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Elsewhere oneDNN chooses a convolution's layout by the image's size, too, and lays another's out
anew in every call: with AVX2 1280 channels at 4x4 take 1070 ms on a layout for 32x32 and 8 on their
own (one Zen 3 core). There a layout is of the size that was seen last."""


class PackedLinear(StoredLinear):
    def forward(self, input: Tensor) -> Tensor:
        if self.packs(input):
            return self.on(input, self.weight, self.bias)
        return super().forward(input)

    def packs(self, input: Tensor) -> bool:
        """Whether this input, [..., C] of at least `FEW` rows, goes through oneDNN."""
        if not _takes(self, input) or input.shape[-1:] != self.weight.shape[1:]:
            return False
        return input.numel() >= FEW * self.in_features

    def on(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with another weight and bias, as an adapter has them."""
        if has_modes():
            return torch.ops.headstart.packed_linear(input, weight, bias)
        return _linear(input, weight, bias)


class PackedConv2d(StoredConv2d):
    def forward(self, input: Tensor) -> Tensor:
        if self.packs(input):
            return self.on(input, self.weight, self.bias)
        return super().forward(input)

    def packs(self, input: Tensor) -> bool:
        """Whether this input, [B, C, h, w] and not empty, goes through oneDNN."""
        if not _takes(self, input) or input.ndim != 4:
            return False
        return input.shape[1] == self.in_channels and input.numel() > 0

    def on(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with another weight and bias, as an adapter has them."""
        form = self.padding, self.stride, self.dilation, self.groups
        tiles = vars(self).get("tiles", True)
        if has_modes():
            return torch.ops.headstart.packed_conv2d(input, weight, bias, *form, tiles)
        return _conv2d(input, weight, bias, form, tiles)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of weight [C', C, ...] and input [..., C]."""
    layout = _PACKS.of(weight, input.dtype, ())
    return torch.ops.mkldnn._linear_pointwise(input, layout, bias, "none", [], "")


def _conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, form: Form, tiles: bool) -> Tensor:
    input = input.contiguous(memory_format=torch.channels_last)
    if form == _POINTS and weight.shape[2:] == (1, 1):
        return _linear(input.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
    if tiles and _is_tiled(input, weight, bias, form):
        filter = _PACKS.of(weight, torch.float32, _TILES)
        y = winograd_conv(input.float(), filter, None if bias is None else bias.float())
        return y.to(input.dtype)
    size = (_SIDE, _SIDE) if _ANY_SIZE else tuple(input.shape[2:])
    layout = _PACKS.of(weight, input.dtype, form, size)
    convolve = torch.ops.mkldnn._convolution_pointwise
    return convolve(input, layout, bias, *form, "none", [], "")


def _is_tiled(input: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> bool:
    """Whether a convolution takes a quarter of the products, in float32 (`winograd`)."""
    same = bias is None or bias.dtype == input.dtype
    return form == _SAME and same and is_tiled(weight.shape, input.shape, input.dtype)


def is_tiled(weight_shape: Sequence[int], input_shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a 3x3 convolution of such images pays for a layout in tiles."""
    numbers = math.prod(weight_shape)
    if dtype == torch.float32:
        gain = _NARROW_GAIN if numbers <= _NARROW else _GAIN
        return pays_tiles(weight_shape, input_shape, gain)
    small = numbers <= _HALF_WEIGHTS
    return dtype == torch.bfloat16 and small and pays_tiles(weight_shape, input_shape, _HALF_GAIN)


def _recorded_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, *form: Sequence[int] | int
) -> Tensor:
    """With the form in lists, as torch hands it on, and whether tiles may be taken."""
    *sizes, tiles = (value if isinstance(value, int) else tuple(value) for value in form)
    return _conv2d(input, weight, bias, tuple(sizes), bool(tiles))


_LIBRARY = torch.library.Library("headstart", "DEF")
_LIBRARY.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define(
    "packed_conv2d(Tensor x, Tensor weight, Tensor? bias, int[] padding, int[] stride, "
    "int[] dilation, int groups, bool tiles) -> Tensor"
)
_LIBRARY.impl("packed_linear", _linear, "CPU")
_LIBRARY.impl("packed_conv2d", _recorded_conv2d, "CPU")
"""For recorders that run operators again: these read the weight, and not a layout from before."""


def _lay_out(weight: Tensor, form: Form, size: Sequence[int]) -> Tensor | Filter:
    """The weight as its product reads it, opaque and of as many bytes, for tiles of four times as
    many; `size`: the image's."""
    ops = torch.ops.mkldnn
    if form == _TILES:
        return Filter.of(weight)
    if not form:
        return ops._reorder_linear_weight(weight.flatten(1), _ROWS)
    channels = weight.shape[1] * form[-1]
    return ops._reorder_convolution_weight(weight, *form, [1, channels, *size])


class _Pack(NamedTuple):
    """A weight as it is laid out, and as it was then: how often it was written to, where and how it
    lies. While the reference to its storage is kept, no other has its address."""

    layout: Any
    state: tuple[object, ...]
    storage: StorageWeakRef

    def holds(self, state: tuple[object, ...]) -> bool:
        return self.state == state and not self.storage.expired()


@final
class _Packs:
    """weight -> its layouts, for as long as anybody has the weight."""

    def __init__(self) -> None:
        self._layouts: Any = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def of(self, weight: Tensor, dtype: torch.dtype, form: Form, size: Sequence[int] = ()) -> Any:
        """Made when it is first needed, and again of a weight that was written to or moved, or for
        another size."""
        address, strides = weight.data_ptr(), weight.stride()
        state = (weight._version, address, weight.shape, strides, weight.dtype, dtype, size)
        pack = self._find(weight, form)
        if pack is not None and pack.holds(state):
            return pack.layout
        with self._lock, torch.inference_mode(False), torch.no_grad():
            pack = self._find(weight, form)
            if pack is None or not pack.holds(state):
                layouts = self._layouts.setdefault(weight, {})
                layouts.pop(form, None)  # before the next is made
                layout = _lay_out(weight.detach().to(dtype), form, size)
                pack = _Pack(layout, state, StorageWeakRef(weight.untyped_storage()))
                layouts[form] = pack
            return pack.layout

    def forget(self, weight: Tensor) -> None:
        with self._lock:
            self._layouts.pop(weight, None)

    def _find(self, weight: Tensor, form: Form) -> _Pack | None:
        return self._layouts.get(weight, {}).get(form)


_PACKS = _Packs()
_PACKED: dict[type[nn.Module], type[nn.Module]] = {
    **dict.fromkeys((nn.Linear, StoredLinear), PackedLinear),
    **dict.fromkeys((nn.Conv2d, Conv2d, StoredConv2d), PackedConv2d),
}


def pack(network: M, *, tiles: bool = True) -> M:
    """Make every matrix of a network on a CPU laid out for the processor when it is first used;
    returns the same network.

    The layouts take as much memory again as the weights do in what the network computes in; weights
    that lie in a file's mapping take none then. They are made again of weights that were written
    to, and go with them; torch counts no writes through `weight.data` or numpy: call `pack` again
    after those. F differs from the unpacked network's by rounding: 2.4e-6 of its norm in
    float32 on an SD1.5-size UNet.

    tiles   3x3 convolutions of many pixels in a quarter of the products, in float32, for four times
            the memory of their weights in float32; False: none

    Raises InputError where `unpackable` says why not.
    """
    dtype = compute_dtype(network)
    if (why := unpackable(dtype)) is not None:
        raise InputError(f"weights cannot be packed: {why}")
    for layer in network.modules():
        if isinstance(layer, PackedLinear | PackedConv2d):
            _PACKS.forget(layer.weight)
        elif is_packable(layer):
            layer.__class__, vars(layer)["computes"] = _PACKED[type(layer)], dtype
        if isinstance(layer, PackedLinear | PackedConv2d):
            vars(layer)["tiles"] = tiles
    return network


def unpackable(dtype: torch.dtype) -> str | None:
    """Why a network that computes in `dtype` cannot be packed here; None where it can."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not all(hasattr(ops, name) for name in _OPS):
        return "this torch was built without oneDNN; run it unpacked (packed=False, --no-packed)"
    if dtype not in DTYPES:
        return (
            f"expected a network that computes in float32 or bfloat16, got {dtype}; use one of "
            "them, or run it unpacked (packed=False, --no-packed)"
        )
    if dtype == torch.bfloat16 and not computes_bfloat16():
        return "this processor has no bfloat16 products (AVX512-BF16, AMX); use float32"
    return None


def is_packable(layer: nn.Module) -> bool:
    """Whether a layer is one that `pack` changes: plain or widened at use, and not of float8."""
    if type(layer) not in _PACKED or SCALE in vars(layer)["_buffers"]:
        return False
    return not isinstance(layer, nn.Conv2d) or (
        layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def pays(network: nn.Module) -> bool:
    """Whether runs of a network pay for its packing: a decoder, whose images are large, or one with
    a convolution of `WIDE` channels."""
    if hasattr(network, "decode"):
        return True
    convolutions = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return max((layer.out_channels for layer in convolutions), default=0) >= WIDE


def is_packed(network: object) -> bool:
    """Whether a network has layers whose weights are laid out at their first use."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    return any(isinstance(layer, PackedLinear | PackedConv2d) for layer in modules)


def _takes(layer: nn.Linear | nn.Conv2d, input: Tensor) -> bool:
    """Whether oneDNN computes it in torch's place: values on a CPU, in what the layer computes in,
    of which no gradient is recorded."""
    weight = layer.weight
    computes = input.dtype in DTYPES and input.dtype in (weight.dtype, vars(layer).get("computes"))
    if not computes or type(input) is not Tensor or input.device.type != "cpu":
        return False
    if weight.device.type != "cpu" or weight.is_inference() or is_compiling() or transformed():
        return False
    return not differentiates(input, weight)
