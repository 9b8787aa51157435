"""Numbers as text, and which cases of a study are shown first."""

from __future__ import annotations

import math
import re

import pytest
import study_reports as reports

from headstart.metrics.resample import Interval
from headstart.study.digits import cell, interval, interval_text, places, plain, write
from headstart.study.table import best_cases, blocks, cost_groups, main_cases, table


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ((0.24541, 0.2146, 0.2765), "0.245 [0.215, 0.277]"),
        ((103.2, 93.1, 113.4), "103 [93, 113]"),
        ((2.911, 2.64, 3.163), "2.91 [2.64, 3.16]"),
        ((-0.0004, -0.0091, 0.0082), "0.000 [-0.009, 0.008]"),
        ((0.0, 0.0, 0.0), "0 [0, 0]"),
        ((0.084, math.nan, math.nan), "0.084"),
        ((9.22, math.nan, math.nan), "9.22"),
        ((1234.5, math.nan, math.nan), "1234"),
        ((3e9, math.nan, math.nan), "3e+09"),
        ((2e-9, math.nan, math.nan), "2e-09"),
    ],
)
def test_a_number_has_the_digits_that_its_interval_supports(
    found: tuple[float, float, float], text: str
) -> None:
    assert interval_text(Interval(*found)) == text


def test_a_number_that_is_not_known_is_a_dash() -> None:
    assert interval_text(None) == "-"


def test_a_column_has_the_digits_of_its_median_interval() -> None:
    column = [Interval(0.2, 0.1, 0.3), Interval(0.2, 0.15, 0.25), Interval(5.0, 0.0, 10.0)]
    assert places(column) == 2 and places([None, Interval(3.0, math.nan, math.nan)]) is None


def test_what_is_surely_not_0_is_never_shown_as_0() -> None:
    assert str(cell(Interval(0.0012, 0.0011, 0.0013), 1)) == "0.00120 [0.00110, 0.00130]"
    assert str(cell(Interval(0.0012, -0.1, 0.1), 1)) == "0.0 [-0.1, 0.1]"
    assert write(-1e-9, 2) == "0.00"


@pytest.mark.parametrize(
    "found",
    [None, math.nan, math.inf, 10**400, True, "3", [1.0], {}, {"value": None}, {"value": math.nan}],
)  # fmt: skip
def test_what_is_no_finite_number_is_not_known(found: object) -> None:
    assert interval(found) is None


@pytest.mark.parametrize("low", [None, math.nan, -math.inf, "1"])
def test_an_interval_with_one_end_is_none(low: object) -> None:
    found = interval({"value": 1.0, "low": low, "high": 2.0})
    assert found is not None and interval_text(found) == "1"


def test_text_that_cannot_be_seen_or_spelt_is_written_as_its_escape() -> None:
    assert plain("a\nb\x1b[31m\ud800") == "a\\nb\\x1b[31m\\ud800"
    assert plain("x" * 99, 10) == "x" * 9 + "…"
    assert plain("שלום 😀") == "שלום 😀"


def test_the_main_table_has_every_plan_and_the_best_of_each_grid() -> None:
    assert main_cases(reports.full()) == {
        **dict.fromkeys(("base", "distilled", "hybrid", "skip-first"), ""),
        "guidance-2": "best of guidance",
        "k-2": "best of k",
        "n-8": "best of n",
        "level-12": "best of handoff",  # its control is more diverse, and no hybrid
        "cads:0.1": "best of cads",  # 0.5 is more diverse, and clearly worse
        "pink:1": "best of pink",
        "hybrid+select:2": "best of hybrid+select",
    }


def test_without_scores_the_best_is_not_clearly_worse_by_its_frechet_distance() -> None:
    report = reports.full()
    for own in report["rows"].values():
        own["score"] = None
    assert best_cases(report)["cads"] == "cads:0.5"
    report["rows"]["cads:0.5"]["spaces"][reports.MAIN]["frechet"] = reports.about(0.4, 0.01)
    assert best_cases(report)["cads"] == "cads:0.1"


def test_where_all_are_worse_the_least_bad_one_is_the_best() -> None:
    report = reports.full()
    report["rows"]["cads:0.1"]["score"] = reports.about(0.5, 0.01)
    assert best_cases(report)["cads"] == "cads:0.5"  # 0.6


def test_what_costs_the_same_stands_together_and_the_clearly_worse_last() -> None:
    found = {own.title: own.lines for own in cost_groups(reports.full())}
    kept = {title.partition(": ")[2]: [line.case for line in own] for title, own in found.items()}
    assert kept == {
        "one network in memory, 4 passes an image": ["cads:0.1", "pink:1", "distilled", "cads:0.5"],
        "two networks in memory, 4 passes an image": ["k-2", "hybrid", "level-12"],
        "two networks in memory, 5 passes an image": ["hybrid+select:2", "n-8", "guidance-2"],
    }
    first = next(iter(found.values()))
    assert [line.why for line in first] == ["", "", "", "clearly worse"]


def test_the_terminal_shows_every_number_of_the_main_table_with_its_interval() -> None:
    report = reports.full()
    text = table(report)
    for own in blocks(report, main_cases(report), counts=False):
        assert own.title in text
        printed = text.split(own.title)[1].split("\n\n")[0].splitlines()
        for line in own.lines:
            (shown,) = [one for one in printed if re.match(rf"{re.escape(line.case)} [ (]", one)]
            assert all(str(found) in shown for found in line.cells)
    assert "0.310 [0.299, 0.321]" in text and "105 [98, 112]" in text
    assert len({len(line) for line in text.split("\n\n")[0].splitlines()[1:]}) == 1


def test_columns_that_no_case_has_are_left_out_and_single_gaps_are_dashes() -> None:
    report = reports.few()
    report["rows"]["hybrid"]["seconds"] = None
    (own,) = blocks(report, main_cases(report), counts=True)
    assert own.heads == (
        "passes", "networks", "images", "s/image", "diversity", "recovered, %", "Vendi",
    )  # fmt: skip
    assert str(own.lines[2].cells[3]) == "-"


def test_one_prompt_has_no_intervals_and_says_so() -> None:
    text = table(reports.tiny())
    assert "0.31 " in text and "over the seeds of the one prompt" in text
    assert "[" not in text.split("\n\n")[0]


def test_a_table_of_nothing_is_two_lines_about_nothing() -> None:
    assert "In brackets" in table(reports.empty())
