"""Strengths as data: a product of factors, read from what a person types."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.adapters.strength import Strength, as_strength, parse_adapter, parse_strengths
from headstart.errors import InputError
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan
from headstart.plan.schedule import NoiseSchedule

LEGS = (
    Leg(model="base", timesteps=(999,)),
    Leg(model="distilled", timesteps=(749, 499, 249), adapters=(("age", 0.5),)),
)
TABLE = Plan(LEGS).compile(NoiseSchedule.scaled_linear())
numbers = st.floats(-4, 4, allow_nan=False)


@given(
    value=st.lists(numbers, min_size=2, max_size=2).map(tuple),
    rows=st.lists(numbers, min_size=4, max_size=4).map(tuple),
    below=st.sampled_from([None, 249.0, 500.0, 999.0]),
    models=st.sampled_from([None, ("base",), ("distilled",), ("base", "distilled")]),
)
def test_a_grid_is_the_product_of_its_factors(
    value: tuple[float, ...],
    rows: tuple[float, ...],
    below: float | None,
    models: tuple[str, ...] | None,
) -> None:
    strength = Strength(value, models, below, rows)
    for name, column in (("age", (0.0, 0.5, 0.5, 0.5)), ("other", (1.0,) * 4)):
        expected = [
            [
                column[row]
                * v
                * rows[row]
                * (models is None or step.model in models)
                * (below is None or step.timestep <= below)
                for v in value
            ]
            for row, step in enumerate(TABLE)
        ]
        assert strength.grid(name, TABLE, 2) == pytest.approx(np.array(expected))


def test_a_strength_of_rows_and_samples_is_the_grid_itself() -> None:
    rows = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
    assert as_strength(rows).grid("other", TABLE, 2).tolist() == rows


def test_json_makes_the_same_strength_again() -> None:
    strength = Strength((1.0, -0.1), ("base",), 800, None, 0.3)
    assert Strength(**json.loads(json.dumps(strength.to_json()))) == strength
    assert Strength(**Strength().to_json()) == Strength()


def test_the_text_has_the_value_unless_told_otherwise() -> None:
    assert Strength((1.0, 2.0), below=10).for_text("age", 2).tolist() == [1.0, 2.0]
    assert Strength((1.0, 2.0), text=0.5).for_text("age", 2).tolist() == [0.5, 0.5]
    with pytest.raises(InputError, match="text="):
        as_strength([[1.0, 2.0]] * 4).for_text("age", 2)


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", Strength()),
        ("a.safetensors:1.5", "a.safetensors", Strength(1.5)),
        ("a:-2@base", "a", Strength(-2.0, ("base",))),
        ("a:.5@distilled+800", "a", Strength(0.5, ("distilled",), 800.0)),
        ("a:1@800", "a", Strength(1.0, None, 800.0)),
        ("a:+1@base+distilled", "a", Strength(1.0, ("base", "distilled"))),
        ("C:/loras/a.safetensors", "C:/loras/a.safetensors", Strength()),
        ("C:/a:2", "C:/a", Strength(2.0)),
    ],
)
def test_what_is_typed_is_a_file_a_strength_and_legs(
    text: str, path: str, strength: Strength
) -> None:
    assert parse_adapter(text) == (path, strength)


@pytest.mark.parametrize("text", ["", " ", "a:1@", "a:1@base+", "a:1@800+700"])
def test_a_mistyped_adapter_is_told(text: str) -> None:
    with pytest.raises(InputError, match=r"expected|adapter"):
        parse_adapter(text)


def test_strengths_are_typed_in_their_order() -> None:
    assert parse_strengths("-2, -1,0,.5") == (-2.0, -1.0, 0.0, 0.5)
    for bad in ("", "1,,2", "1,one", "nan", "1,1.0"):
        with pytest.raises(InputError):
            parse_strengths(bad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Strength(math.nan),
        lambda: Strength(()),
        lambda: Strength((1.0, math.inf)),
        lambda: Strength(below=math.nan),
        lambda: Strength(models=()),
        lambda: as_strength("1.0"),
        lambda: as_strength(None),
        lambda: as_strength({"base": 1.0}),
        lambda: as_strength([[1.0], [1.0, 2.0]]),
        lambda: Strength((1.0, 2.0)).grid("age", TABLE, 3),
        lambda: Strength(rows=(1.0,)).grid("age", TABLE, 3),
        lambda: as_strength([[1.0, 2.0]]).grid("age", TABLE, 2),
    ],
)
def test_what_is_no_strength_for_this_run_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(InputError):
        make()
