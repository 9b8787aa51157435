"""CLIP text encoders: prompts -> Conditioning, as each family was trained to read them.

ids = [bos] + tokens[: L - 2] + [eos] + padding          context = hidden state of each encoder,
side by side on the last axis                            pooled = P @ normed[argmax(ids)]  (SDXL)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor, nn

from headstart.errors import CheckpointError, InputError
from headstart.fork import check_threads
from headstart.interfaces import Conditioning
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.tower import Tower

Size = int | tuple[int, int] | None
"""Pixels: a side, or (height, width)."""


class ClipText(nn.Module):
    """The text side of a family: one encoder, or SDXL's two, and their tokenizer.

    `image_size` is the family's native size in pixels, SDXL's default for `time_ids`;
    `zero_empty_negative`: an empty negative prompt is all zeros and not the encoding of "";
    `learned`: for each encoder the vectors [n, width] of the tokens that the tokenizer learned.
    """

    def __init__(
        self,
        towers: Sequence[Tower],
        tokenizer: ClipTokenizer,
        *,
        image_size: int = 1024,
        zero_empty_negative: bool | None = None,
        learned: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.tokenizer = tokenizer
        self.learned = tuple(learned)
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
    def context_dim(self) -> int:
        """D, the width of the context."""
        return sum(tower.params.width for tower in self._towers())

    @property
    def length(self) -> int:
        """L, the number of positions: 77 for every full-size family."""
        return min(tower.params.positions for tower in self._towers())

    @overload
    def encode(
        self,
        prompts: Sequence[str],
        negative: None = None,
        *,
        size: Size = None,
        original: Size = None,
        crop: tuple[int, int] = (0, 0),
        strict: bool = False,
    ) -> Conditioning: ...
    @overload
    def encode(
        self,
        prompts: Sequence[str],
        negative: str | Sequence[str],
        *,
        size: Size = None,
        original: Size = None,
        crop: tuple[int, int] = (0, 0),
        strict: bool = False,
    ) -> tuple[Conditioning, Conditioning]: ...
    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negative: str | Sequence[str] | None = None,
        *,
        size: Size = None,
        original: Size = None,
        crop: tuple[int, int] = (0, 0),
        strict: bool = False,
    ) -> Conditioning | tuple[Conditioning, Conditioning]:
        """Prompts -> Conditioning, a row each; with `negative`, also the unconditional one.

        context [B, L, D]; SDXL also gets pooled [B, P] and time_ids [B, 6], its micro-conditioning
        (arXiv:2307.01952, section 2.2): the height and width of the picture that `original` says
        this one was cut from (default: `size`), the top and left of the `crop`, and `size` in
        pixels (default: the native size). One negative serves all prompts. A text longer than
        L - 2 tokens is cut, with one warning that counts what was dropped.

        Raises InputError for anything but strings, and with `strict` for a text that is too long.
        """
        texts = _texts("prompts", prompts)
        if negative is None:
            return self._encode(texts, (size, original, crop), strict)
        others = _texts("negative", negative)
        if len(others) not in (1, len(texts)):
            raise InputError(f"expected 1 or {len(texts)} negative prompts, got {len(others)}")
        both = self._encode(texts + others, (size, original, crop), strict)
        cond, uncond = both[: len(texts)], both[len(texts) :]
        if self.zero_empty_negative:
            uncond = _without(uncond, [text == "" for text in others])
        return cond, uncond.expand(len(texts))

    def ids(self, prompts: Sequence[str], *, strict: bool = False) -> list[Tensor]:
        """Token ids [B, L] for each encoder; they differ in padding only."""
        tokens = [self.tokenizer.tokens(prompt) for prompt in prompts]
        room = self.length - 2
        over = [(len(t) - room, p) for t, p in zip(tokens, prompts, strict=True) if len(t) > room]
        if over:
            dropped, longest = max(over)
            message = (
                f"{len(over)} of {len(prompts)} prompts exceed {room} tokens; dropped the last "
                f"{sum(count for count, _ in over)} tokens ({dropped} of {longest[:60]!r})"
            )
            if strict:
                raise InputError(message.replace("dropped", "would drop") + ": shorten the prompt")
            warnings.warn(message, stacklevel=5)
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        rows = [[bos, *row[:room], eos] for row in tokens]
        pads = [eos if tower.rule.pad == "eot" else 0 for tower in self._towers()]
        return [
            torch.tensor([row + [pad] * (self.length - len(row)) for row in rows]) for pad in pads
        ]

    def taught(self, tokens: Mapping[str, tuple[int, ...]], learned: Sequence[Tensor]) -> ClipText:
        """The same encoders, the very modules, behind a tokenizer that knows these tokens too."""
        return ClipText(
            self._towers(),
            self.tokenizer.learn(tokens),
            image_size=self.image_size,
            zero_empty_negative=self.zero_empty_negative,
            learned=learned,
        )

    def _towers(self) -> list[Tower]:
        return [tower for tower in self.towers if isinstance(tower, Tower)]

    def _encode(
        self, texts: list[str], micro: tuple[Size, Size, tuple[int, int]], strict: bool
    ) -> Conditioning:
        check_threads()
        device = next(self.parameters()).device
        ids = self.ids(texts, strict=strict)
        rows = self.learned or (None,) * len(ids)
        outs = [t(i.to(device), own) for t, i, own in zip(self._towers(), ids, rows, strict=True)]
        context = torch.cat([context for context, _ in outs], dim=-1)
        pooled = outs[-1][1]
        if pooled is None:
            return Conditioning(context)
        size, original, crop = micro
        target = self._size(size)
        if min(crop) < 0:
            raise InputError(f"crop must be pixels from the top and from the left, got {crop}")
        sizes = [*(target if original is None else self._size(original)), *crop, *target]
        time_ids = torch.tensor([sizes] * len(texts), dtype=torch.float32, device=device)
        return Conditioning(context, pooled, time_ids)

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


def _texts(name: str, texts: Sequence[str]) -> list[str]:
    """A list of strings; one string is one text."""
    found: list[object] = [texts] if isinstance(texts, str) else list(texts)
    if not found:
        raise InputError(f"{name}: expected at least one text, got none")
    for text in found:
        if not isinstance(text, str):
            raise InputError(f"{name}: expected strings, got {type(text).__name__} {text!r:.40}")
    return [text for text in found if isinstance(text, str)]
