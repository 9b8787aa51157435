"""The paper's numbers, and the sentences on what they may be set against."""

from __future__ import annotations

import json

import numpy as np
import pytest
import study_reports as reports

from headstart.study.paper import PAPER, PLANS, comparable, quoted, recovered


def text_of(report: reports.Json) -> str:
    return "\n".join(comparable(report))


def test_the_averages_of_table_2_are_those_of_its_prompts() -> None:
    rows = PAPER["table 2"]
    prompts = [row for name, row in rows.items() if name not in ("what", "columns", "average")]
    assert len(prompts) == 5
    assert np.abs(np.mean(prompts, 0) - rows["average"]).max() < 0.0005 + 1e-9


def test_the_columns_of_table_1_have_the_means_that_were_computed_when_it_was_read() -> None:
    table = PAPER["table 1"]
    rows = [row for name, row in table.items() if name not in ("what", "columns")]
    assert len(rows) == 9
    assert np.round(np.mean(rows, 0), 1).tolist() == [29.6, 26.8, 27.5, 29.5, 28.6]


@pytest.mark.parametrize("name", [name for name in PAPER if name.startswith("table")])
def test_every_row_of_a_table_has_all_its_columns(name: str) -> None:
    rows = PAPER[name]
    assert all(len(row) == len(rows["columns"]) for k, row in rows.items() if k not in ("what",))
    assert json.loads(json.dumps(PAPER)) == PAPER


def test_plans_are_quoted_with_what_the_paper_prints_of_them_and_no_more() -> None:
    assert [*quoted("hybrid").values()] == [0.350, 0.350, 10.79, 32.12, 0.64]
    assert [*quoted("skip-first").values()] == [None, None, 10.12, 31.71, 0.53]
    assert [*quoted("replace-final").values()] == [None, 0.251, None, None, 6.61]
    assert len({tuple(quoted(plan)) for plan in PLANS}) == 1


def test_recovered_is_the_share_of_the_loss_in_table_2() -> None:
    assert recovered("base") == 1.0 and recovered("distilled") == 0.0
    assert recovered("hybrid") == pytest.approx(0.086 / 0.073)
    assert recovered("skip-first") is None


def test_other_networks_stand_beside_the_papers_and_not_against_them() -> None:
    text = text_of(reports.full())
    assert "ours of demo: they stand beside each other, not against each other" in text
    assert "near each other, not equal" not in text


def test_the_papers_own_networks_should_come_near_its_numbers() -> None:
    text = text_of(reports.few())
    assert "near each other, not equal" in text and "not against" not in text
    assert "dreamsim is the paper's measure" in text


@pytest.mark.parametrize("preset", ["turbo", "paper-lcm", "lightning-1step"])
def test_for_these_distillations_the_paper_prints_no_diversity_of_the_hybrid(preset: str) -> None:
    report = reports.few()
    report["pair"]["preset"] = preset
    assert "For Turbo, Lightning and LCM the paper prints no diversity" in text_of(report)


def test_a_diversity_in_another_space_is_set_against_none_of_the_papers() -> None:
    text = text_of(reports.full())
    assert "No column here is DreamSim" in text
    assert "Diversities of two feature spaces have two scales" in text


@pytest.mark.parametrize(("images", "is_fid"), [(480, False), (30_000, True)])
def test_a_frechet_distance_is_an_fid_by_inception_on_30_000_images_alone(
    images: int, is_fid: bool
) -> None:
    report = reports.few()
    report["spaces"] = [{"name": "inception-v3", "distance": "cosine"}]
    for row in report["rows"].values():
        row["spaces"] = {"inception-v3": {"frechet": reports.about(12.0, 1.0)}}
        row["images"] = images
    assert ("is an FID" in text_of(report)) == is_fid
    assert ("is no FID" in text_of(report)) != is_fid


def test_without_a_reference_nothing_stands_beside_the_fid() -> None:
    assert "Without reference pictures there is no Frechet distance" in text_of(reports.few())


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("curve", "figure 5 is by DreamSim"),
        ("control", "neither prompts nor strengths of its table 1"),
        ("timeline", "concepts that nobody asked for are counted"),
    ],
)
def test_a_part_that_is_there_has_its_sentence(part: str, words: str) -> None:
    assert words in text_of(reports.full())
    assert words not in text_of({**reports.full(), part: None})


def test_how_sure_an_interval_is_depends_on_the_number_of_prompts() -> None:
    assert "narrower than it should be" not in text_of(reports.full())  # 12 prompts
    assert "With 5 prompts an interval is narrower" in text_of(reports.few())
    assert "One prompt says nothing of other prompts" in text_of(reports.tiny())


def test_a_share_of_next_to_nothing_is_called_unsure() -> None:
    report = reports.full()
    assert "next to nothing" not in text_of(report)
    wide = reports.about(0.9, 0.6)
    report["rows"]["hybrid"]["spaces"][reports.SECOND]["recovered"] = wide
    assert f"By {reports.SECOND} the base and the distilled model differ too little" in text_of(
        report
    )


def test_nothing_is_said_of_scores_and_references_that_are_not_there() -> None:
    text = text_of(reports.few())
    assert "CLIP score" not in text and "nearest-picture" not in text
    assert "CLIP score" in text_of(reports.full()) and "nearest-picture" in text_of(reports.full())
    assert comparable(reports.empty())
