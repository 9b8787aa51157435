"""What lies in a file: which network each tensor is of, whatever tools put before its name.

names -> readings (`prefixes`) -> for each network the prefix under which most of its names are
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from headstart.checkpoint import keymap, textmap
from headstart.checkpoint.keymap import PARTS, PartName, Source
from headstart.checkpoint.leftovers import known
from headstart.checkpoint.prefixes import readings
from headstart.errors import CheckpointError

_NUMBER = r"[0-9]{1,3}"


class Known(NamedTuple):
    """Names of one kind of network, in every naming; a `marker` is in all such files.

    A prefix that names the network is as good as a marker.
    """

    names: re.Pattern[str]
    marker: re.Pattern[str]


_CLIP = Known(
    re.compile(
        r"(text_model\.)?(embeddings\.(token|position)_embedding\.weight"
        rf"|encoder\.layers\.{_NUMBER}\.(self_attn|layer_norm[12]|mlp)\..+|final_layer_norm\..+)"
        r"|text_projection(\.weight)?|token_embedding\.weight|positional_embedding|ln_final\..+"
        rf"|transformer\.resblocks\.{_NUMBER}\..+"
    ),
    re.compile(r"((text_model\.)?embeddings\.)?token_embedding\.weight"),
)
KINDS: Mapping[PartName, Known] = {
    "unet": Known(
        re.compile(
            r"(conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|time_embed|out)\..+"
            rf"|label_emb\.0\..+|(input_blocks|output_blocks)\.{_NUMBER}\..+|middle_block\..+"
            rf"|(down|up)_blocks\.{_NUMBER}\..+|mid_block\..+"
        ),
        re.compile(r"(conv_in|input_blocks\.0\.0|time_embed(ding\.linear_1|\.0))\.weight"),
    ),
    "vae": Known(
        re.compile(
            r"(encoder|decoder)\.(conv_in|conv_out|conv_norm_out|norm_out|mid_block|mid"
            rf"|((down|up)_blocks|down|up)\.{_NUMBER})\..+|(post_)?quant_conv\..+"
        ),
        re.compile(r"(encoder|decoder)\.(conv_in\.weight|mid_block\..*|mid\..*)"),
    ),
    "tiny": Known(
        re.compile(rf"((encoder|decoder)\.layers\.)?{_NUMBER}\.(conv\.{_NUMBER}\.)?(weight|bias)"),
        re.compile(rf"((encoder|decoder)\.layers\.)?{_NUMBER}\.(weight|conv\.0\.weight)"),
    ),
    "text": _CLIP,
}
ADAPTER = re.compile(
    r"lora|hada_|lokr_|lycoris|dora_scale|_custom_diffusion|\.diff(_b)?\Z"
    r"|\A(unet|text_encoder):[0-9]+:(up|down)\Z"
    r"|\.(ia3_l|hra_u|(miss|bone)_block|c3a_kernel|(boft|vera|psoft|hira|shira|road|waveft"
    r"|fourierft)_\w+)\b"  # of PEFT's tuners, which `headstart.adapters.tuners` names
    r"|\.(oft_(blocks|R|diag)|on_input|[wb]_norm|set_weight|[ab][12]\.weight)\b"
)
"""Of a key of an adapter of layers, anywhere in it."""


class Place(NamedTuple):
    part: PartName
    prefix: str


def split(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Part -> {name without its prefix: name in the file}; what belongs to no part is under "".

    Parts: unet, vae, text, text_2, tiny, adapter. Known leftovers are left out. Of a network that
    lies in the file under two prefixes, the one with more of its names is taken; raises
    CheckpointError where both have as many.
    """
    kept = [name for name in names if known(name) is None]
    adapters = [name for name in kept if ADAPTER.search(name)]
    skipped = set(adapters)
    read = {name: _places(name) for name in kept if name not in skipped}
    chosen = _chosen(read)
    if adapters and sum(not chosen.keys().isdisjoint(found) for found in read.values()) <= len(
        adapters
    ):
        return {"adapter": {name: name for name in kept}}
    parts: dict[str, dict[str, str]] = {}
    for name in kept:
        place = next((place for place in read.get(name, ()) if place in chosen), None)
        place = place or _within(name, chosen)
        part, prefix = place or ("", "")
        parts.setdefault(part, {})[name[len(prefix) :]] = name
    return parts


def _places(name: str) -> list[Place]:
    """Where the name can belong, the reading with the shortest prefix first."""
    found: list[Place] = []
    for network, rest in readings(name):
        for part, kind in KINDS.items():
            as_text = part == "text" and network in ("text", "text_2")
            if (network in (None, part) or as_text) and kind.names.fullmatch(rest):
                where = network if as_text and network is not None else part
                found.append(Place(where, name[: len(name) - len(rest)]))
    return found


def _chosen(read: Mapping[str, list[Place]]) -> dict[Place, int]:
    """For each network the place with most names; only places that a marker or a prefix proves."""
    counts = Counter(place for found in read.values() for place in found)
    proved = {place for place in counts if _names_network(place.prefix)}
    proved |= {
        place
        for name, found in read.items()
        for place in found
        if KINDS[_kind(place.part)].marker.fullmatch(name[len(place.prefix) :])
    }
    chosen: dict[Place, int] = {}
    for part in PARTS:
        own = sorted((place for place in proved if place.part == part), key=lambda p: -counts[p])
        if len(own) > 1 and counts[own[0]] == counts[own[1]]:
            raise CheckpointError(
                f"two networks could be its {part}, with {counts[own[0]]} tensors each: those "
                f"under {own[0].prefix!r:.80} and those under {own[1].prefix!r:.80}; expected one: "
                "take one of them out, or rename it"
            )
        if own:
            chosen[own[0]] = counts[own[0]]
    return chosen


def _kind(part: PartName) -> PartName:
    return "text" if part == "text_2" else part


def _names_network(prefix: str) -> bool:
    """Whether the prefix itself says which network it is of, such as `unet.`."""
    return any(network is not None for network, _ in readings(prefix + "x"))


def _within(name: str, chosen: Iterable[Place]) -> Place | None:
    """Of a name that no network knows: the network under whose own prefix it lies."""
    held = [place for place in chosen if place.prefix and name.startswith(place.prefix)]
    return max(held, key=lambda place: len(place.prefix), default=None)


def sources(part: str, names: Mapping[str, str]) -> dict[str, Source]:
    """Our tensor name -> where it is; a name no rule knows keeps its own name."""
    return _RULES[part](names)


_RULES: dict[str, Callable[[Mapping[str, str]], dict[str, Source]]] = {
    "unet": keymap.unet_sources,
    "vae": keymap.vae_sources,
    "text": textmap.text_sources,
    "text_2": textmap.text_sources,
    "tiny": keymap.tiny_sources,
}
