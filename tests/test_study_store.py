"""A study's folder: cells are whole or absent, and never of other settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headstart.errors import InputError
from headstart.pictures.png import encode_png
from headstart.study.store import FORMAT, SETTINGS, CellKey, Store, open_store
from headstart.sweep.ledger import Shard

SETTING = {"format": FORMAT, "weights": {"base": "a"}, "prompts": ["a fox"], "numbers": ["0"]}
KEY = CellKey("plans", "cads:0.25", 0)
ARRAYS = {"diversity@a:b": np.arange(3.0), "score": np.ones((2, 2), np.float32)}


def opened(folder: Path) -> Store:
    with open_store(folder, SETTING, Shard()) as store:
        return store


def test_a_cell_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = opened(tmp_path / "new")
    assert store.read(KEY, "one") is None
    store.write(KEY, "one", ARRAYS)
    found = store.read(KEY, "one")
    assert found is not None and set(found) == set(ARRAYS)
    for name, values in ARRAYS.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == values.dtype


def test_a_cell_of_another_identity_is_none(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(KEY, "one", ARRAYS)
    assert store.read(KEY, "another") is None


@pytest.mark.parametrize("kept", [0, 1, 40, 0.5, 0.99])
def test_a_damaged_cell_is_none(tmp_path: Path, kept: float) -> None:
    store = opened(tmp_path)
    store.write(KEY, "one", ARRAYS)
    path = tmp_path / KEY.file
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    assert store.read(KEY, "one") is None


def test_a_cell_with_flipped_bytes_is_none_or_as_it_was(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(KEY, "one", ARRAYS)
    path = tmp_path / KEY.file
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        found = store.read(KEY, "one")
        for name, values in (found or {}).items():
            np.testing.assert_array_equal(values, ARRAYS[name])


def test_an_object_in_a_cell_is_not_unpickled(tmp_path: Path) -> None:
    store = opened(tmp_path)
    path = tmp_path / KEY.file
    path.parent.mkdir(parents=True)
    np.savez(path, identity=np.array("one"), score=np.array([{}], dtype=object))
    assert store.read(KEY, "one") is None


def test_pictures_come_back_to_the_bit_and_a_missing_one_is_all_missing(tmp_path: Path) -> None:
    store = opened(tmp_path)
    rgb = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    store.keep("cads:0.25", 2, (7, 8, 9), [*map(encode_png, rgb)])
    np.testing.assert_array_equal(store.pictures("cads:0.25", 2, (7, 8, 9)), rgb)
    assert store.pictures("cads:0.25", 2, (7, 8, 9, 10)) is None
    (tmp_path / "pictures/cads-0.25/002-8.png").write_bytes(b"\x89PNG")
    assert store.pictures("cads:0.25", 2, (7, 8, 9)) is None


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'thesis.tex' and no study.json"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("key", ["weights", "prompts", "numbers", "size", "dtype", "adapters"])
def test_a_study_of_other_settings_is_refused_by_their_name(tmp_path: Path, key: str) -> None:
    opened(tmp_path)
    with pytest.raises(InputError, match=key), open_store(tmp_path, {**SETTING, key: 1}, Shard()):
        pass


def test_cases_and_machines_may_change_between_runs(tmp_path: Path) -> None:
    opened(tmp_path)
    with open_store(tmp_path, {**SETTING, "cases": ["more"], "machine": {}}, Shard(1, 2)) as store:
        assert store.shard.rank == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 3}', "\xff"])
def test_damaged_settings_are_told_as_that(tmp_path: Path, text: str) -> None:
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(InputError, match=r"study\.json"):
        opened(tmp_path)


def test_one_rank_is_one_process(tmp_path: Path) -> None:
    with open_store(tmp_path, SETTING, Shard()):
        with pytest.raises(InputError, match="another process is at work"):
            opened(tmp_path)
        with open_store(tmp_path, SETTING, Shard(1, 2)):
            pass
    opened(tmp_path)
