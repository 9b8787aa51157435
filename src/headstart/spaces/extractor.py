"""What turns pictures into numbers: an extractor of features, and a judge, which has several.

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
"""Pictures that a network sees at once: 16 of 299 px take 90 MB in Inception's widest layer."""


class Extractor(NamedTuple):
    """What turns images into features, and the name every number it yields is reported under.

    features  rgb uint8 [n, H, W, 3] -> float64 [n, d]
    distance  how two features of it are compared
    wide      d grows with the picture, to millions of numbers: features are never all kept, only
              the distances between the pictures of one prompt, and no Gaussian is fitted to them
    """

    name: str
    features: Callable[[Rgb], Array]
    distance: Distance = "cosine"
    wide: bool = False


Score = Callable[[Rgb, Sequence[str]], Array]
"""rgb uint8 [n, H, W, 3], n prompts -> [n]: how well each picture fits its own prompt."""


class Judge(NamedTuple):
    """The spaces in which pictures are compared, the main one first, and what scores them.

    scored_by  whose scores: cosines of picture and prompt, or ImageReward's rewards, which are
               about -2 to 2 and no cosines; None where nothing scores
    scores     rgb, P prompts -> [n, P], of a model that embeds a picture once for all prompts
    """

    spaces: tuple[Extractor, ...]
    score: Score | None = None
    scored_by: str | None = None
    scores: Score | None = None

    @property
    def extractor(self) -> Extractor:
        """The main one, of which every number is that names no other."""
        return self.spaces[0]


def in_batches(features: Callable[..., Array], size: int = BATCH) -> Callable[..., Array]:
    """The same of any number of pictures, and of the prompts beside them: `size` at a time in
    memory."""

    def batched(*inputs: Rgb | Sequence[str]) -> Array:
        starts = range(0, max(1, len(inputs[0])), size)
        return np.concatenate([features(*(own[at : at + size] for own in inputs)) for at in starts])

    return batched
