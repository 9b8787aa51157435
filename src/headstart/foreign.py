"""What a file is that is no safetensors file: named by its first bytes, whatever its suffix.

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
    """`pattern` matches the first bytes; `pickle` says that `headstart convert` may read it."""

    pattern: re.Pattern[bytes]
    what: str
    pickle: bool = False


def _sign(pattern: bytes, what: str, *, pickle: bool = False) -> _Sign:
    return _Sign(re.compile(pattern, re.IGNORECASE | re.DOTALL), what, pickle)


# Blanks and a byte order mark may come before a text; a magic number is exactly at the start.
_TEXT = rb"(?:\xef\xbb\xbf)?\s*"
_SIGNS = (
    _sign(rb"PK\x03\x04", "a zip archive, which is what torch.save writes (a pickle)", pickle=True),
    _sign(rb"\x80[\x00-\x05]", "a Python pickle", pickle=True),  # the opcode PROTO
    _sign(rb"version https://git-lfs", "a Git LFS pointer; fetch the file with `git lfs pull`"),
    _sign(_TEXT + rb"<(?:!doctype|html|head|body|!--)", f"a web page; {_AGAIN}"),
    _sign(_TEXT + rb"<(?:\?xml|error)", f"a server's answer in XML; {_AGAIN}"),
    _sign(_TEXT + rb'[{\[]\s*["{}\]]', f"a JSON text, such as a server's answer; {_AGAIN}"),
    _sign(rb"GGUF|ggml|lmgg|tjgg", "a GGUF or GGML file; give the safetensors file"),
    _sign(rb"\x1f\x8b", "a gzip archive; unpack it first"),
    _sign(rb"7z\xbc\xaf\x27\x1c|Rar!", "an archive; unpack it first"),
    _sign(rb"\x89HDF", "an HDF5 file (Keras); give the PyTorch release's safetensors file"),
    _sign(rb"\x89PNG|\xff\xd8\xff|RIFF", "a picture; give the model file"),
)
# A length below 4 GB, then JSON. The length alone may look like any sign: 80 02 00 00 is 640.
_SAFETENSORS = re.compile(rb".{4}\x00{4}\{", re.DOTALL)


def foreign(path: Path, head: bytes) -> str | None:
    """What `head`, the first bytes of `path`, belongs to, and what to do; None: nothing we know."""
    if _SAFETENSORS.match(head):
        return None
    for sign in _SIGNS:
        if sign.pattern.match(head):
            return f"{sign.what}; {convert_hint(path)}" if sign.pickle else sign.what
    return None


def is_pickle(head: bytes) -> bool:
    """A zip archive or a bare pickle, the two things that torch.save has written."""
    if _SAFETENSORS.match(head):
        return False
    return any(sign.pickle and sign.pattern.match(head) for sign in _SIGNS)


def convert_hint(path: Path) -> str:
    """The command, to be copied as it is, that makes a safetensors file of the pickle `path`."""
    target = path.with_suffix(".safetensors")
    if target == path:  # a pickle that calls itself safetensors
        target = path.with_suffix(".converted.safetensors")
    return f"run `headstart convert {_quoted(path)} {_quoted(target)}` on it first"


def _quoted(path: Path) -> str:
    """For a POSIX shell; always in quotes, so that the command reads the same for every path."""
    return "'" + str(path).replace("'", "'\"'\"'") + "'"
