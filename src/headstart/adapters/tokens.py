"""The learned tokens in files of attached adapters, and the text encoder that reads them.

text encoder of a snapshot = the weights' own + the tokens of every attached file
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from headstart.adapters.file import AdapterFile
from headstart.adapters.snapshot import AttachedAdapter, Snapshot
from headstart.adapters.textual_inversion import (
    Embedding,
    embeddings_of,
    why_incompatible,
    with_embeddings,
)
from headstart.checkpoint.embeddings import token_keys
from headstart.checkpoint.leftovers import is_allowed
from headstart.errors import AdapterError
from headstart.networks.text import ClipText


def file_tokens(
    text_encoder: ClipText | None,
    file: AdapterFile,
    token_owners: Mapping[str, str],
    allow: Collection[str],
) -> tuple[tuple[Embedding, ...], tuple[str, ...]]:
    """The tokens of a file that prompts can use; and the keys of the others, allowed by name.

    `token_owners`: token -> the other adapter that has it. Raises AdapterError, with what to do,
    for a token that cannot be used and is not allowed.
    """
    if file.tokens_problem is not None:
        keys = token_keys(file.checkpoint)
        return (), _require_allowed(keys, allow, file.tokens_problem)
    usable: list[Embedding] = []
    skipped: list[str] = []
    embeddings = embeddings_of(file.path, file.checkpoint, file.tokens)
    for token, embedding in zip(file.tokens, embeddings, strict=True):
        why = _why_unusable(text_encoder, embedding, token_owners)
        if why is None:
            usable.append(embedding)
        else:
            keys = tuple(token.keys.values())
            skipped += _require_allowed(keys, allow, f"{file.path}: {why}")
    return tuple(usable), tuple(skipped)


def text_encoder_for(
    text_encoder: ClipText | None, before: Snapshot, attached: Mapping[str, AttachedAdapter]
) -> ClipText | None:
    """The text encoder while these are attached; `before`'s where no token changes."""
    tokens = [token for adapter in attached.values() for token in adapter.tokens]
    if text_encoder is None or not tokens:
        return text_encoder
    return (
        before.text_encoder if tokens == [*before.tokens] else with_embeddings(text_encoder, tokens)
    )


def _why_unusable(
    text_encoder: ClipText | None, embedding: Embedding, token_owners: Mapping[str, str]
) -> str | None:
    """Why prompts cannot use a file's token, and what to do; None where they can."""
    token = embedding.token
    if text_encoder is None:
        return f"it has the learned token {token!r:.80}, and no text encoder is here to learn it"
    if (why := why_incompatible(text_encoder, embedding)) is not None:
        return why
    if token in token_owners:
        return (
            f"the token {token!r:.80} is already known from adapter {token_owners[token]!r}: "
            "detach that one first"
        )
    if text_encoder.tokenizer.knows(token):
        return (
            f"the token {token!r:.80} means something already, as a word or by --embedding: teach "
            f"it by another name, as --embedding FILE:<{token:.80}>"
        )
    return None


def _require_allowed(keys: tuple[str, ...], allow: Collection[str], why: str) -> tuple[str, ...]:
    if all(is_allowed(key, allow) for key in keys):
        return keys
    examples = [f"{key:.100}" for key in keys[:2]]
    options = " ".join(f"--allow {key!r}" for key in examples)
    raise AdapterError(f"{why}. To attach it without: allow={examples}, or {options}")
