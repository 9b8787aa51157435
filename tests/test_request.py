"""Requests as they are typed: plans by name, prompts with seeds, sizes."""

from __future__ import annotations

import pytest

from headstart.errors import InputError, PlanError
from headstart.plan.by_name import named_plan
from headstart.plan.pairs import PAIRS
from headstart.plan.preset import preset
from headstart.plan.request import check_size, pair_up, parse_seeds


def test_a_mode_needs_to_know_its_pair_and_takes_the_engines() -> None:
    assert named_plan("hybrid", {}, "demo") == preset("demo")
    assert named_plan("hybrid", {"preset": "turbo"}, "demo") == preset("turbo")
    with pytest.raises(PlanError, match="of which pair"):
        named_plan("hybrid", {})


def test_a_presets_name_is_its_hybrid() -> None:
    assert named_plan("lightning", {"k": 2}) == preset("lightning", k=2)
    with pytest.raises(PlanError, match="two different pairs"):
        named_plan("lightning", {"preset": "dmd2"})


def test_plan_base_alone_runs_as_a_base_model_does() -> None:
    (leg,) = named_plan("base", {}, "demo").legs
    assert (leg.steps, leg.guidance) == (PAIRS["demo"].base_steps, 2.0)
    (leg,) = named_plan("base", {"steps": 7, "base_guidance": 1.0}, "demo").legs
    assert (leg.steps, leg.guidance) == (7, 1.0)


def test_a_setting_of_none_is_not_given() -> None:
    assert named_plan("distilled", {"steps": None, "n": None}, "dmd2") == preset(
        "dmd2", mode="distilled"
    )


@pytest.mark.parametrize(
    ("prompts", "seeds", "images"),
    [
        ("a", 3, [("a", 3)]),
        ("a", [1, 2], [("a", 1), ("a", 2)]),
        (["a", "b"], 5, [("a", 5), ("b", 5)]),
        (["a", "b"], [5], [("a", 5), ("b", 5)]),
        (["a", "a"], [1, 2], [("a", 1), ("a", 2)]),
        (["", "b"], range(2), [("", 0), ("b", 1)]),
        ("a", 2**64 - 1, [("a", 2**64 - 1)]),
    ],
)
def test_prompts_and_seeds_pair_up(
    prompts: str | list[str], seeds: int | list[int], images: list[tuple[str, int]]
) -> None:
    texts, numbers = pair_up(prompts, seeds)
    assert list(zip(texts, numbers, strict=True)) == images


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        (["a", "b"], [1, 2, 3], r"2 prompts and 3 seeds: .* seeds = zip\(\*itertools.product"),
        ([], 0, "0 prompts"),
        ("a", [], "0 seeds"),
        ("a", [4, 4], "seed 4 is given twice"),
        (["a", "a"], 4, "seed 4 is given twice"),
        ("a", -1, "out of range"),
        ("a", 2**64, "out of range"),
        ("a", 1.5, "whole number"),
        ([b"a"], 0, "a prompt is a string"),
        (3, 0, "a string or a list of strings, got 3"),
        (None, 0, "a string or a list of strings, got None"),
        ({"a": 1}, 0, "a string or a list of strings"),
        ("a \ud800", 0, "character 2 is half of a surrogate pair"),
    ],
)
def test_prompts_and_seeds_that_do_not_pair_are_refused(
    prompts: object, seeds: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pair_up(prompts, seeds)  # type: ignore[arg-type]


def test_seeds_are_read_as_numbers_and_ranges() -> None:
    assert parse_seeds("7") == (7,)
    assert parse_seeds("0-3, 9,5") == (0, 1, 2, 3, 9, 5)
    assert parse_seeds(str(2**64 - 1)) == (2**64 - 1,)


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "5-1", "1,,2", "0-9999999", "1,0-3", "1e3"])
def test_unreadable_seeds_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="seed"):
        parse_seeds(text)


def test_a_size_is_one_number_two_or_the_models_own() -> None:
    assert check_size(None, 64, 8) == (64, 64)
    assert check_size(128, 64, 8) == (128, 128)
    assert check_size((64, 96), 64, 8) == (64, 96)


@pytest.mark.parametrize("size", [60, 0, -8, (64, 12), 7])
def test_another_size_is_refused_with_the_nearest(size: int | tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"multiples of 8 pixels; the nearest is \d+x\d+"):
        check_size(size, 64, 8)


@pytest.mark.parametrize("size", ["64", 64.0, (64, 64, 64), (), (64,), (64.5, 64), {64: 64}])
def test_a_size_that_is_no_number_of_pixels_is_refused(size: object) -> None:
    with pytest.raises(InputError, match=r"one whole number or \(height, width\)"):
        check_size(size, 64, 8)  # type: ignore[arg-type]
