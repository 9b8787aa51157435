"""PNG files with text inside: written, and read from files of any program.

signature, then chunks: length, type, data, CRC; a text is a keyword, 0, and the rest of its chunk:
    tEXt  Latin-1      zTXt  a method, then Latin-1, deflated
    iTXt  compressed?, a method, a language, 0, the keyword translated, 0, then UTF-8
(Portable Network Graphics, third edition, sections 5.3 and 11.3.3)
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from headstart.errors import InputError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_TEXT = 2**22
"""Bytes of the largest text that is read, inflated: a record of a picture has about 4,000."""
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_KEYWORD = 80
"""Bytes of the longest keyword and its 0."""
_MOST_KEYWORDS = 64


class Png(NamedTuple):
    """The contents of a file besides its pixels.

    size      (height, width)
    keywords  of its texts, in their order, 64 at most
    text      the text of one keyword, None where there is none
    """

    size: tuple[int, int]
    keywords: tuple[str, ...]
    text: str | None


def encode_png(
    image: Image.Image | NDArray[np.uint8], texts: Mapping[str, str] | None = None
) -> bytes:
    """PNG bytes of an image or of rgb uint8 [H, W, 3], with `texts` by keyword.

    Not `optimize`: it takes 10 times as long for 2.5 % fewer bytes (1.46 s for a sheet of 64).
    """
    chunks = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        add = chunks.add_text if text.isascii() else chunks.add_itxt
        add(keyword, text.replace("\0", ""))  # which ends a text in a chunk
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_png(path: Path, keyword: str) -> Png:
    """The size of a picture, its texts' keywords, and one of its texts; no pixel is decoded.

    Raises InputError for a file that cannot be read or is no PNG, for one that was cut short, and
    for a text that is damaged, stands there twice, or is larger than MOST_TEXT.
    """
    source = str(path)
    try:
        with path.open("rb") as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                raise InputError(f"{source!r} is no PNG file")
            return _read(file, keyword)
    except OSError as error:
        raise InputError(f"cannot read {source!r}: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source!r} is damaged: {error}") from error


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """rgb uint8 [H, W, 3]. Raises InputError for a file that Pillow cannot read whole."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG",)) as image:
                return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        raise InputError(f"{str(path)!r} cannot be read as a picture: {error!s:.200}") from error


def _read(file: BinaryIO, keyword: str) -> Png:
    keywords: list[str] = []
    texts: list[str] = []
    size = None
    for kind, length in _chunks(file):
        if size is None:
            if kind != b"IHDR" or length != 13:
                raise ValueError("it does not begin with a header")
            width, height = struct.unpack(">II", file.read(8))
            size = height, width
        elif kind in _TEXTS:
            name, _, beginning = file.read(min(length, _KEYWORD)).partition(b"\0")
            if len(keywords) < _MOST_KEYWORDS:
                keywords.append(name.decode("latin-1"))
            if name == keyword.encode("latin-1"):
                if length > MOST_TEXT:
                    raise ValueError(f"its text {keyword!r} is larger than {MOST_TEXT} bytes")
                data = beginning + file.read(max(0, length - _KEYWORD))
                texts.append(_decoded(kind, data, keyword))
    if size is None:
        raise ValueError("it does not begin with a header")
    if len(texts) > 1:
        raise ValueError(f"it has {len(texts)} texts {keyword!r}, expected one")
    return Png(size, tuple(keywords), texts[0] if texts else None)


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Type and length of each chunk up to the last, with the file at the first byte of its data."""
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise ValueError("it ends before its last chunk: it was cut short")
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        begin = file.tell()
        yield kind, length
        file.seek(begin + length + 4)


def _decoded(kind: bytes, data: bytes, keyword: str) -> str:
    """The text of a chunk behind its keyword."""
    try:
        if kind == b"tEXt":
            return data.decode("latin-1")
        if kind == b"zTXt":
            return _inflated(data[:1], data[1:], keyword).decode("latin-1")
        compressed, method, tail = data[:1], data[1:2], data[2:]
        _, _, tail = tail.partition(b"\0")
        _, _, text = tail.partition(b"\0")
        return (_inflated(method, text, keyword) if compressed == b"\1" else text).decode()
    except (UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"its text {keyword!r} cannot be read ({error!s:.100})") from None


def _inflated(method: bytes, data: bytes, keyword: str) -> bytes:
    if method != b"\0":
        raise zlib.error("unknown compression")
    stream = zlib.decompressobj()
    text = stream.decompress(data, MOST_TEXT + 1)
    if len(text) > MOST_TEXT:
        raise ValueError(f"its text {keyword!r} is larger than {MOST_TEXT} bytes")
    if not stream.eof:
        raise zlib.error("it was cut short")
    return text
