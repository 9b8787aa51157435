"""What inductor generates for a GPU that is not there: the launches of a compiled block, counted.

The graph is traced on fake CUDA tensors, and inductor is told that there is an H100. It generates
its code, which is read and not run. Attention is flash attention by name, as torch would choose on
that GPU; no product is measured against Triton's templates, as "max-autotune" would do there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

H100 = {
    "name": "NVIDIA H100", "gcnArchName": "", "major": 9, "minor": 0, "total_memory": 80 << 30,
    "multi_processor_count": 132, "regs_per_multiprocessor": 65536, "warp_size": 32,
    "max_threads_per_multi_processor": 2048, "L2_cache_size": 50 << 20,
    "shared_memory_per_block": 48 << 10, "shared_memory_per_block_optin": 227 << 10,
}  # fmt: skip


class Launches(NamedTuple):
    """Of a block: Triton kernels, matrix products, attentions, and calls of anything else."""

    kernels: int
    products: int
    attentions: int
    others: tuple[str, ...]


class Generating:
    """A backend of torch.compile that generates code for a GPU and gives empty results."""

    def __init__(self) -> None:
        self.launches: list[Launches] = []

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        self.launches.append(_read(_generated(graph, examples)))
        values = [node.meta["example_value"] for node in graph.graph.output_node().args[0]]

        def run(*_: object) -> list[Tensor]:
            return [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in values]

        return run


@contextmanager
def flash_attention() -> Generator[None]:
    """The attention that torch chooses on such a GPU; a fake one has torch's plainest."""

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    with mock.patch.object(F, "scaled_dot_product_attention", flash):
        yield


class _GeneratedError(Exception):
    """Raised with the code, in place of loading it."""


def _generated(graph: torch.fx.GraphModule, examples: list[Any]) -> str:
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config, scheduler
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties

    def stop(lowering: GraphLowering) -> None:
        code: Any = lowering.codegen()[0]
        raise _GeneratedError(getattr(code, "value", code))

    properties = {name: H100[name] for name in DeviceProperties._fields if name in H100}
    created = DeviceProperties(type="cuda", index=0, cc=90, **properties)
    device = SimpleNamespace(**H100)
    patches = [
        mock.patch("torch.cuda.get_device_properties", lambda _=None: device),
        mock.patch("torch.cuda.get_device_capability", lambda _=None: (9, 0)),
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch.object(CudaInterface, "get_device_properties", staticmethod(lambda _: device)),
        mock.patch.object(CudaInterface, "get_compute_capability", staticmethod(lambda _: 90)),
        mock.patch.object(CudaInterface, "is_bf16_supported", staticmethod(lambda *_, **__: True)),
        mock.patch.object(CudaInterface, "is_available", staticmethod(lambda: True)),
        mock.patch.object(DeviceProperties, "create", classmethod(lambda *_: created)),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        mock.patch.object(scheduler, "has_triton", lambda: True),
        mock.patch("torch.utils._triton.triton_hash_with_backend", lambda: "none"),
        # It pads a product where a padded one is faster, and would measure that.
        config.patch(force_disable_caches=True, compile_threads=1, shape_padding=False),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        try:
            compile_fx(graph, examples)
        except Exception as error:
            inner = getattr(error, "inner_exception", error)
            if not isinstance(inner, _GeneratedError):
                raise
            return str(inner)
    raise AssertionError("inductor generated nothing")


def _read(code: str) -> Launches:
    """The calls of the generated function `call`; views and allocations are none."""
    body = code[code.index("def call(") :]
    called = re.findall(r"^\s+(?:buf\d+ = )?([\w.]+)\(", body, re.MULTILINE)
    launched = [n for n in called if n.endswith(".run") or ".ops." in n or "extern" in n]
    kernels = [name for name in launched if name.endswith(".run")]
    products = [name for name in launched if re.fullmatch(r"extern_kernels\.(add)?mm", name)]
    attentions = [name for name in launched if "scaled_dot_product" in name]
    others = set(launched) - {*kernels, *products, *attentions}
    return Launches(len(kernels), len(products), len(attentions), tuple(sorted(others)))
