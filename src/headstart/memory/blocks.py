"""The weights of networks as blocks of memory: one copy of bytes moves a block.

Weights that share one storage without gaps, as those of joined layers do, are one block. They stay
side by side, with the same strides, wherever the block is moved.
"""

# The tables of an nn.Module and the identity of a storage are private.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

ALIGNED = 512
"""Bytes; the alignment of CUDACachingAllocator (`kMinBlockSize`)."""


class Weight(NamedTuple):
    """One tensor of a network, with the module and the name that hold it."""

    owner: nn.Module
    name: str
    tensor: Tensor

    @property
    def begin(self) -> int:
        """Bytes from the start of its storage."""
        return int(self.tensor.storage_offset()) * self.tensor.itemsize

    def replace(self, tensor: Tensor) -> None:
        """Put another tensor in its place; a parameter stays a parameter, a buffer a buffer."""
        if self.name in self.owner._parameters:
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(self.owner, self.name, tensor)


class Block(NamedTuple):
    """Weights that fill one storage, in the order of their addresses, and its bytes."""

    weights: tuple[Weight, ...]
    memory: Tensor

    @property
    def aligned_bytes(self) -> int:
        """Bytes up to where the next block may begin."""
        return -(-self.memory.nbytes // ALIGNED) * ALIGNED

    def move_to(self, memory: Tensor, begin: int) -> None:
        """Make the weights views of `memory`, from byte `begin` on. Copies nothing."""
        for weight in self.weights:
            old = weight.tensor
            offset = begin + weight.begin - self.weights[0].begin
            flat = memory.view(old.dtype)
            weight.replace(flat.as_strided(old.shape, old.stride(), offset // old.itemsize))


def weights_of(modules: Iterable[nn.Module]) -> Iterator[Weight]:
    for module in modules:
        for owner in module.modules():
            for tensors in (owner.named_parameters, owner.named_buffers):
                yield from (Weight(owner, *item) for item in tensors(recurse=False))


def blocks_of(modules: Iterable[nn.Module]) -> Iterator[Block]:
    """All weights, in the largest blocks without gaps; a tensor with gaps is made contiguous."""
    by_memory: dict[int, list[Weight]] = {}
    for weight in weights_of(modules):
        if not _is_dense(weight.tensor):
            weight = weight._replace(tensor=weight.tensor.detach().contiguous())
        by_memory.setdefault(weight.tensor.untyped_storage()._cdata, []).append(weight)
    for group in by_memory.values():
        weights = sorted(group, key=lambda weight: weight.begin)
        size = sum(weight.tensor.nbytes for weight in weights)
        extent = weights[-1].begin + weights[-1].tensor.nbytes - weights[0].begin
        if extent == size and len({weight.tensor.dtype for weight in weights}) == 1:
            yield Block(tuple(weights), _bytes(weights[0].tensor, size))
        else:
            yield from (Block((w,), _bytes(w.tensor, w.tensor.nbytes)) for w in weights)


def gather(blocks: Iterable[Block], device: torch.device) -> None:
    """Copy blocks to a device, into one allocation: the allocator leaves no gaps between them."""
    blocks, begin = list(blocks), 0
    size = sum(block.aligned_bytes for block in blocks)
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    for block in blocks:
        memory[begin : begin + block.memory.nbytes].copy_(block.memory)
        block.move_to(memory, begin)
        begin += block.aligned_bytes


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements have no gaps, in whatever order of axes."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or last + 1 == tensor.numel()


def _bytes(first: Tensor, size: int) -> Tensor:
    return first.detach().as_strided((size // first.itemsize,), (1,)).view(torch.uint8)
