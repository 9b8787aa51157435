"""The figures of a study: what is in them as text, and that nobody's settings change them."""

from __future__ import annotations

import itertools
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import study_reports as reports
from matplotlib.figure import Figure as Drawing

from headstart.errors import InputError
from headstart.metrics.resample import Interval
from headstart.study.canvas import CYCLE, PLANS, style
from headstart.study.digits import interval, interval_text
from headstart.study.figures import Figure, check_figures, draw_figures
from headstart.study.labels import Spot, name_spots, shared

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    return {figure.name: figure for figure in draw_figures(reports.full())}


@pytest.fixture(scope="module")
def texts(drawn: Mapping[str, Figure]) -> dict[str, str]:
    return {name: " | ".join(texts_of(figure.svg)) for name, figure in drawn.items()}


def texts_of(svg: bytes) -> list[str]:
    """Letters and titles of an SVG, as a viewer reads them."""
    root = ElementTree.fromstring(svg)
    return [
        node.text or "" for node in root.iter() if node.tag in (f"{SVG}text", f"{SVG}title")
    ]  # fmt: skip


def number(found: Any, factor: float = 1.0) -> str:
    return interval_text(interval(found, factor))


def test_every_part_of_a_report_has_its_figure_and_a_part_that_is_missing_has_none(
    drawn: Mapping[str, Figure],
) -> None:
    assert [*drawn] == ["diversity", "methods", "grids", "handoff", "curve", "control", "timeline"]
    assert all(figure.title and figure.caption for figure in drawn.values())
    assert [figure.name for figure in draw_figures(reports.few())] == ["diversity"]
    assert draw_figures(reports.empty()) == []


def test_diversity_shows_every_plan_in_every_space(texts: Mapping[str, str]) -> None:
    for case, row in reports.full()["rows"].items():
        if row["part"] == "plans":
            for space in (reports.MAIN, reports.SECOND):
                assert f"{case}: {number(row['spaces'][space]['diversity'])}" in texts["diversity"]
    assert "mean pairwise cosine distance" in texts["diversity"]
    assert "mean pairwise squared distance" in texts["diversity"]


@pytest.mark.parametrize(
    ("part", "words"), [("guidance", "guidance {:g}"), ("k", "k={:g}"), ("n", "n={:g}")]
)
def test_grids_show_diversity_score_and_frechet_of_every_value(
    texts: Mapping[str, str], part: str, words: str
) -> None:
    rows = [row for row in reports.full()["rows"].values() if row["part"] == part]
    assert rows
    for row in rows:
        main = row["spaces"][reports.MAIN]
        for found in (main["diversity"], row["score"], main["frechet"]):
            assert f"hybrid, {words.format(row['at'])}: {number(found)}" in texts["grids"]


def test_handoff_shows_what_came_back_at_every_level_and_the_control_beside_it(
    texts: Mapping[str, str],
) -> None:
    rows = {c: row for c, row in reports.full()["rows"].items() if row["part"] == "handoff"}
    for case, row in rows.items():
        line = "control: the distilled" if case.endswith("-control") else "the base, then"
        back = number(row["spaces"][reports.MAIN]["recovered"], 100.0)
        found = re.search(
            rf"{line}[^|]*, sigma {row['at']:.4g}: {re.escape(back)}", texts["handoff"]
        )
        assert found, (case, back)


def test_a_level_that_a_log_axis_has_no_place_for_is_told_in_the_caption() -> None:
    rows = {"level-4": reports.row("handoff", 0.2, at=4.0)}
    rows["level-0"] = reports.row("handoff", 0.2, at=0.0)
    (found,) = draw_figures({**reports.empty(), "spaces": reports.full()["spaces"], "rows": rows})
    assert found.name == "handoff" and "as they have no level above 0: 1." in found.caption


def test_curve_shows_every_step_of_every_plan_and_which_step_matches(
    drawn: Mapping[str, Figure], texts: Mapping[str, str]
) -> None:
    for plan, own in reports.full()["curve"]["plans"].items():
        for passes, share in zip(own["passes"], own["share"], strict=True):
            assert f"{plan}, {passes} passes: {number(share, 100.0)}" in texts["curve"]
    caption = drawn["curve"].caption
    assert "of 6 steps" in caption and "distilled shows after one step, at step 4 [3, 5]" in caption


def test_control_shows_every_strength_on_every_plan(texts: Mapping[str, str]) -> None:
    (adapter,) = reports.full()["control"]["adapters"]
    for plan, rows in adapter["plans"].items():
        for row in rows:
            line = f"{plan}, strength {row['strength']:g}: {number(row['change'])}"
            assert line in texts["control"]
    assert "yellow" in texts["control"] and "change of the score (%)" in texts["control"]


def test_an_adapter_that_was_not_measured_has_an_empty_panel() -> None:
    report = reports.only(reports.full(), "control")
    report["control"]["adapters"].append({"name": "blue", "plans": {}})
    (found,) = draw_figures(report)
    assert {"yellow", "blue"} <= set(texts_of(found.svg))


def test_timeline_shows_asked_concepts_and_those_that_nobody_asked_for(
    texts: Mapping[str, str],
) -> None:
    for plan, own in reports.full()["timeline"]["plans"].items():
        for kind in ("asked", "unasked"):
            dropped = number(own[kind]["dropped"], 100.0)
            assert f"{plan}, {kind}: {dropped} %" in texts["timeline"]
        assert f"{plan}, 2 passes: {number(own['asked']['there'][1], 100.0)}" in texts["timeline"]


def test_methods_shows_what_came_back_and_how_right_it_is(texts: Mapping[str, str]) -> None:
    rows = reports.full()["rows"]
    for case in ("cads:0.1", "pink:1", "hybrid+select:2 (5)", "base (60)", "k-2"):
        main = rows[case.partition(" ")[0]]["spaces"][reports.MAIN]
        back = f"{case}: recovered {number(main['recovered'], 100.0)} %"
        assert f"{back}, {number(main['frechet'])}" in texts["methods"]
        assert f" | {case} | " in texts["methods"]  # its name beside the dot
    assert "cads:0.5: recovered 160 [153, 167] %, -0.120 [-0.128, -0.112]" in texts["methods"]


def test_a_strength_that_draws_noise_does_not_press_the_others_into_a_corner(
    drawn: Mapping[str, Figure], texts: Mapping[str, str]
) -> None:
    assert "Beyond a frame: cads:0.5." in drawn["methods"].caption
    assert texts["methods"].count(" | cads:0.5 |") == 0


def test_of_many_cases_all_are_drawn_and_the_best_are_named() -> None:
    report = reports.only(reports.many(60), "plans", "methods")
    figures = {figure.name: figure for figure in draw_figures(report)}
    texts = texts_of(figures["methods"].svg)
    assert sum(text.startswith("way") and "recovered" in text for text in texts) == 120
    names = [text for text in texts if re.fullmatch(r"way\d:\d+", text)]
    assert len(names) == 20  # the best of ten methods in two panels


def test_figures_stand_in_one_page_without_sharing_an_id(drawn: Mapping[str, Figure]) -> None:
    every: list[str] = []
    for figure in drawn.values():
        root = ElementTree.fromstring(figure.svg)
        own = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
        used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', figure.svg.decode())
        assert {a or b for a, b in used} <= set(own)
        every += set(own)
    assert len(every) == len(set(every))


def test_the_same_report_gives_the_same_bytes_whatever_a_user_has_set(
    drawn: Mapping[str, Figure],
) -> None:
    with mpl.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path"}):
        again = {figure.name: figure.svg for figure in draw_figures(reports.full())}
        assert mpl.rcParams["font.size"] == 30
    assert again == {name: figure.svg for name, figure in drawn.items()}


def test_names_that_are_markup_or_mathematics_are_letters() -> None:
    texts: list[str] = []
    parts = ("plans", "methods", "control")
    for figure in draw_figures(reports.only(reports.hostile(), *parts)):
        texts += texts_of(figure.svg)
        assert b"<script" not in figure.svg
    assert any('<script>alert("1")' in text for text in texts)
    assert any(text.startswith("cads:0.1</td>") and "$x_1$" in text for text in texts)


def test_without_intervals_or_finite_numbers_there_are_dots_alone() -> None:
    (figure,) = draw_figures(reports.tiny())
    assert "hybrid: 0.31" in texts_of(figure.svg)
    report = reports.tiny()
    for row in report["rows"].values():
        row["spaces"]["dreamsim"]["diversity"] = {"value": float("nan"), "low": 1.0, "high": 2.0}
    (figure,) = draw_figures(report)
    assert not any("hybrid: " in text for text in texts_of(figure.svg))


def test_a_missing_library_is_named_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    check_figures()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'headstart\[study\]'"):
        check_figures()


def test_names_hide_neither_dots_nor_each_other_where_there_is_room() -> None:
    rng = np.random.default_rng(5)
    with style():
        figure: Any = Drawing(figsize=(6, 5))
        axis = figure.subplots()
        points = rng.random((24, 2))
        axis.set_xlim(-0.2, 1.2)
        axis.set_ylim(-0.2, 1.2)
        places = [(Interval(x), Interval(y)) for x, y in points]
        spots = [Spot(*place, "#000000", f"name {n}") for n, place in enumerate(places)]
        name_spots(figure, axis, spots)
        boxes = [text.get_window_extent().extents for text in axis.texts]
        frame = axis.get_window_extent().extents
        dots = [axis.transData.transform(point) for point in points]
    assert len(boxes) == 24
    assert all(shared(a, b) == 0 for a, b in itertools.combinations(boxes, 2))
    assert all(abs(shared(box, frame) - shared(box, box)) < 1e-6 for box in boxes)
    assert not any(a < x < c and b < y < d for a, b, c, d in boxes for x, y in dots)


def test_a_crowd_is_named_all_the_same() -> None:
    with style():
        figure: Any = Drawing(figsize=(3, 2))
        axis = figure.subplots()
        middle = Interval(0.5)
        spots = [Spot(middle, middle, "#000000", f"name {n}") for n in range(60)]
        name_spots(figure, axis, spots)
    assert len(axis.texts) == 60


# Machado, Oliveira and Fernandes, 2009: full protanopia, deuteranopia and tritanopia, linear RGB.
BLIND = {
    "none": np.eye(3),
    "protan": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                        [-0.003882, -0.048116, 1.051998]]),
    "deutan": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                        [-0.011820, 0.042940, 0.968881]]),
    "tritan": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                        [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip


def lab(colour: str, matrix: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of an sRGB colour as that eye sees it."""
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(matrix @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                       [0.0193, 0.1192, 0.9505]])  # fmt: skip
    x, y, z = to_xyz @ seen / (0.9505, 1.0, 1.089)
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("eye", BLIND)
def test_the_three_main_plans_are_told_apart_by_every_eye_and_all_are_seen_on_white(
    eye: str,
) -> None:
    colours = {
        plan: lab(PLANS[plan].colour, BLIND[eye]) for plan in ("base", "distilled", "hybrid")
    }
    for a, b in itertools.combinations(colours.values(), 2):
        assert np.linalg.norm(a - b) > 40  # 2.3 is just seen
    for mark in (*PLANS.values(), *CYCLE):
        assert lab(mark.colour, BLIND[eye])[0] < 70  # L* of white is 100


def test_no_two_marks_are_told_apart_by_colour_alone() -> None:
    for every in (PLANS.values(), CYCLE):
        assert len({(mark.marker, str(mark.dash)) for mark in every}) == len(every)
        assert len({mark.marker for mark in every}) == len(every)
