"""CLIP text encoders: prompts -> Conditioning, as each family was trained to read them.

prompt -> spans of one weight -> pieces of L - 2 tokens -> ids = [bos] + tokens + [eos] + padding
context = hidden state of each encoder for each piece, one behind the other, encoders side by side
pooled  = P @ normed[argmax(ids)] of the first piece  (SDXL)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn

from headstart.errors import CheckpointError, InputError
from headstart.fork import check_threads
from headstart.interfaces import Conditioning
from headstart.networks import emphasis, grammar
from headstart.networks.pieces import Piece, common_piece_count, cut
from headstart.networks.prompt_rows import Negative, prompt_rows
from headstart.networks.prompt_style import PROMPT_STYLES, Exclamation, PromptStyle
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.tower import Tower

Size = int | tuple[int, int] | None
"""Pixels: a side, or (height, width)."""


class EncodeOptions(TypedDict, total=False):
    """The options of `ClipText.encode`, which explains them."""

    second: Sequence[str] | None
    negative_second: Negative | None
    style: PromptStyle
    clip_skip: int | None
    size: Size
    original: Size
    crop: tuple[int, int]
    strict: bool


class _Reading(NamedTuple):
    """The input of one encoder: the pieces of each row, their style, and vectors of tokens."""

    tower: Tower
    token_vectors: Tensor | None
    rows: list[list[Piece]]
    style: PromptStyle


class ClipText(nn.Module):
    """The text side of a family: one encoder, or SDXL's two, and their tokenizer.

    `image_size` is the family's native size in pixels, SDXL's default for `time_ids`;
    `zero_empty_negative`: no negative prompt is all zeros, and not the encoding of "";
    `token_vectors`: for each encoder the vectors [n, width] of the tokenizer's added tokens.
    """

    def __init__(
        self,
        towers: Sequence[Tower],
        tokenizer: ClipTokenizer,
        *,
        image_size: int = 1024,
        zero_empty_negative: bool | None = None,
        token_vectors: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.tokenizer = tokenizer
        self.token_vectors = tuple(token_vectors)
        self.image_size = image_size
        # SDXL was trained with its text dropped to zeros (`force_zeros_for_empty_prompt` in its
        # model_index.json); SD 1 and 2 were trained with the empty prompt.
        dual = len(self.towers) > 1
        self.zero_empty_negative = dual if zero_empty_negative is None else zero_empty_negative
        smallest = min(tower.params.vocabulary for tower in towers)
        if len(tokenizer) > smallest:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} tokens, the encoder knows {smallest}: "
                "give the tokenizer that belongs to this encoder"
            )

    @property
    def exclamation(self) -> Exclamation:
        """What "!" becomes: see `ClipTokenizer.exclamation`."""
        return self.tokenizer.exclamation

    @property
    def context_dim(self) -> int:
        """D, the width of the context."""
        return sum(tower.params.width for tower in self._towers())

    @property
    def length(self) -> int:
        """L, the number of positions: 77 for every full-size family."""
        return min(tower.params.positions for tower in self._towers())

    @overload
    def encode(
        self, prompts: Sequence[str], negative: None = None, **options: Unpack[EncodeOptions]
    ) -> Conditioning: ...
    @overload
    def encode(
        self, prompts: Sequence[str], negative: Negative, **options: Unpack[EncodeOptions]
    ) -> tuple[Conditioning, Conditioning]: ...
    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negative: Negative | None = None,
        *,
        second: Sequence[str] | None = None,
        negative_second: Negative | None = None,
        style: PromptStyle = "plain",
        clip_skip: int | None = None,
        size: Size = None,
        original: Size = None,
        crop: tuple[int, int] = (0, 0),
        strict: bool = False,
    ) -> Conditioning | tuple[Conditioning, Conditioning]:
        """Prompts -> Conditioning, a row each; with `negative`, also the unconditional one.

        negative   one for all prompts, or one each. "" is encoded; None is no negative prompt:
                   zeros where the family was trained so (SDXL), else the encoding of ""
        second     what SDXL's second encoder reads, and `negative_second`; by default the same
        style      how weights are written, by the name of the program that reads them so
                   (`networks.grammar`); "plain" reads a text as typed, and warns where it sees one
        clip_skip  the layer that is read, counted from the last as AUTOMATIC1111 and ComfyUI count
                   (stop at layer -n); diffusers counts one less. 1 is the last layer: SD 1's, and
                   the last of those that SD 2 runs. SDXL's own is 2, of both encoders, and there
                   only ComfyUI changes it. The final norm follows where the family has it
        size       in pixels, for SDXL, by default the native size; `original`, the size of the
                   picture that this one was cut from (default: `size`), and the top and left of the
                   `crop` (micro-conditioning, arXiv:2307.01952, section 2.2)

        context [B, k*L, D]; SDXL also gets pooled [B, P] and time_ids [B, 6]. A text of any length
        is read in pieces of L - 2 tokens (`networks.pieces`). All rows of a call get the same k,
        the least common multiple of their own: a row is said again until it is as long, which
        attention does not see (ComfyUI does so; the webui runs them apart, to the same end).

        Raises InputError for anything but strings, for an unknown style, a second text for one
        encoder, a text of more than 64 pieces, texts that only meet after more than 512, and with
        `strict` for a text of more than one.
        """
        if style not in PROMPT_STYLES:
            raise InputError(f"style {style!r:.40}: expected {', '.join(PROMPT_STYLES)}")
        rows = prompt_rows(prompts, negative, second, negative_second, len(self.towers))
        grammar.warn_of_unread_signs(dict.fromkeys((*rows.first, *rows.second)), style)
        readings = self._readings((rows.first, rows.second), style, strict=strict)
        cond = self._encode(readings, self.hidden_state(clip_skip), (size, original, crop))
        if negative is None:
            return cond
        cond, uncond = cond[: rows.prompts], cond[rows.prompts :]
        if self.zero_empty_negative:
            uncond = _without(uncond, rows.absent)
        return cond, uncond.expand(rows.prompts)

    def check(
        self,
        prompts: Sequence[str],
        negative: Negative | None = None,
        *,
        second: Sequence[str] | None = None,
        negative_second: Negative | None = None,
        style: PromptStyle = "plain",
        **_: object,
    ) -> int:
        """Tokens of each row that `encode` would give, with its errors of texts and lengths."""
        rows = prompt_rows(prompts, negative, second, negative_second, len(self.towers))
        pieces = self._readings((rows.first, rows.second), style, strict=False)[0].rows
        return common_piece_count(map(len, pieces), self.length - 2) * self.length

    def ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids [B, k*L] of plain prompts for each encoder, as `encode` reads them."""
        texts = prompt_rows(prompts, None, None, None, 1).first
        readings = self._readings((texts, texts), "plain", strict=False)
        order = _order(readings[0].rows, self.length - 2)
        return [_joined(list(self._ids(reading)), order) for reading in readings]

    def with_tokens(
        self, tokens: Mapping[str, tuple[int, ...]], token_vectors: Sequence[Tensor]
    ) -> ClipText:
        """The same modules behind a tokenizer that also knows these tokens."""
        return ClipText(
            self._towers(),
            self.tokenizer.with_tokens(tokens),
            image_size=self.image_size,
            zero_empty_negative=self.zero_empty_negative,
            token_vectors=token_vectors,
        )

    def _towers(self) -> list[Tower]:
        return [tower for tower in self.towers if isinstance(tower, Tower)]

    def hidden_state(self, clip_skip: int | None) -> int | None:
        """The hidden state that is read; None: the family's own. Raises InputError unless every
        encoder has that layer."""
        layers = min(tower.params.layers for tower in self._towers())
        if clip_skip is None:
            return None
        if type(clip_skip) is not int or not 1 <= clip_skip <= layers:
            raise InputError(
                "clip_skip (--clip-skip): expected a whole number from 1, the last layer, to "
                f"{layers}, got {clip_skip!r:.40}"
            )
        return -clip_skip

    def _readings(
        self, texts: Sequence[list[str]], style: PromptStyle, *, strict: bool
    ) -> list[_Reading]:
        """For each encoder the pieces of its texts. Raises InputError, and with `strict` for a text
        of more than one."""
        readings: list[_Reading] = []
        token_vectors = self.token_vectors or (None,) * len(self.towers)
        for tower, vectors, rows in zip(self._towers(), token_vectors, texts, strict=False):
            pieces_of = {text: self._pieces(text, style, tower) for text in dict.fromkeys(rows)}
            if strict and (long := [text for text, pieces in pieces_of.items() if len(pieces) > 1]):
                raise InputError(
                    f"{len(long)} of {len(pieces_of)} prompts need more than one piece of "
                    f"{self.length - 2} tokens ({long[0][:60]!r}): shorten them"
                )
            readings.append(_Reading(tower, vectors, [pieces_of[text] for text in rows], style))
        # Both encoders of a row read as many pieces, the shorter text with empty ones at the end,
        # as in ComfyUI's CLIPTextEncodeSDXL.
        counts = [max(map(len, rows)) for rows in zip(*(r.rows for r in readings), strict=True)]
        for reading in readings:
            reading.rows[:] = [
                pieces + [Piece()] * (count - len(pieces))
                for pieces, count in zip(reading.rows, counts, strict=True)
            ]
        return readings

    def _pieces(self, text: str, style: PromptStyle, tower: Tower) -> list[Piece]:
        zero_pad = tower.rule.pad == "zero"
        spans = (
            None
            if span.text is None
            else (self.tokenizer.words(span.text, zero_pad=zero_pad), span.weight)
            for span in grammar.read(text, style)
        )
        return cut(spans, self.length - 2, style, self.tokenizer.comma)

    def _ids(self, reading: _Reading) -> Iterator[Tensor]:
        """Ids [B, L] of the first piece of every row, of the second, ..."""
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        pad = eos if reading.tower.rule.pad == "eot" else 0
        for pieces in zip_longest(*reading.rows, fillvalue=Piece()):
            rows = [[bos, *piece.ids, eos] for piece in pieces]
            yield torch.tensor([row + [pad] * (self.length - len(row)) for row in rows])

    def _encode(
        self,
        readings: Sequence[_Reading],
        hidden: int | None,
        micro: tuple[Size, Size, tuple[int, int]],
    ) -> Conditioning:
        check_threads()
        order = _order(readings[0].rows, self.length - 2)
        device = next(self.parameters()).device
        outs = [self._encode_pieces(reading, hidden, device) for reading in readings]
        context = torch.cat([_joined(pieces, order) for pieces, _ in outs], dim=-1)
        pooled = outs[-1][1]
        if pooled is None:
            return Conditioning(context)
        size, original, crop = micro
        target = self._size(size)
        if min(crop) < 0:
            raise InputError(f"crop must be pixels from the top and from the left, got {crop}")
        sizes = [*(target if original is None else self._size(original)), *crop, *target]
        time_ids = torch.tensor([sizes] * len(context), dtype=torch.float32, device=device)
        return Conditioning(context, pooled, time_ids)

    def _encode_pieces(
        self, reading: _Reading, hidden: int | None, device: torch.device
    ) -> tuple[list[Tensor], Tensor | None]:
        """Every piece's context [B, L, D], weighted, and the pooled text of the first.

        Rows are a call's, piece by piece, so that adapters find each row where it was.
        """
        outs = [
            reading.tower(ids.to(device), hidden, reading.token_vectors)
            for ids in self._ids(reading)
        ]
        contexts: list[Tensor] = [context for context, _ in outs]
        pooled: Tensor | None = outs[0][1]
        if not any(piece.weighted for pieces in reading.rows for piece in pieces):
            return contexts, pooled
        columns = zip_longest(*reading.rows, fillvalue=Piece())
        weights = [_weights(pieces, self.length).to(device) for pieces in columns]
        pairs = zip(contexts, weights, strict=True)
        if reading.style == "a1111":
            return [emphasis.scaled(z, w) for z, w in pairs], pooled
        blank = reading._replace(rows=[[Piece()] for _ in reading.rows])
        (ids,) = self._ids(blank)
        empty, _ = reading.tower(ids.to(device), hidden)
        return [emphasis.from_empty(z, w, empty) for z, w in pairs], pooled

    def _size(self, size: Size) -> tuple[int, int]:
        size = self.image_size if size is None else size
        height, width = (size, size) if isinstance(size, int) else size
        if not (height > 0 and width > 0):
            raise InputError(f"size must be positive pixels, height and width, got {size}")
        return height, width


def _without(cond: Conditioning, rows: list[bool]) -> Conditioning:
    """The conditioning with the text of some rows set to zero."""
    keep = ~torch.tensor(rows, device=cond.context.device)
    pooled = None if cond.pooled is None else cond.pooled * keep[:, None]
    return Conditioning(cond.context * keep[:, None, None], pooled, cond.time_ids)


def _order(rows: Sequence[list[Piece]], room: int) -> Tensor:
    """[B, k]: the index of the piece at each position of a row; shorter rows repeat their pieces.

    Raises InputError where the rows need too many (`common_piece_count`).
    """
    counts = [len(pieces) for pieces in rows]
    positions = range(common_piece_count(counts, room))
    return torch.tensor([[i % count for i in positions] for count in counts])


def _joined(pieces: list[Tensor], order: Tensor) -> Tensor:
    """Pieces [B, L, ...], the first of every row, the second, ... -> [B, k*L, ...]."""
    if order.shape[1] == 1:
        return pieces[0]
    rows = torch.arange(len(order))[:, None]
    return torch.stack(pieces, 1)[rows, order].flatten(1, 2)


def _weights(pieces: Iterable[Piece], length: int) -> Tensor:
    """[B, L]; begin, end and padding have weight 1."""
    rows = [[1.0, *piece.weights] for piece in pieces]
    return torch.tensor([row + [1.0] * (length - len(row)) for row in rows])
