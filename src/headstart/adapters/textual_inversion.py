"""Textual inversion: learned vectors behind a new token of the prompt; arXiv:2208.01618.

embedding table [V, D] ++ vectors [n, D]      "a photo of <cat>" -> ..., V, V+1, ..., V+n-1, ...
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from headstart.adapters.group import all_finite
from headstart.adapters.names import parse
from headstart.checkpoint.tensors import FLOATS, Checkpoint
from headstart.errors import AdapterError, CheckpointError, InputError
from headstart.networks.residency import keep_stored
from headstart.networks.text import ClipText
from headstart.networks.tower import Tower

Encoder = Literal["text", "text_2"]
Embeddings = Sequence[str | Path | tuple[str | Path, str | None]]
"""Files of learned tokens; with a token, the file's only one is named so."""
EMBEDDING = "embedding:"
"""What the role of such a file in a record starts with; a token of it follows."""
MAX_VECTORS = 75
"""What fits between the begin and the end of CLIP's 77 positions."""

# Keys that name an encoder and not a token: SDXL's two, and AUTOMATIC1111's one.
_ENCODERS: dict[str, Encoder] = {"clip_l": "text", "clip_g": "text_2", "emb_params": "text"}


@dataclass(frozen=True, slots=True)
class Embedding:
    """One token: for each text encoder the vectors [n, D] that stand for it, in the file's dtype.

    A file that does not name its token has the file's name as the token.
    """

    token: str
    vectors: Mapping[Encoder, Tensor]

    @property
    def count(self) -> int:
        return next(iter(self.vectors.values())).shape[0]


def read_embeddings(path: str | Path, token: str | None = None) -> tuple[Embedding, ...]:
    """The learned tokens of a safetensors file; `token` names the only one of a file anew.

    SDXL: `clip_l` [n, 768] and `clip_g` [n, 1280]. AUTOMATIC1111, converted: `emb_params` [n, D].
    diffusers: a tensor [D] or [n, D] under each token's name. Tokens that lie beside a LoRA
    (cloneofsimo/lora) are read from its file too. Raises AdapterError for anything else, for
    numbers that are not finite, and for a pickle (`headstart convert` makes this file of it).
    """
    path = Path(path)
    try:
        checkpoint = Checkpoint.open(path)
        parts = [part for part in checkpoint.parts() if part != "tiny"]
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    names = [name for name in checkpoint.names if parse(name) is None]
    if parts or not names:
        came = f"a checkpoint ({', '.join(parts)})" if parts else "no learned token"
        raise AdapterError(f"{path}: expected a textual inversion, got {came}")
    tensors = {name: _vectors(checkpoint, name, path) for name in names}
    named: dict[Encoder, Tensor] = {
        _ENCODERS[name]: tensor for name, tensor in tensors.items() if name in _ENCODERS
    }
    if named and (len(named) < len(names) or len({len(t) for t in named.values()}) > 1):
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise AdapterError(
            f"{path}: expected as many vectors for each of SDXL's encoders and nothing besides, "
            f"got {shapes}"
        )
    if not named and token is not None and len(tensors) > 1:
        raise AdapterError(f"{path} holds {len(tensors)} tokens: it cannot be renamed to {token!r}")
    if named:
        return (Embedding(token or path.stem, named),)
    found: list[tuple[str, dict[Encoder, Tensor]]] = [(n, {"text": t}) for n, t in tensors.items()]
    return tuple(Embedding(token or name, vectors) for name, vectors in found)


def extended(text: ClipText, embeddings: Iterable[Embedding]) -> ClipText:
    """A text encoder that also knows these tokens; `text` stays as it is, and shares its weights.

    A token's vectors come after the vocabulary, so prompts without it encode to the same bits.
    Adapters attached to the modules of `text` stay there: extend first, then attach.
    Raises AdapterError for vectors of another width or for other encoders, and for a token given
    twice; InputError for a token that has a meaning already.
    """
    towers = [tower for tower in text.towers if isinstance(tower, Tower)]
    names: tuple[Encoder, ...] = ("text", "text_2")
    first = max(_table(tower).num_embeddings for tower in towers)
    tokens: dict[str, tuple[int, ...]] = {}
    rows: dict[Encoder, list[Tensor]] = {name: [] for name in names[: len(towers)]}
    for embedding in embeddings:
        _check(embedding, dict(zip(names, towers, strict=False)))
        if embedding.token in tokens:
            raise AdapterError(f"the token {embedding.token!r} is given twice: rename one of them")
        tokens[embedding.token] = tuple(range(first, first + embedding.count))
        first += embedding.count
        for name, own in rows.items():
            own.append(embedding.vectors[name])
    grown = [_grown(t, own, first) for t, own in zip(towers, rows.values(), strict=True)]
    return ClipText(
        grown,
        text.tokenizer.learn(tokens),
        image_size=text.image_size,
        zero_empty_negative=text.zero_empty_negative,
    )


def parse_embedding(text: str) -> tuple[str, str | None]:
    """`FILE[:token]` -> (FILE, token or None); a file that is there may have a colon in its name.

    Raises InputError where one of the two is empty.
    """
    path, colon, token = text.rpartition(":")
    if not colon or Path(text).exists():
        path, token = text, None
    if not path.strip() or token == "":
        raise InputError(f"embedding {text!r:.80}: expected FILE or FILE:token, such as cat:<cat>")
    return path, token


def taught(
    text: ClipText, wanted: Embeddings
) -> tuple[ClipText, dict[str, tuple[str, tuple[Path, ...]]]]:
    """`text` with the tokens of these files, and what a record says of them: role -> file."""
    found: list[Embedding] = []
    files: dict[str, tuple[str, tuple[Path, ...]]] = {}
    for entry in wanted:
        path, token = entry if isinstance(entry, tuple) else (entry, None)
        for embedding in read_embeddings(path, token):
            found.append(embedding)
            files[EMBEDDING + embedding.token] = (str(path), (Path(path),))
    return (extended(text, found) if found else text), files


def recorded_embeddings(weights: Mapping[str, Mapping[str, str]]) -> Embeddings:
    """The files that a record of `taught` names; a file of one token is told that token."""
    tokens: dict[str, list[str]] = {}
    for role, told in weights.items():
        if role.startswith(EMBEDDING):
            tokens.setdefault(told["file"], []).append(role.removeprefix(EMBEDDING))
    return [(file, own[0] if len(own) == 1 else None) for file, own in tokens.items()]


def _vectors(checkpoint: Checkpoint, name: str, path: Path) -> Tensor:
    """[n, D], checked; [D] is one vector."""
    entry = checkpoint.entry(name)
    shape = entry.shape if len(entry.shape) == 2 else (1, *entry.shape)
    if len(shape) != 2 or 0 in shape or shape[0] > MAX_VECTORS or entry.dtype not in FLOATS:
        raise AdapterError(
            f"{path}: {name[:80]!r}: expected floating point [D] or [n, D], n at most "
            f"{MAX_VECTORS}, got {entry.dtype} {list(entry.shape)}"
        )
    tensor = checkpoint.tensor(name).reshape(shape)
    if not all_finite(tensor):
        raise AdapterError(f"{path}: {name[:80]!r}: expected finite numbers, got NaN or infinity")
    return tensor


def _check(embedding: Embedding, towers: Mapping[Encoder, Tower]) -> None:
    widths = {name: tower.params.width for name, tower in towers.items()}
    came = {name: vectors.shape[1] for name, vectors in embedding.vectors.items()}
    if came != widths:
        raise AdapterError(
            f"the token {embedding.token!r}: expected vectors of width {widths}, got {came}: it "
            "was learned for another family"
        )


def _table(tower: Tower) -> nn.Embedding:
    return tower.text_model.embeddings.token_embedding


def _grown(tower: Tower, added: list[Tensor], size: int) -> Tower:
    """The tower with a longer table of `size` rows; every other tensor is shared.

    The modules are new, because transformers keeps hooks on them that belong to one model.
    """
    old = _table(tower).weight
    new = torch.cat([tensor.to(old) for tensor in added]) if added else old[:0]
    gap = old.new_zeros(size - len(old) - len(new), old.shape[1])  # where the tables differ in size
    with torch.device("meta"):
        made = Tower(replace(tower.params, vocabulary=size), tower.rule)
    table = {_TABLE: torch.cat([old, gap, new])}
    made.load_state_dict(tower.state_dict() | table, strict=True, assign=True)
    made.params = tower.params  # which ids are words, and so where a text ends
    made.reset_positions(old.device)
    made.requires_grad_(False).eval()
    return keep_stored(made) if "compute_dtype" in vars(tower) else made


_TABLE = "text_model.embeddings.token_embedding.weight"
