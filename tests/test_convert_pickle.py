"""`headstart convert` on pickles: every form torch.save has, and what no reader may run."""

from __future__ import annotations

import json
import os
import pickle
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from headstart.checkpoint.tensors import Checkpoint
from headstart.cli import main
from headstart.convert import pickle_file, unpickle
from headstart.convert.convert import convert
from headstart.errors import CheckpointError, InputError

Tensors = dict[str, torch.Tensor]


def sample() -> Tensors:
    """One tensor of each kind that real pickles hold."""
    base = torch.randn(6, 4)
    return {
        "plain.weight": base,
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "turned": base.T,
        "shared": base,
        "sliced": base[1:3, ::2],
        "alpha": torch.tensor(1),  # the sliders' alpha: 0-d, int64
        "scalar": torch.tensor(0.5),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
    }


def same(path: Path, expected: Tensors) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


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


@pytest.mark.usefixtures("inside")
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


@pytest.mark.usefixtures("inside")
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


@pytest.mark.usefixtures("inside")
def test_nested_tables_are_joined_with_dots(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "in.bin"
    a, b = torch.randn(2), torch.randn(3)
    torch.save({"unet": {"a": a}, "text_encoder": [b, {"deep": a}]}, source)
    convert(source, out)
    same(out, {"unet.a": a, "text_encoder.0": b, "text_encoder.1.deep": a})


@pytest.mark.usefixtures("inside")
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


@pytest.mark.usefixtures("inside")
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


@pytest.mark.usefixtures("inside")
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


@pytest.mark.usefixtures("inside")
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


@pytest.mark.usefixtures("inside")
def test_an_encoded_prompt_without_a_name_is_called_cond(tmp_path: Path, out: Path) -> None:
    tensor = torch.rand(1, 77, 8)
    torch.save(tensor, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", out)
    same(out, {"cond": tensor})


# --------------------------------------------------------------------- refusals


class Malicious:
    """Unpickled by Python, it creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def refused(source: Path, out: Path, **options: Any) -> str:
    """The message of the error, after which no file is left beside the input."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        convert(source, out, **options)
    assert sorted(source.parent.iterdir()) == before
    assert str(source) in str(caught.value) and ".partial" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("inside")
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


@pytest.mark.usefixtures("inside")
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


def _cut(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def _cut_legacy(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:2000])


def _itself(path: Path) -> None:
    table: dict[str, object] = {"a": torch.zeros(1)}
    table["b"] = {"c": table}
    torch.save(table, path)


_RANDOM = {"random_state": (3, (1, 2), None), "torch_manual_seed": torch.zeros(8)}
UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a zip cut short": (_cut, "damaged or cut short"),
    "a legacy file cut short": (_cut_legacy, "damaged"),
    "a zip of something else": (_zip("word/document.xml"), "did not write (it holds word/doc"),
    "an empty zip": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(60)), "damaged or cut short"),
    "TorchScript": (_zip("m/data.pkl", "m/constants.pkl"), "TorchScript"),
    "a compressed zip": (_deflated, "is compressed"),
    "no tensors": (lambda p: torch.save({"a": 1}, p), "holds no tensor"),
    "an empty table": (lambda p: torch.save({}, p), "it holds nothing"),
    "an empty list": (lambda p: torch.save([], p), "it holds nothing"),
    "a vector without a name": (lambda p: torch.save(torch.ones(768), p), "one tensor without a"),
    "means and deviations": (
        lambda p: torch.save([torch.ones(768), torch.ones(768)], p),
        "2 tensors without a name ([768], [768])",
    ),
    "a name of no letters": (lambda p: torch.save({"": torch.ones(1)}, p), "without a name"),
    "an optimizer": (
        lambda p: torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, p),
        "the state of an optimizer",
    ),
    "a scheduler": (
        lambda p: torch.save({"last_epoch": 3, "_step_count": 4}, p),
        "rate's schedule",
    ),
    "random states": (
        lambda p: torch.save(
            _RANDOM | {"numpy_random_seed": np.random.RandomState(1).get_state()}, p
        ),
        "random number generators",
    ),
    "a lone number": (lambda p: torch.save(3, p), "holds no tensor"),
    "a pickle of another program": (
        lambda p: p.write_bytes(pickle.dumps({"a": [1] * 50}, 2)),
        "torch.save did not write it",
    ),
    "a table inside itself": (_itself, "nested"),
    "names that collide": (
        lambda p: torch.save({"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}}, p),
        "two tensors are called 'a.b'",
    ),
    "complex numbers": (
        lambda p: torch.save({"c": torch.zeros(2) + 1j}, p),
        "'c' is torch.complex",
    ),
    "a sparse tensor": (lambda p: torch.save({"s": torch.eye(3).to_sparse()}, p), "'s' is sparse"),
    "a view of 10^12 numbers": (
        lambda p: torch.save({"v": torch.zeros(1).expand(10**6, 10**6)}, p),
        "expanded views",
    ),
    "a name with a control character": (
        lambda p: torch.save({"a\n\x1b[2J": torch.zeros(1)}, p),
        "control character",
    ),
    "a name of 1 MB": (lambda p: torch.save({"a" * 10**6: torch.zeros(1)}, p), "1000000 charac"),
}


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("case", UNREADABLE)
def test_a_pickle_that_cannot_be_converted_is_one_error(
    tmp_path: Path, out: Path, case: str
) -> None:
    write, reason = UNREADABLE[case]
    source = tmp_path / "in.ckpt"
    write(source)
    message = refused(source, out)
    assert reason in message and len(message) < 600


def zip_of(pickled: bytes, path: Path) -> None:
    """A torch archive around a pickle of our own making."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def test_a_pickle_that_never_ends_is_given_up_in_time(tmp_path: Path, out: Path) -> None:
    """(((), ()), ((), ())) ... 60 deep, used as a key: hashing it takes 2^60 steps."""
    source = tmp_path / "in.ckpt"
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    zip_of(b"\x80\x02}" + b")" + doubled + b"K\x01s.", source)
    begin = time.monotonic()
    assert "took more than 4 s" in refused(source, out, timeout_s=4.0)
    assert time.monotonic() - begin < 6.0


def test_a_pickle_that_asks_for_all_memory_is_refused(tmp_path: Path, out: Path) -> None:
    """bytearray(2^40) is among the calls that weights_only allows."""
    source = tmp_path / "in.ckpt"
    zip_of(
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R.",
        source,
    )
    assert "more memory than its size" in refused(source, out)


@pytest.mark.usefixtures("inside")
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


def test_what_lies_beside_weights_is_named_and_not_sent_to_convert(tmp_path: Path) -> None:
    for name in ("optimizer.bin", "random_states_0.pkl", "training_args.bin", "scheduler.pt"):
        torch.save({"last_epoch": 1}, tmp_path / name)
        with pytest.raises(CheckpointError, match="by its name the state of a trainer") as caught:
            Checkpoint([tmp_path / name])
        assert "convert" not in str(caught.value)


@pytest.mark.usefixtures("inside")
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


@pytest.mark.usefixtures("inside")
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


@pytest.mark.parametrize("modern", [True, False])
def test_a_process_of_its_own_reads_the_same(tmp_path: Path, out: Path, modern: bool) -> None:
    source, tensors = tmp_path / "in.ckpt", sample()
    document = {"state_dict": tensors, "epoch": 3}
    torch.save(document, source, _use_new_zipfile_serialization=modern)
    assert convert(source, out).left_out == ("epoch: int",)
    same(out, tensors)


def test_a_process_of_its_own_refuses_what_is_malicious(tmp_path: Path, out: Path) -> None:
    source, witness = tmp_path / "in.ckpt", tmp_path / "witness"
    torch.save({"x": Malicious(witness)}, source)
    assert "it asks for `posix.system`" in refused(source, out)
    assert not witness.exists()
