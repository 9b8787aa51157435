"""The names adapters give to tensors -> (which layer of ours, which operand of its formula).

key = prefix of the network ++ module ++ suffix of the operand
The module is written with dots, with underscores for dots, or as its number in the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Literal, NamedTuple

from headstart.checkpoint import keymap

Network = Literal["unet", "text", "text_2"]
MAX_KEY_CHARS = 512


class AdapterForm(Enum):
    """How a file is written; the suffixes of its keys tell."""

    KOHYA = "kohya"
    """github.com/kohya-ss/sd-scripts, networks/lora.py: `lora_unet_*.lora_down.weight`, alpha."""
    SLIDER = "concept-slider"
    """arXiv:2311.12092: kohya's keys on attention (and, c3lier, resnets) of the UNet alone."""
    LOCON = "locon"
    """Kohya's keys on convolutions too: LyCORIS LoCon; LCM-LoRA, Lightning, DMD2, Hyper-SD."""
    DIFFUSERS_PROCESSOR = "diffusers <= 0.16"
    """`*.processor.to_q_lora.down.weight`, no prefix, no alpha."""
    DIFFUSERS_PREFIXED = "diffusers 0.17 - 0.21"
    """The same with `unet.` or `text_encoder.` before it."""
    DIFFUSERS = "diffusers >= 0.22"
    """`unet.*.to_q.lora.down.weight`; text: `*.lora_linear_layer.down.weight`."""
    PEFT = "peft"
    """github.com/huggingface/peft: `*.lora_A.weight`; alpha is in a config or the metadata."""
    CLONEOFSIMO = "cloneofsimo"
    """github.com/cloneofsimo/lora: `unet:N:up`; N counts linear layers, down, up, then mid."""
    LOHA = "loha"
    """arXiv:2108.06098 as in LyCORIS (arXiv:2309.14859): `hada_w1_a`, ..."""
    LOKR = "lokr"
    """Kronecker product, LyCORIS: `lokr_w1`, ..."""
    DORA = "dora"
    """arXiv:2402.09353: any of the above with `dora_scale` or `lora_magnitude_vector`."""
    GLORA = "glora"
    """arXiv:2306.07967 as in LyCORIS: `a1.weight`, `a2.weight`, `b1.weight`, `b2.weight`."""
    OFT = "oft"
    """arXiv:2306.07280 as in sd-scripts' networks/oft.py and LyCORIS: `oft_blocks` [n, b, b]."""
    BOFT = "boft"
    """arXiv:2311.06243 as in LyCORIS: `oft_blocks` [m, n, b, b]."""
    OFT_V2 = "oftv2"
    """arXiv:2506.19847 as in PEFT and OneTrainer: `oft_R.weight`, upper triangles."""
    IA3 = "ia3"
    """arXiv:2205.05638 as in LyCORIS: `weight`, a number a channel, beside `on_input`."""
    FULL = "full difference"
    """LyCORIS full: `diff`, `diff_b`, and `w_norm`, `b_norm` of norms."""
    WHOLE = "whole weights"
    """github.com/comfyanonymous/ComfyUI, comfy/lora.py: `set_weight`."""
    CUSTOM_DIFFUSION = "custom diffusion"
    """arXiv:2212.04488 as in diffusers: whole key and value matrices of cross-attention."""


class Key(NamedTuple):
    """One tensor's name taken apart; `network` None where the name does not say it.

    name    the module as the file spells it: the key without its operand
    """

    name: str
    network: Network | None
    module: str
    slot: str
    form: AdapterForm | None


_F = AdapterForm
# Suffix -> operand. A named group `slot` is the operand itself; `leaf` belongs to the module.
_SUFFIXES: tuple[tuple[AdapterForm | None, str, str], ...] = (
    (_F.KOHYA, r"\.lora_(?P<slot>down|up|mid)\.weight", ""),
    (_F.KOHYA, r"\.lora_up\.bias", "up_bias"),
    (None, r"\.(?P<slot>alpha|scalar)", ""),
    (_F.PEFT, r"\.lora_A(\.[^.]{1,64})?\.weight", "down"),
    (_F.PEFT, r"\.lora_B(\.[^.]{1,64})?\.weight", "up"),
    (_F.PEFT, r"\.lora_B(\.[^.]{1,64})?\.bias", "up_bias"),
    (_F.DIFFUSERS, r"\.lora(_linear_layer)?\.(?P<slot>down|up)\.weight", ""),
    (
        _F.DIFFUSERS_PROCESSOR,
        r"(\.processor)?\.to_(?P<leaf>q|k|v|out)_lora\.(?P<slot>down|up)\.weight",
        "",
    ),
    (_F.LOHA, r"\.(?P<slot>hada_(w[12]_[ab]|t[12]))", ""),
    (_F.LOKR, r"\.(?P<slot>lokr_(w[12](_[ab])?|t2))", ""),
    (_F.DORA, r"\.(?P<slot>dora_scale)", ""),
    (_F.DORA, r"\.lora_magnitude_vector(\.[^.]{1,64})?(\.weight)?", "magnitude"),
    (_F.GLORA, r"\.(?P<slot>a[12]|b[12m])\.weight", ""),
    (_F.OFT, r"\.(?P<slot>oft_blocks|rescale)", ""),
    (_F.OFT_V2, r"\.oft_R(\.[^.]{1,64})?\.weight", "oft_r"),
    (_F.OFT_V2, r"\.oft_R(\.[^.]{1,64})?\.(?P<slot>scaled_oft)", ""),
    (_F.IA3, r"\.(?P<slot>on_input)", ""),
    (_F.WHOLE, r"\.set_weight", "weight"),
    (_F.FULL, r"\.(diff|w_norm)", "diff"),
    (_F.FULL, r"\.(diff_b|b_norm)", "diff_b"),
    (
        _F.CUSTOM_DIFFUSION,
        r"\.processor\.to_(?P<leaf>q|k|v|out)_custom_diffusion(\.0)?\.(?P<slot>weight|bias)",
        "",
    ),
    (_F.CLONEOFSIMO, r":(?P<slot>down|up)", ""),
)
_ROWS = tuple((form, re.compile(suffix + r"\Z"), slot) for form, suffix, slot in _SUFFIXES)

_PREFIXES: tuple[tuple[str, Network | None], ...] = (
    ("lora_unet_", "unet"),
    ("lora_te1_", "text"),
    ("lora_te2_", "text_2"),
    ("lora_te_", "text"),
    ("lycoris_", None),
    ("unet:", "unet"),
    ("text_encoder:", "text"),
    ("unet.", "unet"),
    ("text_encoder.", "text"),
    ("text_encoder_2.", "text_2"),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("lora_transformer_", "unet"),
    ("transformer.", "unet"),
)
_PEFT_ROOT = "base_model.model."
_LEAVES = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_TEXT_LEAVES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


def parse(name: str) -> Key | None:
    """One key taken apart; None where no row knows its suffix."""
    if len(name) > MAX_KEY_CHARS:
        return None
    for form, suffix, slot in _ROWS:
        if match := suffix.search(name):
            named = match.groupdict()
            network, module, prefixed = _module(name[: match.start()])
            if form is _F.CLONEOFSIMO:
                module = f"#{module}"
            if leaf := named.get("leaf"):
                leaves = _TEXT_LEAVES if module.endswith(".self_attn") else _LEAVES
                module = f"{module}.{leaves[leaf]}"
                name = f"{name[: match.start()]}.{leaves[leaf]}"
            else:
                name = name[: match.start()]
            if form is _F.DIFFUSERS_PROCESSOR and prefixed:
                form = _F.DIFFUSERS_PREFIXED
            return Key(name, network, module, slot or named["slot"], form)
    return None


def _module(text: str) -> tuple[Network | None, str, bool]:
    """The network that the prefix names, the module without it, and whether there was one."""
    text = text.removeprefix(_PEFT_ROOT)
    for prefix, network in _PREFIXES:
        if text.startswith(prefix):
            return network, text[len(prefix) :].removeprefix(_PEFT_ROOT), True
    return None, text, False


class Places:
    """Which layer of our networks a module's name means, in any of the namings."""

    def __init__(self, networks: Mapping[Network, Iterable[str]]) -> None:
        self._tables: dict[Network, dict[str, str]] = {
            network: _spellings(network, list(modules)) for network, modules in networks.items()
        }

    def find(self, network: Network | None, module: str, name: str) -> list[tuple[Network, str]]:
        """The layers it can mean: none, one, or one in each text encoder for a bare name.

        name   the module as the file spells it: what looks like a prefix may be the network's own
        """
        name = name.removeprefix(_PEFT_ROOT)
        return [
            (where, table[spelled])
            for where, table in self._tables.items()
            if network in (None, where)
            if (spelled := next((s for s in (module, name) if s in table), None)) is not None
        ]


def _spellings(network: Network, modules: list[str]) -> dict[str, str]:
    """Every way to write a module -> the module: dots or underscores, our names or LDM's, a number.

    Text encoders with or without `text_model.`, which transformers 5 dropped from its names.
    """
    pairs = [(module, module) for module in modules]
    if network == "unet":
        pairs = [(wan, module) for module in modules if (wan := _of_wan(module))] + pairs
        pairs += [(ldm, module) for module, ldm in keymap.unet_to_ldm(modules).items()]
    else:
        pairs += [(module.removeprefix("text_model."), module) for module in modules]
    table = {spelled.replace(".", "_"): module for spelled, module in pairs} | dict(pairs)
    counted = _counted_unet(modules) if network == "unet" else _counted_text(modules)
    return table | {f"#{number}": module for number, module in enumerate(counted)}


# github.com/Wan-Video/Wan2.1, wan/modules/model.py <- the names that diffusers gave its layers.
_WAN = tuple(
    (re.compile(ours), original)
    for ours, original in (
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
)


def _of_wan(module: str) -> str | None:
    """As Wan's own code calls it, and its Lightning LoRAs do."""
    found = ((match, name) for row, name in _WAN if (match := row.fullmatch(module)))
    return next((match.expand(name) for match, name in found), None)


# cloneofsimo/lora walks diffusers' modules in the order they were registered: down, up, mid; in a
# block attn1, ff, attn2; in CLIP's attention k, v, q, out.
_BLOCK = re.compile(
    r"(?P<side>down|up|mid)_blocks?\.((?P<level>[0-9]{1,3})\.)?attentions\.(?P<i>[0-9]{1,3})"
    r"\.transformer_blocks\.(?P<depth>[0-9]{1,3})\.(?P<leaf>.+)"
)
_UNET_ORDER = (
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
)
_LAYER = re.compile(r"text_model\.encoder\.layers\.([0-9]{1,3})\.self_attn\.(.+)")
_TEXT_ORDER = ("k_proj", "v_proj", "q_proj", "out_proj")


def _counted_unet(modules: list[str]) -> list[str]:
    places = [
        (
            ("down", "up", "mid").index(match["side"]),
            *(int(match[part] or 0) for part in ("level", "i", "depth")),
            _UNET_ORDER.index(match["leaf"]),
            module,
        )
        for module in modules
        if (match := _BLOCK.fullmatch(module)) and match["leaf"] in _UNET_ORDER
    ]
    return [module for *_, module in sorted(places)]


def _counted_text(modules: list[str]) -> list[str]:
    places = [
        (int(match[1]), _TEXT_ORDER.index(match[2]), module)
        for module in modules
        if (match := _LAYER.fullmatch(module)) and match[2] in _TEXT_ORDER
    ]
    return [module for *_, module in sorted(places)]
