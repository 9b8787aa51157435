"""Folders as numbers: what is read, what is paired, and what the table and the JSON say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fidelity_oracle import frechet
from PIL import Image

from headstart.cli import main
from headstart.errors import InputError
from headstart.metrics.features import open_features
from headstart.metrics.metrics import diversity, vendi
from headstart.pictures.png import encode_png
from headstart.sweep.evaluation import contrast, evaluate
from headstart.sweep.gallery import load_rgb, read_gallery, read_pictures
from headstart.sweep.gallery_features import extract_features, read_reference
from headstart.sweep.jobs import Case
from headstart.sweep.ledger import FORMAT, Shard, open_ledger
from headstart.sweep.sweep import sweep

PROMPTS = ("a fox", "an owl", "a frog")
SETTINGS = {"format": FORMAT, "plan": "demo-hybrid", "passes": 4, "cases": {"count": 12}}


def cases(count: int = 12) -> list[Case]:
    return [Case(n, PROMPTS[n % 3], n // 3) for n in range(count)]


def make_sweep(folder: Path, spread: float, world: int = 1, ranks: int | None = None) -> Path:
    """Pictures around a colour of the prompt, `spread` apart; `ranks` of `world` have run."""

    def draw(part: list[Case]) -> list[bytes]:
        found = []
        for case in part:
            own = np.random.default_rng(case.number).normal(0.0, spread, (16, 16, 3))
            place = np.zeros((16, 16, 3)) + 60.0 * PROMPTS.index(case.prompt)
            found.append(encode_png((place + 60.0 + own).clip(0, 255).astype(np.uint8)))
        return found

    for rank in range(world if ranks is None else ranks):
        with open_ledger(folder, SETTINGS, Shard(rank, world)) as ledger:
            sweep(cases(), draw, ledger, batch=2)
    return folder


def test_a_sharded_sweep_reads_as_an_unsharded_one(tmp_path: Path) -> None:
    one = read_gallery(make_sweep(tmp_path / "one", 9.0))
    three = read_gallery(make_sweep(tmp_path / "three", 9.0, world=3))
    assert [p[:2] for p in one.pictures] == [p[:2] for p in three.pictures]
    assert one.prompts == PROMPTS and one.sizes == (4, 4, 4) and one.missing == 0
    for a, b in zip(load_rgb([p.path for p in one.pictures]),
                    load_rgb([p.path for p in three.pictures]), strict=True):  # fmt: skip
        assert np.array_equal(a, b)


def test_an_unfinished_sweep_says_how_much_is_missing(tmp_path: Path) -> None:
    gallery = read_gallery(make_sweep(tmp_path, 9.0, world=3, ranks=2))
    assert len(gallery.pictures) == 8 and gallery.missing == 4


def test_the_numbers_are_those_of_the_metrics_by_prompt(tmp_path: Path) -> None:
    judge = open_features("colours")
    seen = extract_features(read_gallery(make_sweep(tmp_path / "a", 30.0)), judge)
    other = make_sweep(tmp_path / "b", 10.0)
    reference = read_reference(str(other), judge)
    (row,) = evaluate([seen], judge, reference).rows
    groups = seen.by_prompt(seen.features)
    assert [len(group) for group in groups] == [4, 4, 4]
    varied, effective = row.variety.diversity, row.variety.vendi
    assert varied is not None and effective is not None and row.frechet is not None
    assert varied.value == pytest.approx(np.mean([diversity(group) for group in groups]))
    assert effective.value == pytest.approx(np.mean([vendi(group) for group in groups]))
    assert reference.features is not None and row.kid is not None and row.neighbours is not None
    assert row.frechet.value == pytest.approx(frechet(seen.features, reference.features), rel=1e-6)
    assert row.to_json()["mss"] == pytest.approx(1.0 - varied.value, abs=1e-5)


def test_only_shared_prompts_and_seeds_are_paired(tmp_path: Path) -> None:
    judge = open_features("colours")
    wide = extract_features(read_gallery(make_sweep(tmp_path / "wide", 40.0)), judge)
    part = extract_features(
        read_gallery(make_sweep(tmp_path / "part", 10.0, world=3, ranks=2)), judge
    )
    found = contrast(wide, part, judge)
    assert found is not None and found.diversity is not None
    assert (found.prompts, found.images, found.score) == (3, 8, None)
    assert found.diversity.over_prompts is not None
    assert found.diversity.over_prompts.value > 0
    same = contrast(wide, wide, judge)
    assert same is not None and same.diversity == (0, (0, 0, 0), (0, 0, 0), 1.0)


def test_evaluate_prints_a_table_and_the_same_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (str(make_sweep(tmp_path / name, s)) for name, s in (("a", 10.0), ("b", 40.0)))
    command = ["evaluate", a, b, "--features", "colours", "--reference", a]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (
        "features: colours-8x8 · structure: diversity of" in printed
        and f"{b} minus {a}, 3 prompts, 12 images each" in printed
    )
    assert "p = 0.25 (sign flips over prompts)" in printed  # three prompts: 2 of 8 patterns
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["features"] == "colours-8x8"
    assert list(found["rows"][0]["spaces"]) == ["colours-8x8", "structure-16x16"]
    assert found["reference"] == {"name": a, "images": 12}
    assert [row["folder"] for row in found["rows"]] == [a, b]
    assert found["rows"][0]["frechet"]["value"] == pytest.approx(0.0, abs=1e-6)
    near = found["rows"][0]["neighbours"]
    assert near["coverage"]["value"] == 1.0
    for measured in (found["rows"][0]["frechet"], found["rows"][0]["kid"], *near.values()):
        assert set(measured) == {"value", "over_prompts_95", "over_seeds_95"}
        for low, high in (measured["over_prompts_95"], measured["over_seeds_95"]):
            assert low <= high
    assert found["paired"][0]["diversity"]["difference"] > 0
    assert found["rows"][1]["score"] is None


def test_one_image_a_prompt_has_a_frechet_distance_and_no_diversity(tmp_path: Path) -> None:
    folder = tmp_path / "few"
    with open_ledger(folder, SETTINGS, Shard()) as ledger:
        sweep(
            [Case(n, f"prompt {n}", 0) for n in range(6)],
            lambda part: [
                encode_png(np.full((16, 16, 3), 20 * c.number + 9, np.uint8)) for c in part
            ],
            ledger,
            batch=6,
        )
    judge = open_features("colours")
    seen = extract_features(read_gallery(folder), judge)
    (row,) = evaluate([seen], judge, read_reference(str(folder), judge)).rows
    assert row.variety.diversity is None and row.varied == 0
    assert row.frechet is not None and row.frechet.over_prompts is not None
    assert row.frechet.over_seeds is None  # one image a prompt: there are no seeds to draw
    assert row.frechet.over_prompts.high > row.frechet.over_prompts.low


def test_a_folder_of_sample_is_read_from_its_record(tmp_path: Path) -> None:
    for n in range(3):
        Image.new("RGB", (16, 16), (n, n, n)).save(tmp_path / f"{n:06d}.png")
    columns = ["model", "guidance"]
    table = {"name": "demo-base", "columns": columns, "rows": [["base", 2.0], ["base", 1.0]]}
    record = {"prompts": ["b", "a", "b"], "seeds": [5, 1, 2], "table": table}
    (tmp_path / "record.json").write_text(json.dumps(record))
    gallery = read_gallery(tmp_path)
    assert [p[:2] for p in gallery.pictures] == [("b", 2), ("b", 5), ("a", 1)]
    assert (gallery.plan, gallery.passes) == ("demo-base", 3)


def test_an_image_that_two_cases_share_is_counted_once(tmp_path: Path) -> None:
    with open_ledger(tmp_path, SETTINGS, Shard()) as ledger:
        sweep(
            [Case(4, "a", 1), Case(7, "a", 1), Case(8, "a", 2)],
            lambda part: [np.zeros((8, 8, 3), np.uint8)] * len(part),
            ledger,
            batch=3,
        )
    assert [p.path.name for p in read_gallery(tmp_path).pictures] == ["000004.png", "000008.png"]


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        read_gallery(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no sweep.json and no record.json"):
        read_gallery(tmp_path)
    with pytest.raises(InputError, match="no pictures"):
        read_pictures(tmp_path)
    for name in ("000000.png", "grid.png"):
        (tmp_path / name).touch()
    assert [path.name for path in read_pictures(tmp_path)] == ["000000.png", "grid.png"]
    (tmp_path / "record.json").touch()  # so grid.png is the contact sheet of a run
    assert [path.name for path in read_pictures(tmp_path)] == ["000000.png"]
    folder = make_sweep(tmp_path / "own", 9.0)
    (folder / "000003.png").unlink()
    with pytest.raises(InputError, match=r"000003.png and 0 more are gone"):
        read_gallery(folder)
    (tmp_path / "record.json").write_text('{"prompts": []}')
    with pytest.raises(InputError, match="damaged"):
        read_gallery(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        list(load_rgb([tmp_path / "bad.png"]))
    with pytest.raises(InputError, match="bundled reference is of headstart-demo-scorer"):
        read_reference("bundled", open_features("colours"))
