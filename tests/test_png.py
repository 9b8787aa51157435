"""PNG texts round, and what anybody may have put in their place."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from plans import patient

from headstart.errors import InputError
from headstart.pictures import png
from headstart.pictures.png import SIGNATURE, encode_png, read_png, read_rgb

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes, rgb: np.ndarray = RGB) -> bytes:
    """A picture with a chunk before its last."""
    whole = encode_png(rgb)
    return whole[:-12] + chunk(kind, data) + whole[-12:]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@patient
@given(text=TEXT, other=TEXT)
def test_a_text_comes_back_as_it_was_also_through_pillow(
    text: str, other: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = encode_png(RGB, {"parameters": other, "headstart": text})
    path = written(tmp_path_factory.getbasetemp() / "a.png", data)
    found = read_png(path, "headstart")
    assert found == ((4, 6), ("parameters", "headstart"), text)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.info["headstart"] == text and image.info["parameters"] == other
    assert np.array_equal(read_rgb(path), RGB)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("text", ["plain", "snö 雪 \N{FOX FACE}"])
def test_what_another_program_wrote_anew_is_read(
    text: str, compressed: bool, tmp_path: Path
) -> None:
    """zTXt and compressed iTXt, as programs write longer texts, behind the pixels too."""
    info = PngImagePlugin.PngInfo()
    (info.add_text if text.isascii() else info.add_itxt)("headstart", text, zip=compressed)
    Image.fromarray(RGB).save(tmp_path / "a.png", pnginfo=info)
    assert read_png(tmp_path / "a.png", "headstart").text == text
    behind = with_chunk(b"zTXt", b"headstart\0\0" + zlib.compress(b"plain"))
    assert read_png(written(tmp_path / "b.png", behind), "headstart").text == "plain"


BOMB = zlib.compress(b"a" * 2**26)
HOSTILE = {
    "larger than": [
        with_chunk(b"zTXt", b"headstart\0\0" + BOMB),
        with_chunk(b"iTXt", b"headstart\0\1\0\0\0" + BOMB),
        with_chunk(b"tEXt", b"headstart\0" + b"a" * png.MOST_TEXT),
    ],
    "cannot be read": [
        with_chunk(b"zTXt", b"headstart\0\0" + BOMB[:100]),
        with_chunk(b"zTXt", b"headstart\0\7" + zlib.compress(b"{}")),
        with_chunk(b"zTXt", b"headstart\0"),
        with_chunk(b"iTXt", b"headstart\0\0\0\0\0\xff\xfe"),
    ],
    "expected one": [with_chunk(b"tEXt", b"headstart\0{}headstart\0{}")[:-12] + chunk(
        b"tEXt", b"headstart\0{}"
    ) + chunk(b"IEND", b"")],
    "cut short": [encode_png(RGB)[:-13], encode_png(RGB)[:40]],
    "begin with a header": [
        SIGNATURE + chunk(b"IEND", b""),
        SIGNATURE + b"\xff" * 40,
        SIGNATURE + chunk(b"tEXt", b"headstart\0{}") + chunk(b"IEND", b""),
    ],
    "no PNG": [b"", b"\xff\xd8\xff\xe0", b"{}"],
}  # fmt: skip


@pytest.mark.parametrize("message", HOSTILE)
def test_a_hostile_file_is_one_error(message: str, tmp_path: Path) -> None:
    for data in HOSTILE[message]:
        with pytest.raises(InputError, match=message) as caught:
            read_png(written(tmp_path / "a.png", data), "headstart")
        assert len(str(caught.value)) < 400


def test_a_flood_of_texts_is_not_kept(tmp_path: Path) -> None:
    data = with_chunk(b"tEXt", b"a\0")
    data = data[:-12] + chunk(b"tEXt", b"a\0") * 10_000 + data[-12:]
    assert len(read_png(written(tmp_path / "a.png", data), "headstart").keywords) == 64


@patient
@given(at=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_damaged_byte_is_harmless(
    at: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(encode_png(RGB, {"headstart": "{}"}))
    data[at % len(data)] = byte
    path = written(tmp_path_factory.getbasetemp() / "a.png", bytes(data))
    for read in (lambda: read_png(path, "headstart"), lambda: read_rgb(path)):
        try:
            read()
        except InputError as error:
            assert str(path) in str(error)


def test_pixels_of_a_bomb_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read_rgb(written(tmp_path / "a.png", encode_png(RGB)))
