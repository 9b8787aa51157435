"""The networks in a file: which network each tensor belongs to, with any prefix.

names -> readings (`prefixes`) -> for each network the prefix of most of its names
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from headstart.checkpoint import keymap
from headstart.checkpoint.keymap import PARTS, PartName, Source
from headstart.checkpoint.leftovers import is_leftover
from headstart.checkpoint.prefixes import readings
from headstart.errors import CheckpointError

_NUMBER = r"[0-9]{1,3}"


class NetworkNames(NamedTuple):
    """Tensor names of one kind of network, in every naming. All such files have a `marker`.

    A prefix that names the network counts as a marker too.
    """

    names: re.Pattern[str]
    marker: re.Pattern[str]


_CLIP = NetworkNames(
    re.compile(
        r"(text_model\.)?(embeddings\.(token|position)_embedding\.weight"
        rf"|encoder\.layers\.{_NUMBER}\.(self_attn|layer_norm[12]|mlp)\..+|final_layer_norm\..+)"
        r"|text_projection(\.weight)?|token_embedding\.weight|positional_embedding|ln_final\..+"
        rf"|transformer\.resblocks\.{_NUMBER}\..+"
    ),
    re.compile(r"((text_model\.)?embeddings\.)?token_embedding\.weight"),
)
NAMES: Mapping[PartName, NetworkNames] = {
    "unet": NetworkNames(
        re.compile(
            r"(conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|time_embed|out)\..+"
            rf"|label_emb\.0\..+|(input_blocks|output_blocks)\.{_NUMBER}\..+|middle_block\..+"
            rf"|(down|up)_blocks\.{_NUMBER}\..+|mid_block\..+"
        ),
        re.compile(r"(conv_in|input_blocks\.0\.0|time_embed(ding\.linear_1|\.0))\.weight"),
    ),
    "vae": NetworkNames(
        re.compile(
            r"(encoder|decoder)\.(conv_in|conv_out|conv_norm_out|norm_out|mid_block|mid"
            rf"|((down|up)_blocks|down|up)\.{_NUMBER})\..+|(post_)?quant_conv\..+"
        ),
        re.compile(r"(encoder|decoder)\.(conv_in\.weight|mid_block\..*|mid\..*)"),
    ),
    "tiny": NetworkNames(
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
"""Found in every key of an adapter, at any position."""


class Location(NamedTuple):
    """A network of the file, and the prefix of its names."""

    part: PartName
    prefix: str


def split(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Part -> {name without its prefix: name in the file}; part "" has the unknown names.

    Parts: unet, vae, text, text_2, tiny, adapter. Known leftovers are dropped. If a network is in
    the file under two prefixes, the one with more names counts; raises CheckpointError if both have
    the same number.
    """
    names = [name for name in names if not is_leftover(name)]
    adapters = {name for name in names if ADAPTER.search(name)}
    locations = {name: _locations(name) for name in names if name not in adapters}
    chosen = _choose(locations)
    of_networks = sum(any(option in chosen for option in row) for row in locations.values())
    if adapters and of_networks <= len(adapters):
        return {"adapter": {name: name for name in names}}
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        inside = (location for location in locations.get(name, ()) if location in chosen)
        part, prefix = next(inside, None) or _enclosing(name, chosen) or ("", "")
        parts.setdefault(part, {})[name[len(prefix) :]] = name
    return parts


def _locations(name: str) -> list[Location]:
    """The networks that the name can belong to, the shortest prefix first."""
    locations: list[Location] = []
    for network, bare in readings(name):
        for part, patterns in NAMES.items():
            if network not in (None, part, "text_2" if part == "text" else part):
                continue
            if patterns.names.fullmatch(bare):
                locations.append(Location(network or part, name.removesuffix(bare)))
    return locations


def _choose(locations: Mapping[str, list[Location]]) -> list[Location]:
    """For each network the location with most names, with a marker or a clear prefix."""
    counts = Counter(location for options in locations.values() for location in options)
    # A prefix that itself names a network, such as `unet.`, or a marker behind it.
    clear = {location for location in counts if any(n for n, _ in readings(location.prefix + "x"))}
    clear |= {
        location
        for name, options in locations.items()
        for location in options
        if NAMES["text" if location.part == "text_2" else location.part].marker.fullmatch(
            name[len(location.prefix) :]
        )
    }
    chosen: list[Location] = []
    for part in PARTS:
        options = [location for location in clear if location.part == part]
        if not options:
            continue
        first, *others = sorted(options, key=lambda location: -counts[location])
        if others and counts[first] == counts[others[0]]:
            raise CheckpointError(
                f"two networks could be its {part}, with {counts[first]} tensors each: those "
                f"under {first.prefix!r:.80} and those under {others[0].prefix!r:.80}; expected "
                "one: take one of them out, or rename it"
            )
        chosen.append(first)
    return chosen


def _enclosing(name: str, chosen: Iterable[Location]) -> Location | None:
    """The network whose prefix an unknown name has, the longest prefix first."""
    around = (
        location for location in chosen if location.prefix and name.startswith(location.prefix)
    )
    return max(around, key=lambda location: len(location.prefix), default=None)


def sources(part: str, names: Mapping[str, str]) -> dict[str, Source]:
    """Our tensor name -> its source in the file; an unknown name stays as it is."""
    return _RULES[part](names)


_RULES: dict[str, Callable[[Mapping[str, str]], dict[str, Source]]] = {
    "unet": keymap.unet_sources,
    "vae": keymap.vae_sources,
    "text": keymap.text_sources,
    "text_2": keymap.text_sources,
    "tiny": keymap.tiny_sources,
}
