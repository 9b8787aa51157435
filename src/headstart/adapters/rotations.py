"""Changes that rotate a weight: W' = R W or W R, R of orthogonal blocks by Cayley's formula.

OFT    R = (I + Q)(I - Q)^-1,  W'_k = R_k^T W_k for each block k of rows     arXiv:2306.07280
BOFT   W' = B_m ... B_1 W, B_j of such blocks on rows shuffled as an FFT's   arXiv:2311.06243
OFTv2  W' = W R^T, blocks of columns; R a series in Q                        arXiv:2506.19847

A strength s gives W + s*(W' - W), that is I + s*(R - I) in place of R, as in sd-scripts'
networks/oft.py and LyCORIS' diag-oft. LyCORIS' BOFT interpolates each B_j so, which is the same
at 0 and 1 only; a sum of W' - W is what several adapters need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from headstart.adapters.kind import Agreement, Kind, Shape, Shapes, Sides, Tensors
from headstart.adapters.names import AdapterForm
from headstart.errors import AdapterError


def _cayley(skew: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 in float64; both factors are functions of Q, so their order is free."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype)
    solve = cast("Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]", torch.linalg.solve_ex)  # pyright: ignore
    return solve(one - skew, one + skew)[0]


def _blocks(t: Tensors, outs: int) -> Tensor:
    """The rotations of OFT and BOFT, float64 on the CPU.

    alpha bounds |Q| over all blocks: by alpha * outs in sd-scripts and LyCORIS, which train such
    files (ComfyUI bounds it by alpha itself). 0, LyCORIS' default, or no alpha: no bound.
    """
    skew = t["oft_blocks"].cpu().double()
    skew = skew - skew.mT
    bound = outs * float(t["alpha"].flatten()[0]) if "alpha" in t else 0.0
    norm = float(skew.square().sum().sqrt())
    return _check_finite(_cayley(skew * (bound / norm) if 0 < bound < norm else skew))


def _check_finite(rotation: Tensor) -> Tensor:
    """A skew Q has no real eigenvalue but 0, so I - Q has an inverse; only overflow takes it."""
    if not bool((rotation.abs() < _LARGEST).all()):
        raise AdapterError(
            "expected blocks that make a rotation, got numbers so large that it is not finite; the "
            "file is damaged or its training diverged"
        )
    return rotation


_LARGEST = 2.0**64
"""A rotation's entries are at most 1; those of a series that is cut off may be more."""


def _rescaled(rotated: Tensor, t: Tensors) -> Tensor:
    if "rescale" not in t:
        return rotated
    return rotated * t["rescale"].float().reshape(-1, *[1] * (rotated.ndim - 1))


def _oft(t: Tensors, weight: Tensor) -> Tensor:
    rotations = _blocks(t, len(weight)).to(weight)
    rows = weight.reshape(*rotations.shape[:2], *weight.shape[1:])
    rotated = torch.einsum("knm,kn...->km...", rotations, rows).reshape(weight.shape)
    return _rescaled(rotated, t) - weight


def _boft(t: Tensors, weight: Tensor) -> Tensor:
    rotations = _blocks(t, len(weight)).to(weight)
    _, count, size, _ = rotations.shape
    rotated, inner = weight, weight.shape[1:]
    for stage, rotation in enumerate(rotations):
        half = 2**stage * size // 2  # rows that far apart become neighbours
        near = rotated.reshape(-1, 2, half, *inner).transpose(1, 2).reshape(count, size, *inner)
        near = torch.einsum("bij,bj...->bi...", rotation, near)
        rotated = near.reshape(-1, half, 2, *inner).transpose(1, 2).reshape(weight.shape)
    return _rescaled(rotated, t) - weight


def _rows_sides(shapes: Shapes) -> Sides:
    *_, count, size, _ = shapes["oft_blocks"]
    return (count * size, None)


def _oft_agreements(shapes: Shapes) -> Iterator[Agreement]:
    *stages, count, size, columns = shapes["oft_blocks"]
    yield Agreement("square blocks", size, columns)
    if "rescale" in shapes:
        yield Agreement("a rescale of", count * size, math.prod(shapes["rescale"]))
    if stages:
        yield Agreement("blocks of an even size, such as", size + size % 2, size)
        most = (count & -count).bit_length()  # stage j pairs rows 2^j*b/2 apart
        yield Agreement("stages, at most", min(stages[0], most), stages[0])


OFT = Kind(
    title="OFT",
    form=AdapterForm.OFT,
    operands={"oft_blocks": (3,), "rescale": (1, 2, 4), "alpha": (0, 1)},
    parts=((("oft_blocks",),),),
    needs={"rescale": "oft_blocks"},
    sides=_rows_sides,
    change=_oft,
    agreements=_oft_agreements,
    fits=lambda shapes, layer: len(layer) > 1 and _rows_sides(shapes)[0] == layer[0],
)
BOFT = replace(
    OFT,
    title="BOFT",
    form=AdapterForm.BOFT,
    operands={**OFT.operands, "oft_blocks": (4,)},
    change=_boft,
)


# ------------------------------------------------------------------------------------------ OFTv2


class OftSettings(NamedTuple):
    """Settings of OFTv2 that its tensors do not show.

    terms   of the series I + 2Q + 2Q^2 + ... + 2Q^(n-2) + last*Q^(n-1), which PEFT and OneTrainer
            train with; None: Cayley's formula, PEFT's without `use_cayley_neumann`
    last    1, and 2 in PEFT before version 0.18
    kernel  whether a convolution is rotated by R instead of R^T, as OneTrainer does, unlike PEFT
    """

    terms: int | None = 5
    last: float = 1.0
    kernel: bool = True


def _series(skew: Tensor, terms: int, last: float) -> Tensor:
    """(I + Q)(I - Q)^-1 cut off: PEFT's tuners/oft/layer.py `_cayley_batch`, where 3 terms are 4
    since the last one counts once."""
    terms = 4 if terms == 3 and last == 1 else terms
    total = power = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    for term in range(1, terms):
        power = power @ skew
        total = total + (last if term == terms - 1 > 1 else 2.0) * power
    return total


def _size(shapes: Shapes) -> int:
    """b of b*(b - 1)/2 entries above the diagonal."""
    return (1 + math.isqrt(1 + 8 * shapes["oft_r"][1])) // 2


def _oft_v2(t: Tensors, weight: Tensor, settings: OftSettings) -> Tensor:
    packed = t["oft_r"].cpu().double()
    size = _size({"oft_r": tuple(packed.shape)})
    if "scaled_oft" in t and bool(t["scaled_oft"].flatten()[0]):
        packed = packed / (2 * math.sqrt(size - 1))
    rows, columns = torch.triu_indices(size, size, 1)
    skew = packed.new_zeros(len(packed), size, size)
    skew[:, rows, columns] = packed
    skew = skew - skew.mT
    # Without the series PEFT has (I - Q)(I + Q)^-1: the other way round.
    terms, last, _ = settings
    rotation = _check_finite(_cayley(-skew) if terms is None else _series(skew, terms, last))
    if weight.ndim == 2 or not settings.kernel:
        rotation = rotation.mT
    blocks = weight.reshape(len(weight), -1, size)
    rotation = rotation.to(weight).expand(blocks.shape[1], size, size)
    return torch.einsum("ork,rkc->orc", blocks, rotation).reshape(weight.shape) - weight


def _oft_v2_agreements(shapes: Shapes) -> Iterator[Agreement]:
    size, entries = _size(shapes), shapes["oft_r"][1]
    yield Agreement("the entries above a diagonal,", size * (size - 1) // 2, entries)


def _columns_sides(shapes: Shapes) -> Sides:
    """One block may be shared by all columns, so it does not tell how many there are."""
    count = shapes["oft_r"][0]
    return (None, count * _size(shapes) if count > 1 else None)


def _same_columns(shapes: Shapes, layer: Shape) -> bool:
    columns, count, size = math.prod(layer[1:]), shapes["oft_r"][0], _size(shapes)
    shared = count == 1 and columns % size == 0
    return len(layer) > 1 and (shared or columns == count * size)


def oft_v2(settings: OftSettings) -> Kind:
    """OFTv2 as one program has it."""
    return replace(OFT_V2, change=partial(_oft_v2, settings=settings))


OFT_V2 = Kind(
    title="OFTv2",
    form=AdapterForm.OFT_V2,
    operands={"oft_r": (2,), "scaled_oft": (0, 1)},
    parts=((("oft_r",),),),
    needs={"scaled_oft": "oft_r"},
    sides=_columns_sides,
    change=partial(_oft_v2, settings=OftSettings()),
    agreements=_oft_v2_agreements,
    fits=_same_columns,
)
