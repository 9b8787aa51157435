"""Any CLIP folder as a concept scorer: contrast of a phrase with naming nothing.

contrast = 100*(cos(image, phrase) - cos(image, "a picture"))

A raw cosine of CLIP has no zero: what says that a concept is there is that naming it fits better
than not naming it, by a margin. 100 is the scale CLIP was trained with (arXiv:2103.00020), so the
contrast is a log-odds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headstart.errors import CheckpointError, InputError
from headstart.spaces.extractor import Array, Rgb
from headstart.spaces.folder import read_folder
from headstart.traces.timeline import ConceptScorer, phrase_of

NEUTRAL = "a picture"
SCALE = 100.0
_NOUNS = """airplane anchor apple bicycle book bridge bus butterfly cactus camel candle castle chair
clock cow crab crown drum elephant fence fountain giraffe guitar hammer helicopter kettle key ladder
lamp lighthouse lizard mushroom piano pizza rocket rose sailboat snail spoon suitcase teapot tractor
train trumpet umbrella violin waterfall windmill zebra"""
UNASKED = tuple(phrase_of(noun) for noun in _NOUNS.split())
"""Things to measure margins with: a prompt rarely has more than one of them."""


def clip_scorer(folder: Path | str) -> ConceptScorer:
    """A scorer from a folder with a transformers CLIP model, its tokenizer and image processor.

    Nothing is fetched, no code from the folder runs, and only safetensors weights are read. Raises
    CheckpointError where the folder does not hold such a model.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{str(path)!r} is no CLIP folder: expected config.json, model.safetensors, a "
            "tokenizer and preprocessor_config.json in it"
        )
    try:
        cosines = read_folder(path).scores
    except (InputError, CheckpointError) as error:
        raise CheckpointError(f"{str(path)!r} is no CLIP model: {error}") from error
    if cosines is None:
        raise CheckpointError(f"{str(path)!r} is no CLIP model: it reads no text")

    def score(rgb: Rgb, phrases: Sequence[str]) -> Array:
        scores = cosines(rgb, [*phrases, NEUTRAL])
        return SCALE * (scores[:, :-1] - scores[:, -1:])

    return ConceptScorer(
        name=f"CLIP {path.name}",
        score=score,
        meaning=f"100 x (cosine with the phrase - cosine with “{NEUTRAL}”)",
        unasked=UNASKED,
    )
