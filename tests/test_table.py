"""The compiled table: JSON, columns, slices and print."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from plans import NAMES, SD, compiled

from headstart.errors import PlanError
from headstart.plan.plan import Leg, StepTable
from headstart.plan.preset import preset
from headstart.plan.schedule import Spacing
from headstart.plan.table import COLUMNS


def tables() -> Iterator[StepTable]:
    for name in NAMES:
        yield preset(name, k=2, base_guidance=2.5).compile(SD)
    yield compiled(Leg(model="base", steps=7, spacing=Spacing.FRACTIONAL, update="dpmpp_2m"))  # type: ignore[arg-type]


def test_json_returns_an_equal_table_bit_for_bit() -> None:
    for table in tables():
        again = StepTable.from_json(table.to_json())
        assert again == table
        assert hash(again) == hash(table)
        assert again.to_json() == table.to_json()
        part = table[1:3]
        assert StepTable.from_json(part.to_json()) == part


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("rows"),
        lambda document: document.update(format="headstart.table/9"),
        lambda document: document.update(columns=document["columns"][::-1]),
        lambda document: document.update(rows=[]),
        lambda document: document.update(rows=3),
        lambda document: document["rows"].pop(1),
        lambda document: document["rows"][0].__setitem__(2, math.nan),
        lambda document: document["rows"][0].__setitem__(7, "many"),
        lambda document: document["rows"][0].pop(),
        lambda document: document.update(start="pure"),
        lambda document: document.update(first=None),
    ],
)
def test_json_that_is_not_a_table_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(preset("paper-dmd2").compile(SD).to_json())
    change(document)
    with pytest.raises(PlanError):
        StepTable.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"format": 1}'])
def test_text_that_is_not_json_of_a_table_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a "):
        StepTable.from_json(text)


def test_coefficients_are_the_documented_columns_in_float32() -> None:
    assert COLUMNS == ("c_in", "c_skip", "c_out", "keep", "add", "carry", "guidance", "timestep")
    for table in tables():
        coefficients = table.coefficients()
        assert coefficients.dtype == np.float32
        assert coefficients.shape == (len(table), 8)
        for row, step in zip(coefficients, table, strict=True):
            assert row.tolist() == [float(np.float32(getattr(step, name))) for name in COLUMNS]


def test_the_next_input_scale_is_the_next_rows_and_1_at_the_end() -> None:
    for table in tables():
        expected = [*table.coefficients()[1:, 0], np.float32(1.0)]
        assert table.c_in_next.tolist() == expected
        assert table.c_in_next.dtype == np.float32


def test_guidance_other_than_1_costs_a_second_pass() -> None:
    table = preset("lightning", k=2, base_guidance=7.0, distilled_guidance=1.5).compile(SD)
    assert (table.passes(), table.passes("base"), table.passes("distilled")) == (8, 4, 4)
    assert preset("lightning", k=2).compile(SD).passes() == 4
    assert table.passes("refiner") == 0


def test_a_slice_is_a_table_that_knows_where_it_was_cut() -> None:
    table = preset("turbo", k=2).compile(SD)
    part = table[1:][1:3]
    assert isinstance(part, StepTable)
    assert part.steps == table.steps[2:4]
    assert part.first == 2
    assert part.handoffs == ()
    assert table[1:3].handoffs == (1,)
    assert part.init_scale == table[2].sigma
    assert table[-1] == table.steps[-1]
    assert [*table] == [table[i] for i in range(len(table))]
    assert (part.schedule, part.name, part.start) == (table.schedule, table.name, table.start)
    for bad in (slice(2, 2), slice(None, None, 2), slice(None, None, -1), slice(9, None)):
        with pytest.raises(PlanError, match="is a run of rows"):
            table[bad]


def test_rows_that_do_not_chain_are_no_table() -> None:
    steps = preset("lightning").compile(SD).steps
    for broken in (
        (),
        (steps[0], steps[2]),
        (steps[1], steps[0]),
        (steps[0]._replace(sigma_next=steps[0].sigma),),
        (steps[0]._replace(keep=math.nan),),
        (steps[0]._replace(sigma_next=-0.5),),
    ):
        with pytest.raises(PlanError):
            StepTable(broken)


def test_adapters_become_a_column() -> None:
    """A distilled model that is base plus LoRA: off on the base's steps, on afterwards."""
    table = compiled(
        Leg(model="base", timesteps=(999,)),
        Leg(model="base", timesteps=(749, 499), adapters=(("lightning", 1.0),)),
    )
    assert table.strengths("lightning") == (0.0, 1.0, 1.0)
    assert table.strengths("age") is None
    assert StepTable.from_json(table.to_json()).strengths("lightning") == (0.0, 1.0, 1.0)


def test_plans_and_tables_are_frozen_values() -> None:
    table, plan = preset("paper-dmd2").compile(SD), preset("paper-dmd2")
    assert plan == preset("paper-dmd2")
    assert hash(plan) == hash(preset("paper-dmd2"))
    assert len({table, preset("paper-dmd2").compile(SD)}) == 1
    assert table.schedule == SD.fingerprint()
    for frozen, field in ((table, "name"), (plan, "name"), (plan.legs[0], "model")):
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, field, "other")


def test_the_table_prints_aligned_with_a_line_at_the_handoff() -> None:
    assert str(preset("paper-dmd2").compile(SD)).splitlines() == [
        "step  model      timestep    sigma  sigma_next    keep     add   carry  guidance",
        "   0  base            999  14.6146      4.2606  0.0000  4.2606  0.0000         1",
        "-- base hands over to distilled at sigma 4.2606 --------------------------------",
        "   1  distilled       759   4.2606      1.6129  0.0000  1.6129  0.0000         1",
        "   2  distilled       499   1.6129      0.7194  0.0000  0.7194  0.0000         1",
        "   3  distilled       259   0.7194      0.0000  0.0000  0.0000  0.0000         1",
        "paper-dmd2-hybrid: 4 network passes (base 1, distilled 3); x starts as 14.6488 * noise",
    ]


def test_printing_a_slice_keeps_the_numbers_of_the_whole() -> None:
    lines = str(preset("turbo", k=2).compile(SD)[1:]).splitlines()
    assert [line.split()[0] for line in lines] == ["step", "1", "--", "2", "3", "turbo-hybrid:"]
