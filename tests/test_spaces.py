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
from published import (
    WORDS,
    pictures,
    seeded,
    small_alex,
    vit_tensors,
    write_dreamsim,
    write_reward,
    write_small_lpips,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.convert.convert import convert
from headstart.errors import CheckpointError, HeadstartError, InputError
from headstart.metrics.features import open_features
from headstart.spaces import lpips
from headstart.spaces.published import read_published

RGB = pictures(5, 64, 48)
Tensors = dict[str, Tensor]


@pytest.fixture
def alex(tmp_path: Path) -> Path:
    return write_small_lpips(tmp_path / "alex")


@pytest.fixture(scope="module")
def dreamsim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("dreamsim") / "models"
    write_dreamsim(home, "clip_vitb32_single", pickles=False)
    return home


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward(tmp_path_factory.mktemp("reward"), pickles=False)


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
        monkeypatch.setattr(lpips, "BUGGY", (digest,))
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
            value = CHANGES[change](whole[name])
            rest = {key: tensor for key, tensor in whole.items() if key != name}
            save_file(rest if value is None else {**rest, name: value.contiguous()}, path)
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
