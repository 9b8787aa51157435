"""Methods as text: what is written is read, and what is wrong is told with what to do."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import headstart as hs
from headstart.diversify.cads import Cads
from headstart.diversify.dial import Dial
from headstart.diversify.embedding_noise import EmbeddingNoise
from headstart.diversify.interval import Interval
from headstart.diversify.method import Limits
from headstart.diversify.methods import NAMES, parse_method, read_methods
from headstart.diversify.particles import Particles
from headstart.diversify.pink import Pink
from headstart.diversify.select import Select


def test_every_method_is_in_the_table_by_its_own_name_with_an_example_that_reads() -> None:
    for name, entry in NAMES.items():
        method = parse_method(entry.example)
        assert type(method) is entry.kind and entry.kind.name == name
        assert str(method) == entry.example
        assert [field.name for field in fields(entry.kind)] == list(entry.kind.limits)


def numbers(limits: Limits) -> st.SearchStrategy[float]:
    high = min(limits.high, 1e9)
    if limits.whole:
        return st.integers(int(limits.low), int(high)).map(float)
    return st.floats(limits.low, high, exclude_min=limits.above)


@st.composite
def methods(draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from([entry.kind for entry in NAMES.values()]))
    first, *others = fields(kind)
    options: dict[str, float] = {first.name: draw(numbers(kind.limits[first.name]))}
    for name in draw(st.lists(st.sampled_from(others), unique=True)) if others else ():
        options[name.name] = draw(numbers(kind.limits[name.name]))
    try:
        return kind(**options)
    except hs.InputError as error:
        assert "is not below high" in str(error)
        return kind(*list(options.values())[:1])


@given(methods())
def test_what_is_written_is_read_back(method: Any) -> None:
    again = parse_method(str(method))
    assert again == method and str(again) == str(method)
    assert read_methods(str(method)) == read_methods([method]) == (method,)


@given(st.one_of(
    st.text(max_size=30),
    st.builds(
        lambda name, rest: f"{name}:{rest}",
        st.sampled_from([*NAMES, "CADS", "cad"]),
        st.text("0123456789.,=-+einfal owhgxsr", max_size=20),
    ),
))  # fmt: skip
def test_any_text_is_a_method_or_one_short_error(text: str) -> None:
    try:
        method = parse_method(text)
    except hs.InputError as error:
        lines = str(error).splitlines()
        assert len(lines) <= 10 and all(len(line) < 400 for line in lines)
        return
    assert parse_method(str(method)) == method
    values = [getattr(method, field.name) for field in fields(method)]  # type: ignore[arg-type]
    assert all(value is None or not math.isnan(value) for value in values)


def test_spaces_and_other_forms_of_a_number_are_the_same_method() -> None:
    assert parse_method(" cads : 1e-1 , low = .50 ") == Cads(0.1, low=0.5)
    assert str(parse_method("cads:0.10,low=0.6,mix=1")) == "cads:0.1"
    assert str(Select(4)) == "select:4" and str(Interval(0.28)) == "interval:0.28"
    assert str(Dial(0, first=1)) == "dial:0,first=1"
    assert str(EmbeddingNoise(1 / 3, until=1)) == "embedding-noise:0.3333333333333333,until=1"


def test_methods_are_read_in_their_order_as_text_or_data() -> None:
    methods = read_methods(["pink:1", Cads(0.1), "select:2"])
    assert methods == (Pink(1.0), Cads(0.1), Select(2))
    assert read_methods(()) == () and read_methods("pink:1") == (Pink(1.0),)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ("cad:0.1", "did you mean 'cads:0.1'\\? there is\n  cads:0.1 "),
        ("embedding_noise:1", "did you mean 'embedding-noise:1'"),
        ("zzz", "diversify 'zzz': there is\n"),
        ("cads", "expected a number, got '': such as cads:0.1"),
        ("cads:low=0.5", "expected a number, got 'low=0.5'"),
        ("cads:0", "scale is a number above 0, at most 10, got 0"),
        ("cads:-1", "got -1"),
        ("cads:nan", "got nan"),
        ("pink:inf", "exponent is a number above 0, at most 4, got inf"),
        ("interval:0.2,high=nan", "high is a number above 0, got nan"),
        ("interval:5,high=2", "low=5 is not below high=2"),
        ("interval:0.2,high=0.2", "is not below"),
        ("cads:0.1,low=0.9", "low=0.9 is not below high=0.9"),
        ("cads:0.1,scale=0.2", "cads has keys low, high, mix, each once"),
        ("cads:0.1,low=0.2,low=0.3", "each once"),
        ("cads:0.1,", "'': cads has keys"),
        ("cads:0.1,lo=0.2", "'lo=0.2': cads has keys low, high, mix"),
        ("pink:1,low=2", "pink has no keys"),
        ("select:1", "times is a whole number of at least 2, at most 1024, got 1"),
        ("select:2.5", "whole number"),
        ("dial:0.5,first=0", "first is a whole number of at least 1, got 0"),
        ("dial:3", "strength is a number of at least 0, at most 2, got 3"),
        ("embedding-noise:1,share=0", "share is a number above 0, at most 1"),
        ("embedding-noise:1,until=1.5", "until is a number above 0, at most 1"),
        ("particles:1,above=-1", "above is a number of at least 0"),
        (["cads:0.1", "pink:1", "cads:0.2"], "'cads' is given twice"),
        (7, "expected methods such as 'cads:0.1' or a list of them, got 7"),
        ([None], "got None"),
        ({"cads": 0.1}, "expected methods"),
        (b"cads:0.1", "expected methods"),
        (Cads, "expected methods"),
    ],
)
def test_what_is_no_method_is_told_with_what_to_do(inputs: object, says: str) -> None:
    with pytest.raises(hs.InputError, match=says):
        read_methods(inputs)


def test_data_is_checked_as_text_is() -> None:
    for make in (
        lambda: Cads(True),
        lambda: Cads("0.1"),  # type: ignore[arg-type]
        lambda: Select(math.inf),
        lambda: replace(Particles(1.0), above=math.nan),
    ):
        with pytest.raises(hs.InputError, match="diversify"):
            make()
