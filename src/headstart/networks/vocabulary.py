"""CLIP's own vocabulary (arXiv:2103.00020), from what lies on this machine; never from the network.

49408 tokens = 256 bytes + 256 bytes that end a word + 48894 merged pairs + begin + end
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from headstart.errors import CheckpointError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
EXTRA = "clip"
PACKAGE = "clip-anytorch"
"""The optional extra of this package that brings the vocabulary, and the package it depends on."""

_MERGES = 49152 - 256 - 2
_PACKAGES = ("clip", "open_clip")  # clip-anytorch, or OpenAI's own; open_clip_torch
_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MAX_BYTES = 16 * 2**20

# Repositories whose tokenizer is CLIP's, and where in them it lies.
_REPOSITORIES: tuple[tuple[str, str], ...] = (
    ("openai/clip-vit-large-patch14", ""),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer"),
    ("stabilityai/sdxl-turbo", "tokenizer"),
    ("stabilityai/sd-turbo", "tokenizer"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer"),
    ("stabilityai/stable-diffusion-2-1-base", "tokenizer"),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer"),
    ("segmind/SSD-1B", "tokenizer"),
    ("segmind/Segmind-Vega", "tokenizer"),
)


class Vocabulary(NamedTuple):
    """Token -> id, and the pairs that are merged, in order."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]


def cached_folder() -> Path | None:
    """A folder with CLIP's vocab.json and merges.txt in the Hub's cache, or None.

    The cache is where huggingface_hub keeps it: HF_HUB_CACHE, else HF_HOME/hub, else
    ~/.cache/huggingface/hub. `refs/main` names the snapshot; without it any complete one will do.
    """
    for repository, inner in _REPOSITORIES:
        folder = _cache() / f"models--{repository.replace('/', '--')}"
        for snapshot in _snapshots(folder):
            found = snapshot / inner
            if (found / "vocab.json").is_file() and (found / "merges.txt").is_file():
                return found
    return None


def packaged_file() -> Path | None:
    """The vocabulary's file in an installed package, which is not imported; or None."""
    for package in _PACKAGES:
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(place) / _FILE).is_file():
                return path
    return None


def read_packaged(path: Path) -> Vocabulary:
    """The vocabulary of CLIP's release from its gzipped list of merges.

    Raises CheckpointError for a file that is not that list.
    """
    try:
        with gzip.open(path) as file:
            lines = file.read(_MAX_BYTES).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: CLIP's vocabulary cannot be read: {error}") from error
    pairs = [tuple(line.split()) for line in lines[1 : 1 + _MERGES]]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    if len(merges) != _MERGES:
        raise CheckpointError(
            f"{path}: expected {_MERGES} merges of two tokens, found {len(merges)}: reinstall the "
            "package that it belongs to"
        )
    letters = list(byte_letters())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [left + right for left, right in merges] + [BOS, EOS]
    return Vocabulary({token: id for id, token in enumerate(tokens)}, merges)


def byte_letters() -> Iterator[str]:
    """The letter that stands for each byte, printable ones first, as the release orders them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    yield from map(chr, printable)
    yield from (chr(256 + i) for i in range(256 - len(printable)))


def _cache() -> Path:
    if named := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{home}/huggingface").expanduser() / "hub"


def _snapshots(folder: Path) -> Iterator[Path]:
    ref = folder / "refs" / "main"
    if ref.is_file() and ref.stat().st_size < 100:
        yield folder / "snapshots" / ref.read_text().strip()
    if (folder / "snapshots").is_dir():
        yield from sorted((folder / "snapshots").iterdir())
