"""A network as a program of OpenVINO, on a CPU: F = network(x_in, timestep, cond).

torch.export lists the network's operators once a shape, and OpenVINO compiles them with a copy of
the weights (docs.openvino.ai: convert_model, compile_model, INFERENCE_PRECISION_HINT). It is an
extra, for networks that it is faster for: see `bench/README.md`.
"""

# openvino is not annotated.
# pyright: reportMissingImports=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportPrivateUsage=false

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Hashable
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from headstart.errors import CaptureError, first_line
from headstart.interfaces import Conditioning, Denoiser
from headstart.networks.casting import compute_dtype
from headstart.prompt_cache import ReadsPrompt
from headstart.runner.binding import Binding, state_of
from headstart.runner.capture import Tensors
from headstart.runner.graph import form_of, named, require_no_adapters, unnamed

_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def require_openvino() -> None:
    """Raises CaptureError where the package is not installed."""
    if find_spec("openvino") is None:
        raise CaptureError(
            "runner 'openvino' needs the package openvino, which is not installed: "
            "pip install 'headstart[openvino]', or use 'eager'"
        )


class OpenVinoNetwork:
    """A denoiser that runs `network` by OpenVINO.

    Programs belong to the network: another object of the same network has them, too. They are made
    anew for another shape or number of threads, and of weights that were written to or replaced;
    torch counts no writes through `weight.data` or numpy. Threads take turns.
    Raises CaptureError for a network that computes in another dtype than float32 or bfloat16 or
    cannot be converted, and with adapters, which a program would not follow.
    """

    def __init__(self, network: Denoiser) -> None:
        require_openvino()
        dtype = compute_dtype(network)
        if dtype not in _HINTS:
            raise CaptureError(
                f"runner 'openvino' computes in float32 or bfloat16, and the network in {dtype}: "
                "choose one of them (dtype=, --dtype), or use runner='eager'"
            )
        self.network, self.compute_dtype = network, dtype
        self._programs = _PROGRAMS.setdefault(network, _Programs())
        if hasattr(network, "prompt_key"):
            reader = cast("ReadsPrompt", network)
            self.prompt_key, self.read_prompt = reader.prompt_key, reader.read_prompt

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        require_no_adapters(self.network, cond, "is a program of OpenVINO, with weights of its own")
        inputs = {"x_in": x_in, "timestep": timestep, **named(cond)}
        with self._programs.lock:
            f = self._programs.of(self.network, self.compute_dtype, inputs)(inputs)
        return f.to(self.compute_dtype)


class _Weights:
    """The weights of a network, and how often they had been written to."""

    def __init__(self, network: object) -> None:
        self._binding = Binding([network])
        module = network if isinstance(network, nn.Module) else nn.Module()
        weights = [*module.parameters(), *module.buffers()]
        self._counted = [weight for weight in weights if not weight.is_inference()]
        self._writes = self._count()

    def are_the_same(self) -> bool:
        return self._binding.is_valid() and self._count() == self._writes

    def _count(self) -> int:
        return sum(weight._version for weight in self._counted)


class _Programs:
    """The programs of a network, by form: shapes, dtypes, threads and Python state."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._weights: _Weights | None = None
        self._by_form: dict[Hashable, Callable[[Tensors], Tensor]] = {}

    def of(
        self, network: Denoiser, dtype: torch.dtype, inputs: Tensors
    ) -> Callable[[Tensors], Tensor]:
        if self._weights is None or not self._weights.are_the_same():
            self._by_form.clear()
            self._weights = _Weights(network)
        form = dtype, form_of(inputs), torch.get_num_threads(), state_of(network)
        if form not in self._by_form:
            self._by_form[form] = _program(network, dtype, inputs)
        return self._by_form[form]


_PROGRAMS: weakref.WeakKeyDictionary[Denoiser, _Programs] = weakref.WeakKeyDictionary()


class _Flat(nn.Module):
    """A network called with tensors alone, float32 outside, as NumPy has no bfloat16."""

    def __init__(self, network: Any, dtype: torch.dtype, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.dtype, self.names = network, dtype, names

    def forward(self, *inputs: Tensor) -> Tensor:
        tensors = dict(zip(self.names, inputs, strict=True))
        x_in = tensors["x_in"]
        cond = unnamed(tensors).to(x_in.device, self.dtype)
        return self.network(x_in.to(self.dtype), tensors["timestep"], cond).float()


def _program(network: Denoiser, dtype: torch.dtype, inputs: Tensors) -> Callable[[Tensors], Tensor]:
    import openvino

    names = tuple(inputs)
    flat = _Flat(network, dtype, names)
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": _HINTS[dtype],
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        with torch.no_grad(), torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about code of torch and of openvino
            example = tuple(_outside(tensor).clone() for tensor in inputs.values())
            model = openvino.convert_model(torch.export.export(flat, example))
        request: Any = openvino.compile_model(model, "CPU", options).create_infer_request()
    except Exception as error:
        raise CaptureError(
            f"{type(network).__name__} could not be converted for OpenVINO: "
            f"{type(error).__name__}: {first_line(error):.300}; use runner='eager'"
        ) from error

    def call(tensors: Tensors) -> Tensor:
        arrays = [_outside(tensors[name]).contiguous().numpy() for name in names]
        return torch.from_numpy(request.infer(arrays, share_inputs=True)[0])

    return call


def _outside(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
