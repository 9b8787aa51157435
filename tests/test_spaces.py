"""Files of feature spaces that are not what they should be, and spaces too long to keep.

What right files give is compared with their authors' programs in `parity/test_spaces.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from published import WORDS, pictures, seeded, vit_tensors, write_dreamsim, write_reward
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.cli import main
from headstart.compare.compare import Variety
from headstart.convert.convert import convert
from headstart.errors import CheckpointError, HeadstartError, InputError
from headstart.metrics.features import open_features
from headstart.metrics.gram import gram, group_features
from headstart.metrics.metrics import cosines, distances, diversity, vendi
from headstart.metrics.resample import measure_diversity
from headstart.spaces import lpips
from headstart.spaces.extractor import Extractor
from headstart.spaces.lpips import LAYERS
from headstart.spaces.published import read_published
from headstart.sweep.gallery import read_gallery
from headstart.sweep.seen import read_reference, see
from headstart.traces.structure import feature_space

RGB = pictures(5, 64, 48)
Tensors = dict[str, Tensor]


def small_alex() -> tuple[Tensors, Tensors]:
    """AlexNet and LPIPS' linear layers with a few channels each: widths are the file's."""
    widths = dict(zip((0, 3, 6, 8, 10), (4, 6, 8, 6, 5), strict=True))
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for layer in LAYERS["alex"]:
        width = widths[layer.number]
        shapes[f"features.{layer.number}.weight"] = (width, channels, layer.kernel, layer.kernel)
        shapes[f"features.{layer.number}.bias"] = (width,)
        channels = width
    lin = {f"lin{n}.model.1.weight": (1, w, 1, 1) for n, w in enumerate(widths.values())}
    return seeded(shapes), seeded(lin)


@pytest.fixture
def alex(tmp_path: Path) -> Path:
    folder = tmp_path / "alex"
    folder.mkdir()
    backbone, lin = small_alex()
    save_file(backbone, folder / "alexnet.safetensors")
    save_file(lin, folder / "lin.safetensors")
    return folder


@pytest.fixture(scope="module")
def dreamsim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("dreamsim") / "models"
    write_dreamsim(home, "clip_vitb32_single", pickles=False)
    return home


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward(tmp_path_factory.mktemp("reward"), pickles=False)


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


# --------------------------------------------------------------------- what a file is


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"fc.weight": (1000, 2048), "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1)},
         r"torchvision's Inception: its features give no FID: give pt_inception"),
        ({"features.0.weight": (8, 3, 3, 3), "features.34.weight": (8, 8, 3, 3)},
         "is VGG-19: LPIPS is of VGG-16"),
        ({"lin0.model.1.weight": (1, 64, 1, 1), "lin6.model.1.weight": (1, 512, 1, 1)},
         "SqueezeNet's linear layers of LPIPS: give those of alex or vgg"),
        ({"pos_drop.weight": (8,), "cls_token": (1, 1, 8)},
         "a backbone of DreamSim: give the folder that has all of them"),
        ({"embeddings.cls_token": (1, 1, 8)},
         r"a model of transformers: give its folder, with config\.json"),
        ({"conv_in.weight": (8, 4, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)},
         r"holds: UNet \(with 'conv_in.weight'\)\. Features come from Inception"),
        ({"some.weight": (2,)}, "holds: no network that is known here"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_space_is_named(
    tensors: Mapping[str, tuple[int, ...]], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "some.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(InputError, match=says) as refused:
        open_features(str(path))
    assert str(path) in str(refused.value) and str(refused.value).count("\n") == 0


def test_a_file_cut_short_and_a_pickle_that_asks_for_more_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file(small_alex()[0], path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated"):
        open_features(str(path))
    torch.save({"features.0.weight": Path("/")}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="asks for `pathlib"):
        open_features(str(tmp_path / "bad.pth"))
    (tmp_path / "empty.pth").touch()
    with pytest.raises(CheckpointError, match="at least 10 bytes"):
        open_features(str(tmp_path / "empty.pth"))


def test_the_word_before_the_path_must_be_what_is_there(alex: Path) -> None:
    assert open_features(f"lpips:{alex}").extractor.name.startswith("lpips-alex:lin:")
    with pytest.raises(InputError, match="is lpips: leave the word before the colon out"):
        open_features(f"dreamsim:{alex}")
    with pytest.raises(InputError, match="there is no such file or folder"):
        open_features("lpips:nowhere")


# --------------------------------------------------------------------- LPIPS


def test_half_of_lpips_says_which_half_is_missing(alex: Path, tmp_path: Path) -> None:
    (alex / "lin.safetensors").rename(tmp_path / "lin.safetensors")
    with pytest.raises(InputError, match=r"LPIPS alex and 0 sets of linear .*put one weights/v0.1"):
        open_features(str(alex))
    with pytest.raises(InputError, match=r"no backbone: put alexnet-owt-7be5be79\.pth or vgg16"):
        open_features(str(tmp_path / "lin.safetensors"))
    shutil.copy(tmp_path / "lin.safetensors", alex / "a.safetensors")
    shutil.copy(tmp_path / "lin.safetensors", alex / "b.safetensors")
    with pytest.raises(InputError, match="2 sets of linear layers"):
        open_features(str(alex))
    shutil.copy(alex / "alexnet.safetensors", alex / "c.safetensors")
    with pytest.raises(InputError, match="2 backbones of LPIPS: leave one"):
        open_features(str(alex))


def test_linear_layers_of_another_net_may_lie_beside_the_right_ones(alex: Path) -> None:
    widths = (64, 128, 256, 384, 384, 512, 512)
    squeeze = {f"lin{n}.model.1.weight": (1, width, 1, 1) for n, width in enumerate(widths)}
    save_file(seeded(squeeze), alex / "squeeze.safetensors")
    vgg = {f"lin{n}.model.1.weight": (1, 64, 1, 1) for n in range(5)}
    save_file(seeded(vgg), alex / "vgg.safetensors")
    assert open_features(str(alex)).extractor.name.startswith("lpips-alex:")


@pytest.mark.parametrize("way", ["negative", "old", "nan", "narrow", "deep"])
def test_weights_of_lpips_that_are_not_its_own_are_refused(
    way: str, alex: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, lin = small_alex()
    says = {"negative": "negative numbers", "old": r"version 0\.0.*give weights/v0\.1",
            "nan": "holds NaN or Inf", "narrow": "of another shape, such as features.8.weight",
            "deep": "1 unexpected, such as features.12.weight"}[way]  # fmt: skip
    if way == "negative":
        lin["lin2.model.1.weight"][0, 1] = -0.1
    if way == "old":
        digest = hashlib.sha256(lin["lin0.model.1.weight"].numpy().tobytes()).hexdigest()
        monkeypatch.setattr(lpips, "OLD", (digest,))
    if way == "nan":
        backbone["features.3.bias"][2] = torch.nan
    if way == "narrow":
        backbone["features.8.weight"] = backbone["features.8.weight"][:, 1:].contiguous()
    if way == "deep":
        backbone["features.12.weight"] = torch.zeros(5, 5, 3, 3)
    save_file(backbone, alex / "alexnet.safetensors")
    save_file(lin, alex / "lin.safetensors")
    with pytest.raises(CheckpointError, match=says):
        open_features(str(alex))


def test_a_state_of_the_packages_module_is_lpips_in_one_file(alex: Path, tmp_path: Path) -> None:
    backbone, lin = small_alex()
    slices = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
    whole = {**lin, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for name, tensor in backbone.items():
        _, number, kind = name.split(".")
        whole[f"net.slice{slices[int(number)]}.{number}.{kind}"] = tensor
    path = tmp_path / "lpips.pth"
    torch.save(whole, path)
    pair, one = open_features(str(alex)).extractor, open_features(str(path)).extractor
    np.testing.assert_array_equal(pair.features(RGB), one.features(RGB))
    convert(path, tmp_path / "lpips.safetensors")
    again = open_features(str(tmp_path / "lpips.safetensors")).extractor
    np.testing.assert_array_equal(one.features(RGB), again.features(RGB))
    assert len({pair.name, one.name, again.name}) == 3  # the digest is that of the files


def test_pictures_too_small_for_lpips_are_refused(alex: Path) -> None:
    with pytest.raises(InputError, match="at least 32 px, got 31x48"):
        open_features(str(alex)).extractor.features(RGB[:, :31])


# --------------------------------------------------------------------- DreamSim


def test_dreamsims_files_that_are_missing_are_named(dreamsim: Path, tmp_path: Path) -> None:
    home = shutil.copytree(dreamsim, tmp_path / "models")
    backbone = home / "clip_vitb32_pretrain.safetensors"
    backbone.rename(home / "checkpoints" / backbone.name)
    assert open_features(str(home)).extractor.name.startswith("dreamsim:clip_vitb32_single:")
    (home / "checkpoints" / backbone.name).unlink()
    with pytest.raises(InputError, match=r"needs clip_vitb32_pretrain.pth .*it is not in"):
        open_features(str(home))
    (home / "clip_vitb32_single_lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="needs adapter_model"):
        open_features(str(home))
    (home / "clip_vitb32_single_lora").rename(home / "mine")
    with pytest.raises(InputError, match=r"no variant of DreamSim .*rename it to one of ensemble"):
        open_features(str(home))


def test_of_several_dreamsims_in_a_folder_one_must_be_named(dreamsim: Path, tmp_path: Path) -> None:
    home = shutil.copytree(dreamsim, tmp_path / "models")
    write_dreamsim(home, "open_clip_vitb32_single", pickles=True)
    with pytest.raises(InputError, match="several DreamSims, clip_vitb32_single_lora, open_clip"):
        open_features(str(home))
    first = open_features(str(home / "clip_vitb32_single_lora")).extractor
    other = open_features(f"dreamsim:{home / 'open_clip_vitb32_single_lora'}").extractor
    assert first.name.startswith("dreamsim:clip_vitb32_single:")
    assert not np.allclose(first.features(RGB), other.features(RGB))  # pickles are read as well


def change(path: Path, how: Callable[[Tensors], object]) -> None:
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path)


def deeper(tensors: Tensors) -> None:
    extra = {n: t for n, t in tensors.items() if n.startswith("blocks.11.")}
    tensors.update({n.replace(".11.", ".12."): t.clone() for n, t in extra.items()})


def stray(tensors: Tensors) -> None:
    tensors["base_model.model.mlp.lora_A.weight"] = torch.zeros(4, 128)


def unpaired(tensors: Tensors) -> None:
    del tensors["base_model.model.extractor_list.0.model.blocks.3.attn.qkv.lora_B.weight"]


def second(tensors: Tensors) -> None:
    name = "base_model.model.extractor_list.{}.model.blocks.3.attn.qkv.lora_A.weight"
    tensors[name.format(1)] = tensors[name.format(0)].clone()


@pytest.mark.parametrize(
    ("file", "how", "says"),
    [
        ("clip_vitb32_pretrain", deeper, "which has 12 blocks; this file has fewer or more"),
        ("clip_vitb32_pretrain", lambda t: t.pop("proj"), r"'proj' is a matrix .* got \[\]"),
        ("clip_vitb32_pretrain", lambda t: t.pop("norm.bias"), "1 missing, such as norm.bias"),
        ("clip_vitb32_pretrain", lambda t: t.update(extra=torch.zeros(1)), "1 unexpected"),
        ("clip_vitb32_pretrain", lambda t: t["norm.bias"].fill_(torch.inf), "holds NaN or Inf"),
        ("clip_vitb32_pretrain", lambda t: t.update(vit_tensors(1, 32, 384, clip=True)),
         "not made for 224 px pictures"),
        ("clip_vitb32_pretrain", lambda t: t.pop("cls_token"), "'cls_token' is not there"),
        ("clip_vitb32_single_lora/adapter_model", stray, "no tensor of a DreamSim LoRA"),
        ("clip_vitb32_single_lora/adapter_model", unpaired, r"blocks.3.attn.qkv' does not fit"),
        ("clip_vitb32_single_lora/adapter_model", second, "with 1 backbones"),
    ],
)  # fmt: skip
def test_dreamsims_files_that_are_others_are_refused(
    file: str, how: Callable[[Tensors], Any], says: str, dreamsim: Path, tmp_path: Path
) -> None:
    home = shutil.copytree(dreamsim, tmp_path / "models")
    change(home / f"{file}.safetensors", how)
    with pytest.raises(CheckpointError, match=says):
        open_features(str(home))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("r", 8, "does not fit this backbone at rank 8"),
        ("r", 0, "asks for another rank or bias"),
        ("use_dora", True, "asks for use_dora"),
        ("bias", "all", "another rank or bias"),
        ("lora_alpha", "much", "lora_alpha must be a finite number"),
    ],
)
def test_a_lora_of_another_kind_is_refused(
    field: str, value: object, says: str, dreamsim: Path, tmp_path: Path
) -> None:
    home = shutil.copytree(dreamsim, tmp_path / "models")
    path = home / "clip_vitb32_single_lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(HeadstartError, match=says):
        open_features(str(home))


# --------------------------------------------------------------------- ImageReward


def test_image_reward_scores_and_the_spaces_stay_the_default_ones(reward: Path) -> None:
    judge = open_features(str(reward.parent))
    assert [space.name for space in judge.spaces] == ["structure-16x16", "colours-8x8"]
    assert judge.scored_by is not None and judge.scored_by.startswith("imagereward:ImageReward:")
    assert judge.score is not None
    many = judge.score(RGB[[0] * 20], ["a fox"] * 20)  # more than one batch
    assert many.shape == (20,) and np.ptp(many) < 1e-4
    assert judge.score(RGB[:1], ["the owl"])[0] != pytest.approx(many[0])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (None, "cannot be read"),
        (["a", "fox"], r"expected at most 14 lines with \[UNK\]"),
        ([*WORDS, "one", "two", "more"], "at most 14 lines"),
    ],
)
def test_image_reward_needs_berts_vocabulary(
    words: list[str] | None, says: str, reward: Path, tmp_path: Path
) -> None:
    shutil.copy(reward, tmp_path)
    if words is not None:
        (tmp_path / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(InputError, match=says) as refused:
        open_features(str(tmp_path / reward.name))
    assert "bert-base-uncased" in str(refused.value)


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("mlp.layers.4.bias", r"ImageReward's head, but 1 missing, such as 4\.bias"),
        ("blip.text_encoder.embeddings.word_embeddings.weight", "word_embeddings.weight' is not"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias", "1 missing"),
        ("blip.visual_encoder.norm.weight", "the picture encoder of ImageReward, but 1 missing"),
    ],
)
def test_image_reward_without_a_tensor_is_refused(
    gone: str, says: str, reward: Path, tmp_path: Path
) -> None:
    home = shutil.copytree(reward.parent, tmp_path / "reward")
    change(home / reward.name, lambda tensors: tensors.pop(gone))
    with pytest.raises(CheckpointError, match=says):
        open_features(str(home))


# --------------------------------------------------------------------- squared distances


def test_squared_distances_are_those_of_the_rows_also_far_from_zero() -> None:
    features = np.random.default_rng(0).normal(size=(7, 5)) + 1e6
    expected = np.square(features[:, None] - features[None]).sum(-1)
    found = distances(features, "squared")
    np.testing.assert_allclose(found, expected, rtol=1e-9)
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
    varied = Variety.of(RGB, extractor)
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
    np.testing.assert_allclose(gram(counted, RGB, held_bytes=2 * row), whole, rtol=1e-12)
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
    asked = ["evaluate", *folders]
    for name in ("structure", str(alex), "colours", str(reward)):
        asked += ["--features", name]
    assert main([*asked, "--reference", folders[1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lpips_name = found["spaces"][1]
    assert found["spaces"] == ["structure-16x16", lpips_name, "colours-8x8"]
    assert lpips_name.startswith("lpips-alex:")
    assert found["scored_by"].startswith("imagereward:") and found["frechet_is"] == "Frechet"
    row = found["rows"][0]
    assert row["frechet"]["value"] > 0 and row["score"]["value"] != 0
    own = row["spaces"][lpips_name]
    assert own["distance"] == "squared" and own["mss"] is None
    extractor = open_features(str(alex)).extractor
    gallery = read_gallery(Path(folders[0]))
    assert gallery.sizes == (3, 2)
    rgb = np.stack([np.asarray(Image.open(p.path)) for p in gallery.pictures])
    groups = [extractor.features(rgb[:3]), extractor.features(rgb[3:])]
    expected = np.mean([diversity(group, "squared") for group in groups])
    assert own["diversity"]["value"] == pytest.approx(expected, abs=1e-6)
    assert set(found["paired"][0]["spaces"]) == set(found["spaces"])
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "lpips: diversity of lpips-alex:" in told and "score: by imagereward:" in told
    assert told.count("\n  lpips ") == told.count("\n  colours ") == 1


def test_a_wide_space_has_no_reference_and_says_so_before_it_looks(
    alex: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "a")
    asked = ["evaluate", str(folder), "--features", str(alex), "--reference", str(folder)]
    assert main(asked) == 2
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
        see(gallery, open_features(str(alex)))
    assert see(gallery, open_features("colours")).features.shape == (5, 192)


CHANGES: Mapping[str, Callable[[Tensor], Tensor | None]] = {
    "gone": lambda _: None,
    "flat": lambda tensor: tensor.reshape(-1) if tensor.ndim > 1 else tensor[None],
    "scalar": lambda _: torch.tensor(1.0),
    "empty": lambda tensor: tensor[:0],
    "wider": lambda tensor: torch.cat([tensor, tensor]),
    "whole numbers": lambda tensor: tensor.to(torch.int32),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["lpips", "dreamsim", "imagereward"])
def test_any_tensor_of_another_kind_is_one_error_that_names_the_file(
    kind: str, change: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "lpips":
        home, names = request.getfixturevalue("alex"), ("alexnet", "lin")
    elif kind == "dreamsim":
        home = shutil.copytree(request.getfixturevalue("dreamsim"), tmp_path / "copy")
        names = ("clip_vitb32_pretrain", "clip_vitb32_single_lora/adapter_model")
    else:
        home = shutil.copytree(request.getfixturevalue("reward").parent, tmp_path / "copy")
        names = ("ImageReward",)
    for path in (home / f"{name}.safetensors" for name in names):
        whole = load_file(path)
        read = [name for name in whole if not name.endswith(("position_ids", "vision_proj.weight"))]
        for name in read[:: max(1, len(read) // 9)]:
            found = CHANGES[change](whole[name])
            kept = {key: tensor for key, tensor in whole.items() if key != name}
            save_file(kept if found is None else {**kept, name: found.contiguous()}, path)
            with pytest.raises(HeadstartError) as refused:
                read_published(home)
            assert str(home) in str(refused.value) and len(str(refused.value)) < 1000
        save_file(whole, path)
    read_published(home)


def test_read_published_takes_one_whole_file_of_a_folder(reward: Path, tmp_path: Path) -> None:
    home = shutil.copytree(reward.parent, tmp_path / "reward")
    shutil.copy(home / reward.name, home / "again.safetensors")
    with pytest.raises(InputError, match="holds imagereward and imagereward: give one file"):
        read_published(home)
    for n in range(8):
        (home / f"{n}.bin").touch()
    with pytest.raises(InputError, match="10 files with weights: expected"):
        read_published(home)
