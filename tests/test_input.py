"""Damaged records, ledgers, plans and configurations: one error that names the file, or no harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Model
from crashes import CASES, contents, run
from damage import DEEP, STRANGE, changed, damaged_bytes, damaged_values, paths, written
from hypothesis import given
from hypothesis import strategies as st
from plans import SD, patient

import headstart as hs
from headstart.checkpoint.checkpoint import read_family
from headstart.cli import build_parser, main
from headstart.commands.replay import _as_recorded
from headstart.engine.record import Recorded, describe, parse, read_record
from headstart.errors import HeadstartError, InputError, PlanError
from headstart.input import MAX_DEPTH, loads, misfit, read_json
from headstart.metrics.features import open_features
from headstart.networks.tokenizer import ClipTokenizer
from headstart.plan.toml_plan import read_plan
from headstart.sweep.gallery import read_gallery
from headstart.sweep.ledger import read_entries

RECORD = describe(
    Recorded(
        prompts=("a fox", "an owl"),
        seeds=(3, 2**64 - 1),
        negative="",
        size=(64, 64),
        chunk=2,
        table=hs.preset("demo").compile(SD),
        weights={
            role: {"file": f"headstart_weights/{role}", "sha256": "ab" * 32}
            for role in ("base", "distilled", "adapter:ink")
        },
        machine={"device": "cpu", "dtype": "float32", "threads": 2, "embedded_guidance": 8.0},
        results={"latents": ["cd" * 32] * 2, "rgb": ["ef" * 32] * 2},
        adapters={"ink": {"to": ["base"], "allow": [], "strength": {"value": 0.5}}},
        lineage="demo",
    )
)
SWEEP = {
    "format": "headstart.sweep/1",
    "plan": "demo-hybrid",
    "passes": 4,
    "cases": {"count": len(CASES), "sha256": "ab"},
    "lineage": "demo",
    "weights": {"base": {"file": "headstart_weights/base", "sha256": "ab"}},
}
PLAN = """
name = "mine"
start = "unit"
end = "first"
[[leg]]
model = "base"
steps = 2
until = "next"
guidance = 3.0
[[leg]]
model = "distilled"
timesteps = [749, 499, 249]
update = "ddim"
eta = 0.5
adapters = { ink = 0.5 }
"""


def read_whole_record(path: Path) -> Recorded:
    return parse(read_record(path), str(path))


def is_harmless(read: Callable[[Path], object], path: Path, text: bytes) -> bool:
    """Whether it is refused: with a short error that names the file or its folder, or is read."""
    path.write_bytes(text)
    try:
        read(path)
    except HeadstartError as error:
        assert any(str(part) in str(error) for part in (path, path.parent, path.parents[1]))
        assert len(str(error)) < 1500 and str(error).count("\n") < 10
        return True
    return False


def everywhere(document: Any) -> list[bytes]:
    """Every strange value in every place, one at a time."""
    return [written(changed(document, at, value)) for at in paths(document) for value in STRANGE]


# ------------------------------------------------------------------ records


def test_a_strange_value_anywhere_in_a_record_is_refused_or_harmless(tmp_path: Path) -> None:
    texts = everywhere(RECORD)
    refused = [is_harmless(read_whole_record, tmp_path / "record.json", text) for text in texts]
    assert len(texts) // 2 < sum(refused) < len(texts)


@pytest.mark.parametrize("reading", [{"style": "zzz"}, {"clip_skip": 0}])
def test_a_way_of_reading_that_there_is_not_names_the_record(
    reading: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(written({**RECORD, "reading": reading}))
    with pytest.raises(InputError, match=rf"record.json' is damaged, .*{next(iter(reading))}"):
        read_whole_record(path)


@pytest.mark.parametrize("field", ["seeds", "chunk", "size", "prompts", "weights", "table"])
@pytest.mark.parametrize("value", [None, "12", 2.5, float("inf"), 10**400, True], ids=str)
def test_a_field_of_another_kind_is_named(field: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(written({**RECORD, field: value}))
    with pytest.raises(InputError, match=rf"record.json' is damaged, .*({field}|Infinity|digits)"):
        read_whole_record(path)


def test_a_record_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    text = json.dumps(RECORD).encode()
    path = tmp_path / "record.json"
    assert not is_harmless(read_whole_record, path, text)
    assert all(is_harmless(read_whole_record, path, text[:end]) for end in range(len(text)))


@given(text=damaged_bytes(json.dumps(RECORD).encode()) | damaged_values(RECORD))
@patient
def test_damage_to_a_record_is_refused_or_harmless(
    text: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    is_harmless(read_whole_record, tmp_path_factory.getbasetemp() / "record.json", text)


@pytest.mark.parametrize("text", [b"", DEEP, b"\xff\xfe{}", b"\0" * 100, b"[]", b'{"a": 1', None])
def test_replay_says_in_one_line_which_file_is_damaged(
    text: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    path.mkdir() if text is None else path.write_bytes(text)
    assert main(["replay", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("headstart: error: ") and error.count("\n") == 1
    assert str(path) in error and "the record.json that sampling wrote" in error


def test_a_record_chooses_weights_and_no_other_option() -> None:
    """A role is only a name in a file that anybody may have written."""
    args = build_parser(["replay"]).parse_args(["replay", "record.json"])
    files = {role: {"file": f"mine/{role}", "sha256": "ab"} for role in ("base", "out", "debug")}
    chosen = _as_recorded(args, files, {})
    assert (chosen.base, chosen.out, chosen.debug) == ("mine/base", None, False)


# ------------------------------------------------------------------ sweeps


@given(
    number=st.integers(0, len(CASES) - 1),
    torn=st.booleans(),
    data=st.data(),
)
@patient
def test_a_damaged_line_of_a_ledger_finishes_nothing_and_blocks_nothing(
    number: int, torn: bool, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Wherever it is, and cut off at the end too: the others count, and the sweep goes on."""
    folder = tmp_path_factory.mktemp("sweep")
    run(folder)
    whole = contents(folder)
    journal = folder / "shards/0000.jsonl"
    lines = journal.read_bytes().splitlines()
    lines.append(lines.pop(number)) if torn else None
    at = len(lines) - 1 if torn else number
    own = json.loads(lines[at])
    lines[at] = data.draw(damaged_bytes(lines[at]) | damaged_values(own) | st.binary())
    others = {json.loads(line)["case_number"] for n, line in enumerate(lines) if n != at}
    journal.write_bytes(b"\n".join(lines) + (b"" if torn else b"\n"))
    (folder / "manifest.jsonl").unlink()
    assert others <= {entry.case_number for entry in read_entries(folder)}
    done = run(folder)
    assert done.complete and done.skipped >= len(others) and contents(folder) == whole
    after = journal.read_bytes().splitlines()
    assert all(loads(line) for line in after[len(after) - done.written :])  # none, if none was torn


def test_a_damaged_manifest_is_read_from_the_shards_and_written_anew(tmp_path: Path) -> None:
    run(tmp_path)
    whole, entries = contents(tmp_path), read_entries(tmp_path)
    (tmp_path / "manifest.jsonl").write_bytes(DEEP + b"\n\0\0\n[]\n{")
    assert read_entries(tmp_path) == entries
    assert run(tmp_path) == (0, len(CASES), True)
    assert contents(tmp_path) == whole


def test_a_ledger_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "shards/0007.jsonl").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*0007.jsonl"):
        run(tmp_path)


def test_a_strange_value_anywhere_in_sweep_json_is_refused_or_harmless(tmp_path: Path) -> None:
    run(tmp_path)
    report = json.loads((tmp_path / "sweep.json").read_text())
    texts = everywhere(report)
    refused = [
        is_harmless(lambda path: run(path.parent), tmp_path / "sweep.json", t) for t in texts
    ]
    assert len(texts) // 2 < sum(refused) < len(texts)
    texts = everywhere({**report, **SWEEP})
    for text in texts:
        is_harmless(lambda path: read_gallery(path.parent), tmp_path / "sweep.json", text)


def test_a_strange_value_in_the_record_of_an_evaluated_folder_is_refused_or_harmless(
    tmp_path: Path,
) -> None:
    for text in everywhere(RECORD):
        is_harmless(lambda path: read_gallery(path.parent), tmp_path / "record.json", text)


# ------------------------------------------------------------------ plans and models

TOML = (
    *("0", "-1", "2.5", "inf", "nan", "1e400", "true", "'x'", "''", "[]", "{}", "[[]]", "[nan]"),
    *("9" * 400, f"[{'9' * 400}]", f"{{a={'9' * 400}}}", "0x" + "f" * 5000, "{a='x'}", "['a']"),
    *("2020-01-01", "'\\u0000'", "[" * 50_000 + "]" * 50_000, f"'{'x' * 5000}'"),
)


@pytest.mark.parametrize("number", range(len(PLAN.split("\n"))))
def test_a_strange_value_in_a_plan_file_is_refused_or_harmless(number: int, tmp_path: Path) -> None:
    lines = PLAN.split("\n")
    if "=" not in lines[number]:
        return
    name = lines[number].partition("=")[0]
    for value in TOML:
        lines[number] = f"{name} = {value}"
        is_harmless(read_plan, tmp_path / "mine.toml", "\n".join(lines).encode())


@given(text=damaged_bytes(PLAN.encode()))
@patient
def test_damage_to_a_plan_file_is_refused_or_harmless(
    text: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    is_harmless(read_plan, tmp_path_factory.getbasetemp() / "mine.toml", text)


@pytest.mark.parametrize("field", ["guidance", "eta", "gamma", "until", "below", "timesteps"])
def test_a_number_too_large_for_a_float_is_a_plan_error(field: str) -> None:
    value: Any = (10**400,) if field == "timesteps" else 10**400
    with pytest.raises(PlanError, match=field):
        hs.Leg(model="base", **({"steps": 4} if field != "timesteps" else {}), **{field: value})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Model.of("sd15", 1).write("folder", tmp_path_factory.mktemp("models") / "model")


SCHEDULERS: tuple[dict[str, Any], ...] = (
    {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
     "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "epsilon"},
    {"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.2]},
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "shift_terminal": 0.02},
    {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_data": 0.5, "rho": 7.0},
)  # fmt: skip


@pytest.mark.parametrize("inputs", SCHEDULERS, ids=lambda expected: str(len(expected)))
def test_a_strange_value_in_a_scheduler_config_is_refused_or_harmless(
    inputs: dict[str, Any], model: Path
) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    whole = path.read_bytes()
    refused = [is_harmless(lambda _: read_family(model), path, text) for text in everywhere(inputs)]
    path.write_bytes(whole)
    assert any(refused) and not all(refused)


def test_a_strange_value_in_a_unet_config_is_refused_or_harmless(model: Path) -> None:
    path = model / "unet" / "config.json"
    whole = path.read_bytes()
    config = json.loads(whole) | {"norm_num_groups": 32, "sample_size": 64, "act_fn": "silu"}
    refused = [is_harmless(lambda _: read_family(model), path, text) for text in everywhere(config)]
    path.write_bytes(whole)
    assert any(refused) and not all(refused)


def test_a_strange_value_in_a_vocabulary_is_refused_or_harmless(tmp_path: Path) -> None:
    words = {token: n for n, token in enumerate(("a", "b", "<|startoftext|>", "<|endoftext|>"))}
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")

    def read(path: Path) -> list[int]:
        return ClipTokenizer.load(path.parent).tokens("ab c")

    refused = [is_harmless(read, tmp_path / "vocab.json", text) for text in everywhere(words)]
    assert any(refused) and not all(refused)


def test_a_strange_value_in_what_prepares_pictures_is_refused_before_a_network_is_read(
    tmp_path: Path,
) -> None:
    """There are no weights here, which is told once the configuration is fine."""
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    config = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    config |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    for text in everywhere(config):
        assert is_harmless(
            lambda path: open_features(str(path.parent)),
            tmp_path / "preprocessor_config.json",
            text,
        )


# ------------------------------------------------------------------ the reader itself


def test_nesting_is_told_at_the_depth_that_is_documented() -> None:
    assert loads(b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)) is not None
    for depth in (MAX_DEPTH + 1, 900, 200_000):
        with pytest.raises(ValueError, match="nested more than"):
            loads(b"[" * depth + b"]" * depth)


@pytest.mark.parametrize(
    ("value", "shape", "expected"),
    [
        ([1, 2], [int], None),
        ((1, 2), [int], None),
        ([1, True], [int], "it[1] must be a whole number, not True"),
        ({"a": {"b": 1}}, {"a": {"b": str}}, "a.b must be a string, not 1"),
        ({}, {"a": int}, "it has no 'a'"),
        ({}, {"a?": int}, None),
        ({"a": None}, {"a?": int}, "a must be a whole number, not None"),
        ({"x": 1, "y": "2"}, {"": int}, "y must be a whole number, not '2'"),
        (None, (None, str), None),
        (3, (None, str), "it must be a string, not 3"),
        (10**30, int, "it must be a whole number, not 1000000000000000000000000000000"),
        (float("nan"), float, "it must be a finite number, not nan"),
        ([], {}, "it must be an object, not a list"),
        ({}, [int], "it must be a list, not an object"),
    ],
)
def test_a_value_that_does_not_fit_is_told_by_its_place(
    value: object, shape: object, expected: str | None
) -> None:
    assert misfit(value, shape) == expected


def test_a_file_that_cannot_be_read_is_named_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent.json.*: expected a list"):
        read_json(tmp_path / "absent.json", "a list")
    with pytest.raises(InputError, match=r"cannot read .*: expected a list"):
        read_json(tmp_path, "a list")


def test_a_line_of_another_size_finishes_nothing(tmp_path: Path) -> None:
    """With the right digest too: else the case would be skipped and the sweep never complete."""
    run(tmp_path)
    whole, journal = contents(tmp_path), tmp_path / "shards/0000.jsonl"
    lines = journal.read_bytes().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "size_bytes": 1}).encode()
    journal.write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "manifest.jsonl").unlink()
    assert run(tmp_path).complete and contents(tmp_path) == whole
