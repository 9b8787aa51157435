"""A network with a file's tensors: built without memory, then each tensor assigned.

a part that `checkpoint.verdict` accepts -> meta device -> tensors as they are, or in a dtype
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headstart.checkpoint.dtypes import WIDENED
from headstart.checkpoint.tensors import Part
from headstart.errors import CheckpointError, InputError
from headstart.fork import check_threads
from headstart.networks.casting import in_float8, keep_float8, keep_stored
from headstart.networks.convolution import Conv2d
from headstart.networks.packed import is_packable, pack, pays, unpackable

M = TypeVar("M", bound=nn.Module)
Dtype = torch.dtype | Literal["stored", "float8"] | None
"""The dtype of weights; see `headstart.networks.load.load_unet`."""
Packed = bool | Literal["direct"] | None
"""Whether weights are laid out for a CPU's products; see there."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WIDENED_FLOATS = _FLOATS | dict.fromkeys(WIDENED, torch.float16)


def assemble(
    build: Callable[[], M],
    part: Part,
    device: torch.device,
    dtype: Dtype,
    wide: re.Pattern[str] | None = None,
    packed: Packed = False,
) -> M:
    """Build on the meta device, then assign the tensors of a part that was judged and fits.

    wide    with dtype "float8" the layers that keep the compute dtype; None: all
    packed  lay weights out for a CPU's products (`networks.packed`): they stay as the file has them
            and are cast to `dtype` when they are laid out; None: where that is possible and faster;
            "direct": as None, but not for tiles

    Raises InputError in a forked process that cannot compute, and where `packed` cannot be.
    """
    check_threads()
    # torch does not count writes to tensors that are made in inference mode.
    with _uncollected(), torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"), _Unfilled():
            module = build()
        computes = _packed_as(module, _TARGET.get() or device, dtype, packed)
        if computes is not None:
            return pack(_fill_packed(module, part, computes), tiles=packed != "direct")
        return _fill(module, part, device, dtype, wide)


def _packed_as(
    module: nn.Module, device: torch.device, dtype: Dtype, packed: Packed
) -> torch.dtype | None:
    """The compute dtype of a network whose weights are laid out; None where they are not.

    Raises InputError for `packed` True where that is impossible.
    """
    computes = torch.float32 if dtype is None else dtype
    if packed is False or (packed is not True and not pays(module)):
        return None
    if device.type != "cpu":
        why = f"that is for device cpu, and this is {device}"
    elif not isinstance(computes, torch.dtype):
        why = too_small(computes)
    else:
        why = unpackable(computes)
        if why is None:
            return computes
    if packed is True:
        raise InputError(f"weights cannot be packed: {why}")
    return None


def too_small(dtype: str) -> str:
    return (
        f'dtype "{dtype}" keeps weights smaller than what is computed with; use float32 or '
        "bfloat16, or run it unpacked (packed=False, --no-packed)"
    )


_TARGET: ContextVar[torch.device | None] = ContextVar("headstart_target", default=None)


@contextmanager
def loading_for(device: torch.device) -> Generator[None]:
    """Inside, networks are loaded as for `device`, even if they stay in host memory."""
    token = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(token)


def _fill(
    module: M, part: Part, device: torch.device, dtype: Dtype, wide: re.Pattern[str] | None
) -> M:
    target = _TARGET.get() or device
    stored = dtype == "stored" and target.type == "cpu"
    float8_names = _matrices(module, wide) if dtype == "float8" else frozenset[str]()
    scales: dict[str, Tensor] = {}
    if dtype == "float8":
        dtype = _computes(part, target)
    if dtype is None or dtype == "stored":
        dtype = torch.float32 if target.type == "cpu" else default_dtype(part)
    state: dict[str, Tensor] = {}
    for name in module.state_dict():
        weight_dtype = _WIDENED_FLOATS.get(part.dtype(name), dtype) if stored else dtype
        tensor = part.tensor(name)
        if name in float8_names:
            state[name], scales[name] = _float8_of(part, name, tensor.to(device), dtype)
            continue
        if part.dtype(name) in WIDENED and weight_dtype == torch.float16:
            weight_dtype = _half_of(part, name, tensor, stored)
        state[name] = _aligned(name, tensor.to(device=device, dtype=weight_dtype))
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()
    if float8_names:
        keep_float8(module, scales, dtype)
    lay_out: Callable[[], object] = getattr(module, "lay_out", lambda: None)
    lay_out()
    return keep_stored(module) if stored else module


def _fill_packed(module: M, part: Part, dtype: torch.dtype) -> M:
    """Matrices stay as the file has them, in its mapping. The rest is in `dtype`: small tensors,
    and layers with one row a sample, which are never laid out."""
    layers = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
    stay = {f"{path}.weight" for path, layer in layers if is_packable(layer)}
    state: dict[str, Tensor] = {}
    for name in module.state_dict():
        stays = name in stay and _ONE_ROW.fullmatch(name) is None
        weight_dtype = _FLOATS.get(part.dtype(name), dtype) if stays else dtype
        state[name] = _aligned(name, part.tensor(name).to(dtype=weight_dtype))
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()
    return keep_stored(module, dtype)


def _matrices(module: nn.Module, wide: re.Pattern[str] | None) -> frozenset[str]:
    """The names of the weights that dtype "float8" stores so, of linear layers and convolutions."""
    return frozenset(
        f"{path}.weight"
        for path, layer in cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
        if wide is not None
        and type(layer) in (nn.Linear, nn.Conv2d, Conv2d)
        and not wide.fullmatch(path)
    )


def _computes(part: Part, device: torch.device) -> torch.dtype:
    """The compute dtype of a network with weights in float8."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if stored_dtype(part) == "BF16" else torch.float16


def _float8_of(
    part: Part, name: str, tensor: Tensor, computes: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Raises CheckpointError for numbers that would be infinite once they are widened."""
    try:
        float8, scale = in_float8(tensor)
    except ValueError as error:
        raise CheckpointError(f"{part.checkpoint.files[0]}: {name}: {error}") from error
    large = computes == torch.float16 and float(scale.max()) > 128  # 448*128 < 65504
    if large and not bool((float8.float() * scale).half().isfinite().all()):
        raise _too_large(part, name, computes)
    return float8, scale


def _too_large(part: Part, name: str, dtype: torch.dtype) -> CheckpointError:
    name_of_dtype = str(dtype).removeprefix("torch.")
    return CheckpointError(
        f"{part.checkpoint.files[0]}: {name} holds numbers that {name_of_dtype} cannot: give "
        "dtype=bfloat16 or float32 (--dtype)"
    )


def _half_of(part: Part, name: str, tensor: Tensor, stored: bool) -> torch.dtype:
    """float16, if it holds every number; else bfloat16 where layers cast their weights.

    Raises CheckpointError where they do not: a network computes in one dtype.
    """
    if bool(tensor.half().isfinite().all()) or not bool(tensor.isfinite().all()):
        return torch.float16
    if stored:
        return torch.bfloat16
    raise _too_large(part, name, torch.float16)


class _Unfilled(TorchFunctionMode):
    """Skips drawing initial values, which on the meta device is a quarter of the time that building
    SDXL's UNet takes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        arguments = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else arguments["tensor"]
        return func(*args, **arguments)


_DRAWS: frozenset[Any] = frozenset(
    (
        *(nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_),
        *(Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_),
    )
)


@contextmanager
def _uncollected() -> Generator[None]:
    """Without Python's cycle collector, which 1750 new modules would start: it takes 85 ms, as much
    as building SDXL's UNet."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


# Layers whose input is one row a sample. A float32 product with a single row rounds by the address
# of its matrix modulo 16 bytes, and by whether it is transposed (measured, MKL's sgemv), and a
# file's data may start anywhere. They are 1 % of an SDXL UNet.
_ONE_ROW = re.compile(
    r"(time|add)_embedding\..*\.weight|.*\.time_emb_proj\.weight|text_projection\.weight"
)


def _aligned(name: str, tensor: Tensor) -> Tensor:
    """The tensor at an aligned address, so that its products do not depend on the file's layout."""
    if _ONE_ROW.fullmatch(name) is None or tensor.is_meta:
        return tensor
    tensor = tensor.contiguous()
    misaligned = tensor.dtype == torch.float32 and tensor.data_ptr() % 64
    return tensor.clone() if misaligned else tensor


def default_dtype(part: Part) -> torch.dtype:
    """The default dtype of a part's weights on an accelerator."""
    return _WIDENED_FLOATS.get(stored_dtype(part), torch.float32)


def stored_dtype(part: Part) -> str:
    """The dtype most of the part's values have."""
    sizes: dict[str, int] = {}
    for name, shape in part.shapes.items():
        dtype = part.dtype(name)
        sizes[dtype] = sizes.get(dtype, 0) + torch.Size(shape).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def is_half(dtype: Dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def device_of(device: torch.device | str) -> torch.device:
    """Raises InputError for a device that this torch does not have."""
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}: {str(error).splitlines()[0]}") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device}: this torch has no usable CUDA device; use 'cpu'")
    return target
