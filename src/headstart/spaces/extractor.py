"""From pictures to numbers: an extractor of features, and a judge, which has several.

rgb uint8 [n, H, W, 3] -> features float64 [n, d], compared by the distance that the extractor names
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rgb = NDArray[np.uint8]
Array = NDArray[np.float64]
Distance = Literal["cosine", "squared"]
"""cosine: 1 - cos(f, g); squared: |f - g|^2."""

BATCH = 16
"""Pictures in a network's batch: 16 of 299 px take 90 MB in Inception's widest layer."""


class Extractor(NamedTuple):
    """A feature space, whose name stands beside every number that is measured in it.

    features  rgb uint8 [n, H, W, 3] -> float64 [n, d]
    distance  how two features are compared
    wide      d grows with the picture, to millions of numbers: only the distances between the
              pictures of one prompt are stored, and no Gaussian is fitted to the features
    """

    name: str
    features: Callable[[Rgb], Array]
    distance: Distance = "cosine"
    wide: bool = False


Score = Callable[[Rgb, Sequence[str]], Array]
"""rgb uint8 [n, H, W, 3], n prompts -> [n]: how well each picture fits its prompt."""


class Judge(NamedTuple):
    """The spaces in which pictures are compared, the main one first, and a scorer.

    scored_by  the scorer's name. Scores are cosines of picture and prompt, or ImageReward's
               rewards, which are about -2 to 2 and no cosines; None without a scorer
    scores     rgb, P prompts -> [n, P], of a model that embeds a picture once for all prompts
    """

    spaces: tuple[Extractor, ...]
    score: Score | None = None
    scored_by: str | None = None
    scores: Score | None = None

    @property
    def extractor(self) -> Extractor:
        """The main space, of every number that names no other."""
        return self.spaces[0]


def in_batches(features: Callable[..., Array], size: int = BATCH) -> Callable[..., Array]:
    """The same function for any number of pictures, and of prompts beside them, which calls
    `features` with `size` at a time."""

    def batched(*inputs: Rgb | Sequence[str]) -> Array:
        starts = range(0, max(1, len(inputs[0])), size)
        batches = ([values[i : i + size] for values in inputs] for i in starts)
        return np.concatenate([features(*batch) for batch in batches])

    return batched
