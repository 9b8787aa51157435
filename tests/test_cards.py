"""The peaks that estimates are made with: what they follow from, and what torch has."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from headstart.cost.cards import CARDS, card_of
from headstart.errors import InputError


class Chip(NamedTuple):
    """What a card's peaks are products of.

    units        streaming multiprocessors
    matrix       dense float16 FLOPs of a multiprocessor in a cycle, added in float32
    vector       float32 FLOPs of a multiprocessor in a cycle
    matrix_ghz   boost clock under matrix products
    vector_ghz   boost clock otherwise
    bus          bits of the memory bus
    gbit_s       bits a second of one pin
    """

    units: int
    matrix: int
    vector: int
    matrix_ghz: float
    vector_ghz: float
    bus: int
    gbit_s: float


CHIPS = {
    "h200": Chip(132, 4096, 256, 1.83, 1.98, 6144, 6.25),
    "h100": Chip(132, 4096, 256, 1.83, 1.98, 5120, 5.23),
    "h100-pcie": Chip(114, 4096, 256, 1.62, 1.755, 5120, 3.2),
    "a100": Chip(108, 2048, 128, 1.41, 1.41, 5120, 3.186),
    "a100-40gb": Chip(108, 2048, 128, 1.41, 1.41, 5120, 2.43),
    "l40s": Chip(142, 1024, 256, 2.49, 2.52, 384, 18),
    "l4": Chip(58, 1024, 256, 2.04, 2.04, 192, 12.5),
    "a10": Chip(72, 1024, 256, 1.695, 1.695, 384, 12.5),
    "t4": Chip(40, 1024, 128, 1.59, 1.59, 256, 10),
    "v100": Chip(80, 1024, 128, 1.53, 1.53, 4096, 1.752),
    "5090": Chip(170, 512, 256, 2.407, 2.407, 512, 28),
    "4090": Chip(128, 512, 256, 2.52, 2.52, 384, 21),
    "3090": Chip(82, 512, 256, 1.695, 1.695, 384, 19.5),
}
# Multiprocessors, clocks and buses of the architecture whitepapers. B200 has none published: its
# figures are the brief's own.


@pytest.mark.parametrize("name", sorted(CHIPS))
def test_peaks_are_units_times_rate_times_clock(name: str) -> None:
    """Rounded by the makers: 3 %. A peak "with sparsity", or with float16 sums, would be twice."""
    chip, card = CHIPS[name], CARDS[name]
    assert card.float16 == pytest.approx(chip.units * chip.matrix * chip.matrix_ghz / 1e3, rel=0.03)
    assert card.float32 == pytest.approx(chip.units * chip.vector * chip.vector_ghz / 1e3, rel=0.03)
    assert card.gbytes_s == pytest.approx(chip.bus * chip.gbit_s / 8, rel=0.03)


def test_every_card_but_one_is_checked_by_its_chip() -> None:
    assert set(CARDS) - set(CHIPS) == {"b200"}


def test_peaks_are_those_of_torch() -> None:
    """torch keeps a table of datasheets for its own estimates; its L4 has H100's bandwidth."""
    info = pytest.importorskip("torch._inductor.analysis.device_info")
    for name, title in (("h100", "NVIDIA H100"), ("a100", "NVIDIA A100"), ("l4", "NVIDIA L4")):
        theirs, card = info.lookup_device_info(title), CARDS[name]
        if theirs is None:
            pytest.skip(f"this torch has no {title}")
        sparse = 1 if name == "a100" else 2
        assert card.float16 == pytest.approx(theirs.tops[torch.float16] / sparse, rel=0.005)
        assert card.tf32 == pytest.approx(theirs.tops["torch.tf32"] / sparse, rel=0.005)
        assert card.float32 == pytest.approx(theirs.tops[torch.float32], rel=0.005)
        assert name == "l4" or card.gbytes_s == theirs.dram_bw_gbs


def test_cards_say_where_they_are_from() -> None:
    for name, card in CARDS.items():
        assert card_of(name) is card
        assert card.source.startswith("NVIDIA ")
        assert card.bfloat16 in (None, card.float16)
        assert card.tf32 is None or 0.45 < card.tf32 / card.float16 <= 0.51
    assert card_of("RTX 4090") is CARDS["4090"]
    for name in ("cpu", "auto", "cuda:0", "h1000"):
        with pytest.raises(InputError, match="one of b200, h200, h100"):
            card_of(name)
