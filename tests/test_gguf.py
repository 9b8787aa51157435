"""GGUF: a header is believed only as far as the file goes, and numbers are as ggml defines them."""

from __future__ import annotations

import importlib.util
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Model, ldm_unet
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from gguf_files import Packed, gguf, meaning, plain, random_blocks, text
from networks import PARAMS, random_unet
from safetensors.torch import load_file, save_file

import headstart as hs
import headstart.checkpoint.gguf as reader
from headstart.checkpoint import keymap
from headstart.checkpoint.checkpoint import inspect_checkpoint
from headstart.checkpoint.dtypes import FLOATS
from headstart.checkpoint.tensors import Checkpoint
from headstart.cli import main
from headstart.convert.convert import convert
from headstart.errors import CheckpointError
from headstart.networks.load import load_unet, widened_bytes

METADATA = {"general.architecture": "sd1", "headstart.head_dim": "8", "headstart.norm_groups": "8"}


def small() -> bytes:
    shape = "comfy.gguf.orig_shape.odd"
    tensors = {
        "eight": random_blocks("Q8_0", (4, 64), 0),
        "four": random_blocks("Q4_K", (3, 512), 1),
        "odd": random_blocks("Q4_K", (2, 256), 2),
        "half": plain(np.linspace(-1, 1, 6).astype("<f2").reshape(2, 3)),
        "none": plain(np.zeros((0, 3), "<f4")),
    }
    return gguf(tensors, {**METADATA, shape: [16, 32]})


# --------------------------------------------------------------------- numbers


def test_blocks_mean_what_ggml_defines(tmp_path: Path) -> None:
    """d*scale*q takes 21 bits and is exact in float32; Q4_K's subtraction rounds once."""
    path = tmp_path / "x.gguf"
    tensors = {
        "eight": random_blocks("Q8_0", (40, 96), 0),
        "four": random_blocks("Q4_K", (21, 512), 1),
        "half": plain(np.random.default_rng(2).normal(size=(5, 3, 2)).astype("<f2")),
    }
    path.write_bytes(gguf(tensors, {}))
    checkpoint = Checkpoint([path])
    assert checkpoint.dtypes == {"eight": "Q8_0", "four": "Q4_K", "half": "F16"}
    assert checkpoint.metadata == {} and checkpoint.container == "GGUF"
    for name, packed in tensors.items():
        exact, values = meaning(packed), checkpoint.tensor(name).double().numpy()
        assert values.shape == exact.shape
        rounding = 2.0**-24 * np.abs(exact) if name == "four" else 0 * exact
        assert (np.abs(values - exact) <= rounding).all(), name
        flat = values.reshape(-1)
        for begin, end in ((0, 7), (31, 33), (5, len(flat))):  # beside the edges of blocks
            assert np.array_equal(checkpoint.values(name, begin, end), flat[begin:end])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16", "F32"])
def test_what_the_package_writes_is_read_within_a_step_of_its_blocks(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "x.gguf"
    weight = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    number = GGMLQuantizationType[kind]
    writer = GGUFWriter(path, "sdxl")
    writer.add_array("general.tags", ["a", "b"])
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_tensor("a.weight", quantize(weight, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = Checkpoint([path])
    assert checkpoint.metadata["general.architecture"] == "sdxl" and checkpoint.dtypes == {
        "a.weight": kind
    }
    high = np.abs(weight).reshape(-1, 32).max(1)
    low = weight.reshape(-1, 32).max(1) - weight.reshape(-1, 32).min(1)
    # A step of a block is its largest / 2^(bits - 1), or its spread / (2^bits - 1) where it has a
    # minimum of its own; Q4_0 and Q5_0 clip at the side where they have no code for the largest.
    steps = {"Q8_0": high / 127, "Q4_0": high / 8, "Q5_0": high / 16, "Q4_1": low / 15}
    steps |= {"Q5_1": low / 31, "BF16": high / 2**7, "F16": high / 2**10, "F32": high * 0}
    error = np.abs(checkpoint.tensor("a.weight").float().numpy() - weight).reshape(-1, 32).max(1)
    assert (error <= 1.01 * steps[kind]).all()


# --------------------------------------------------------------------- whole networks


@pytest.fixture(scope="module")
def unet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet as city96's converter writes it: LDM names without prefix, matrices of odd width as
    rows of 256, small tensors in full; here half of its matrices in each block format."""
    state = random_unet().state_dict()
    names = keymap.unet_to_ldm(state)
    tensors: dict[str, Packed] = {}
    shapes: dict[str, str | int | list[int]] = {}
    for seed, (ours, tensor) in enumerate(state.items()):
        name, count = names[ours], tensor.numel()
        if tensor.ndim < 2 or count % 256:
            numbers = tensor.numpy()
            tensors[name] = plain(numbers.astype("<f2") if tensor.ndim > 1 else numbers)
            continue
        shape = tuple(tensor.shape)
        if shape[-1] % 256:
            shapes[f"comfy.gguf.orig_shape.{name}"] = [*shape]
            shape = (count // 256, 256)
        tensors[name] = random_blocks("Q8_0" if seed % 2 else "Q4_K", shape, seed)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    path.write_bytes(gguf(tensors, {**METADATA, **shapes}))
    return path


def test_a_unet_loads_converts_and_is_inspected(
    unet_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--deep", str(unet_file)]) == 0
    output = capsys.readouterr().out
    assert "blocks with scales of their own (GGUF, Q4_K, Q8_0)" in output and "--base" in output
    unet = load_unet(unet_file)
    assert unet.params == PARAMS
    out = tmp_path / "y.safetensors"
    assert main(["convert", str(unet_file), str(out)]) == 0
    assert "every number has its scale in it" in capsys.readouterr().out
    assert convert(unet_file, out, overwrite=True).read_as == "GGUF"
    tensors, other = load_file(out), load_unet(out)
    checkpoint = Checkpoint([unet_file])
    assert tensors.keys() == set(checkpoint.names)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, checkpoint.tensor(name)), name
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    convert(unet_file, out, layout="diffusers", dtype="f16", overwrite=True)
    narrow, again = load_unet(unet_file, dtype=torch.float16), load_unet(out, dtype=torch.float16)
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    matrices = [w for name, w in unet.named_parameters() if stored_dtype(checkpoint, name) != "F32"]
    assert widened_bytes(unet_file, "unet") == 4 * sum(w.numel() for w in matrices)


def test_an_engine_runs_on_it_with_what_another_file_has(
    tmp_path: Path, small_tokenizer: Path
) -> None:
    """Average and GGUF in one run: the base's UNet is in blocks, the distilled file has both."""
    model = Model.of("sd15", 0)
    tensors = {
        name: Packed("Q8_0", tuple(t.shape), quantize(t.numpy(), Q8_0).tobytes())
        if t.ndim > 1 and t.shape[-1] % 32 == 0 else plain(t.numpy())
        for name, t in ldm_unet(model.unet.state_dict()).items()
    }  # fmt: skip
    path = tmp_path / "base.gguf"
    path.write_bytes(gguf({UNET + name: tensor for name, tensor in tensors.items()}, {}))
    full = load_file(other := model.write("ldm", tmp_path / "other"))
    for name in [name for name in full if name.startswith(UNET)]:
        full["model_ema." + name.removeprefix("model.").replace(".", "")] = full[name] * 0.5
    save_file(full, other)

    def sampled(ema: bool | None = None) -> hs.Trajectory:
        engine = hs.Engine.load(
            path, other, text=other, vae=other, tokenizer=small_tokenizer, text_head_dim=32,
            device="cpu", ema=ema,
        )  # fmt: skip
        notes = [note for note in engine.weights.notes if "average (EMA)" in note]
        assert len(notes) == (ema is None) and all(n.startswith("distilled: ") for n in notes)
        return engine.sample("a fox", seeds=1, size=64, timesteps=[999, 499])

    one, two = sampled(), sampled(True)
    assert not torch.equal(one.latents, two.latents)
    assert [run.record()["machine"].get("ema") for run in (one, two)] == [None, True]


UNET, Q8_0 = "model.diffusion_model.", GGMLQuantizationType.Q8_0


def stored_dtype(checkpoint: Checkpoint, ours: str) -> str:
    return checkpoint.parts()["unet"].dtype(ours)


def test_without_the_package_all_but_the_blocks_is_read(
    unet_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(reader, "find_spec", lambda name: None if name == "gguf" else find(name))
    (problem,) = inspect_checkpoint(unet_file).problems
    with pytest.raises(CheckpointError) as caught:
        load_unet(unet_file)
    assert problem == str(caught.value).removeprefix(f"{unet_file}: ")
    assert "pip install 'headstart[gguf]'" in problem
    path = tmp_path / "half.gguf"
    numbers = {name: plain(np.ones((4, 2), "<f2")) for name in ("a", "b")}
    path.write_bytes(gguf(numbers, {}))
    assert Checkpoint([path]).tensor("a").dtype == torch.float16


def test_fused_blocks_are_taken_apart(tmp_path: Path) -> None:
    """q, k and v of a matrix of 3 x 20 rows, whose thirds do not end where blocks of Q4_K do."""
    fused = random_blocks("Q4_K", (60, 256), 0)
    from headstart.convert.convert import _numbers

    path = tmp_path / "x.gguf"
    path.write_bytes(gguf({"in": fused}, {}))
    whole = Checkpoint([path]).tensor("in")
    for op, third in zip("qkv", whole.chunk(3), strict=True):
        (values,) = _numbers(Checkpoint([path]), keymap.Source("in", op))  # type: ignore[arg-type]
        assert np.array_equal(values, third.flatten().numpy())
    (turned,) = _numbers(Checkpoint([path]), keymap.Source("in", "transpose"))
    assert np.array_equal(turned, whole.T.flatten().numpy())


# --------------------------------------------------------------------- hostile headers


def head(tensors: int, values: int, rest: bytes = b"", version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, values) + rest + bytes(64)


def one(name: str = "a", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    listed = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + listed + struct.pack("<IQ", kind, offset)


BAD = {
    "version 1": (head(0, 0, version=1), "version 1: expected 2 or 3"),
    "big-endian": (head(0, 0, version=3 << 24), "big-endian"),
    "short": (b"GGUF\x03\0\0", "bytes are claimed at byte 4"),
    "tensors": (head(2**63, 0), "9223372036854775808 tensors are claimed"),
    "values": (head(0, 2**40), "values are claimed"),
    "text": (head(0, 1, struct.pack("<Q", 2**62)), "bytes are claimed"),
    "array": (head(0, 1, text("a") + struct.pack("<IIQ", 9, 4, 2**60)), "are claimed"),
    "texts": (head(0, 1, text("a") + struct.pack("<IIQ", 9, 8, 2**19)), "are claimed"),
    "nested": (head(0, 1, text("a") + struct.pack("<IIQ", 9, 9, 1)), "an array of type 9"),
    "kind": (head(0, 1, text("a") + struct.pack("<I", 99)), "has unknown type 99"),
    "twice": (head(0, 2, 2 * (text("a") + struct.pack("<IB", 0, 1))), "'a' appears twice"),
    "utf-8": (head(0, 1, struct.pack("<Q", 2) + b"\xff\xff"), "not UTF-8"),
    "alignment": (head(0, 1, text("general.alignment") + struct.pack("<II", 4, 0)), "power of two"),
    "name": (head(1, 0, one("")), "0 characters"),
    "control": (head(1, 0, one("a\x1b[2J")), "expected 1 to 1024, plain"),
    "same name": (head(2, 0, one() + one()), "name appears twice"),
    "no dims": (head(1, 0, one(dims=())), "0 dimensions"),
    "many dims": (head(1, 0, one(dims=(1,) * 5)), "5 dimensions"),
    "huge": (head(1, 0, one(dims=(2**62,))), "beyond 2"),
    "type": (head(1, 0, one(kind=16)), "has type 16, which is not read"),
    "block": (head(1, 0, one(dims=(33,), kind=8)), "Q8_0 has 32 weights a block"),
    "offset": (head(1, 0, one(offset=32)), "begins at byte"),
    "billions": (head(1, 0, one(dims=(2**20, 2**20))), "truncated"),
    "rest": (head(0, 0) + bytes(200), "bytes follow the last tensor"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_header_that_claims_what_is_not_there_is_refused(tmp_path: Path, what: str) -> None:
    written, message = BAD[what]
    path = tmp_path / "x.gguf"
    path.write_bytes(written)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            Checkpoint([path])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [([5], "another count"), ([-16, -32], "expected a shape"), ([0], "another count")],
)
def test_an_original_shape_must_hold_the_same_numbers(
    tmp_path: Path, shape: list[int], message: str
) -> None:
    path = tmp_path / "x.gguf"
    tensors = {"a": random_blocks("Q4_K", (2, 256), 0)}
    path.write_bytes(gguf(tensors, {"comfy.gguf.orig_shape.a": shape}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint([path])
    path.write_bytes(gguf(tensors, {"comfy.gguf.orig_shape.b": [512]}))
    with pytest.raises(CheckpointError, match="the shape of a tensor that is not in the file"):
        Checkpoint([path])


def test_a_file_cut_or_changed_anywhere_is_one_error_or_a_file(tmp_path: Path) -> None:
    whole = small()
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    assert set(Checkpoint([path]).names) == {"eight", "four", "odd", "half", "none"}
    for end in [*range(0, 400, 3), *range(400, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            Checkpoint([path])
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for at in random.integers(0, 480, random.integers(1, 4)):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            checkpoint = Checkpoint([path])
            for name in checkpoint.names:
                if checkpoint.entry(name).dtype in FLOATS:
                    checkpoint.values(name)
        except CheckpointError as error:
            assert str(path) in str(error)


def test_another_alignment_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tensors = {name: random_blocks("Q8_0", (1, 32), seed) for seed, name in enumerate("abc")}
    path.write_bytes(gguf(tensors, {}, align=64))
    checkpoint = Checkpoint([path])
    for name, packed in tensors.items():
        assert np.array_equal(checkpoint.numbers(name), meaning(packed))
