"""`bench/levels.py`: its plans meet where they say, and its numbers are what they say."""

from __future__ import annotations

import hashlib
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from bundled import needs_pair

import headstart as hs

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import flow_pair  # noqa: E402
import levels  # noqa: E402
import measured  # noqa: E402

sys.path.remove(str(BENCH))

pytestmark = needs_pair


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> levels.Lab:
    judges = measured.Judges(None, ("a fox", "an owl"), None)  # pyright: ignore
    return levels.Lab(levels.engines(), judges, range(2), tmp_path_factory.mktemp("levels"))


def made(width: float) -> measured.Sampled:
    """Three prompts whose four samples lie `width` around one direction."""
    noise = np.random.default_rng(0).standard_normal((3, 4, 128))
    features = np.eye(128)[0] + width * noise
    ones = np.ones((3, 4))
    return measured.Sampled(features, features, ones, ones, None, 0.5, 4, 1.0)


def test_every_case_goes_on_at_its_level_with_the_students_own_steps(lab: levels.Lab) -> None:
    for case in levels.cases().values():
        table = lab.table(case)
        if case.landing is None:
            assert table.models == (case.first,) and lab.level(case) is None
            continue
        after = table.steps[case.k :]
        assert {step.model for step in table.steps[: case.k]} == {case.first}
        assert {step.model for step in after} == {"distilled"}
        assert lab.level(case) == after[0].sigma / 0.4
        if case.process == "vp":
            below = [t for t in (749, 499, 249) if t < case.landing]
            assert [step.timestep for step in after] == [case.landing, *below]


def test_one_step_to_a_trained_timestep_is_the_pairs_hybrid_and_its_control_the_student(
    lab: levels.Lab,
) -> None:
    engine, every = lab.engines["vp"], levels.cases()
    hybrid, student = (engine.compile(plan).steps for plan in ("hybrid", "distilled"))
    assert lab.table(every["vp base k=1 to 749"]).steps == hybrid
    assert lab.table(every["vp distilled k=1 to 749"]).steps == student
    alone = lab.table(every["flow distilled alone"]).steps
    assert lab.table(every["flow distilled k=1 to 1"]).steps == alone


def test_a_flow_from_the_pairs_top_differs_in_its_first_row_alone(lab: levels.Lab) -> None:
    every = levels.cases()
    for row in levels.TOP_ROWS:
        flow, top = (
            lab.table(every[f"{process} base k=1 to {row}"]) for process in ("flow", "flow-top")
        )
        assert top.steps[1:] == flow.steps[1:] and top[0].sigma_next == flow[0].sigma_next
        sigma = lab.table(every["vp base k=1 to 749"])[0].sigma
        assert top[0].sigma == pytest.approx(sigma, rel=1e-6)  # the file is float32
        assert top.start == "unit"


def test_steps_are_even_in_timestep_or_in_the_unshifted_time(lab: levels.Lab) -> None:
    every = levels.cases()
    vp = [step.timestep for step in lab.table(every["vp base k=4 to 499"])][:5]
    assert np.diff(vp) == pytest.approx(-125.0)
    t = np.array([s.timestep for s in lab.table(every["flow base k=4 to 3"])][:5]) / 1000
    u = t / (flow_pair.SHIFT - (flow_pair.SHIFT - 1) * t)
    assert np.diff(u) == pytest.approx(-3 / 8 / 4)


def test_levels_are_those_that_sdxl_has_at_the_timestep(lab: levels.Lab) -> None:
    """The file holds alphas_cumprod in float32."""
    levels_of = [lab.level(c) for c in levels.cases().values() if c.process == "vp" and c.k == 1]
    sdxl = hs.NoiseSchedule.scaled_linear().sigma([float(t) for t in levels.LANDINGS])
    assert (
        levels_of[::2] == pytest.approx(sdxl.tolist(), rel=1e-6)
        and levels_of[::2] == levels_of[1::2]
    )
    assert all(a > b for a, b in pairwise(levels_of[::2]))


def test_the_crossing_lies_between_two_levels_in_the_logarithm() -> None:
    falling = np.array([8.0, 4.0, 2.0])
    assert levels.crossing(falling, np.array([0.0, 0.25, 0.75])) == pytest.approx(8**0.5)
    assert levels.crossing(falling, np.array([0.0, 1.0, 0.0])) == pytest.approx(32**0.5)
    assert np.isnan(levels.crossing(falling, np.array([0.6, 0.7, 0.8])))
    assert np.isnan(levels.crossing(falling, np.array([0.1, 0.2, 0.3])))


def test_a_report_has_every_case_and_its_ends_are_none_and_all(
    lab: levels.Lab, tmp_path: Path
) -> None:
    every = levels.cases()
    wide = {name: 0.02 * (1 + i / len(every)) for i, name in enumerate(every)}
    wide |= {f"{p} base alone": 0.06 for p in ("vp", "flow")}
    wide |= {f"{p} distilled alone": 0.01 for p in ("vp", "flow")}
    sampled = {name: made(width) for name, width in wide.items()}
    report = levels.report_of(sampled, lab)
    assert list(report["cases"]) == list(every)
    for process in ("vp", "flow"):
        base, student = (report["cases"][f"{process} {m} alone"] for m in ("base", "distilled"))
        assert base["recovered"]["value"] == 1.0 and student["recovered"]["value"] == 0.0
    assert sum(row["trained"] for row in report["cases"].values()) == 2 + 3 * 4
    assert report["seconds"] == len(every)
    text = levels.table(report)
    assert text.count("\n| 21.00 |") == 4 and text.count("| 4.08 * |") == 4
    pytest.importorskip("matplotlib", reason="of the bench extra")
    levels.level_pictures.draw(report, tmp_path / "level.png")
    assert (tmp_path / "level.png").stat().st_size > 10_000


def test_a_case_that_is_there_is_read_and_not_drawn_again(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    first = measured.cached(folder, ["case", 1], lambda: made(0.1))

    def never() -> measured.Sampled:
        raise AssertionError

    again = measured.cached(folder, ["case", 1], never)
    assert again.passes == first.passes and again.nearest is None and again.seconds == 1.0
    assert np.array_equal(again.features, first.features)
    key = hashlib.sha256(b'["case", 1]').hexdigest()[:24]
    assert [path.name for path in folder.iterdir()] == [f"{key}.npz"]
    with pytest.raises(AssertionError):
        measured.cached(folder, ["case", 2], never)
