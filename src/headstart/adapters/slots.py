"""Where adapters act on a network: y[b] = layer(x)[b] + sum_a s[b, a]*scale_a*up_a(down_a(x[b])).

Low-rank changes run beside the layer, out of buffers that stay where they are, with strengths that
are read while the network runs. Other changes are merged, from the weights as they were loaded:
W' = W + sum_a s_a*change_a(W). Either way detaching gives the network back to the bit.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from headstart.adapters.delta import Delta, LowRank
from headstart.errors import AdapterError
from headstart.interfaces import Conditioning
from headstart.networks.fusion import fused
from headstart.runner.capture import is_capturing
from headstart_kernels import low_rank_add

Layer = nn.Linear | nn.Conv2d
_CHILD = "adapters"
_CALL: ContextVar[Mapping[str, Tensor] | None] = ContextVar("headstart_strengths", default=None)
"""Adapter -> [B] strengths of the network call that runs in this thread; absent ones do nothing."""


@contextmanager
def acting(names: tuple[str, ...], strengths: Tensor | None) -> Generator[None]:
    """Networks called inside have these strengths [B, A], a column a name."""
    token = _CALL.set(None if strengths is None else _by_name(names, strengths))
    try:
        yield
    finally:
        _CALL.reset(token)


def _by_name(names: tuple[str, ...], strengths: Tensor) -> dict[str, Tensor]:
    """On a CPU, where looking costs no wait, a column of zeros is left out: it runs no layer. Not
    from what is captured, which serves every strength."""
    columns = zip(names, strengths.unbind(1), strict=True)
    if strengths.device.type != "cpu" or is_capturing():
        return dict(columns)
    return {name: column for name, column in columns if bool(column.any())}


@final
class Slot(nn.Module):
    """Room for a low-rank change of one layer, up to `rank`.

    down   [R, i(, kh, kw)] and up [o, R] in `dtype`, scale [] float32. Filling copies into them, so
    a captured graph that reads them sees the new adapter. Unused ranks are 0.
    """

    down: Tensor
    up: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        place = weight.device
        down = torch.zeros((rank, *weight.shape[1:]), dtype=dtype, device=place)
        up = torch.zeros((len(weight), rank), dtype=dtype, device=place)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("scale", torch.zeros((), device=place), persistent=False)

    @property
    def rank(self) -> int:
        return len(self.down)

    def fill(self, delta: LowRank | None) -> None:
        """Hold `delta`, whose rank has room; None: nothing."""
        if delta is None:
            self.scale.zero_()
            return
        down, up, rank = self.down, self.up, delta.rank
        if rank < self.rank:
            down[rank:].zero_()
            up[:, rank:].zero_()
            down, up = down[:rank], up[:, :rank]
        down.copy_(delta.down)
        up.copy_(delta.up)
        self.scale.fill_(delta.scale)

    def add_to(self, y: Tensor, x: Tensor, layer: Layer, strength: Tensor) -> None:
        """y += strength*scale*up(down(x)), in place."""
        conv = isinstance(layer, nn.Conv2d)
        if fused(y) and y.dtype == x.dtype == self.down.dtype and (rows := _rows(layer, y, x)):
            strengths = (strength * self.scale).expand(len(y))
            low_rank_add(*rows, self.down.flatten(1), self.up, strengths)
            return
        if conv:
            h = F.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation)
        else:
            h = F.linear(x, self.down)
        h *= (strength * self.scale).to(h.dtype).view(-1, *[1] * (h.ndim - 1))
        if conv:
            y += F.conv2d(h, self.up[:, :, None, None])
        elif y.is_contiguous():  # one pass over y
            y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, self.rank), self.up.t())
        else:
            y += F.linear(h, self.up)


def _rows(layer: Layer, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """y and x with the channels last, where the layer is one matrix product on them: a linear layer
    as it is, a 1x1 convolution of channels-last images without a copy. None for any other."""
    if isinstance(layer, nn.Linear):
        return y, x
    pointwise = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)
    if not pointwise or layer.groups != 1:
        return None
    rows = y.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
    return rows if all(row.is_contiguous() for row in rows) else None


@final
class Leaf(nn.Module):
    """The slots of one layer, in the order of their names: sums do not depend on who came first.

    It is a part of the layer, so whoever watches the network's buffers sees adapters come and go.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.held: dict[str, Slot] = {}
        self._handle: RemovableHandle = layer.register_forward_hook(self._act)
        layer.add_module(_CHILD, self)

    def hold(self, held: Mapping[str, Slot]) -> None:
        self.held = dict(sorted(held.items()))
        self.slots = nn.ModuleList(self.held.values())

    def leave(self, layer: Layer) -> None:
        self._handle.remove()
        delattr(layer, _CHILD)

    def _act(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        strengths = _CALL.get()
        if strengths:
            assert isinstance(layer, Layer)
            for name, slot in self.held.items():
                if name in strengths:
                    slot.add_to(y, args[0], layer, strengths[name])


@final
class _Merge:
    """One layer whose weight is a sum for as long as adapters are merged into it."""

    __slots__ = ("_own", "bias", "changes", "layer", "weight")

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        self.layer, self.weight = layer, layer.weight
        self.bias: nn.Parameter | None = layer.bias  # pyright: ignore[reportAttributeAccessIssue]
        self._own: nn.Parameter | None = None
        self.changes: dict[str, tuple[Delta, float]] = {}
        layer.weight = _parameter(self.weight, dtype)

    def refresh(self) -> None:
        """W + sum of strength*change(W), float32 sums in the order of the names; the bias too."""
        weight, bias = self.weight.float(), None
        for _, (delta, strength) in sorted(self.changes.items()):
            if not strength:
                continue
            low = isinstance(delta, LowRank)
            change = delta.weight() if low else delta.change(self.weight.float())
            weight = weight + strength * change.to(weight.device)
            if not low and delta.bias is not None:
                change = strength * delta.bias.to(weight)
                bias = change if bias is None else bias + change
        self.layer.weight.copy_(weight)
        self._refresh_bias(bias)

    def _refresh_bias(self, change: Tensor | None) -> None:
        """A layer without a bias gets one only while an adapter has one for it."""
        if change is None and self._own is None:
            return
        if self._own is None:
            zeros = self.weight.new_zeros(len(self.weight))
            own = _parameter(zeros if self.bias is None else self.bias, self.layer.weight.dtype)
            self._own = self.layer.bias = own
        total = torch.zeros_like(self._own, dtype=torch.float32)
        for part in (self.bias, change):
            total = total if part is None else total + part.float()
        self._own.copy_(total)

    def restore(self) -> None:
        self.layer.weight = self.weight
        self.layer.bias = self.bias  # pyright: ignore[reportAttributeAccessIssue]: None is legal


def _parameter(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(dtype, copy=True), requires_grad=False)


@final
class Host:
    """A network's layers and what is attached to them.

    module   a UNet, called (x_in, timestep, cond), or a text encoder, called inside `acting`
    shapes   layer -> shape of its weight
    columns  the adapters that `Conditioning.strengths` has numbers for, in order
    epoch    grows when buffers or weights move: graphs captured before must be captured again
    """

    def __init__(self, module: nn.Module, *, conditioned: bool = True) -> None:
        self.module, self.conditioned = module, conditioned
        self._columns: tuple[str, ...] = ()
        self.epoch = 0
        found = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
        self.layers: dict[str, Layer] = {
            path: layer for path, layer in found if isinstance(layer, Layer)
        }
        self.shapes = {path: tuple(layer.weight.shape) for path, layer in self.layers.items()}
        self._leaves: dict[str, Leaf] = {}
        self._merges: dict[str, _Merge] = {}
        self._hooks: list[RemovableHandle] = []

    @property
    def columns(self) -> tuple[str, ...]:
        return self._columns

    @columns.setter
    def columns(self, names: tuple[str, ...]) -> None:
        # Which column is whose is Python's to know, so `runner.capture` builds it into graphs.
        self._columns = names
        object.__setattr__(self.module, "graph_state", names or None)

    def pristine(self, path: str) -> Tensor:
        """The weight of a layer as it was loaded."""
        merge = self._merges.get(path)
        return self.layers[path].weight if merge is None else merge.weight

    def slots(self, name: str) -> dict[str, Slot]:
        """The layers where an adapter has room, and the room."""
        found = self._leaves.items()
        return {path: leaf.held[name] for path, leaf in found if name in leaf.held}

    def fits(self, name: str, deltas: Mapping[str, Delta]) -> bool:
        """Whether `deltas` go into the slots that `name` has, without moving one."""
        room = self.slots(name)
        return all(
            isinstance(delta, LowRank) and path in room and delta.rank <= room[path].rank
            for path, delta in deltas.items()
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def put(self, name: str, deltas: Mapping[str, LowRank]) -> None:
        """Give `name` its low-rank changes, in the slots it has where they are large enough."""
        for path, slot in self.slots(name).items():
            if path not in deltas:
                slot.fill(None)
        for path, delta in deltas.items():
            layer = self.layers[path]
            if path not in self._leaves:
                self._leaves[path] = Leaf(layer)
            leaf = self._leaves[path]
            slot = leaf.held.get(name)
            if slot is None or slot.rank < delta.rank:
                slot = Slot(layer.weight, delta.rank, self._dtype(layer))
                leaf.hold({**leaf.held, name: slot})
                self.epoch += 1
            slot.fill(delta)
        if self._leaves and self.conditioned and not self._hooks:
            self._hooks = [
                self.module.register_forward_pre_hook(self._enter, with_kwargs=True),
                self.module.register_forward_hook(_leave, always_call=True),
            ]

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, name: str, deltas: Mapping[str, Delta], strength: float) -> None:
        """Merge the changes of `name` at a strength."""
        for path, delta in deltas.items():
            if path not in self._merges:
                self._merges[path] = _Merge(self.layers[path], self._dtype(self.layers[path]))
                self.epoch += 1
            merge = self._merges[path]
            merge.changes[name] = (delta, strength)
            merge.refresh()

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge_again(self, name: str, strength: float) -> None:
        """What `name` has merged, at another strength: from the pristine weights, in place."""
        for merge in self._merges.values():
            if name in merge.changes:
                merge.changes[name] = (merge.changes[name][0], strength)
                merge.refresh()

    @torch.inference_mode(False)
    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Take `name` out; with the last adapter of a layer, its hook or merged weight goes too."""
        for path, leaf in list(self._leaves.items()):
            if name not in leaf.held:
                continue
            self.epoch += 1
            leaf.hold({other: slot for other, slot in leaf.held.items() if other != name})
            if not leaf.held:
                leaf.leave(self.layers[path])
                del self._leaves[path]
        for path, merge in list(self._merges.items()):
            if merge.changes.pop(name, None) is None:
                continue
            if merge.changes:
                merge.refresh()
            else:
                merge.restore()
                self.epoch += 1
                del self._merges[path]
        if not self._leaves:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def _dtype(self, layer: Layer) -> torch.dtype:
        """What the layer computes in; a network whose weights are widened at use says so."""
        stated = getattr(self.module, "compute_dtype", None)
        return stated if isinstance(stated, torch.dtype) else layer.weight.dtype

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x_in, _, cond = (*args, *kwargs.values())
        assert isinstance(cond, Conditioning)
        strengths = cond.strengths
        if strengths is None:
            raise AdapterError(
                f"adapters {', '.join(self.columns)} are attached to this network, and the "
                "conditioning has no strengths: sample with the engine, or give headstart.sample "
                "strengths=engine.adapters.strengths(table, batch)"
            )
        if strengths.shape[1] != len(self.columns) or len(strengths) not in (1, len(x_in)):
            raise AdapterError(
                f"expected strengths [{len(x_in)} samples, {len(self.columns)} adapters], got "
                f"{list(strengths.shape)}: make them with engine.adapters.strengths(table, batch)"
            )
        _CALL.set(_by_name(self.columns, strengths))


def _leave(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
    _CALL.set(None)
