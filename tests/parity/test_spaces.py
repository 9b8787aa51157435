"""Published feature spaces against their authors' own programs, on the same seeded weights.

The numbers in spaces.json came from pytorch-fid, torch-fidelity, lpips, dreamsim and image-reward
(`record_spaces.py` says which versions, and why they are not installed here). Each is known in
float32, as those programs run, and in float64: ours may be 4 times as far from float64 as theirs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fidelity_oracle import frechet
from numpy.typing import NDArray
from PIL import Image
from published import (
    inception_tensors,
    pictures,
    write_dreamsim,
    write_lpips,
    write_reward,
)
from safetensors.torch import save_file

from headstart.cli import main
from headstart.metrics.gram import group_features
from headstart.metrics.metrics import distances
from headstart.spaces.published import read_published

RECORDED = json.loads(Path(__file__).with_name("spaces.json").read_text())
RGB = pictures(4, 96, 80)
VARIANTS = sorted({name.rpartition(" ")[0] for name in RECORDED["dreamsim"]})


def assert_close(actual: NDArray[np.float64], single: object, double: object) -> None:
    exact = np.array(double)
    theirs = np.abs(np.array(single) - exact).max()
    assert 0.0 < theirs < 1e-4 * np.abs(exact).max()  # else the numbers themselves are no good
    assert np.abs(actual - exact).max() <= 4.0 * theirs


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.safetensors"
    save_file(inception_tensors(), path)
    return path


def test_inceptions_features_are_those_of_pytorch_fid(inception: Path) -> None:
    result = read_published(inception).extractor.features(RGB[:2])
    assert result.shape == (2, 2048)
    recorded = RECORDED["inception"]
    assert_close(result[:, ::64], recorded["pytorch-fid 32"], recorded["pytorch-fid 64"])


def test_resized_as_tensorflow_did_they_are_those_of_torch_fidelity(inception: Path) -> None:
    extractor = read_published(inception, "inception-tf1").extractor
    recorded = RECORDED["inception"]
    theirs = np.array(recorded["torch-fidelity"])
    error = np.abs(
        np.array(recorded["pytorch-fid 32"]) - np.array(recorded["pytorch-fid 64"])
    ).max()
    assert (
        np.abs(extractor.features(RGB[:2])[:, ::64] - theirs).max() <= 8.0 * error
    )  # both rounded
    assert np.abs(theirs - np.array(recorded["pytorch-fid 64"])).max() > 1000.0 * error
    a, b = (extractor.features(pictures(3, 96, 80, seed)) for seed in (1, 2))
    assert frechet(a, b) == pytest.approx(recorded["torch-fidelity fid"], rel=1e-5)


def test_the_fid_of_two_folders_is_pytorch_fids(
    inception: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(write_run(tmp_path / name, seed)) for name, seed in (("a", 1), ("b", 2))]
    command = ["evaluate", folders[0], "--features", str(inception), "--reference", folders[1]]
    assert main([*command, "--json"]) == 0
    (row,) = (report := json.loads(capsys.readouterr().out))["rows"]
    assert report["frechet_is"] == "FID"
    assert row["frechet"]["value"] == pytest.approx(RECORDED["inception"]["fid"], rel=1e-5)
    assert row["frechet"]["over_seeds_95"][0] <= row["frechet"]["value"]


def write_run(folder: Path, seed: int) -> Path:
    """Three pictures that a run claims to have drawn."""
    folder.mkdir()
    for n, rgb in enumerate(pictures(3, 96, 80, seed)):
        Image.fromarray(rgb).save(folder / f"{n:06d}.png")
    table = {"name": "hybrid", "columns": ["guidance"], "rows": [[1.0]]}
    record = {"prompts": ["a fox"] * 3, "seeds": [0, 1, 2], "table": table, "lineage": "sdxl"}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_the_packages(net: str, tmp_path: Path) -> None:
    extractor = read_published(write_lpips(tmp_path, net)).extractor  # type: ignore[arg-type]
    assert extractor.name.startswith(f"lpips-{net}:") and extractor.distance == "squared"
    recorded = RECORDED["lpips"]
    for features in (extractor.features(RGB), group_features(extractor, RGB)):
        result = distances(features, "squared")
        assert_close(result, recorded[f"{net} 32"], recorded[f"{net} 64"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_dreamsim_is_the_packages(variant: str, tmp_path: Path) -> None:
    write_dreamsim(tmp_path, variant, pickles=False)
    extractor = read_published(tmp_path).extractor
    assert extractor.name.startswith(f"dreamsim:{variant}:")
    recorded = RECORDED["dreamsim"]
    result = distances(extractor.features(RGB), extractor.distance)
    assert_close(result, recorded[f"{variant} 32"], recorded[f"{variant} 64"])


def test_rewards_are_those_of_image_reward(tmp_path: Path) -> None:
    judge = read_published(write_reward(tmp_path, pickles=False))
    assert judge.spaces == () and judge.score is not None
    prompts = ("a fox", "A foxy owl, in the snow", "the unknown " * 30, "")
    recorded = RECORDED["imagereward"]
    assert_close(judge.score(RGB, prompts), recorded["32"], recorded["64"])
    alone = judge.score(RGB[1:2], prompts[1:2])  # without the padding of a longer prompt
    assert alone[0] == pytest.approx(recorded["64"][1], abs=1e-4)
