"""The weights of networks as blocks of memory: what can be moved by one copy of bytes.

Weights that fill one memory together, as those of joined layers do, are one block, and lie in the
next memory as they lay in the last: side by side, in the order of axes that they had.
"""

# The tables of an nn.Module and the identity of a storage are private.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

ALIGNED = 512
"""As CUDACachingAllocator places what it gives (`kMinBlockSize`)."""


class Weight(NamedTuple):
    """One tensor of a network, and where it hangs."""

    owner: nn.Module
    name: str
    tensor: Tensor

    @property
    def begin(self) -> int:
        """Bytes from the start of its memory."""
        return int(self.tensor.storage_offset()) * self.tensor.itemsize

    def become(self, tensor: Tensor) -> None:
        """Hang another in its place, as what it was: a parameter or a buffer."""
        if self.name in self.owner._parameters:
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(self.owner, self.name, tensor)


class Block(NamedTuple):
    """Weights that fill one memory, in the order in which they lie, and its bytes."""

    weights: tuple[Weight, ...]
    memory: Tensor

    @property
    def aligned_bytes(self) -> int:
        """What it takes where others come behind it."""
        return -(-self.memory.nbytes // ALIGNED) * ALIGNED

    def settle(self, memory: Tensor, begin: int) -> None:
        """Hang the weights into other bytes, `begin` of which are before them."""
        for weight in self.weights:
            own = weight.tensor
            place = begin + weight.begin - self.weights[0].begin
            flat = memory.view(own.dtype)
            weight.become(flat.as_strided(own.shape, own.stride(), place // own.itemsize))


def weights_of(modules: Iterable[nn.Module]) -> Iterator[Weight]:
    """Parameters and buffers."""
    for module in modules:
        for owner in module.modules():
            parameters, buffers = owner.named_parameters, owner.named_buffers
            for name, tensor in (*parameters(recurse=False), *buffers(recurse=False)):
                yield Weight(owner, name, tensor)


def blocks_of(modules: Iterable[nn.Module]) -> Iterator[Block]:
    """All weights, in blocks as large as they lie; those that hold gaps are closed up."""
    by_memory: dict[int, list[Weight]] = {}
    for weight in weights_of(modules):
        if not _is_dense(weight.tensor):
            weight = weight._replace(tensor=weight.tensor.detach().contiguous())
        by_memory.setdefault(weight.tensor.untyped_storage()._cdata, []).append(weight)
    for found in by_memory.values():
        together = sorted(found, key=lambda weight: weight.begin)
        size = sum(weight.tensor.nbytes for weight in together)
        last = together[-1]
        reach = last.begin + last.tensor.nbytes - together[0].begin
        if reach == size and len({weight.tensor.dtype for weight in together}) == 1:
            yield Block(tuple(together), _bytes(together[0].tensor, size))
        else:
            yield from (Block((w,), _bytes(w.tensor, w.tensor.nbytes)) for w in together)


def gather(blocks: Iterable[Block], device: torch.device) -> None:
    """Move them to a device, into one memory: nothing is lost between them."""
    blocks = list(blocks)
    memory = torch.empty(
        sum(block.aligned_bytes for block in blocks), dtype=torch.uint8, device=device
    )
    begin = 0
    for block in blocks:
        memory[begin : begin + block.memory.nbytes].copy_(block.memory)
        block.settle(memory, begin)
        begin += block.aligned_bytes


def _is_dense(tensor: Tensor) -> bool:
    """Whether it fills its memory, in whatever order of axes."""
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or reach + 1 == tensor.numel()


def _bytes(first: Tensor, size: int) -> Tensor:
    return first.detach().as_strided((size // first.itemsize,), (1,)).view(torch.uint8)
