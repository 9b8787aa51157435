"""CLIP's own vocabulary (arXiv:2103.00020), for files that bring none, as single files do.

49408 tokens = 256 bytes + 256 bytes that end a word + 48894 merged pairs + begin + end

`clip_merges.txt.gz` holds the pairs, one a line: lines 2 to 48895, the ones that CLIP uses, of
`bpe_simple_vocab_16e6.txt.gz`, which OpenAI released with it under the MIT licence. NOTICE has both
files' SHA-256.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from importlib.resources import files
from typing import NamedTuple

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


class Vocabulary(NamedTuple):
    """Token -> id, and the pairs that are merged, in order."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]


def clip_vocabulary() -> Vocabulary:
    """The vocabulary that SD 1, SD 2 and SDXL read prompts with, from the file beside this one."""
    packed = files("headstart.networks").joinpath("clip_merges.txt.gz").read_bytes()
    parts = gzip.decompress(packed).decode("utf-8").split()
    merges = list(zip(parts[::2], parts[1::2], strict=True))
    letters = list(byte_letters())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [left + right for left, right in merges] + [BOS, EOS]
    return Vocabulary({token: id for id, token in enumerate(tokens)}, merges)


def byte_letters() -> Iterator[str]:
    """The letter that stands for each byte, printable ones first, as the release orders them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    yield from map(chr, printable)
    yield from (chr(256 + i) for i in range(256 - len(printable)))
