"""Cells become rows: means over prompts, intervals, and shares of what was lost."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headstart.metrics.fidelity import Moments, frechet_gaussian
from headstart.metrics.resample import recovered
from headstart.spaces.extractor import Extractor
from headstart.study.cases import Case
from headstart.study.numbers import by_prompt, rows_of
from headstart.study.store import Arrays
from headstart.sweep.gallery_features import Reference

SPACE = Extractor("toy", lambda rgb: rgb.reshape(len(rgb), -1).astype(np.float64))
CASES = {
    name: Case(name=name, part="plans", about=name, plan=name)
    for name in ("base", "distilled", "hybrid")
}
PROMPTS = ("a fox", "an owl", "a cat")


def cell(diversity: float, *, score: float | None = 0.5, seed: int = 0) -> Arrays:
    features = np.random.default_rng(seed).normal(size=(6, 4)).astype(np.float32)
    cell_ = {
        "diversity@toy": np.array([diversity, diversity - 0.1, diversity + 0.1]),
        "vendi@toy": np.array(2.0),
        "features@toy": features,
        "images": np.array(6.0),
        "passes": np.array(4.0),
        "networks": np.array(1.0),
        "seconds": np.array(0.1 * (1 + seed)),
    }
    return cell_ if score is None else {**cell_, "score": np.full(6, score)}


def cells(prompts: int = 3) -> dict[str, list[Arrays]]:
    values = {"base": (0.4, 0.5, 0.6), "distilled": (0.1, 0.2, 0.3), "hybrid": (0.2, 0.4, 0.6)}
    return {
        name: [cell(values_[n], seed=n) for n in range(prompts)] for name, values_ in values.items()
    }  # fmt: skip


def test_a_row_is_the_mean_over_prompts_and_the_share_that_came_back() -> None:
    row = rows_of(CASES, cells(), [SPACE], {})["hybrid"]
    space = row["spaces"]["toy"]
    assert space["diversity"]["value"] == pytest.approx(0.4)
    assert space["diversity"]["low"] <= 0.4 <= space["diversity"]["high"]
    assert space["recovered"]["value"] == pytest.approx(0.2 / 0.3, abs=1e-6)
    assert (row["images"], row["passes"], row["networks"]) == (18, 4.0, 1)
    assert row["seconds"] == pytest.approx(0.2)
    assert row["score"]["value"] == 0.5 and row["nearest"] is None


def test_the_ends_recover_nothing_and_everything() -> None:
    rows = rows_of(CASES, cells(), [SPACE], {})
    for name, share in (("base", 1.0), ("distilled", 0.0)):
        recovered = rows[name]["spaces"]["toy"]["recovered"]
        assert [recovered[end] for end in ("value", "low", "high")] == pytest.approx([share] * 3)


def test_a_case_is_measured_against_the_model_that_it_names() -> None:
    other = Case(name="other", part="methods", about="", plan="hybrid", against="hybrid")
    cases = {**cells(), "other": cells()["base"]}
    row = rows_of({**CASES, "other": other}, cases, [SPACE], {})["other"]
    assert row["spaces"]["toy"]["recovered"]["value"] == pytest.approx(1.0)


def test_one_prompt_has_an_interval_over_its_seeds_and_no_share() -> None:
    row = rows_of(CASES, cells(1), [SPACE], {})["hybrid"]
    space = row["spaces"]["toy"]
    assert space["diversity"]["low"] == pytest.approx(0.105, abs=1e-3)
    assert space["diversity"]["high"] == pytest.approx(0.295, abs=1e-3)
    assert space["recovered"] is None
    assert row["score"] == {"value": 0.5, "low": None, "high": None}


def test_the_frechet_distance_is_that_of_all_pictures_to_the_reference() -> None:
    cells_ = cells()
    moments = Moments(np.zeros(4), np.eye(4))
    row = rows_of(CASES, cells_, [SPACE], {"toy": Reference("r", moments)})["base"]
    flat = np.concatenate([c["features@toy"] for c in cells_["base"]]).astype(np.float64)
    expected = frechet_gaussian(flat.mean(0), np.cov(flat.T), *moments)
    assert row["spaces"]["toy"]["frechet"]["value"] == pytest.approx(expected, abs=1e-5)


def test_a_judge_without_text_gives_no_score() -> None:
    plain = {name: [cell(0.3, score=None, seed=n) for n in range(3)] for name in CASES}
    rows = rows_of(CASES, plain, [SPACE], {})
    assert all(row["score"] is None for row in rows.values())
    assert by_prompt(CASES, plain, PROMPTS, [SPACE])[0]["score"] is None


def test_where_nothing_was_lost_no_share_is_told() -> None:
    same = {name: [cell(0.3, seed=n) for n in range(3)] for name in CASES}
    assert rows_of(CASES, same, [SPACE], {})["hybrid"]["spaces"]["toy"]["recovered"] is None


def test_every_prompt_case_and_space_has_a_line() -> None:
    lines = by_prompt(CASES, cells(), PROMPTS, [SPACE])
    assert [(line["case"], line["prompt"]) for line in lines] == [
        (name, prompt) for name in CASES for prompt in PROMPTS
    ]
    assert lines[-1]["diversity"] == pytest.approx(0.6) and lines[-1]["space"] == "toy"


def test_recovered_is_exact_where_every_prompt_agrees() -> None:
    base, distilled = np.array([0.4, 0.6, 0.8]), np.array([0.2, 0.4, 0.6])
    share = recovered(distilled + 0.05, base, distilled)
    assert list(share) == pytest.approx([0.25, 0.25, 0.25])
    assert math.isnan(recovered(base, base, base).value)
