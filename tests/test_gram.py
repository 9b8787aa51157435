"""Spaces compared by squared distance, whose features are too long to keep, and several at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published import pictures, write_reward, write_small_lpips

from headstart.cli import main
from headstart.compare.compare import SeedVariety
from headstart.errors import InputError
from headstart.metrics.features import open_features
from headstart.metrics.gram import gram, group_features
from headstart.metrics.metrics import cosines, distances, diversity, vendi
from headstart.metrics.resample import measure_diversity
from headstart.spaces.extractor import Extractor
from headstart.sweep.gallery import read_gallery
from headstart.sweep.gallery_features import extract_features, read_reference
from headstart.traces.structure import feature_space

RGB = pictures(5, 64, 48)


@pytest.fixture
def alex(tmp_path: Path) -> Path:
    return write_small_lpips(tmp_path / "alex")


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    (tmp_path / "reward").mkdir()
    return write_reward(tmp_path / "reward", pickles=False)


def write_run(folder: Path, side: int = 64, prompts: int = 2) -> Path:
    """Pictures that a run claims to have drawn: two seeds of each prompt and one more of one."""
    folder.mkdir()
    keys = [(f"prompt {n}", seed) for n in range(prompts) for seed in range(2)] + [("prompt 0", 2)]
    for n, rgb in enumerate(pictures(len(keys), side, side, side)):
        Image.fromarray(rgb).save(folder / f"{n:06d}.png")
    table = {"name": "hybrid", "columns": ["guidance"], "rows": [[1.0]]}
    record = {"prompts": [k[0] for k in keys], "seeds": [k[1] for k in keys], "table": table}
    (folder / "record.json").write_text(json.dumps({**record, "lineage": "sdxl"}))
    return folder


def test_squared_distances_are_those_of_the_rows_also_far_from_zero() -> None:
    features = np.random.default_rng(0).normal(size=(7, 5)) + 1e6
    expected = np.square(features[:, None] - features[None]).sum(-1)
    result = distances(features, "squared")
    np.testing.assert_allclose(result, expected, rtol=1e-9)
    off = expected.sum() / (7 * 6)
    assert diversity(features, "squared") == pytest.approx(off)
    measured = measure_diversity([features, features[:3]], "squared")
    assert measured.values[0] == pytest.approx(off)
    assert distances(np.zeros((2, 3)), "squared").max() == 0.0  # by cosine they have no direction
    with pytest.raises(InputError, match="not finite"):
        distances(np.full((2, 3), np.nan), "squared")


def test_rows_of_a_wide_space_have_the_inner_products_of_its_features(alex: Path) -> None:
    extractor = open_features(str(alex)).extractor
    features, rows = extractor.features(RGB), group_features(extractor, RGB)
    assert rows.shape == (5, 5) and features.shape[1] > 900
    np.testing.assert_allclose(rows @ rows.T, features @ features.T, rtol=1e-9)
    np.testing.assert_allclose(cosines(rows, at_least=2), cosines(features, at_least=2), rtol=1e-9)
    varied = SeedVariety.of(RGB, extractor)
    assert varied.diversity is not None
    assert varied.diversity.value == pytest.approx(diversity(features, "squared"))
    assert varied.vendi == pytest.approx(vendi(features))


def test_only_a_few_pictures_of_a_wide_space_are_kept_at_once(alex: Path) -> None:
    features = open_features(str(alex)).extractor.features
    whole = gram(features, RGB)
    held, most = 0, 0

    def counted(rgb: np.ndarray) -> np.ndarray:
        nonlocal held, most
        held += len(rgb)
        most = max(most, len(rgb))
        return features(rgb)

    row = features(RGB[:1]).shape[1] * 4
    np.testing.assert_allclose(gram(counted, RGB, block_bytes=2 * row), whole, rtol=1e-12)
    assert most == 1  # each by itself in float64, and kept in float32
    assert held == 1 + (2 + 3) + (2 + 1) + 1  # two at a time, with all that come after them


def test_a_curve_in_a_squared_space_is_of_its_own_distance() -> None:
    space = feature_space(Extractor("corner", lambda rgb: rgb[:, 0, 0] * 1.0, "squared"))
    assert space.name == "squared distance of corner features"
    assert space.pair(np.array([3.0, 0.0]), np.array([0.0, 4.0])) == 25.0


def test_evaluate_tells_diversity_in_every_space_that_is_named(
    alex: Path, reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(write_run(tmp_path / name, side)) for name, side in (("a", 64), ("b", 80))]
    command = ["evaluate", *folders]
    for name in ("structure", str(alex), "colours", str(reward)):
        command += ["--features", name]
    assert main([*command, "--reference", folders[1], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    lpips_name = report["spaces"][1]
    assert report["spaces"] == ["structure-16x16", lpips_name, "colours-8x8"]
    assert lpips_name.startswith("lpips-alex:")
    assert report["scored_by"].startswith("imagereward:") and report["frechet_is"] == "Frechet"
    row = report["rows"][0]
    assert row["frechet"]["value"] > 0 and row["score"]["value"] != 0
    values = row["spaces"][lpips_name]
    assert values["distance"] == "squared" and values["mss"] is None
    extractor = open_features(str(alex)).extractor
    gallery = read_gallery(Path(folders[0]))
    assert gallery.sizes == (3, 2)
    rgb = np.stack([np.asarray(Image.open(p.path)) for p in gallery.pictures])
    groups = [extractor.features(rgb[:3]), extractor.features(rgb[3:])]
    expected = np.mean([diversity(group, "squared") for group in groups])
    assert values["diversity"]["value"] == pytest.approx(expected, abs=1e-6)
    assert set(report["paired"][0]["spaces"]) == set(report["spaces"])
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "lpips: diversity of lpips-alex:" in printed and "score: by imagereward:" in printed
    assert printed.count("\n  lpips ") == printed.count("\n  colours ") == 1


def test_a_wide_space_has_no_reference_and_says_so_before_it_looks(
    alex: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "a")
    command = ["evaluate", str(folder), "--features", str(alex), "--reference", str(folder)]
    assert main(command) == 2
    complaint = capsys.readouterr().err
    assert "has no Frechet distance and no KID" in complaint and "features:" not in complaint
    with pytest.raises(InputError, match="Give another --features first"):
        read_reference(str(folder), open_features(str(alex)))


def test_pictures_of_one_prompt_must_be_of_one_size_in_a_wide_space(
    alex: Path, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "a")
    Image.new("RGB", (96, 80)).save(folder / "000000.png")
    gallery = read_gallery(folder)
    with pytest.raises(InputError, match="'prompt 0' are 64x64 and 80x96 px"):
        extract_features(gallery, open_features(str(alex)))
    assert extract_features(gallery, open_features("colours")).features.shape == (5, 192)
