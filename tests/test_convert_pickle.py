"""`headstart convert` on pickles: every form torch.save has, and what no reader may run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pickles import Malicious, Tensors, refused, same, sample
from torch import nn

from headstart.checkpoint.tensors import Checkpoint
from headstart.cli import main
from headstart.convert import pickle_file, unpickle
from headstart.convert.convert import convert
from headstart.errors import CheckpointError, InputError

pytestmark = pytest.mark.usefixtures("inside")


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in this process, which has torch already: what is read does not depend on where."""

    def extract(path: Path, target: Path, **_: object) -> pickle_file.Extracted:
        if pickle_file.format_of(path) == "zip":
            pickle_file.check_archive(path)
        try:
            count, left_out = unpickle.transfer(path, target)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: this pickle is refused: {error}") from error
        return pickle_file.Extracted(count, tuple(left_out))

    monkeypatch.setattr(pickle_file, "extract", extract)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


FORMS: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "a table of tensors": ("zip", lambda t: t),
    "an ordered table": ("zip", lambda t: OrderedDict(t)),
    "a state_dict": ("zip", lambda t: {"state_dict": t, "epoch": 3}),
    "a state_dict in a module": ("zip", lambda t: {"module": {"state_dict": t}}),
    "parameters": (
        "zip",
        lambda t: {k: nn.Parameter(v, v.is_floating_point()) for k, v in t.items()},
    ),
    "a legacy table": ("legacy", lambda t: t),
    "a legacy state_dict": ("legacy", lambda t: {"state_dict": t, "global_step": 5}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_pickle_comes_out_bit_for_bit(tmp_path: Path, out: Path, form: str) -> None:
    kind, wrap = FORMS[form]
    source, tensors = tmp_path / "in.ckpt", sample()
    torch.save(wrap(tensors), source, _use_new_zipfile_serialization=kind == "zip")
    done = convert(source, out)
    same(out, tensors)
    assert done.read_as == f"{kind} pickle" and done.tensors == len(tensors)
    assert Checkpoint([out]).metadata == {"format": "pt"}
    assert os.listdir(tmp_path) in (["in.ckpt", out.name], [out.name, "in.ckpt"])


def test_what_is_no_tensor_is_listed_and_nothing_else_is_left_out(
    tmp_path: Path, out: Path
) -> None:
    source, tensors = tmp_path / "in.pt", sample()
    document: dict[str, Any] = {
        "state_dict": {**tensors, "note": "words"},
        "epoch": 3,
        "optimizer_states": [{"state": {0: torch.zeros(3), 1: torch.ones(2)}}],
    }
    torch.save(document, source)
    assert convert(source, out).left_out == (
        "epoch: int",
        "optimizer_states: list with 2 tensors",
        "note: str",
    )
    same(out, tensors)


def test_nested_tables_are_joined_with_dots(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "in.bin"
    a, b = torch.randn(2), torch.randn(3)
    torch.save({"unet": {"a": a}, "text_encoder": [b, {"deep": a}]}, source)
    convert(source, out)
    same(out, {"unet.a": a, "text_encoder.0": b, "text_encoder.1.deep": a})


@pytest.mark.parametrize("table", [dict, nn.ParameterDict])
def test_a_textual_inversion_becomes_emb_params(
    tmp_path: Path, out: Path, table: Callable[[Tensors], object]
) -> None:
    source, vectors = tmp_path / "in.pt", torch.randn(4, 768)
    document = {"string_to_token": {"*": 265}, "string_to_param": table({"*": vectors})}
    torch.save(document | {"name": "style", "step": 500}, source)
    done = convert(source, out)
    same(out, {"emb_params": vectors})
    assert done.left_out == ("string_to_token: dict with 0 tensors", "name: str", "step: int")


def test_a_trainers_bookkeeping_is_read_as_inert(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sd-v1-4.ckpt holds the class of a Lightning callback, and numpy scalars."""
    import sys
    import types

    class ModelCheckpoint:
        pass

    name = "pytorch_lightning.callbacks.model_checkpoint"
    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = name, "ModelCheckpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    document = {
        "state_dict": {"a": torch.ones(2)},
        "callbacks": {ModelCheckpoint: {"best": np.float64(0.5)}},
    }
    torch.save(document, tmp_path / "in.ckpt")
    assert convert(tmp_path / "in.ckpt", out).left_out == ("callbacks: dict with 0 tensors",)
    same(out, {"a": torch.ones(2)})


def _pairs(layers: list[tuple[int, int]]) -> list[torch.Tensor]:
    """cloneofsimo's list of a LoRA of rank 2: [o, 2], [2, i], ..."""
    return [tensor for o, i in layers for tensor in (torch.rand(o, 2), torch.rand(2, i))]


def test_a_list_that_is_a_lora_gets_the_names_of_one(tmp_path: Path, out: Path) -> None:
    block = [(8, 8)] * 4 + [(8, 8), (8, 1024), (8, 1024), (8, 8)]
    for network, layers in {"unet": block * 16, "text_encoder": [(768, 768)] * 48}.items():
        tensors = _pairs(layers)
        torch.save(tensors, tmp_path / "in.pt")
        convert(tmp_path / "in.pt", out, overwrite=True)
        names = [f"{network}:{n}:{side}" for n in range(len(layers)) for side in ("up", "down")]
        same(out, dict(zip(names, tensors, strict=True)))
        with pytest.raises(CheckpointError, match="without a name"):
            torch.save(tensors[2:], tmp_path / "in.pt")
            convert(tmp_path / "in.pt", out, overwrite=True)


def test_of_the_stages_of_a_token_the_last_is_kept_and_the_others_are_listed(
    tmp_path: Path, out: Path
) -> None:
    """oss-roettger/XL-Textual-Inversion saves its progress so; other lists are none."""
    stages = [{"emb": torch.rand(768), "emb2": torch.rand(1280)} for _ in range(3)]
    torch.save(stages, tmp_path / "in.pt")
    done = convert(tmp_path / "in.pt", out)
    same(out, stages[-1])
    assert done.left_out == ("0 to 1: earlier stages of the last token",)
    torch.save([{"w": torch.ones(1)}, {"w": torch.ones(2)}], tmp_path / "in.pt")
    convert(tmp_path / "in.pt", out, overwrite=True)
    same(out, {"0.w": torch.ones(1), "1.w": torch.ones(2)})


def test_an_encoded_prompt_without_a_name_is_called_cond(tmp_path: Path, out: Path) -> None:
    tensor = torch.rand(1, 77, 8)
    torch.save(tensor, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", out)
    same(out, {"cond": tensor})


@pytest.mark.parametrize("modern", [True, False])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(
    tmp_path: Path, out: Path, modern: bool
) -> None:
    source, witness = tmp_path / "in.ckpt", tmp_path / "witness"
    document = {"a": torch.ones(2), "x": Malicious(witness)}
    torch.save(document, source, _use_new_zipfile_serialization=modern)
    message = refused(source, out)
    assert "it asks for `posix.system`" in message and "nothing of it was run" in message
    assert not witness.exists()
    torch.load(source, weights_only=False)
    assert witness.exists(), "the pickle is harmless, so the test above shows nothing"


def test_a_bare_malicious_pickle_is_refused_and_nothing_of_it_runs(
    tmp_path: Path, out: Path
) -> None:
    source, witness = tmp_path / "in.pt", tmp_path / "witness"
    for protocol in (2, 4):
        source.write_bytes(pickle.dumps(Malicious(witness), protocol))
        refused(source, out)
        assert not witness.exists()


def _deflated(path: Path) -> None:
    torch.save({"a": torch.zeros(10_000)}, path.with_suffix(".tmp"))
    with zipfile.ZipFile(path.with_suffix(".tmp")) as old, zipfile.ZipFile(path, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    path.with_suffix(".tmp").unlink()


def _zip(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"\x80\x02N.")

    return write


def _cut(path: Path, modern: bool = True) -> None:
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=modern)
    path.write_bytes(path.read_bytes()[:2000])


_ITSELF: dict[str, object] = {"a": torch.zeros(1)}
_ITSELF["b"] = {"c": _ITSELF}
_RANDOM = {
    "random_state": (3, (1, 2), None),
    "torch_manual_seed": torch.zeros(8),
    "numpy_random_seed": np.random.RandomState(1).get_state(),
}
UNREADABLE: dict[str, tuple[object, str]] = {
    "a zip cut short": (_cut, "damaged or cut short"),
    "a legacy file cut short": (partial(_cut, modern=False), "damaged"),
    "a zip of something else": (_zip("word/document.xml"), "did not write (it holds word/doc"),
    "an empty zip": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(60)), "damaged or cut short"),
    "TorchScript": (_zip("m/data.pkl", "m/constants.pkl"), "TorchScript"),
    "a compressed zip": (_deflated, "is compressed"),
    "no tensors": ({"a": 1}, "holds no tensor"),
    "an empty table": ({}, "it holds nothing"),
    "an empty list": ([], "it holds nothing"),
    "a vector without a name": (torch.ones(768), "one tensor without a"),
    "means and deviations": ([torch.ones(768)] * 2, "2 tensors without a name ([768], [768])"),
    "a name of no letters": ({"": torch.ones(1)}, "without a name"),
    "an optimizer": (
        {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
        "the state of an optimizer",
    ),
    "a scheduler": ({"last_epoch": 3, "_step_count": 4}, "rate's schedule"),
    "random states": (_RANDOM, "random number generators"),
    "a lone number": (3, "holds no tensor"),
    "a pickle of another program": (
        lambda p: p.write_bytes(pickle.dumps({"a": [1] * 50}, 2)),
        "torch.save did not write it",
    ),
    "a table inside itself": (_ITSELF, "nested"),
    "names that collide": (
        {"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}},
        "two tensors are called 'a.b'",
    ),
    "complex numbers": ({"c": torch.zeros(2) + 1j}, "'c' is torch.complex"),
    "a sparse tensor": ({"s": torch.eye(3).to_sparse()}, "'s' is sparse"),
    "a view of 10^12 numbers": ({"v": torch.zeros(1).expand(10**6, 10**6)}, "expanded views"),
    "a name with a control character": ({"a\n\x1b[2J": torch.zeros(1)}, "control character"),
    "a name of 1 MB": ({"a" * 10**6: torch.zeros(1)}, "1000000 charac"),
}
"""What is saved, or what writes the file; and the reason."""


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_pickle_that_cannot_be_converted_is_one_error(
    tmp_path: Path, out: Path, case: str
) -> None:
    document, reason = UNREADABLE[case]
    source = tmp_path / "in.ckpt"
    document(source) if callable(document) else torch.save(document, source)
    message = refused(source, out)
    assert reason in message and len(message) < 600


def test_the_header_names_the_command_that_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Taken from the error as it is, it makes a file that loads."""
    import shlex

    for name in ("it's a model.ckpt", "renamed.safetensors"):
        source = tmp_path / name
        torch.save({"a": torch.ones(2)}, source)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint([source])
        command = shlex.split(str(caught.value).split("`")[1])
        assert command[:3] == ["headstart", "convert", str(source)]
        assert main(command[1:]) == 0
        same(Path(command[3]), {"a": torch.ones(2)})
    assert "1 tensors, mostly F32" in capsys.readouterr().out


def test_the_command_reports_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 1}, source)
    assert main(["convert", str(source), str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["left_out"] == ["epoch: int"] and printed["tensors"] == 1
    assert main(["convert", str(source), str(out)]) == 2
    assert main(["convert", str(source), str(out), "--overwrite"]) == 0
    captured = capsys.readouterr()
    assert "give --overwrite" in captured.err and "epoch: int" in captured.out


def test_a_full_disk_leaves_no_file(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart import output

    source = tmp_path / "in.pt"
    torch.save({"a": torch.ones(2)}, source)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        convert(source, out)
    assert os.listdir(tmp_path) == ["in.pt"]
