"""The tokens of a textual inversion (arXiv:2208.01618), from a file's header: names and widths.

key = encoder | token | bundle_emb.TOKEN.encoder     vectors [D] or [n, D], D the encoder's width
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from headstart.checkpoint.contents import ADAPTER
from headstart.checkpoint.dtypes import FLOATS, UNREAD
from headstart.checkpoint.families import CONTEXT_WIDTHS
from headstart.checkpoint.header import Entry, fail
from headstart.checkpoint.leftovers import is_leftover
from headstart.checkpoint.scales import SCALED
from headstart.checkpoint.tensors import Checkpoint

Encoder = Literal["text", "text_2"]
MAX_VECTORS = 75
"""CLIP's 77 positions without the begin and the end token."""
MAX_TOKENS = 1000

_PAIRS: tuple[tuple[str, str], ...] = (
    ("clip_l", "clip_g"),  # kohya, ComfyUI, OneTrainer, diffusers' advanced training scripts
    ("text_encoders_0", "text_encoders_1"),  # Replicate's cog-sdxl, embeddings.pti
    ("text_encoder", "text_encoder_2"),  # fal
    ("emb", "emb2"),  # oss-roettger/XL-Textual-Inversion
)
"""Names of SDXL's two encoders. The last two could also be tokens, so both must be there."""
_ENCODERS: dict[str, Encoder] = {
    **{first: "text" for first, _ in _PAIRS},
    **{second: "text_2" for _, second in _PAIRS},
    "clip_h": "text",  # the encoder of SD 2 in ComfyUI and Forge
}
_ALONE = frozenset({*_PAIRS[0], *_PAIRS[1], "clip_h", "emb_params", "*"})
"""Keys that never name a token. AUTOMATIC1111, kohya and ai-toolkit write `emb_params`, CompVis
calls its only token `*`: then the width determines the encoder."""
_PARAMS = re.compile(r"(string_to_param|emb_params)\.(?P<token>[^.]{1,64})")
"""AUTOMATIC1111's table of tokens, flattened."""
_FOREIGN = re.compile(
    r"(t5(xxl)?|gemma2?|llama|qwen|mistral)(_out)?|clip_[lgh]_out"  # OneTrainer
)
_ROWS = frozenset(_PAIRS[1])
"""Each row of these is a token of its own, <s0>, <s1>, ...: github.com/replicate/cog-sdxl,
dataset_and_utils.py, TokenEmbeddingsHandler; diffusers' `load_textual_inversion(token=[...])`."""
_BUNDLE = re.compile(
    r"bundle_emb\.(?P<token>.+?)\.(?P<field>(string_to_param|emb_params)\.[^.]{1,64}|[^.]{1,64})"
)
"""HCP-Diffusion, AUTOMATIC1111, OneTrainer: a token of any characters, then as in a file of it."""
_BRACKETS = re.compile(r"<.+>")
_WIDTHS: dict[int, Encoder] = {768: "text", 1280: "text_2"}
"""Width -> SDXL's encoder, whatever its name."""
_TEXT_WIDTHS = frozenset({128, *_WIDTHS, 1024})
"""Widths of the bundled pair's encoder, SDXL's two, SD 2's: vectors under any name fit."""
_TOKEN = re.compile(r"(?!cond\Z|[0-9]*\Z)[^.]+")
"""A possible token: not a number in a list, nor `Engine.sample`'s `cond`."""
_LAYER = re.compile(r".*\.(weight|bias|alpha|scale)|.*:(up|down)")


class Token(NamedTuple):
    """One token of a file.

    keys    encoder -> the name of the tensor [n, D] or [D] with its vectors
    widths  encoder -> D
    vectors how many vectors it has; row: the row of its only vector, or None: all rows
    """

    name: str
    keys: Mapping[Encoder, str]
    widths: Mapping[Encoder, int]
    vectors: int
    row: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingInfo:
    """The header of a textual inversion file.

    tokens    as written in a prompt; vectors: how many each has
    widths    encoder -> numbers in a vector
    family    the lineage whose text encoders have these widths; None: scaled down, or unknown
    """

    path: str
    tokens: tuple[str, ...]
    vectors: tuple[int, ...]
    widths: Mapping[Encoder, int]
    family: str | None
    dtype: str
    size_bytes: int


def describe_embedding(path: Path, checkpoint: Checkpoint) -> EmbeddingInfo | None:
    """The tokens of an open file; None if it holds something else: a network, an adapter.

    Raises CheckpointError for tokens that cannot be used, with the same messages as
    `headstart.adapters.textual_inversion`.
    """
    if not is_embedding(checkpoint):
        return None
    tokens = tokens_of(path, checkpoint)
    return EmbeddingInfo(
        path=str(path),
        tokens=tuple(token.name for token in tokens),
        vectors=tuple(token.vectors for token in tokens),
        widths=tokens[0].widths,
        family=family_of_widths(tokens[0].widths),
        dtype=checkpoint.dtype,
        size_bytes=checkpoint.size_bytes,
    )


def is_embedding(checkpoint: Checkpoint) -> bool:
    """Whether the file holds tokens and nothing else; a LoRA may hold both."""
    names = [name for name in checkpoint.names if not is_leftover(name)]
    if not names or checkpoint.parts() or any(map(_is_layer, names)):
        return False
    if any(map(_is_known, names)):
        return True
    entries = [checkpoint.entry(name) for name in names]
    return all(map(_TOKEN.fullmatch, names)) and all(
        _is_vectors(entry) and entry.shape[-1] in _TEXT_WIDTHS for entry in entries
    )


def token_keys(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The keys of tokens in a LoRA's file.

    Bundled ones; ai-toolkit's, as in a file of their own; cloneofsimo's, which the metadata or
    brackets mark (github.com/cloneofsimo/lora, lora.py, EMBED_FLAG).
    """
    return tuple(
        name
        for name in checkpoint.names
        if _BUNDLE.fullmatch(name)
        or name in _ALONE
        or (_BRACKETS.fullmatch(name) and not _is_layer(name))
        or checkpoint.metadata.get(name) == "<embed>"
    )


def tokens_of(
    path: Path,
    checkpoint: Checkpoint,
    rename: str | None = None,
    keys: tuple[str, ...] | None = None,
) -> tuple[Token, ...]:
    """The tokens of the file; `rename` is a new name for the only one, `keys` limits the tensors.

    A token without a name gets the name of the file, without its suffix. cog-sdxl's rows are <s0>,
    <s1>, ...; with `rename` all of them are one token, as its card writes TOK for "<s0><s1>".
    Raises CheckpointError for tensors that are no vectors, for another family's encoders, for two
    encoders that do not fit each other, and for `rename` with several tokens.
    """
    entries = {
        name: checkpoint.entry(name)
        for name in (checkpoint.names if keys is None else keys)
        if not is_leftover(name)
    }
    for name, entry in entries.items():
        if not _is_vectors(entry):
            fail(
                path,
                f"{name[:80]!r}: expected floating point [D] or [n, D], n at most {MAX_VECTORS}, "
                f"got {entry.dtype} {list(entry.shape)}",
            )
    groups = _grouped(path, entries)
    if not groups:
        fail(path, "expected a textual inversion, got no learned token")
    if len(groups) > MAX_TOKENS:
        fail(path, f"expected at most {MAX_TOKENS} learned tokens, got {len(groups)}")
    if rename is not None and len(groups) > 1:
        fail(path, f"holds {len(groups)} tokens: it cannot be renamed to {rename!r}")
    return tuple(
        token
        for name, keys_of in groups.items()
        for token in _tokens(path, name, rename, keys_of, entries)
    )


def family_of_widths(widths: Mapping[Encoder, int]) -> str | None:
    """The lineage whose encoders together have these widths."""
    return None if set(widths) == {"text_2"} else CONTEXT_WIDTHS.get(sum(widths.values()))


def _grouped(path: Path, entries: Mapping[str, Entry]) -> dict[str | None, dict[str, str]]:
    """Token (None without a name) -> {name of an encoder in the file, or "": key}."""
    groups: dict[str | None, dict[str, str]] = {}
    pairs = {name for pair in _PAIRS if {*pair} <= entries.keys() for name in pair}
    table = sum(_PARAMS.fullmatch(key) is not None for key in entries) > 1
    is_clip = any(key.startswith("clip_") for key in entries)
    for key in entries:
        if bundled := _BUNDLE.fullmatch(key):
            name, field = bundled["token"], bundled["field"]
        elif params := _PARAMS.fullmatch(key):
            name, field = (params["token"], "") if table else (None, key)
        elif key in pairs or key in _ALONE or (is_clip and _FOREIGN.fullmatch(key)):
            name, field = None, key
        else:
            name, field = key, ""
        groups.setdefault(name, {})[field] = key
    widths = sorted(entry.shape[-1] for entry in entries.values())
    bare = [fields.keys() == {""} for fields in groups.values()]
    if len(entries) == 2 and all(bare) and widths == [*_WIDTHS]:
        return {None: {key: key for key in entries}}  # with any names
    if None in groups and any(bare):
        shapes = {key[:80]: list(entry.shape) for key, entry in entries.items()}
        fail(path, f"expected vectors for SDXL's encoders and nothing besides, got {shapes!s:.300}")
    return groups


def _tokens(
    path: Path,
    name: str | None,
    rename: str | None,
    keys_of: Mapping[str, str],
    entries: Mapping[str, Entry],
) -> Iterator[Token]:
    token = rename or name or path.stem
    if foreign := [field for field in keys_of if _FOREIGN.fullmatch(field)]:
        fields, origin = ", ".join(foreign), _origin(foreign)
        fail(path, f"the token {token!r:.80} has vectors for {fields}: {origin}")
    keys: dict[Encoder, str] = {}
    for field, key in keys_of.items():
        encoder = _encoder(field, entries[key].shape[-1], len(keys_of))
        if encoder in keys:
            fail(
                path,
                f"the token {token!r:.80}: {keys[encoder][:80]!r} and {key[:80]!r} are both for "
                f"one text encoder; expected one tensor for each",
            )
        keys[encoder] = key
    shapes = {encoder: entries[key].shape for encoder, key in keys.items()}
    counts = {e: shape[0] if len(shape) == 2 else 1 for e, shape in shapes.items()}
    if len({*counts.values()}) > 1:
        fail(path, f"expected as many vectors for each of SDXL's encoders, got {counts}")
    widths: dict[Encoder, int] = {encoder: shapes[encoder][-1] for encoder in sorted(keys)}
    count = next(iter(counts.values()))
    if rename is None and name is None and keys_of.keys() <= {*_ROWS}:
        yield from (Token(f"<s{row}>", keys, widths, 1, row) for row in range(count))
    else:
        yield Token(token, keys, widths, count)


def _encoder(field: str, width: int, of: int) -> Encoder:
    """By width if there are two and it is one of SDXL's, else by the name in the file."""
    encoder = _ENCODERS.get(field)
    if encoder is None or (of == 2 and width in _WIDTHS):
        return _WIDTHS.get(width, "text")
    return encoder


def _is_vectors(entry: Entry) -> bool:
    shape = entry.shape if len(entry.shape) == 2 else (1, *entry.shape)
    fits = len(shape) == 2 and 0 not in shape and shape[0] <= MAX_VECTORS
    return fits and entry.dtype in FLOATS - UNREAD - SCALED.keys()


def _is_known(name: str) -> bool:
    """Whether the name alone shows that this is a token."""
    return bool(
        name in _ALONE
        or _BUNDLE.fullmatch(name)
        or _PARAMS.fullmatch(name)
        or _BRACKETS.fullmatch(name)
    )


def _is_layer(name: str) -> bool:
    """Whether it is a tensor of a network or an adapter."""
    return not _is_known(name) and bool(_LAYER.fullmatch(name) or ADAPTER.search(name))


def _origin(fields: list[str]) -> str:
    if all(field.startswith("clip_") for field in fields):
        return "added behind the encoder (OneTrainer's output embeddings), which is not implemented"
    return "an encoder of SD 3, Flux or another family, which no model here reads"
