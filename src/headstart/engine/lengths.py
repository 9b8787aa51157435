"""How long texts are that share a call: each is said again until all are as long.

context = own, own, ...        softmax over keys said n times each is that over the keys
"""

from __future__ import annotations

from torch import Tensor

from headstart.by_level import told_by_row
from headstart.engine.given import Told
from headstart.interfaces import Conditioning
from headstart.plan.table import StepTable


def tokens_of(told: Told, table: StepTable, piece: int) -> list[tuple[int, ...]]:
    """[rows][samples]: the tokens of each sample before they are said again, in whole pieces.

    Waits for the device, once a text.
    """
    known: dict[int, tuple[int, ...]] = {}
    rows = told_by_row(told, table)
    for part in rows:
        if isinstance(part, Conditioning) and id(part) not in known:
            known[id(part)] = _own(part.context, piece)
    return [known[id(part)] for part in rows]


def _own(context: Tensor, piece: int) -> tuple[int, ...]:
    """The shortest beginning of each [L, D] that, said again, is the whole of it."""
    length = context.shape[1]
    own = [length] * len(context)
    if length % piece == 0:
        shorter = [n for n in range(piece, length, piece) if length % n == 0]
        for tokens in reversed(shorter):
            again = context[:, :tokens].repeat(1, length // tokens, 1)
            for row, same in enumerate((again == context).flatten(1).all(1).tolist()):
                own[row] = tokens if same else own[row]
    return tuple(own)
