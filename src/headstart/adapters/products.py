"""Changes that are products of factors: LoRA, LoHa, LoKr, GLoRA.

LoRA   up @ down                      arXiv:2106.09685; a core between them: arXiv:2309.14859
LoHa   (A1 B1) * (A2 B2)              arXiv:2108.06098, eq. 1
LoKr   A (x) B                        arXiv:2212.10650; both as in LyCORIS
GLoRA  W A + B,  A and B of rank r    arXiv:2306.07967, eq. 10, without its D and E; LyCORIS' and
                                      ComfyUI's weight_adapter/glora.py, which read two layouts
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from headstart.adapters.kind import Agreement, Kind, Shape, Shapes, Sides, Tensors
from headstart.adapters.names import AdapterForm

_SCALED = frozenset({"alpha", "scalar", "dora_scale", "magnitude", "diff_b"})


def with_core(down: Tensor, core: Tensor) -> Tensor:
    """Fold a tucker core into `down`: [r, c, kh, kw] and [c, i] -> [r, i, kh, kw], float32.

    up(core(down(x))) has 1x1 convolutions on either side of the core, so core and `down` are one
    kh x kw convolution: down'_{rikl} = sum_c core_{rckl} down_{ci}.
    """
    return torch.einsum("rckl,ci->rikl", core.float(), down.float().flatten(1))


# ------------------------------------------------------------------------------------ LoRA, LoCon


def _lora(t: Tensors, _: Tensor) -> Tensor:
    down = with_core(t["down"], t["mid"]) if "mid" in t else t["down"].float()
    return t["up"].float().flatten(1) @ down.flatten(1)


def _lora_sides(shapes: Shapes) -> Sides:
    kernel = shapes["mid" if "mid" in shapes else "down"][2:]
    return (shapes["up"][0], shapes["down"][1], *kernel)


def _lora_agreements(shapes: Shapes) -> Iterator[Agreement]:
    down, up = shapes["down"], shapes["up"]
    inner = outer = down[0]
    if "mid" in shapes:
        outer, inner = shapes["mid"][:2]
        yield Agreement("a core of rank", inner, down[0])
        yield Agreement("a kernel", (1,) * len(down[2:]), down[2:])
    yield Agreement("a rank", outer, up[1])
    yield Agreement("a kernel", (1,) * len(up[2:]), up[2:])
    if "up_bias" in shapes:
        yield Agreement("a bias", up[:1], shapes["up_bias"])


LORA = Kind(
    title="LoRA",
    form=None,
    operands={"down": (2, 4), "up": (2, 4), "mid": (4,), "up_bias": (1,)},
    parts=((("down", "up"),),),
    needs={"mid": "down", "up_bias": "up"},
    sides=_lora_sides,
    change=_lora,
    agreements=_lora_agreements,
    modifiers=_SCALED,
    rank=lambda shapes: shapes["down"][0],  # LyCORIS divides by it where a core has another
)


# ------------------------------------------------------------------------------------- LoHa, LoKr


_LOHA_SIDES = (("hada_w1", "hada_t1"), ("hada_w2", "hada_t2"))
_LOKR_SIDES = (("lokr_w1", "lokr_t1"), ("lokr_w2", "lokr_t2"))


def _side(t: Tensors, side: str, core: str) -> Tensor:
    """A whole matrix, or a @ b; with a core [r, r, h, w], a [r, o] and b [r, i] -> [o, i, h, w]."""
    if side in t:
        return t[side].float()
    a, b = t[f"{side}_a"].float(), t[f"{side}_b"].float()
    return torch.einsum("ijkl,jr,ip->prkl", t[core].float(), b, a) if core in t else a @ b


def _side_shape(shapes: Shapes, side: str, core: str) -> Shape:
    if side in shapes:
        return shapes[side]
    a, b = shapes[f"{side}_a"], shapes[f"{side}_b"]
    return (a[0], b[1]) if core not in shapes else (a[1], b[1], *shapes[core][2:])


def _side_agreements(shapes: Shapes, sides: Iterable[tuple[str, str]]) -> Iterator[Agreement]:
    for side, core in sides:
        if side in shapes:
            continue
        a, b = shapes[f"{side}_a"], shapes[f"{side}_b"]
        if core in shapes:
            yield Agreement("a core", shapes[core][:2], (a[0], b[0]))
        else:
            yield Agreement("a rank", a[1], b[0])


def _loha(t: Tensors, _: Tensor) -> Tensor:
    w1, w2 = (_side(t, *names) for names in _LOHA_SIDES)
    return w1 * w2


def _loha_agreements(shapes: Shapes) -> Iterator[Agreement]:
    yield from _side_agreements(shapes, _LOHA_SIDES)
    first, second = (_side_shape(shapes, *names) for names in _LOHA_SIDES)
    yield Agreement("a shape", first, second)


LOHA = Kind(
    title="LoHa",
    form=AdapterForm.LOHA,
    operands={
        **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (2,)),
        **dict.fromkeys(("hada_t1", "hada_t2"), (4,)),
    },
    parts=((("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),),
    needs={"hada_t1": "hada_t2", "hada_t2": "hada_t1"},
    sides=lambda shapes: _side_shape(shapes, *_LOHA_SIDES[0]),
    change=_loha,
    agreements=_loha_agreements,
    modifiers=_SCALED,
    rank=lambda shapes: shapes["hada_w1_b"][0],
)


def _lokr(t: Tensors, _: Tensor) -> Tensor:
    w1, w2 = (_side(t, *names) for names in _LOKR_SIDES)
    # contiguous, because kron views its operands and an einsum's result may be transposed
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())


def _lokr_sides(shapes: Shapes) -> Sides:
    left, right = (_side_shape(shapes, *names) for names in _LOKR_SIDES)
    return (left[0] * right[0], left[1] * right[1], *right[2:])


def _lokr_rank(shapes: Shapes) -> int | None:
    """None where both sides are whole: LyCORIS' scale is 1 then, whatever alpha is."""
    return next((shapes[b][0] for b in ("lokr_w2_b", "lokr_w1_b") if b in shapes), None)


LOKR = Kind(
    title="LoKr",
    form=AdapterForm.LOKR,
    operands={
        **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"), (2,)),
        **{"lokr_w2": (2, 4), "lokr_t2": (4,)},
    },
    parts=tuple(((side,), (f"{side}_a", f"{side}_b")) for side, _ in _LOKR_SIDES),
    needs={"lokr_t2": "lokr_w2_a"},
    sides=_lokr_sides,
    change=_lokr,
    agreements=lambda shapes: _side_agreements(shapes, _LOKR_SIDES),
    modifiers=_SCALED,
    rank=_lokr_rank,
)


# ------------------------------------------------------------------------------------------ GLoRA


def _glora_order(shapes: Shapes) -> tuple[str, str, str, str]:
    """The operands [i, r], [r, i], [o, r], [r, i]: a1, a2, b1, b2, or a2, a1, b2, b1 as LyCORIS
    wrote them before 3.0. On a square weight shapes allow both, one of a rank above its width,
    which nobody trains.
    """
    a1, a2, b1, b2 = (shapes[name] for name in ("a1", "a2", "b1", "b2"))
    old = a1[0] == a2[1] == b1[0] == b2[1] and a1[1] == a2[0] == b1[1]
    new = a1[1] == a2[0] == b1[1] == b2[0] and a1[0] == a2[1] == b2[1]
    turned = old and (not new or a1[0] < a1[1])
    return ("a2", "a1", "b2", "b1") if turned else ("a1", "a2", "b1", "b2")


def _glora_sides(shapes: Shapes) -> Sides:
    _, _, up, down = _glora_order(shapes)
    kernel = shapes["bm" if "bm" in shapes else down][2:]
    return (shapes[up][0], shapes[down][1], *kernel)


def _glora_agreements(shapes: Shapes) -> Iterator[Agreement]:
    narrow, wide, up, down = _glora_order(shapes)
    core = "bm" in shapes
    width, rank = shapes[narrow][:2]
    yield Agreement(f"{wide} of", (rank, width), shapes[wide][:2])
    yield Agreement(f"{up} of rank", rank, shapes[up][1])
    yield Agreement(f"{down} of", (rank, width), shapes[down][:2])
    for name in (narrow, wide, up, *((down,) if core else ())):
        yield Agreement(f"{name} with a kernel", (1,) * len(shapes[name][2:]), shapes[name][2:])
    if core:
        yield Agreement("a core of", (rank, rank), shapes["bm"][:2])
    if rank == width == shapes[up][0]:
        yield Agreement("a rank that tells one layout from the other,", f"below {width}", rank)


def _glora(t: Tensors, weight: Tensor) -> Tensor:
    order = _glora_order({name: tuple(tensor.shape) for name, tensor in t.items()})
    a1, a2, b1, b2 = (t[name].float().flatten(1) for name in order)
    narrow = torch.einsum("oi...,ir->or...", weight, a1)
    inner = torch.einsum("or...,ri->oi...", narrow, a2)
    outer = b1 @ (with_core(b2, t["bm"]).flatten(1) if "bm" in t else b2)
    return inner + outer.reshape(weight.shape)


GLORA = Kind(
    title="GLoRA",
    form=AdapterForm.GLORA,
    operands={**dict.fromkeys(("a1", "a2", "b1", "b2"), (2, 4)), "bm": (4,)},
    parts=((("a1", "a2", "b1", "b2"),),),
    needs={"bm": "b1"},
    sides=_glora_sides,
    change=_glora,
    agreements=_glora_agreements,
    modifiers=_SCALED - {"magnitude"},
    rank=lambda shapes: shapes[_glora_order(shapes)[0]][1],
)
