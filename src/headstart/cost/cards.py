"""What cards can do at most, as their makers state it: the roofs of an estimate.

TFLOP/s are dense (a datasheet's "with sparsity" halved), with float32 accumulation where a card has
two rates; GB/s are of the card's own memory. No program reaches either. `tests/test_cards.py`
derives each figure again, from the chip's units, clocks and memory bus.
"""

from __future__ import annotations

from typing import NamedTuple

from headstart.errors import InputError


class Card(NamedTuple):
    """One card.

    float16, bfloat16, tf32   TFLOP/s of its matrix units, None where it has none of that kind
    float32                   TFLOP/s of its vector units
    gbytes_s                  GB/s of its memory
    source                    where the maker says so
    """

    title: str
    float16: float
    bfloat16: float | None
    tf32: float | None
    float32: float
    gbytes_s: float
    source: str


_SHEET, _PAPER = "Tensor Core GPU datasheet", "GPU Architecture whitepaper"
_BRIEF = "NVIDIA Blackwell Architecture Technical Brief, HGX B200"
CARDS: dict[str, Card] = {
    "b200": Card("NVIDIA B200 (HGX, 1000 W)", 2250, 2250, 1100, 80, 8000, _BRIEF),
    "h200": Card("NVIDIA H200 SXM", 989.5, 989.5, 494.7, 67, 4800, f"NVIDIA H200 {_SHEET}"),
    "h100": Card("NVIDIA H100 SXM", 989.5, 989.5, 494.7, 67, 3350, f"NVIDIA H100 {_SHEET}"),
    "h100-pcie": Card("NVIDIA H100 PCIe", 756.5, 756.5, 378, 51, 2000, f"NVIDIA H100 {_SHEET}"),
    "a100": Card("NVIDIA A100 80GB SXM", 312, 312, 156, 19.5, 2039, f"NVIDIA A100 80GB {_SHEET}"),
    "a100-40gb": Card(
        "NVIDIA A100 40GB SXM", 312, 312, 156, 19.5, 1555, f"NVIDIA A100 Tensor Core {_PAPER}"
    ),
    "l40s": Card("NVIDIA L40S", 362.05, 362.05, 183, 91.6, 864, "NVIDIA L40S GPU datasheet"),
    "l4": Card("NVIDIA L4", 121, 121, 60, 30.3, 300, f"NVIDIA L4 {_SHEET}"),
    "a10": Card("NVIDIA A10", 125, 125, 62.5, 31.2, 600, f"NVIDIA A10 {_SHEET}"),
    "t4": Card("NVIDIA T4", 65, None, None, 8.1, 320, f"NVIDIA T4 {_SHEET}"),
    "v100": Card("NVIDIA V100 SXM2", 125, None, None, 15.7, 900, f"NVIDIA V100 {_SHEET}"),
    "5090": Card(
        "GeForce RTX 5090", 209.5, 209.5, 104.8, 104.8, 1792, f"NVIDIA RTX Blackwell {_PAPER}"
    ),
    "4090": Card("GeForce RTX 4090", 165.2, 165.2, 82.6, 82.6, 1008, f"NVIDIA Ada {_PAPER}"),
    "3090": Card("GeForce RTX 3090", 71, 71, 35.6, 35.6, 936, f"NVIDIA Ampere GA102 {_PAPER}"),
}


def card_of(name: str) -> Card:
    """`h100`, in any letters. Raises InputError for what is not in the table."""
    card = CARDS.get(name.lower().removeprefix("rtx").strip(" -_"))
    if card is None:
        raise InputError(
            f"device {name!r:.40}: an estimate is for a card, one of {', '.join(CARDS)}: give its "
            "name, as --device h100"
        )
    return card
