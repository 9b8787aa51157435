"""Any CLIP folder as a concept scorer: contrast of a phrase with naming nothing.

contrast = 100*(cos(image, phrase) - cos(image, "a picture"))

A raw cosine of CLIP has no zero: what says that a concept is there is that naming it fits better
than not naming it, by a margin. 100 is the scale CLIP was trained with (arXiv:2103.00020), so the
contrast is a log-odds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headstart.errors import CheckpointError
from headstart.traces.timeline import ConceptScorer, phrase_of

NEUTRAL = "a picture"
SCALE = 100.0
_NOUNS = """airplane anchor apple bicycle book bridge bus butterfly cactus camel candle castle chair
clock cow crab crown drum elephant fence fountain giraffe guitar hammer helicopter kettle key ladder
lamp lighthouse lizard mushroom piano pizza rocket rose sailboat snail spoon suitcase teapot tractor
train trumpet umbrella violin waterfall windmill zebra"""
UNASKED = tuple(phrase_of(noun) for noun in _NOUNS.split())
"""Things to measure margins with: a prompt rarely has more than one of them."""
_BATCH = 16


def clip_scorer(folder: Path | str, *, device: torch.device | str = "cpu") -> ConceptScorer:
    """A scorer from a folder with a transformers CLIP model, its tokenizer and image processor.

    Nothing is fetched, no code from the folder runs, and only safetensors weights are read. Raises
    CheckpointError where the folder does not hold such a model.
    """
    from transformers import CLIPModel, CLIPProcessor

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{str(path)!r} is no CLIP folder: expected config.json, model.safetensors, a "
            "tokenizer and preprocessor_config.json in it"
        )
    try:
        loader: Any = CLIPModel
        model: Any = loader.from_pretrained(path, local_files_only=True, use_safetensors=True)
        reader: Any = CLIPProcessor
        processor: Any = reader.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{str(path)!r} is no CLIP model: {told[0]}") from error
    model = model.to(device).eval().requires_grad_(False)

    def score(rgb: NDArray[np.uint8], phrases: Sequence[str]) -> NDArray[np.float64]:
        with torch.inference_mode():
            words = processor(
                text=[*phrases, NEUTRAL], return_tensors="pt", padding=True, truncation=True
            ).to(device)
            text = _unit(model.get_text_features(**words))
            parts: list[torch.Tensor] = []
            for begin in range(0, len(rgb), _BATCH):
                pictures = processor(
                    images=list(rgb[begin : begin + _BATCH]), return_tensors="pt"
                ).to(device)
                parts.append(_unit(model.get_image_features(**pictures)) @ text.T)
        cosines = torch.cat(parts).double().cpu().numpy()
        return SCALE * (cosines[:, :-1] - cosines[:, -1:])

    return ConceptScorer(
        name=f"CLIP {path.name}",
        score=score,
        meaning=f"100 x (cosine with the phrase - cosine with “{NEUTRAL}”)",
        unasked=UNASKED,
    )


def _unit(features: Any) -> torch.Tensor:
    """Of unit length; transformers 5 gives an output object where older ones gave the tensor."""
    tensor: torch.Tensor = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(tensor.float(), dim=-1)
