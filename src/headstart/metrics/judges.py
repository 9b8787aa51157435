"""Which features are valid for which pictures, decided before any are taken; two spaces or more.

the bundled pair's, 64 x 64 px   the bundled scorer and structure, and scores against prompts
any other                        structure and colours, and no score
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from headstart.errors import InputError
from headstart.metrics.features import open_features
from headstart.metrics.scorer import IMAGE_SIZE
from headstart.spaces.extractor import Judge

DEMO = "demo"


class PictureSource(NamedTuple):
    """What is known of pictures beforehand.

    lineage  the family that drew them, or None where nothing says
    sizes    (height, width) of those there are
    """

    name: str
    lineage: str | None
    sizes: frozenset[tuple[int, int]]

    def strange(self) -> str | None:
        """Why the bundled scorer was not made for them, or None where it was."""
        if self.lineage not in (DEMO, None):
            return f"of family {self.lineage}"
        other = min(self.sizes - {(IMAGE_SIZE, IMAGE_SIZE)}, default=None)
        return None if other is None else f"{other[0]}x{other[1]} px"


class Choice(NamedTuple):
    """A judge, and what the user should know about it."""

    judge: Judge
    notes: tuple[str, ...] = ()


def choose_judge(
    pictures: Sequence[PictureSource], named: Sequence[str] | str | None = None
) -> Choice:
    """The features called `named`, or without a name those that are valid for all the pictures.

    Where nothing says whose pictures are, their size decides, and a note tells. Raises InputError
    for the bundled scorer on pictures that it was not made for.
    """
    strange = [(own, why) for own in pictures if (why := own.strange()) is not None]
    names = (named,) if isinstance(named, str) else tuple(named or ())
    if names and "scorer" not in names:
        return Choice(open_features(*names))
    if not strange:
        notes = (
            f"{own.name}: nothing says which family drew these pictures; at "
            f"{IMAGE_SIZE}x{IMAGE_SIZE} px they are taken for the bundled pair's"
            for own in pictures
            if own.lineage is None
        )
        return Choice(open_features(*(names or ("scorer",))), tuple(notes))
    own, why = strange[0]
    reason = (
        f"the bundled scorer knows the bundled pair's {IMAGE_SIZE}x{IMAGE_SIZE} px pictures only, "
        f"and those of {own.name} are {why}: "
    )
    if names:
        raise InputError(
            f"features 'scorer': {reason}leave --features out, for structure and colours, or give "
            "imagenet, or a folder with a CLIP model, which scores too"
        )
    instead = "diversity is by structure and by colours, and there is no prompt score"
    return Choice(open_features("structure"), (reason + instead,))
