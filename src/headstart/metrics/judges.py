"""Which feature spaces are valid for which pictures, decided before any work; two or more.

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
    """Where pictures come from.

    lineage  the family of the models, or None where it is unknown
    sizes    (height, width) of the pictures
    """

    name: str
    lineage: str | None
    sizes: frozenset[tuple[int, int]]

    def misfit(self) -> str | None:
        """The reason why the bundled scorer was not made for them, or None where it was."""
        if self.lineage not in (DEMO, None):
            return f"of family {self.lineage}"
        size = min(self.sizes - {(IMAGE_SIZE, IMAGE_SIZE)}, default=None)
        return None if size is None else f"{size[0]}x{size[1]} px"


class Choice(NamedTuple):
    """A judge, and notes on it for the user."""

    judge: Judge
    notes: tuple[str, ...] = ()


def choose_judge(
    pictures: Sequence[PictureSource], names: Sequence[str] | str | None = None
) -> Choice:
    """The features called `names`, or without a name those that are valid for all the pictures.

    Where the lineage is unknown, the size of pictures decides, and a note says so. Raises
    InputError for the bundled scorer on pictures that it was not made for.
    """
    misfits = [(source, misfit) for source in pictures if (misfit := source.misfit()) is not None]
    names = (names,) if isinstance(names, str) else tuple(names or ())
    if names and "scorer" not in names:
        return Choice(open_features(*names))
    if not misfits:
        notes = (
            f"{source.name}: nothing says which family drew these pictures; at "
            f"{IMAGE_SIZE}x{IMAGE_SIZE} px they are taken for the bundled pair's"
            for source in pictures
            if source.lineage is None
        )
        return Choice(open_features(*(names or ("scorer",))), tuple(notes))
    source, misfit = misfits[0]
    reason = (
        f"the bundled scorer knows the bundled pair's {IMAGE_SIZE}x{IMAGE_SIZE} px pictures only, "
        f"and those of {source.name} are {misfit}: "
    )
    if names:
        raise InputError(
            f"features 'scorer': {reason}leave --features out, for structure and colours, or give "
            "imagenet, or a folder with a CLIP model, which scores too"
        )
    instead = "diversity is by structure and by colours, and there is no prompt score"
    return Choice(open_features("structure"), (reason + instead,))
