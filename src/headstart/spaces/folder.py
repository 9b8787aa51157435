"""CLIP (arXiv:2103.00020), DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104) in a folder.

The folder is one that transformers saved: config.json, preprocessor_config.json, model.safetensors,
and for CLIP the tokenizer, with which it also scores pictures against prompts. DINOv3's
configuration resizes after the division by 255; here it is done before, as for all others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from headstart.checkpoint.foreign import convert_hint
from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import CheckpointError, InputError
from headstart.fork import check_threads
from headstart.input import check_shape, read_json
from headstart.spaces.extractor import Array, Extractor, Judge, Rgb, Score, in_batches
from headstart.spaces.preparation import Preparation, read_preparation

KINDS = ("clip", "dinov2", "dinov3_vit")
PICKLE = "pytorch_model.bin"


def read_folder(folder: Path) -> Judge:
    """Features of a folder's model, and scores where it reads text.

    Raises InputError for another kind of model, CheckpointError for weights that are not whole.
    """
    check_threads()
    config = read_json(folder / "config.json", "that of a folder of features", {})
    kind = config.get("model_type")
    if kind not in KINDS:
        raise InputError(
            f"{str(folder)!r} holds a {kind!r} model: features come from {' or '.join(KINDS)}"
        )
    prepare = read_preparation(folder / "preprocessor_config.json")
    model, digest = _load(folder)
    name = f"{kind.removesuffix('_vit')}:{folder.name}:{digest[:12]}"
    if kind != "clip":
        return Judge((Extractor(name, in_batches(_pooled(prepare, model))),))
    extractor = Extractor(name, in_batches(_pooled(prepare, model.get_image_features)))
    score, scores = _clip_scores(folder, config, prepare, model)
    return Judge((extractor,), score, name, scores)


def cosines_of(images: torch.Tensor, texts: torch.Tensor) -> Array:
    """[n], of n pictures [n, e] and their own prompts; [n, P] of [n, 1, e] and P prompts."""
    return torch.nn.functional.cosine_similarity(images.double(), texts.double(), dim=-1).numpy()


def _pooled(prepare: Preparation, network: Callable[..., Any]) -> Callable[[Rgb], Array]:
    """DINO's normalised class token, or CLIP's projected one: `pooler_output` or the tensor."""

    def features(rgb: Rgb) -> Array:
        with torch.inference_mode():
            output = network(pixel_values=prepare.pixels(rgb))
            return _tensor(output).double().numpy()

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
    except Exception as error:  # transformers and tokenizers raise errors of any kind
        raise CheckpointError(f"{str(folder)!r}: its tokenizer cannot be read: {error}") from error

    @lru_cache(maxsize=4)  # a timeline asks for the same phrases at every step
    def texts(prompts: tuple[str, ...]) -> torch.Tensor:
        tokens: Any = tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            return _tensor(model.get_text_features(**inputs))

    def images(rgb: Rgb) -> torch.Tensor:
        with torch.inference_mode():
            return _tensor(model.get_image_features(pixel_values=prepare.pixels(rgb)))

    def score(rgb: Rgb, prompts: Sequence[str]) -> Array:
        return cosines_of(images(rgb), texts(tuple(prompts)))

    def scores(rgb: Rgb, prompts: Sequence[str]) -> Array:
        return cosines_of(images(rgb)[:, None], texts(tuple(prompts)))

    return score, scores


def _load(folder: Path) -> tuple[Any, str]:
    """The model in float32 and SHA-256 of its weights, without pickles and remote code."""
    import transformers
    from transformers.utils import logging

    files = _files(folder)
    Checkpoint(files)  # raises for a header that is hostile, truncated or overlapping
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        auto: Any = transformers.AutoModel
        model, info = auto.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # transformers raises errors of any kind
        raise CheckpointError(f"{str(folder)!r} cannot be loaded: {error!r:.200}") from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    missing = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))
    if missing:
        raise CheckpointError(
            f"{str(folder)!r} lacks {len(missing)} tensors such as {missing[0]!r}: they would be "
            "random; give complete weights"
        )
    names = (n for n, value in model.state_dict().items() if not torch.isfinite(value).all())
    if (name := next(names, None)) is not None:
        raise CheckpointError(
            f"{str(folder)!r}: {name!r} holds NaN or Inf, so every number would: fetch it again"
        )
    return model.eval(), _digest(files)


def _files(folder: Path) -> tuple[Path, ...]:
    single = folder / "model.safetensors"
    if files := (single,) if single.exists() else tuple(sorted(folder.glob("model-*.safetensors"))):
        return files
    pickle = folder / PICKLE
    fix = "save the model with safetensors; pickles are not read"
    if pickle.is_file():
        hint = convert_hint(pickle).replace("pytorch_model.safetensors", single.name)
        fix = f"pickles are not read here: {hint}"
    raise CheckpointError(f"{str(folder)!r} has no model.safetensors: {fix}")


def _digest(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output
