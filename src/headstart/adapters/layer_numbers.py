"""Layers by number, as cloneofsimo's trainer writes them: `unet:N`, `text_encoder:N`.

N counts the layers that the trainer walked through: down, up, then mid; in a block in the order in
which the diffusers of its day registered them. The shapes of a file tell which order that was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from headstart.adapters.group import Group
from headstart.adapters.kind import Shape
from headstart.adapters.names import Network
from headstart.errors import AdapterError

_NAME = re.compile(r"(unet|text_encoder):(0|[1-9][0-9]{0,3})")
_NETWORKS: Mapping[str, Network] = {"unet": "unet", "text_encoder": "text"}

_BLOCK = re.compile(
    r"(?P<side>down|up|mid)_blocks?\.((?P<level>[0-9]{1,3})\.)?attentions\.(?P<i>[0-9]{1,3})"
    r"\.transformer_blocks\.(?P<depth>[0-9]{1,3})\.(?P<leaf>.+)"
)
_SELF = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
_CROSS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
_FF = ("ff.net.0.proj",)
# diffusers, models/attention.py, BasicTransformerBlock: ff was registered before attn2 until 0.15.
# The first files have attention alone (github.com/cloneofsimo/lora, lora.py, CrossAttention).
_UNET_ORDERS: Mapping[str, tuple[str, ...]] = {
    "attn1, ff, attn2": _SELF + _FF + _CROSS,
    "attn1, attn2, ff": _SELF + _CROSS + _FF,
    "attn1, attn2": _SELF + _CROSS,
}
_LAYER = re.compile(r"text_model\.encoder\.layers\.([0-9]{1,3})\.self_attn\.(.+)")
_TEXT_ORDER = ("k_proj", "v_proj", "q_proj", "out_proj")


def is_numbered(name: str) -> bool:
    """Whether a module's name is a number in a network."""
    return _NAME.fullmatch(name) is not None


def numbered(
    groups: Iterable[Group], networks: Mapping[Network, Mapping[str, Shape]]
) -> dict[str, tuple[Network, str]]:
    """The layers of the modules that are numbers; without those of a network that fits no order.

    Every module of a network must fit, because a wrong order finds layers of the right shape too.
    An order that has as many layers as the file goes before one of which it has a part. Raises
    AdapterError where two orders are left that mean different layers.
    """
    found: dict[str, tuple[Network, str]] = {}
    for spelled, network in _NETWORKS.items():
        own = {
            int(match[2]): group
            for group in groups
            if (match := _NAME.fullmatch(group.name)) and match[1] == spelled
        }
        if own and network in networks:
            layers = _chosen(own, network, networks[network])
            found |= {own[number].name: (network, layer) for number, layer in layers.items()}
    return found


def _chosen(
    own: Mapping[int, Group], network: Network, layers: Mapping[str, Shape]
) -> dict[int, str]:
    fitting = {
        title: (order, {number: order[number] for number in own})
        for title, order in _orders(network, layers)
        if all(n < len(order) and group.fits(layers[order[n]]) for n, group in own.items())
    }
    whole = {title: each for title, each in fitting.items() if len(each[0]) == len(own)}
    kept = [(title, places) for title, (_, places) in (whole or fitting).items()]
    for title, places in kept[1:]:
        first = kept[0][1]
        if other := next((n for n in own if places[n] != first[n]), None):
            raise AdapterError(
                f"its {len(own)} numbered modules fit two orders of the layers: {kept[0][0]} has "
                f"{first[other]} as {network}:{other}, and {title} has {places[other]}; expected "
                "the whole file, which fits one order"
            )
    return kept[0][1] if kept else {}


def _orders(network: Network, layers: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    if network != "unet":
        yield "k, v, q, out", _counted_text(layers)
        return
    for title, order in _UNET_ORDERS.items():
        yield title, _counted_unet(layers, order)


def _counted_unet(layers: Iterable[str], order: tuple[str, ...]) -> list[str]:
    places = [
        (
            ("down", "up", "mid").index(match["side"]),
            *(int(match[part] or 0) for part in ("level", "i", "depth")),
            order.index(match["leaf"]),
            layer,
        )
        for layer in layers
        if (match := _BLOCK.fullmatch(layer)) and match["leaf"] in order
    ]
    return [layer for *_, layer in sorted(places)]


def _counted_text(layers: Iterable[str]) -> list[str]:
    places = [
        (int(match[1]), _TEXT_ORDER.index(match[2]), layer)
        for layer in layers
        if (match := _LAYER.fullmatch(layer)) and match[2] in _TEXT_ORDER
    ]
    return [layer for *_, layer in sorted(places)]
