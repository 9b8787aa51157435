"""`bench/paper.py`: its cases can be drawn, its cells go on, its numbers are what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import headstart as hs
import headstart_weights

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import paper_cases  # noqa: E402
import paper_cells  # noqa: E402
import paper_numbers  # noqa: E402
import paper_pictures  # noqa: E402

sys.path.remove(str(BENCH))
if TYPE_CHECKING:
    from paper_cells import Cell, Lab

pytestmark = pytest.mark.skipif(
    not (Path(headstart_weights.__file__).parent / headstart_weights.MANIFEST).is_file(),
    reason="needs the bundled pair",
)
PROMPTS = ("a fox", "an owl")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return paper_cells.Lab(
        work=tmp_path / "work", data=tmp_path, names=PROMPTS, prompts=PROMPTS, seeds=range(3)
    )


@pytest.fixture(scope="module")
def engine() -> hs.Engine:
    return hs.Engine.demo(device="cpu")


def cell(features: np.ndarray, spread: tuple[float, ...] = ()) -> Cell:
    n = len(features)
    rgb = np.zeros((1, 8, 8, 3), np.uint8)
    ones = np.ones(n)
    return paper_cells.Cell(features, features, ones, ones, rgb, np.array(spread), 4.0)


def cloud(width: float, seed: int) -> np.ndarray:
    """Unit features `width` around one direction."""
    found = np.eye(6)[0] + width * np.random.default_rng(seed).standard_normal((12, 6))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_every_case_is_an_exact_plan_with_the_passes_that_the_paper_gives_it(
    engine: hs.Engine,
) -> None:
    passes = {
        name: engine.compile(case.plan, **case.settings).passes()
        for name, case in paper_cases.cases().items()
    }
    assert (passes["base"], passes["distilled"], passes["hybrid"], passes["skip-first"]) == (
        60, 4, 4, 3,
    )  # fmt: skip
    assert passes["replace-final"] == 1 + 2 * 30  # table E.1: the base does all but the first step
    assert [passes[f"hybrid-n{n}"] for n in (8, 12, 16, 20, 40)] == [5, 6, 7, 8, 13]
    assert set(paper_cases.QUICK) <= set(passes)
    drawn = {name for _, _, names in paper_pictures.FAMILIES.values() for name in names}
    shown = {name for _, names in paper_pictures.SHEETS.values() for name in names}
    assert drawn | shown | set(paper_pictures.LABELS) <= set(passes)


@pytest.mark.parametrize("method", sorted(set(paper_cases.METHODS) - {"global", "first"}))
def test_every_method_draws_one_image_a_seed(engine: hs.Engine, method: str) -> None:
    plan = "base" if method == "interval" else "distilled"
    settings = {"steps": 3} if method == "interval" else {}
    case = paper_cases.Case(plan=plan, about="", settings=settings, method=method, value=2.0)
    drawn = paper_cases.images(engine, case, "a fox", range(3))
    assert drawn.rgb.shape == (3, 64, 64, 3) and drawn.rgb.dtype == np.uint8
    assert drawn.passes == {"select": 5.0, "interval": 5.0}.get(method, 4.0)


def test_the_dial_between_a_base_and_its_lora_ends_at_both(lab: Lab) -> None:
    paper_cells.make_adapter(lab)
    engine = lab.engine("lora")
    own = {name: case for name, case in paper_cases.cases().items() if case.student == "lora"}
    drawn = {
        name: paper_cases.images(engine, own[name], "a fox", range(3)).rgb.astype(int)
        for name in ("global-0", "first-0", "global-1", "first-0.75")
    }
    for name, plan, settings in (
        ("global-0", "replace-final", {"k": 4}),
        ("first-0", "hybrid", {}),
    ):
        expected = engine.sample("a fox", plan=plan, seeds=range(3), **settings).rgb.numpy()
        assert np.abs(drawn[name] - expected).max() <= 1
    apart = [np.abs(drawn[name] - drawn["global-1"]).mean() for name in drawn]
    assert apart[0] > apart[1] > apart[3] > apart[2] == 0


def test_a_cell_that_is_there_is_read_and_one_of_other_settings_or_cut_off_is_not(
    lab: Lab, engine: hs.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.engines["distilled"] = engine
    case = paper_cases.cases()["distilled"]
    assert lab.cells("distilled", case) is None
    for prompt in PROMPTS:
        lab.measure("distilled", case, prompt)
    cells = lab.cells("distilled", case)
    assert cells is not None and [c.features.shape for c in cells] == [(3, 128)] * 2
    expected = engine.sample("an owl", plan="distilled", seeds=range(3)).rgb.numpy()
    assert np.array_equal(cells[1].rgb, expected) and cells[1].right.all()
    assert lab.read("distilled", paper_cases.cases()["hybrid"], "a fox") is None
    path = lab.cell_path("distilled", "a fox")
    path.write_bytes(path.read_bytes()[:-100])
    assert lab.read("distilled", case, "a fox") is None

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(paper_cells.os, "replace", killed)
        lab.measure("distilled", case, "a fox")
    assert lab.read("distilled", case, "a fox") is None and not path.exists()


def test_recovered_is_the_share_of_the_loss_that_came_back() -> None:
    narrow, wide = ([cell(cloud(w, s)) for s in range(4)] for w in (0.05, 0.4))
    assert paper_numbers.recovered(narrow, wide, narrow) == [0.0, 0.0, 0.0]
    assert paper_numbers.recovered(wide, wide, narrow) == [1.0, 1.0, 1.0]
    between = paper_numbers.recovered([cell(cloud(0.2, s)) for s in range(4)], wide, narrow)
    assert 0.0 < between[1] <= between[0] <= between[2] < 1.0


@pytest.mark.parametrize("knows", [True, False])
def test_the_adaptive_control_tells_a_spread_that_knows_from_one_that_does_not(
    knows: bool,
) -> None:
    """k = 2 helps half of the prompts; the spread is low on those, or on others."""
    rng = np.random.default_rng(4)
    needy = np.arange(12) % 2 == 0
    spreads = np.where(needy, 0.1, 0.9) if knows else np.where(np.arange(12) < 6, 0.1, 0.9)
    spreads = spreads + 0.01 * rng.random(12)
    one = [cell(cloud(0.3, p)) for p in range(12)]
    two = [cell(cloud(0.6 if needy[p] else 0.3, p), (float(spreads[p]), 1.0)) for p in range(12)]
    by_k = {1: one, 2: two, 3: [c._replace(spread=np.array([*c.spread, 1.0])) for c in two]}
    pictures = np.concatenate([c.features for c in two])
    of = paper_numbers.References(hs_moments(pictures), "")
    (found,) = [row for row in paper_numbers.adaptive(by_k, of) if row["mean_k"] == 1.5]
    assert (found["p_diversity"] < 0.01) == knows
    assert found["k"] == [2 if s < 0.5 else 1 for s in spreads]


def hs_moments(features: np.ndarray) -> object:
    from headstart.metrics.fidelity import Moments

    return Moments.of(features)


def test_figure_5_matches_a_first_step_with_the_bases_first_that_shows_as_much() -> None:
    base = np.tile(np.linspace(0.1, 1.0, 10), (3, 1))
    part = {"base": base, "distilled": np.full((3, 4), 0.45)}
    found = paper_numbers.figure_5([part, part])
    assert found["matches"] == {"distilled": 5} and found["base_steps"] == 10
    assert found["share"]["base"][9] == [1.0, 1.0, 1.0]
