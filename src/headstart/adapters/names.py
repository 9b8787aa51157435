"""The keys of an adapter's file, parsed: the module, and the operand of its formula.

key = prefixes ++ module ++ suffix of the operand
`headstart.adapters.layer_names` finds the layer of a module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

from headstart.checkpoint.prefixes import readings

Network = Literal["unet", "text", "text_2"]
MAX_KEY_CHARS = 512


class AdapterForm(Enum):
    """The naming scheme of a file, from the suffixes of its keys."""

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
    """github.com/cloneofsimo/lora: `unet:N:up`; N counts layers, see `layer_numbers`."""
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
    """One tensor's name, parsed.

    name     the module as the file spells it: the key without its operand
    network  the network in the name, or None; `module`: the rest of the name
    """

    name: str
    network: Network | None
    module: str
    slot: str
    form: AdapterForm | None


_F = AdapterForm
# Suffix -> operand. A named group `slot` is the operand itself; `leaf` belongs to the module.
_SUFFIXES: tuple[tuple[AdapterForm | None, str, str], ...] = (
    (_F.KOHYA, r"[._]lora_(?P<slot>down|up|mid)\.weight", ""),
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

_LEAVES = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_TEXT_LEAVES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


def parse(name: str) -> Key | None:
    """One key, parsed; None for an unknown suffix."""
    if len(name) > MAX_KEY_CHARS:
        return None
    for form, suffix, slot in _ROWS:
        if match := suffix.search(name):
            groups = match.groupdict()
            spelling = name[: match.start()]
            network, module = _guess_network(spelling)
            if form is _F.DIFFUSERS_PROCESSOR and module != spelling:
                form = _F.DIFFUSERS_PREFIXED
            if leaf := groups.get("leaf"):
                leaves = _TEXT_LEAVES if module.endswith(".self_attn") else _LEAVES
                module, spelling = f"{module}.{leaves[leaf]}", f"{spelling}.{leaves[leaf]}"
            return Key(spelling, network, module, slot or groups["slot"], form)
    return None


# How the names of a network's modules begin, with dots or with underscores.
_HEADS: tuple[tuple[tuple[Network, ...], re.Pattern[str]], ...] = (
    (
        ("unet",),
        re.compile(
            r"(down|up|input|output)_blocks?[._]|(mid|middle)_block[._]|conv_(in|out|norm_out)\Z"
            r"|(time|add)_embedding[._]|time_embed[._]|label_emb[._]|out[._][02]\Z"
        ),
    ),
    (
        ("text", "text_2"),
        re.compile(
            r"(text_model[._])?(encoder[._]layers[._]|embeddings[._]|final_layer_norm\Z)|text_projection\Z"
            r"|(transformer[._])?resblocks[._]|ln_final\Z|(token|position(al)?)_embedding\Z"
        ),
    ),
)


Reading: TypeAlias = "tuple[Network | None, str]"
"""One way to read a module's name: the network of its prefixes, and the rest."""


@lru_cache(maxsize=4096)
def name_readings(spelling: str) -> tuple[Reading, ...]:
    """`readings` of a module's name, without those of other kinds of network."""
    return tuple(
        (network, module)
        for network, module in readings(spelling)
        if network is None or network == "unet" or network == "text" or network == "text_2"
    )


@lru_cache(maxsize=4096)
def _guess_network(spelling: str) -> Reading:
    """The network of a module, from the prefixes or the beginning of its name, and the rest.

    This describes a file without its network; with one, `layer_names` finds the layer.
    """
    readings = name_readings(spelling)
    for networks, heads in _HEADS:
        for network, module in readings:
            if network in (None, *networks) and heads.match(module):
                return network or ("unet" if networks == ("unet",) else None), module
    return max(readings, key=lambda reading: (reading[0] is not None, -len(reading[1])))


_FOREIGN = (
    (re.compile(r"(^|[._])(double|single)_(stream_)?blocks[._]|single_transformer_blocks"), "Flux"),
    (re.compile(r"(^|[._])joint_blocks[._]|(^|[._])attn[._](to_)?add_[qkv]_proj"), "SD3"),
    (re.compile(r"(^|[._])blocks[._][0-9]+[._](self|cross)_attn[._]"), "Wan"),
    (re.compile(r"(^|[._])layers[._][0-9]+[._](attention|feed_forward)[._]"), "Lumina"),
    (re.compile(r"(^|[._])motion_modules[._]"), "AnimateDiff"),
)
"""Names that occur only in networks of another architecture."""


def other_family(names: Iterable[str]) -> str | None:
    """The family that has modules of these names, with the word that shows it: "Flux
    (double_blocks)"; None where no family here has them."""
    for name in names:
        for pattern, family in _FOREIGN:
            if match := pattern.search(name):
                return f"{family} ({match[0].strip('._')})"
    return None


_UNSUPPORTED = (
    (re.compile(r"(token|position(al)?)_embedding"), "of an embedding, which is not implemented"),
    (
        re.compile(r"(unet|text_encoder):[0-9]+:"),
        "of layers by number, which fit no order of this network's layers",
    ),
    (re.compile(r"attn[._]in_proj"), "of OpenCLIP's q, k and v in one, which is not implemented"),
)


def why_unmatched(key: str) -> str:
    """Why a key of an adapter has no layer, as the end of "3 keys are ...:"."""
    return next((why for pattern, why in _UNSUPPORTED if pattern.search(key)), "unknown here")
