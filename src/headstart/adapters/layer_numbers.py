"""Layers by number, as cloneofsimo's trainer writes them: `unet:N`, `text_encoder:N`.

N counts the layers that the trainer walked through: down, up, then mid; in a block in the order in
which the diffusers of its day registered them. The shapes of a file tell which order that was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from headstart.adapters.group import Group
from headstart.adapters.kind import Shape
from headstart.adapters.names import Network
from headstart.errors import AdapterError

_NAME = re.compile(r"(unet|text_encoder):(0|[1-9][0-9]{0,3})")
_NETWORKS: Mapping[str, Network] = {"unet": "unet", "text_encoder": "text"}

# The groups that count, in their order, and then the layer.
_SIDES = {"down": 0, "up": 1, "mid": 2, None: 0}
_BLOCK = re.compile(
    r"(down|up|mid)_blocks?\.(?:([0-9]{1,3})\.)?attentions\.([0-9]{1,3})"
    r"\.transformer_blocks\.([0-9]{1,3})\.(.+)"
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
_TEXT_ORDERS = {"k, v, q, out": ("k_proj", "v_proj", "q_proj", "out_proj")}


def is_numbered(name: str) -> bool:
    """Whether a module's name is a number in a network."""
    return _NAME.fullmatch(name) is not None


def layers_by_number(
    groups: Iterable[Group], networks: Mapping[Network, Mapping[str, Shape]]
) -> dict[str, tuple[Network, str]]:
    """The layers of the modules that are numbers; none of a network that fits no order.

    Every module of a network must fit, because some layers fit a wrong order by chance. An order
    with as many layers as the file is preferred to one with more. Raises AdapterError where two
    orders remain that name different layers.
    """
    layer_of: dict[str, tuple[Network, str]] = {}
    for spelling, network in _NETWORKS.items():
        numbered = {
            int(match[2]): group
            for group in groups
            if (match := _NAME.fullmatch(group.name)) and match[1] == spelling
        }
        if numbered and network in networks:
            layers = _best_order(numbered, network, networks[network])
            layer_of |= {numbered[n].name: (network, layer) for n, layer in layers.items()}
    return layer_of


def _best_order(
    groups: Mapping[int, Group], network: Network, layers: Mapping[str, Shape]
) -> dict[int, str]:
    pattern, orders = (_BLOCK, _UNET_ORDERS) if network == "unet" else (_LAYER, _TEXT_ORDERS)
    walks = {title: _walk(layers, pattern, leaves) for title, leaves in orders.items()}
    fitting = {
        title: order
        for title, order in walks.items()
        if all(n < len(order) and g.fits(layers[order[n]]) for n, g in groups.items())
    }
    complete = {title: order for title, order in fitting.items() if len(order) == len(groups)}
    candidates = [*(complete or fitting).items()]
    title, order = candidates[0] if candidates else ("", [])
    for other_title, other in candidates[1:]:
        differing = next((n for n in groups if other[n] != order[n]), None)
        if differing is not None:
            raise AdapterError(
                f"its {len(groups)} numbered modules fit two orders of the layers: {title} has "
                f"{order[differing]} as {network}:{differing}, and {other_title} has "
                f"{other[differing]}; expected the whole file, which fits one order"
            )
    return {number: order[number] for number in groups} if order else {}


def _walk(layers: Iterable[str], pattern: re.Pattern[str], leaves: tuple[str, ...]) -> list[str]:
    """The layers that a trainer counts, in its order."""
    keys: list[tuple[list[int], int, str]] = []
    for layer in layers:
        if (match := pattern.fullmatch(layer)) and match[match.re.groups] in leaves:
            *parts, leaf = match.groups()
            numbers = [_SIDES[part] if part in _SIDES else int(part) for part in parts]
            keys.append((numbers, leaves.index(leaf), layer))
    return [layer for *_, layer in sorted(keys)]
