"""Eight-bit weights: every number is float32(weight) * scale; what does not match is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from eight_bits import FLOAT8, SCHEMES, Tensors, real, written
from safetensors.torch import save_file

from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import CheckpointError


def matrices() -> Tensors:
    generator = torch.Generator().manual_seed(5)
    made = {f"a.{i}.weight": torch.randn(6, 4 + i, generator=generator) for i in range(3)}
    return made | {"a.0.bias": torch.ones(6), "b.norm.weight": torch.ones(4).half()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_its_stored_number_times_its_scale_to_the_bit(
    tmp_path: Path, scheme: str
) -> None:
    path = tmp_path / "x.safetensors"
    tensors, metadata = written(scheme, matrices())
    save_file(tensors, path, metadata)
    held, expected = Checkpoint([path]), real(tensors)
    assert set(held.names) == set(expected) == set(matrices())
    assert held.scales.scheme is not None and "with a scale for each weight" in held.scales.scheme
    for name, numbers in expected.items():
        assert torch.equal(held.tensor(name), numbers), name
        assert np.array_equal(held.numbers(name), numbers.double().numpy()), name
        flat = numbers.float().flatten().numpy()
        for begin, end in ((0, 3), (3, len(flat)), (5, 6)):
            assert np.array_equal(held.values(name, begin, end), flat[begin:end]), (name, begin)
    for name, weight in matrices().items():  # and they are the weights, but for eight bits
        assert (held.tensor(name) - weight).abs().max() < 0.08 * weight.abs().max()


@pytest.mark.parametrize("kind", FLOAT8)
def test_float8_without_scales_is_taken_at_face_value(tmp_path: Path, kind: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    codes = torch.arange(256, dtype=torch.uint8).view(kind)
    save_file({"a.bias": codes}, path)
    held = Checkpoint([path])
    assert held.scales.scheme is None
    found, exact = held.tensor("a.bias"), codes.double()
    assert found.dtype == torch.float16 and torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.double().nan_to_num(), exact.nan_to_num())


def damage() -> dict[str, tuple[Callable[[Tensors], object], str]]:
    """What can be wrong with a file of ComfyUI's -> how, and what is said of it."""
    eight = torch.zeros(2, 2).to(FLOAT8[0])

    def put(name: str, value: torch.Tensor) -> Callable[[Tensors], object]:
        return lambda tensors: tensors.update({name: value})

    def drop(*names: str) -> Callable[[Tensors], object]:
        return lambda tensors: [tensors.pop(name) for name in names]

    return {
        "orphan": (drop("a.0.weight"), "'a.0.scale_weight' is the scale of 'a.0.weight', which is"),
        "no scale": (drop("a.1.scale_weight", "a.1.scale_input"), "1 weights have none"),
        "one more weight": (put("c.weight", eight), "1 weights have none, such as 'c.weight'"),
        "orphan input": (put("q.scale_input", torch.ones(())), "'q.weight' has none"),
        "two": (put("a.0.weight_scale", torch.ones(())), "'a.0.weight' has two scales"),
        "blocks": (put("a.0.scale_weight", torch.ones(3, 2)), r"a scale \[3, 2\] for a weight"),
        "vector": (put("a.0.scale_weight", torch.ones(4)), r"a scale \[4\] for a weight \[6, 4\]"),
        "empty": (put("a.0.scale_weight", torch.ones(0)), r"a scale \[0\] for a weight"),
        "integers": (put("a.0.scale_weight", torch.ones(1).int()), "expected a scale in F32"),
        "widened": (put("a.0.weight", torch.ones(6, 4).half()), "'a.0.weight' is F16: it may have"),
        "nan": (put("a.0.scale_weight", torch.tensor(float("nan"))), "scale_weight' holds nan"),
        "infinite": (put("a.0.scale_weight", torch.tensor(float("inf"))), "holds inf"),
        "zero": (put("a.0.scale_weight", torch.zeros(6)), "holds 0: expected positive finite"),
        "negative": (put("a.0.scale_weight", torch.tensor([1.0, -2, 1, 1, 1, 1])), "holds -2"),
        "overflow": (put("a.0.scale_weight", torch.tensor(1e300).double()), "holds inf"),
        "rotated": (put("a.0.comfy_quant", text('{"format": "int8_tensorwise", "convrot": true}')),
                    "columns rotated"),
        "four bits": (put("a.0.comfy_quant", text('{"format": "nvfp4"}')), "quantised as 'nvfp4'"),
        "no JSON": (put("a.0.comfy_quant", text("[" * 3000)), "the JSON cannot be read"),
        "not scaled": (put("z.comfy_quant", text('{"format": "float8_e4m3fn"}')), "has none"),
    }  # fmt: skip


def text(said: str) -> torch.Tensor:
    return torch.tensor(list(said.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("what", damage())
def test_a_scale_that_does_not_match_is_refused(tmp_path: Path, what: str) -> None:
    tensors, _ = written("comfy", matrices())
    spoil, said = damage()[what]
    spoil(tensors)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=said) as caught:
        Checkpoint([path]).check_scales()
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_marker_without_scales_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    eight = torch.zeros(2, 2).to(FLOAT8[0])
    save_file({"a.weight": eight, "scaled_fp8": torch.zeros(2).to(FLOAT8[0])}, path)
    with pytest.raises(CheckpointError, match="'scaled_fp8' says that weights are float8 with sca"):
        Checkpoint([path])
    save_file({"a.weight": eight}, path, {"_quantization_metadata": '{"layers": {"a": "nvfp4"}}'})
    with pytest.raises(CheckpointError, match="'a' is quantised as 'nvfp4'"):
        Checkpoint([path])


def test_a_row_of_zeros_has_an_absmax_of_zero(tmp_path: Path) -> None:
    """bitsandbytes stores the row's largest number, which is no factor by itself."""
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.zeros(2, 3).char(), "a.SCB": torch.tensor([0.0, 127.0])}, path)
    assert not Checkpoint([path]).tensor("a.weight").any()


@pytest.mark.parametrize(
    ("ending", "scheme"),
    [
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes' 4-bit nf4"),
        ("weight.quant_state.bitsandbytes__fp4", "bitsandbytes' 4-bit fp4"),
        ("weight.absmax", "bitsandbytes' 4-bit"),
        ("wscales", "nunchaku"),
        ("qweight", "AWQ's or GPTQ's"),
        ("g_idx", "GPTQ's"),
        ("weight_scale_2", "NVFP4"),
        ("weight_scale_inv", "a scale for each block"),
    ],
)
def test_a_scheme_that_is_not_read_is_called_by_its_name(
    tmp_path: Path, ending: str, scheme: str
) -> None:
    path = tmp_path / "x.safetensors"
    beside = {"a.weight": torch.zeros(8, 1, dtype=torch.uint8)}
    if ending == "g_idx":
        beside["a.qweight"] = torch.zeros(4, 4).int()
    save_file(beside | {f"a.{ending}": torch.zeros(2, dtype=torch.uint8)}, path)
    with pytest.raises(CheckpointError, match=scheme):
        Checkpoint([path])
