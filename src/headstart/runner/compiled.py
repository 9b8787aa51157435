"""A compiled network: F = network(x_in, timestep, cond), block by block, or whole.

    regions       of a network that has some (`headstart.networks.regions`): each is compiled, and
                  what is between them runs as it is, in our kernels on a GPU
    the whole     of any other network

On a CUDA device what came out is captured, and a pass is one launch.
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
from headstart.runner.compiled_cache import Forms, Shapes
from headstart.runner.compiled_function import Backend, Form
from headstart.runner.graph import GraphRunner, adapters_of, named, unnamed

_FIXES = {
    "OutOfMemory": "ask for a smaller batch or size",
    "Cxx": "install a C++ compiler (g++), or name one in the variable CXX",
    "Cpp": "install a C++ compiler (g++) that works, or name one in the variable CXX",
    "C compiler": "install a C compiler (gcc), or name one in the variable CC",
    "triton": "install triton in the version that torch asks for",
}
"""Part of what the compiler says -> what to do about it, besides not compiling."""


class CompiledNetwork(GraphRunner):
    """A denoiser that calls `network` compiled, as one graph where it is captured.

    backend  that of torch.compile
    site     where graphs live; by default that of x_in's device if it is a CUDA one: elsewhere
             nothing is captured

    What is compiled belongs to structures and shapes, not to this object: another of the same
    network finds it again, and where blocks are compiled, so does any network of such blocks.
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
            """Warm-ups compile, and what they leave is captured."""
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
        told, others = _sorted(leaves)
        shapes = Shapes.of([*told, *block.strengths], (str(spec), others))
        form = _forms(self.backend).find(name, block.structure, shapes, lambda: Skeleton(block).on)
        tensors = [*block.tensors.values(), *block.strengths, *told]
        return _called(name, shapes, form, tensors, block.tensors, block.strengths, args)

    def _whole(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        name, adapters = type(self.network).__name__, adapters_of(self.network, cond)
        if adapters is not None and adapters.parts(self.network):
            raise CaptureError(
                f"adapters are attached to this {name}, which has no blocks that are compiled for "
                "themselves (headstart.networks.regions), and a network compiled whole would not "
                "follow them: detach them, or use runner='eager'"
            )
        cond = replace(cond, adapters=None)
        told = named(cond)
        tensors = [x_in, timestep, *told.values()]
        shapes, training = Shapes.of(tensors, tuple(told)), getattr(self.network, "training", False)
        form = _forms_of(self.network, self.backend).find(name, training, shapes, lambda: _call)
        return _called(name, shapes, form, tensors, self.network, x_in, timestep, cond)


def _call(network: Denoiser, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    return network(x_in, timestep, cond)


@cache
def _forms(backend: Backend) -> Forms:
    """Of all blocks."""
    return Forms(backend)


_WHOLE: weakref.WeakKeyDictionary[object, dict[Backend, Forms]] = weakref.WeakKeyDictionary()


def _forms_of(network: object, backend: Backend) -> Forms:
    """Of a network that is compiled whole, for as long as it lives."""
    return _WHOLE.setdefault(network, {}).setdefault(backend, Forms(backend, guarded=True))


def _sorted(leaves: Iterable[object]) -> tuple[list[Tensor], tuple[Hashable, ...]]:
    """The tensors; and, in the place of each, None, between what else a block is given."""
    found, others = list[Tensor](), list[Hashable]()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        others.append(None if isinstance(leaf, Tensor) else cast("Hashable", leaf))
    return found, tuple(others)


def _called(name: str, shapes: Shapes, form: Form, tensors: list[Tensor], *args: Any) -> Any:
    try:
        return form(tensors, *args)
    except HeadstartError:
        raise
    except Exception as error:
        if not _of_the_compiler(error):
            raise
        reason = _reason(error)
        fix = next((fix for part, fix in _FIXES.items() if part in reason), None)
        raise CaptureError(
            f"{name} could not be compiled for {shapes}: {reason}; "
            f"{'' if fix is None else fix + ', or '}use runner='eager', or 'auto'"
        ) from error


def _reason(error: Exception) -> str:
    """What a backend raised, where dynamo passes it on: its kind and its first line."""
    inner: Exception = getattr(error, "inner_exception", error)
    said = str(inner).strip().splitlines()
    return f"{type(inner).__name__}: {said[0]:.300}" if said else type(inner).__name__


def _of_the_compiler(error: Exception) -> bool:
    """By where its class is, because versions of torch have other ones and loading them takes a
    second; triton's own, which looks for gcc when it launches, is a RuntimeError."""
    places = ("torch._dynamo", "torch._inductor", "torch.fx", "triton")
    ours = any(base.__module__.startswith(places) for base in type(error).__mro__)
    return ours or "C compiler" in str(error)
