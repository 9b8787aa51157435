"""A cell of a study: measured again from its pictures where another judge scores them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import headstart as hs
from headstart.metrics.features import open_features
from headstart.study.cases import Case
from headstart.study.lab import Lab
from headstart.study.store import FORMAT, open_store
from headstart.sweep.ledger import Shard

CASE = Case(name="distilled", part="plans", about="", plan="distilled")


def test_another_scorer_in_the_same_spaces_scores_the_kept_pictures_again(tmp_path: Path) -> None:
    judge = open_features("scorer")
    engine = hs.Engine.demo(device="cpu")
    lab = Lab(engine=engine, judge=judge, prompts=("a fox",), seeds=(3, 5))
    other = judge._replace(scored_by="another", score=lambda rgb, prompts: np.full(len(rgb), 0.25))
    again = replace(lab, judge=other)
    with open_store(tmp_path, {"format": FORMAT}, Shard()) as store:
        lab.measure(store, CASE, 0)
        before = lab.read(store, CASE, 0)
        assert before is not None and again.read(store, CASE, 0) is None
        stamps = [path.stat().st_mtime_ns for path in tmp_path.glob("pictures/*/*.png")]
        again.measure(store, CASE, 0)
        cell = again.read(store, CASE, 0)
        assert stamps == [path.stat().st_mtime_ns for path in tmp_path.glob("pictures/*/*.png")]
    assert cell is not None and not np.allclose(before["score"], 0.25)
    np.testing.assert_array_equal(cell["score"], 0.25)
    np.testing.assert_array_equal(
        cell["diversity@" + judge.spaces[0].name], before["diversity@" + judge.spaces[0].name]
    )


def test_kept_pictures_hold_the_record_that_draws_them_again(tmp_path: Path) -> None:
    engine = hs.Engine.demo(device="cpu")
    lab = Lab(
        engine=engine, judge=open_features("scorer"), prompts=("a fox",), seeds=(3, 5, 8), keep=2
    )
    with open_store(tmp_path, {"format": FORMAT}, Shard()) as store:
        lab.measure(store, CASE, 0)
    pictures = sorted(tmp_path.glob("pictures/*/*.png"))
    assert [path.name for path in pictures] == ["000-3.png", "000-5.png"]
    assert hs.replay(pictures[1], engine).seeds == (5,)
