"""A compiled network: F = network(x_in, timestep, cond), block by block, or whole.

    by regions    where a network has some (`headstart.networks.regions`): each is compiled, and the
                  code between them runs as Python, with our kernels on a GPU
    whole         any other network

On a CUDA device the result is captured, and a pass is one launch.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from headstart.errors import CaptureError, HeadstartError
from headstart.interfaces import Conditioning, Denoiser
from headstart.networks.regions import compiled_by, has_regions
from headstart.runner.capture import Program, Site, Tensors
from headstart.runner.compiled_block import Block, Skeleton
from headstart.runner.compiled_cache import CompiledCache, Shapes
from headstart.runner.compiled_function import Backend, CompiledFunction
from headstart.runner.graph import (
    GraphRunner,
    adapters_of,
    named,
    require_no_adapters,
    unnamed,
)

_FIXES = {
    "OutOfMemory": "ask for a smaller batch or size",
    "Cxx": "install a C++ compiler (g++), or name one in the variable CXX",
    "Cpp": "install a C++ compiler (g++) that works, or name one in the variable CXX",
    "C compiler": "install a C compiler (gcc), or name one in the variable CC",
    "triton": "install triton in the version that torch asks for",
}
"""Part of a compiler's error -> what to do about it."""


class CompiledNetwork(GraphRunner):
    """A denoiser that runs `network` compiled, and captured on a CUDA device.

    backend  that of torch.compile
    site     where graphs live; by default that of x_in's device if it is a CUDA one: elsewhere
             nothing is captured

    Compiled functions belong to structures and shapes, not to this object: another object of the
    same network reuses them, and so does any network of such blocks.
    Raises CaptureError where it cannot be compiled.
    """

    def __init__(
        self, network: Denoiser, backend: Backend, site: Site | None = None, **options: Any
    ) -> None:
        super().__init__(network, site, **options)
        self.backend, self.regional = backend, has_regions(network)
        if site is not None and site.warmups < 1:
            raise CaptureError(
                "nothing compiles while a graph is captured: expected a site with warm-ups, got "
                "warmups=0; give it one, or use runner='graph'"
            )

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        if self.site is None and x_in.device.type != "cuda":
            return self.compiled(x_in, timestep, cond)
        return super().__call__(x_in, timestep, cond)

    def request(
        self, x_in: Tensor, timestep: Tensor, cond: Conditioning
    ) -> tuple[Program, Tensors]:
        adapters = adapters_of(self.network, cond)
        program, inputs = super().request(x_in, timestep, replace(cond, adapters=adapters))

        def body(inputs: Tensors) -> tuple[Tensor, ...]:
            """Warm-ups compile; then the compiled functions are captured."""
            cond = replace(unnamed(inputs), adapters=adapters)
            return (self.compiled(inputs["x_in"], inputs["timestep"], cond),)

        return program._replace(body=body, key=(program.key, self.backend)), inputs

    def compiled(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """The network, compiled and not captured."""
        if not self.regional:
            return self._whole(x_in, timestep, cond)
        with compiled_by(self._block):
            return self.network(x_in, timestep, cond)

    def _block(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        name, block = type(module).__name__, Block.of(module)
        leaves, spec = tree_flatten(args)
        inputs, others = _split_leaves(leaves)
        shapes = Shapes.of([*inputs, *block.strengths], (str(spec), others))
        cache = _block_cache(self.backend)
        function = cache.find(name, block.structure, shapes, lambda: Skeleton(block).on)
        tensors = [*block.tensors.values(), *block.strengths, *inputs]
        return _run(name, shapes, function, tensors, block.tensors, block.strengths, args)

    def _whole(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        name = type(self.network).__name__
        require_no_adapters(
            self.network, cond, "has no blocks that are compiled for themselves "
            "(headstart.networks.regions), and a network compiled whole would not follow them",
        )  # fmt: skip
        cond = replace(cond, adapters=None)
        fields = named(cond)
        tensors = [x_in, timestep, *fields.values()]
        shapes = Shapes.of(tensors, tuple(fields))
        training = getattr(self.network, "training", False)
        cache = _whole_cache(self.network, self.backend)
        function = cache.find(name, training, shapes, lambda: _call)
        return _run(name, shapes, function, tensors, self.network, x_in, timestep, cond)


def _call(network: Denoiser, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    return network(x_in, timestep, cond)


@cache
def _block_cache(backend: Backend) -> CompiledCache:
    """The cache of all blocks."""
    return CompiledCache(backend)


_WHOLE: weakref.WeakKeyDictionary[object, dict[Backend, CompiledCache]] = (
    weakref.WeakKeyDictionary()
)


def _whole_cache(network: object, backend: Backend) -> CompiledCache:
    """The cache of a network that is compiled whole, for as long as the network lives."""
    return _WHOLE.setdefault(network, {}).setdefault(backend, CompiledCache(backend, guarded=True))


def _split_leaves(leaves: Iterable[object]) -> tuple[list[Tensor], tuple[Hashable, ...]]:
    """The tensors among a block's arguments; and all arguments, with None for each tensor."""
    tensors, others = list[Tensor](), list[Hashable]()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        others.append(None if isinstance(leaf, Tensor) else cast("Hashable", leaf))
    return tensors, tuple(others)


def _run(
    name: str, shapes: Shapes, function: CompiledFunction, tensors: list[Tensor], *args: Any
) -> Any:
    try:
        return function(tensors, *args)
    except HeadstartError:
        raise
    except Exception as error:
        if not _is_compiler_error(error):
            raise
        reason = _reason(error)
        fix = next((fix for part, fix in _FIXES.items() if part in reason), None)
        raise CaptureError(
            f"{name} could not be compiled for {shapes}: {reason}; "
            f"{'' if fix is None else fix + ', or '}use runner='eager', or 'auto'"
        ) from error


def _reason(error: Exception) -> str:
    """The type and first line of an error; of the backend's own, where dynamo passes it on."""
    inner: Exception = getattr(error, "inner_exception", error)
    lines = str(inner).strip().splitlines()
    return f"{type(inner).__name__}: {lines[0]:.300}" if lines else type(inner).__name__


def _is_compiler_error(error: Exception) -> bool:
    """From the module of its class: the classes differ between versions of torch, and importing
    them takes a second. Triton's error about a missing gcc is a RuntimeError."""
    modules = ("torch._dynamo", "torch._inductor", "torch.fx", "triton")
    ours = any(base.__module__.startswith(modules) for base in type(error).__mro__)
    return ours or "C compiler" in str(error)
