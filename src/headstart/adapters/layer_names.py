"""The layer of a network that a module's name stands for, in any of the naming schemes.

name = prefixes ++ module: of all the ways to read a name, those count whose rest is a layer
A module is written with dots, with underscores, or as its number in the network
(`headstart.adapters.layer_numbers`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from headstart.adapters.group import Group
from headstart.adapters.layer_numbers import layers_by_number
from headstart.adapters.names import Network, name_readings
from headstart.checkpoint import keymap
from headstart.errors import AdapterError

LayerKey = tuple[Network, str]
"""A network, and the path of a layer in it."""
Networks = Mapping[Network, Mapping[str, tuple[int, ...]]]
"""Network -> layer -> the shape of its weight."""


def match_layers(
    groups: Iterable[Group], networks: Networks
) -> Iterator[tuple[Group, LayerKey | None]]:
    """Each module with its layer; None where its name is that of no layer.

    Where a name may be several layers, the one of the same shape is taken. If several have it, the
    network counts that most of the file's modules name: PEFT saves an encoder alone, without its
    name. Raises AdapterError where two layers fit equally well.
    """
    tables: dict[Network, dict[str, tuple[str, ...]]] = {
        network: _spellings(network, list(layers)) for network, layers in networks.items()
    }
    groups = list(groups)
    by_number = layers_by_number(groups, networks)
    candidates = [
        [by_number[g.name]] if g.name in by_number else _candidates(g.name, tables) for g in groups
    ]
    fitting = [
        [key for key in keys if group.fits(networks[key[0]][key[1]])]
        for group, keys in zip(groups, candidates, strict=True)
    ]
    counts = Counter(network for keys in fitting for network in {network for network, _ in keys})
    for group, keys, fits in zip(groups, candidates, fitting, strict=True):
        if len(fits) > 1:
            most = max(counts[network] for network, _ in fits)
            fits = [layer for layer in fits if counts[layer[0]] == most]
        if len(fits) > 1:
            both = " and as ".join(f"{path} of the {network}" for network, path in fits[:2])
            raise AdapterError(
                f"{group.name!r} reads as {both}, and fits both: put the network in front of the "
                "names, such as unet., text_encoder. or text_encoder_2."
            )
        yield group, next(iter(fits or keys), None)


def _candidates(name: str, tables: Mapping[Network, Mapping[str, Iterable[str]]]) -> list[LayerKey]:
    """The layers that `name`, a module as a file spells it, can be; `tables`: see `_spellings`."""
    layers: dict[LayerKey, None] = {
        (network, module): None
        for prefix, bare in name_readings(name)
        for network, table in tables.items()
        if prefix in (None, network)
        for module in table.get(bare, ())
    }
    return list(layers)


def _spellings(network: Network, modules: list[str]) -> dict[str, tuple[str, ...]]:
    """Every way to write a module -> the modules that it may be.

    Dots or underscores; our names, or those of the original networks (LDM, OpenCLIP, Wan); text
    encoders without `text_model.`, which transformers 5 dropped.
    """
    pairs = [(module, module) for module in modules]
    if network == "unet":
        pairs += [(wan, module) for module in modules if (wan := _wan_name(module))]
        pairs += [(ldm, module) for module, ldm in keymap.unet_to_ldm(modules).items()]
    else:
        pairs += [(module.removeprefix("text_model."), module) for module in modules]
        openclip = [(name, module) for module in modules if (name := _openclip_name(module))]
        pairs += openclip + [(name.removeprefix("transformer."), m) for name, m in openclip]
    table: dict[str, tuple[str, ...]] = {}
    for spelling, module in pairs:
        for name in {spelling, spelling.replace(".", "_")}:
            candidates = table.get(name, ())
            if module not in candidates:
                table[name] = (*candidates, module)
    return table


# github.com/mlfoundations/open_clip, transformer.py <- transformers' names. OpenCLIP has q, k and v
# in one tensor, so they have no row.
_OPENCLIP = (
    ("text_model.encoder.layers.", "transformer.resblocks."),
    *((f".{ours}", f".{theirs}") for theirs, ours in keymap.OPENCLIP_INNER.items()),
    ("text_model.final_layer_norm", "ln_final"),
)


def _openclip_name(module: str) -> str | None:
    name = module
    for ours, theirs in _OPENCLIP:
        name = name.replace(ours, theirs)
    return None if name == module or ".self_attn." in name else name


# github.com/Wan-Video/Wan2.1, wan/modules/model.py <- the names that diffusers gave its layers.
_WAN = (
    (r"(blocks\.[0-9]+)\.attn1\.to_([qkv])", r"\1.self_attn.\2"),
    (r"(blocks\.[0-9]+)\.attn1\.to_out\.0", r"\1.self_attn.o"),
    (r"(blocks\.[0-9]+)\.attn2\.to_([qkv])", r"\1.cross_attn.\2"),
    (r"(blocks\.[0-9]+)\.attn2\.to_out\.0", r"\1.cross_attn.o"),
    (r"(blocks\.[0-9]+)\.attn2\.add_([kv])_proj", r"\1.cross_attn.\2_img"),
    (r"(blocks\.[0-9]+)\.ffn\.net\.0\.proj", r"\1.ffn.0"),
    (r"(blocks\.[0-9]+)\.ffn\.net\.2", r"\1.ffn.2"),
    (r"condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
    (r"condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"proj_out", "head.head"),
)


def _wan_name(module: str) -> str | None:
    """The name in Wan's own code, and in its Lightning LoRAs."""
    matches = ((match, name) for row, name in _WAN if (match := re.fullmatch(row, module)))
    return next((match.expand(name) for match, name in matches), None)
