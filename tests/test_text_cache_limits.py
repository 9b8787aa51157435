"""What a cache of texts holds, and under which settings of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_pair import tiny_engine

import headstart as hs
from headstart.conditioning.text_cache import VARIABLE, TextCache, limit_bytes
from headstart.errors import InputError
from headstart.interfaces import Conditioning


@pytest.fixture
def engine() -> hs.Engine:
    return tiny_engine("sd15")


def test_a_limit_is_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limit_bytes() == 64e6
    monkeypatch.setenv(VARIABLE, "1.5")
    assert limit_bytes() == 1.5e6
    for wrong in ("many", "-1", "nan", "inf", ""):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(InputError, match="expected megabytes"):
            limit_bytes()


def test_an_encoder_that_is_changed_while_it_encodes_keeps_nothing(engine: hs.Engine) -> None:
    text = engine.weights.text
    cache = TextCache(text)

    def encode() -> Any:
        encodings = text.encode(["a cat"])
        with torch.no_grad():
            next(text.parameters()).mul_(1.5)
        return encodings, None

    cache.find("key", encode)
    assert len(cache) == 0


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_settings_that_change_the_rounding_encode_again(engine: hs.Engine) -> None:
    calls: list[Any] = []
    cache = TextCache(engine.weights.text)

    def encode() -> Any:
        calls.append((Conditioning(torch.zeros(1, 2, 3)), None))
        return calls[-1]

    torch.set_num_threads(1)
    assert cache.find("key", encode) is cache.find("key", encode)
    torch.set_num_threads(2)
    cache.find("key", encode)
    assert len(calls) == 2
    with torch.autocast("cpu", torch.bfloat16):
        cache.find("key", encode)
    assert len(calls) == 3
    with torch.inference_mode():
        cache.find("key", encode)
    assert len(calls) == 4
    torch.set_num_threads(1)
    assert cache.find("key", encode) is calls[0]
