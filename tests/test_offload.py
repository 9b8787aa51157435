"""Which weights stay on a card and which take turns: the cheapest that fits, and what it costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.checkpoint.params import VaeParams
from headstart.errors import InputError
from headstart.memory.budget import SAFE_SHARE, Footprint, Shape
from headstart.memory.offload import RESERVE, Move, Placement, arena_bytes, note, place

GB = 10**9
SDXL = {"text": int(1.64 * GB), "base": int(5.14 * GB), "distilled": int(5.14 * GB), "vae": GB // 3}
VALUES = Footprint(latent_values=8e3, vae=VaeParams(), itemsize=2, vae_itemsize=2, text_values=7e6)
SHAPE = Shape(1, 4, (128, 128), (1024, 1024))


def planned(free: float | None, weights: dict[str, int] = SDXL) -> Placement:
    return place(weights, VALUES, SHAPE, None if free is None else int(free * GB), device="cuda:0")


@pytest.mark.parametrize("free", [None, 24.0, 16.0])
def test_where_all_fits_nothing_takes_turns_and_nothing_is_said(free: float | None) -> None:
    placement = planned(free)
    assert placement.turns == () and placement.resident_bytes == sum(SDXL.values())
    assert placement.by_picture == placement.by_prompt == () and note(placement) is None


def test_text_and_distilled_take_turns_first_and_only_as_far_as_is_needed() -> None:
    placement = planned(12.6)
    assert placement.turns == ("text", "distilled")
    assert 0 < placement.arena < SDXL["text"]
    assert placement.by_picture == ()
    assert placement.by_prompt == (
        Move("text", placement.arena),
        Move("distilled", placement.arena, "base"),
    )
    more = planned(12.5)
    assert abs(more.arena - placement.arena - GB // 10) <= 2


def test_base_and_distilled_take_turns_where_text_does_not_save_enough() -> None:
    placement = planned(8.0)
    assert placement.turns == ("text", "base", "distilled")
    assert [move.part for move in placement.by_picture] == ["base", "distilled"]
    assert sum(move.size_bytes for move in placement.by_picture) == 2 * placement.arena
    assert placement.by_prompt == (Move("text", SDXL["text"]),)


def test_what_does_not_fit_even_in_turns_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(InputError, match=r"the weights are 12\.3 GB, and need .* of cuda:0 with"):
        planned(5.0)


@given(st.floats(6.8, 20.0))
def test_every_stage_of_a_plan_fits_in_what_was_free(free: float) -> None:
    placement = planned(free)
    for work in placement.work.values():
        assert placement.resident_bytes + work / SAFE_SHARE + RESERVE <= int(free * GB) + 1


@given(st.lists(st.integers(1, 50), min_size=2, max_size=4), st.integers(1, 120))
def test_an_arena_is_the_smallest_that_saves_enough(sizes: list[int], excess: int) -> None:
    def saved(share: int) -> int:
        return sum(min(size, share) for size in sizes) - share

    enough = [share for share in range(1, max(sizes) + 1) if saved(share) >= excess]
    assert arena_bytes(sizes, excess) == (min(enough) if enough else None)


def test_float8_is_not_recommended_to_those_who_have_it() -> None:
    placement = place(SDXL, VALUES, SHAPE, 8 * GB, device="cuda:0", float8=True)
    text = note(placement)
    assert text is not None and "float8" not in text and "--distilled-lora" in text
    with pytest.raises(InputError, match=r"even where .* memory= \(--memory\) .*--size") as caught:
        place(SDXL, VALUES, SHAPE, 5 * GB, device="cuda:0", float8=True)
    assert "float8" not in str(caught.value)


def test_each_of_two_devices_has_a_plan_of_its_own_parts() -> None:
    first = planned(7.6, {name: SDXL[name] for name in ("text", "base")})
    assert first.turns == ("text", "base") and first.by_picture == ()
    assert [move.part for move in first.by_prompt] == ["text", "base"]
    assert [*first.work] == ["text", "base"]
    second = planned(8.0, {name: SDXL[name] for name in ("distilled", "vae")})
    assert second.turns == () and [*second.work] == ["distilled", "decode"]


def test_the_note_says_what_was_chosen_what_it_costs_and_how_to_choose_otherwise() -> None:
    text = note(planned(8.0))
    assert text is not None
    for part in (
        "8.0 GB are free on cuda:0, for 12.3 GB of weights",
        "the text encoders, the base and the distilled model take turns",
        "a picture", "a new prompt", "ms", "at 25 GB/s", "the same to the bit",
        "--memory none", "--dtype float8", "headstart transfer", "--distilled-lora", "base=cuda:0",
    ):  # fmt: skip
        assert part in text
    hidden = note(planned(12.5))
    assert hidden is not None and "of them beside the base's rows" in hidden
