"""What a file is if it is no safetensors file: by its first bytes, not by its suffix.

first bytes -> "a Git LFS pointer; fetch the file itself with `git lfs pull`"
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

SNIFFED_BYTES = 256
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
_AGAIN = "the download went wrong, fetch the file again"


class _Sign(NamedTuple):
    """`pattern` matches the first bytes; with `pickle`, `headstart convert` can read it."""

    pattern: bytes
    what: str
    pickle: bool = False


# Blanks and a byte order mark may come before text; a magic number is exactly at the start.
_TEXT = rb"(?:\xef\xbb\xbf)?\s*"
_SIGNS = (
    _Sign(rb"PK\x03\x04", "a zip archive, which is what torch.save writes (a pickle)", pickle=True),
    _Sign(rb"\x80[\x00-\x05]", "a Python pickle", pickle=True),  # the opcode PROTO
    _Sign(rb"version https://git-lfs", "a Git LFS pointer; fetch the file with `git lfs pull`"),
    _Sign(_TEXT + rb"<(?:!doctype|html|head|body|!--)", f"a web page; {_AGAIN}"),
    _Sign(_TEXT + rb"<(?:\?xml|error)", f"a server's answer in XML; {_AGAIN}"),
    _Sign(_TEXT + rb'[{\[]\s*["{}\]]', f"a JSON text, such as a server's answer; {_AGAIN}"),
    _Sign(rb"GGUF|ggml|lmgg|tjgg", "a GGUF or GGML file; give the safetensors file"),
    _Sign(rb"\x1f\x8b", "a gzip archive; unpack it first"),
    _Sign(rb"7z\xbc\xaf\x27\x1c|Rar!", "an archive; unpack it first"),
    _Sign(rb"\x89HDF", "an HDF5 file (Keras); give the PyTorch release's safetensors file"),
    _Sign(rb"\x89PNG|\xff\xd8\xff|RIFF", "a picture; give the model file"),
)

# github.com/huggingface/accelerate, utils/constants.py; transformers, trainer.py.
_TRAINER = re.compile(
    r"random_states(_[0-9]+)?\.pkl|rng_state(_[0-9]+)?\.pth|training_args\.bin"
    r"|(optimizer|scheduler|scaler|sampler)(_[0-9]+)?\.(bin|pt)"
)


def foreign(path: Path, head: bytes) -> str | None:
    """What a file with these first bytes is, and what to do; None: unknown."""
    sign = _matching(head)
    if sign is None:
        return None
    if sign.pickle and _TRAINER.fullmatch(path.name):
        return (
            f"{sign.what}, by its name the state of a trainer, which has no weights: give the file "
            "of weights that lies beside it"
        )
    return f"{sign.what}; {convert_hint(path)}" if sign.pickle else sign.what


def is_pickle(head: bytes) -> bool:
    """Whether it is a zip archive or a bare pickle, the two formats of torch.save."""
    sign = _matching(head)
    return sign is not None and sign.pickle


def _matching(head: bytes) -> _Sign | None:
    # Safetensors: a length below 4 GB, then JSON. The length may look like a magic number.
    if head[4:9] == b"\0\0\0\0{":
        return None
    flags = re.IGNORECASE | re.DOTALL
    return next((sign for sign in _SIGNS if re.match(sign.pattern, head, flags)), None)


def convert_hint(path: Path) -> str:
    """The command, to be copied as it is, that makes a safetensors file of the pickle `path`."""
    target = path.with_suffix(".safetensors")
    if target == path:  # a pickle with the suffix .safetensors
        target = path.with_suffix(".converted.safetensors")
    return f"run `headstart convert {quoted(path)} {quoted(target)}` on it first"


def quoted(path: Path) -> str:
    """For a POSIX shell; always in quotes, so that the command reads the same for every path."""
    return "'" + str(path).replace("'", "'\"'\"'") + "'"
