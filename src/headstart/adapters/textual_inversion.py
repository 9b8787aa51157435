"""Textual inversion: learned vectors behind a new token of the prompt; arXiv:2208.01618.

"a photo of <cat>" -> ids of the words, -1, ..., -n     token -1 - i is row i of vectors [n, D]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from headstart.adapters.group import all_finite
from headstart.checkpoint.embeddings import (
    Encoder,
    Token,
    family_of_widths,
    token_keys,
    tokens_of,
)
from headstart.checkpoint.tensors import Checkpoint
from headstart.checkpoint.verdict import ADAPTER, NO_NETWORK, judge
from headstart.errors import AdapterError, CheckpointError, InputError
from headstart.networks.text import ClipText
from headstart.networks.tower import Tower

Embeddings = Sequence[str | Path | tuple[str | Path, str | None]]
"""Files of learned tokens, each alone or with a new name for its only token."""
EMBEDDING, EMBEDDING_2 = "embedding:", "embedding_2:"
"""The beginning of such a file's role in a record, before the token. The second is for a file with
the same token's vectors for the other encoder."""
_NAMES: tuple[Encoder, ...] = ("text", "text_2")


@dataclass(frozen=True, slots=True, eq=False)
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
    """The learned tokens of a safetensors file; `token` is a new name for the only one of a file.

    Every spelling that `headstart.checkpoint.embeddings` knows: SDXL's pairs, one tensor [D] or
    [n, D] a token, and tokens that lie beside the layers of a LoRA. Raises AdapterError for
    anything else, for numbers that are not finite, and for a pickle (`headstart convert` makes
    this file of it).
    """
    path = Path(path)
    try:
        checkpoint = Checkpoint.open(path)
        verdict = judge(path, checkpoint)
        keys = token_keys(checkpoint) if verdict.what == ADAPTER else None
        if verdict.embedding is None and not keys:
            if verdict.problem not in (None, NO_NETWORK):
                raise AdapterError(f"{path}: {verdict.problem}")
            parts = [part for part in verdict.networks if part != "tiny"]
            actual = f"a checkpoint ({', '.join(parts)})" if parts else "no learned token"
            raise AdapterError(f"{path}: expected a textual inversion, got {actual}")
        return embeddings_of(path, checkpoint, tokens_of(path, checkpoint, token, keys))
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def embeddings_of(
    path: Path, checkpoint: Checkpoint, tokens: Iterable[Token]
) -> tuple[Embedding, ...]:
    """The vectors of a file's tokens. Raises AdapterError for NaN and infinity."""
    return tuple(
        Embedding(
            token.name,
            {e: _vectors(path, checkpoint, key, token.row) for e, key in token.keys.items()},
        )
        for token in tokens
    )


def with_embeddings(text: ClipText, embeddings: Iterable[Embedding]) -> ClipText:
    """A text encoder that also knows these tokens. `text` does not change; both share its modules,
    with the adapters on them.

    A token's vectors lie beside the vocabulary, so prompts without the token encode to the same
    bits. Two embeddings of one token, one for each of SDXL's encoders, are one: diffusers saves
    them as two files. Raises AdapterError for vectors of another width or for other encoders, and
    for a token given twice; InputError for a token that has a meaning already.
    """
    pairs = _pair_by_token(embeddings)
    for embedding in pairs:
        if (why := why_incompatible(text, embedding)) is not None:
            raise AdapterError(why)
    before = text.token_vectors or (torch.empty(0),) * len(text.towers)
    first, tokens = len(before[0]), dict[str, tuple[int, ...]]()
    for embedding in pairs:
        tokens[embedding.token] = tuple(-1 - first - row for row in range(embedding.count))
        first += embedding.count
    rows = [
        torch.cat([*([old] if len(old) else []), *(pair.vectors[name].float() for pair in pairs)])
        for name, old in zip(_NAMES, before, strict=False)
    ]
    return text.with_tokens(tokens, rows)


def why_incompatible(text: ClipText, embedding: Embedding) -> str | None:
    """Why these vectors do not fit these encoders; None where they do."""
    towers = [tower for tower in text.towers if isinstance(tower, Tower)]
    widths: dict[Encoder, int] = {n: t.params.width for n, t in zip(_NAMES, towers, strict=False)}
    actual: dict[Encoder, int] = {n: rows.shape[1] for n, rows in embedding.vectors.items()}
    if actual == widths:
        return None
    token = f"the token {embedding.token!r:.80}"
    missing = widths.keys() - actual.keys()
    if missing and all(widths[name] == width for name, width in actual.items()):
        half = "first" if "text" in actual else "second"
        return (
            f"{token}: expected vectors for both text encoders, {_describe_widths(widths)}, got "
            f"those of the {half} alone; give the other one's file too, with the same token"
        )
    return (
        f"{token}: expected vectors for {_describe_widths(widths)}, got them for "
        f"{_describe_widths(actual)}: it was learned for another family"
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


def with_tokens(
    text: ClipText, embeddings: Embeddings
) -> tuple[ClipText, dict[str, tuple[str, tuple[Path, ...]]]]:
    """`text` with the tokens of these files, and the files for a record: role -> file."""
    new_tokens: list[Embedding] = []
    files: dict[str, tuple[str, tuple[Path, ...]]] = {}
    for entry in embeddings:
        path, token = entry if isinstance(entry, tuple) else (entry, None)
        for embedding in read_embeddings(path, token):
            new_tokens.append(embedding)
            role = EMBEDDING + embedding.token
            role = EMBEDDING_2 + embedding.token if role in files else role
            files[role] = (str(path), (Path(path),))
    return (with_embeddings(text, new_tokens) if new_tokens else text), files


def recorded_embeddings(weights: Mapping[str, Mapping[str, str]]) -> Embeddings:
    """The files in a record of `with_tokens`; a file of one token comes with that token."""
    tokens: dict[str, list[str]] = {}
    for role, file_entry in weights.items():
        for start in (EMBEDDING, EMBEDDING_2):
            if role.startswith(start):
                tokens.setdefault(file_entry["file"], []).append(role.removeprefix(start))
    return [(file, names[0] if len(names) == 1 else None) for file, names in tokens.items()]


def _pair_by_token(embeddings: Iterable[Embedding]) -> list[Embedding]:
    by_token: dict[str, Embedding] = {}
    for embedding in embeddings:
        first, token = by_token.get(embedding.token), f"the token {embedding.token!r:.80}"
        if first is None:
            by_token[embedding.token] = embedding
            continue
        if first.vectors.keys() & embedding.vectors.keys():
            raise AdapterError(f"{token} is given twice: rename one of them, as in FILE:TOKEN")
        if first.count != embedding.count:
            raise AdapterError(
                f"{token}: expected as many vectors for each of SDXL's encoders, got "
                f"{first.count} and {embedding.count}: the files are of different trainings"
            )
        vectors = {**first.vectors, **embedding.vectors}
        by_token[embedding.token] = replace(embedding, vectors=vectors)
    return [*by_token.values()]


def _describe_widths(widths: Mapping[Encoder, int]) -> str:
    """ "sdxl (768 + 1280 numbers)"; a width alone where no family has it."""
    numbers = " + ".join(str(widths[name]) for name in _NAMES if name in widths)
    family = family_of_widths(widths)
    if family is None and set(widths) == {"text_2"}:
        family = "a second text encoder"
    return f"{family or 'text encoders'} ({numbers} numbers)"


def _vectors(path: Path, checkpoint: Checkpoint, key: str, row: int | None) -> Tensor:
    """[n, D], finite; [D] is one vector, and `row` chooses one."""
    tensor = checkpoint.tensor(key)
    tensor = tensor[None] if tensor.ndim == 1 else tensor
    tensor = tensor if row is None else tensor[row : row + 1]
    if not all_finite(tensor.float()):  # as it is computed with
        raise AdapterError(f"{path}: {key[:80]!r}: expected finite numbers, got NaN or infinity")
    return tensor
