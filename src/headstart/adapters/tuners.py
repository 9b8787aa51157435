"""Ways to adapt a network that are not computed here, by the names they give to tensors.

So such a file is called what it is. Names: github.com/huggingface/peft, src/peft/tuners/*/layer.py
(`adapter_layer_names`), version 0.21; LyCORIS' modules/*.py (`weight_list`), version 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_BY_PREFIX = (
    *("AdaMSS", "BEFT", "DEFT", "DeLoRA", "FourierFT", "FRoD", "GraLoRA", "HiRA", "Lily", "OSF"),
    *("PEANuT", "Poly", "PSOFT", "RandLoRA", "RoAd", "SHiRA", "TinyLoRA", "UniLoRA", "WaveFT"),
)
"""Tuners whose tensors have their own name as a prefix, in lower case."""
_TUNERS: tuple[tuple[str, str], ...] = (
    *((name, rf"{name.lower()}_\w+") for name in _BY_PREFIX),
    ("LoRA of an embedding", r"lora_embedding_[AB]"),
    ("MonteCLoRA", r"lora_monteclora_\w+"),
    ("LoRA with a diagonal", r"lora_diag"),
    ("VeRA", r"vera_(lambda_[bd]|[AB])"),
    ("PVeRA", r"pvera_(lambda_[bd]|[AB])"),
    ("VB-LoRA", r"vblora_\w+"),
    ("PEFT's GLoRA", r"glora_\w+"),
    ("PEFT's (IA)^3", r"ia3_l"),
    ("PEFT's BOFT", r"boft_[Rs]"),
    ("PEFT's OFT before version 0.16", r"oft_r"),
    ("OFT of an embedding", r"oft_embedding_R"),
    ("HRA", r"hra_u"),
    ("MiSS", r"miss_block"),
    ("Bone", r"bone_block"),
    ("C3A", r"c3a_kernel"),
    ("LN tuning", r"ln_tuning_layers"),
    ("PEFT's shadow tuner", r"shadow_\w+"),
    ("PEFT's supertuning", r"supertuning_\w+"),
    ("trainable tokens", r"trainable_tokens_\w+"),
    ("X-LoRA", r"xlora_\w+|internal_xlora_classifier"),
    ("AdaLoRA", r"lora_(E|ranknum)"),
    ("T-LoRA", r"(base_)?(lambda_layer|[pq]_layer)"),
    ("LyCORIS' OFT before version 2", r"oft_diag"),
    ("LyCORIS' LoKr with a first core", r"lokr_t1"),
    ("LoRA-XS", r"lora_R|(default_)?lora_latent_mapping"),
)
_ROWS = re.compile("|".join(f"(?P<row{at}>{names})" for at, (_, names) in enumerate(_TUNERS)))
_BARE = ("lora_A", "lora_B")
"""AdaLoRA's, which are no modules and so have no `.weight`."""


def tuner_of(key: str) -> str | None:
    """What such a key belongs to, by one of its last three parts; None where no row knows them."""
    if key.removesuffix(".default").rpartition(".")[2] in _BARE:
        return "AdaLoRA"
    parts = key.split(".")[-3:]
    matches = (match for part in parts if (match := _ROWS.fullmatch(part)))
    return next((_TUNERS[int((match.lastgroup or "row0")[3:])][0] for match in matches), None)


def tuners_of(keys: Iterable[str]) -> dict[str, list[str]]:
    """Tuner -> its keys."""
    keys_of: dict[str, list[str]] = {}
    for key in keys:
        if (title := tuner_of(key)) is not None:
            keys_of.setdefault(title, []).append(key)
    return keys_of
