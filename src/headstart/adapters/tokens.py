"""The learned tokens of attached adapters: which of a file prompts can learn, and who reads them.

text with the tokens of a moment = text of the weights ++ tokens of every attached file
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from headstart.adapters.file import AdapterFile
from headstart.adapters.resolution import allowed
from headstart.adapters.snapshot import Attached, Held
from headstart.adapters.textual_inversion import Embedding, embeddings_of, extended, misfit
from headstart.checkpoint.embeddings import beside_layers
from headstart.errors import AdapterError
from headstart.networks.text import ClipText


def teachable(
    text: ClipText | None,
    file: AdapterFile,
    teachers: Mapping[str, str],
    allow: Collection[str],
) -> tuple[tuple[Embedding, ...], tuple[str, ...]]:
    """What the file teaches prompts; and the keys of its tokens that were let be by name.

    `teachers`: token -> the other adapter that teaches it. Raises AdapterError for a token that
    cannot be taught and was not allowed, with what to do.
    """
    if file.no_tokens is not None:
        return (), _require(beside_layers(file.checkpoint), allow, file.no_tokens)
    taught: list[Embedding] = []
    left: list[str] = []
    embeddings = embeddings_of(file.path, file.checkpoint, file.tokens)
    for token, embedding in zip(file.tokens, embeddings, strict=True):
        why = _unteachable(text, embedding, teachers)
        if why is None:
            taught.append(embedding)
        else:
            left += _require(tuple(token.keys.values()), allow, f"{file.path}: {why}")
    return tuple(taught), tuple(left)


def reading(text: ClipText | None, before: Attached, held: Mapping[str, Held]) -> ClipText | None:
    """What reads prompts while these are attached: that of the moment before, where tokens stay."""
    tokens = [token for own in held.values() for token in own.tokens]
    if text is None or not tokens:
        return text
    return before.text if tokens == [*before.tokens] else extended(text, tokens)


def _unteachable(
    text: ClipText | None, embedding: Embedding, teachers: Mapping[str, str]
) -> str | None:
    """Why a file's token cannot be taught, and what to do; None where it can."""
    token = embedding.token
    if text is None:
        return f"it has the learned token {token!r:.80}, and no text encoder is here to learn it"
    if (why := misfit(text, embedding)) is not None:
        return why
    if token in teachers:
        return (
            f"the token {token!r:.80} is already known from adapter {teachers[token]!r}: detach "
            "that one first"
        )
    if text.tokenizer.knows(token):
        return (
            f"the token {token!r:.80} means something already, as a word or by --embedding: teach "
            f"it by another name, as --embedding FILE:<{token:.80}>"
        )
    return None


def _require(keys: tuple[str, ...], allow: Collection[str], why: str) -> tuple[str, ...]:
    if all(allowed(key, allow) for key in keys):
        return keys
    shown = [f"{key:.100}" for key in keys[:2]]
    options = " ".join(f"--allow {key!r}" for key in shown)
    raise AdapterError(f"{why}. To attach it without: allow={shown}, or {options}")
