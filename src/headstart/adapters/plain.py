"""Changes that are written out: a difference, a whole weight, or a factor a channel.

full   dW itself, and of a bias                         LyCORIS
whole  W* - W, for a file that holds W*                 arXiv:2212.04488; ComfyUI's `set_weight`
(IA)^3 W * l, l of the rows or, on the input, columns   arXiv:2205.05638, section 3.3; LyCORIS'
       modules/ia3.py stores l - 1, so a strength s gives W * (1 + s*(l - 1))
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from headstart.adapters.kind import Agreement, Kind, Shape, Shapes, Sides, Tensors
from headstart.adapters.names import AdapterForm


def _only(shapes: Shapes) -> Sides:
    return next(shapes[name] for name in ("diff", "weight", "diff_b", "bias") if name in shapes)


FULL = Kind(
    title="full difference",
    form=AdapterForm.FULL,
    operands={"diff": (1, 2, 4)},
    parts=(),
    sides=_only,
    change=lambda t, _: t["diff"].float(),
    modifiers=frozenset({"alpha", "dora_scale", "magnitude", "diff_b"}),
)
WHOLE = Kind(
    title="whole weight",
    form=None,
    operands={"weight": (1, 2, 4), "bias": (1,)},
    parts=(),
    sides=_only,
    change=lambda t, weight: t["weight"].float().reshape(weight.shape) - weight,
    modifiers=frozenset({"alpha"}),
)


def _axis(t: Tensors) -> int:
    return 1 if bool(t["on_input"].flatten()[0]) else 0


def _ia3(t: Tensors, weight: Tensor) -> Tensor:
    shape = [1] * weight.ndim
    shape[_axis(t)] = -1
    return weight * t["factors"].float().reshape(shape)


def _ia3_settled(t: Tensors, layer: Shape) -> Iterator[Agreement]:
    where = ("outputs", "inputs")[_axis(t)]
    yield Agreement(f"a factor for each of the {where},", layer[_axis(t)], t["factors"].numel())


IA3 = Kind(
    title="(IA)^3",
    form=AdapterForm.IA3,
    operands={"factors": (1, 2, 4), "on_input": (0, 1)},
    parts=((("factors", "on_input"),),),
    sides=lambda shapes: (max(shapes["factors"]),),
    change=_ia3,
    # Either side may fit: `on_input` decides, whose value is not in the header.
    fits=lambda shapes, layer: len(layer) > 1 and max(shapes["factors"]) in layer[:2],
    value_agreements=_ia3_settled,
)
