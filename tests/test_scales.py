"""Eight-bit weights: every number is float32(weight) * scale; what does not match is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Model
from eight_bits import FLOAT8, SCHEMES, Tensors, real, written
from networks import METADATA, random_unet, random_vae, same, single_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from headstart.adapters.delta import LowRank
from headstart.adapters.file import read_adapter
from headstart.adapters.peft import Peft
from headstart.checkpoint import keymap
from headstart.checkpoint.checkpoint import inspect_checkpoint
from headstart.checkpoint.tensors import Checkpoint
from headstart.cli import main
from headstart.convert.convert import convert
from headstart.errors import CheckpointError
from headstart.networks.load import load_unet, widened_bytes


def matrices() -> Tensors:
    generator = torch.Generator().manual_seed(5)
    tensors = {f"a.{i}.weight": torch.randn(6, 4 + i, generator=generator) for i in range(3)}
    return tensors | {"a.0.bias": torch.ones(6), "b.norm.weight": torch.ones(4).half()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_its_stored_number_times_its_scale_to_the_bit(
    tmp_path: Path, scheme: str
) -> None:
    path = tmp_path / "x.safetensors"
    tensors, metadata = written(scheme, matrices())
    save_file(tensors, path, metadata)
    checkpoint, expected = Checkpoint([path]), real(tensors)
    assert set(checkpoint.names) == set(expected) == set(matrices())
    assert (
        checkpoint.scales.scheme is not None
        and "with a scale for each weight" in checkpoint.scales.scheme
    )
    for name, numbers in expected.items():
        assert torch.equal(checkpoint.tensor(name), numbers), name
        assert np.array_equal(checkpoint.numbers(name), numbers.double().numpy()), name
        flat = numbers.float().flatten().numpy()
        for begin, end in ((0, 3), (3, len(flat)), (5, 6)):
            assert np.array_equal(checkpoint.values(name, begin, end), flat[begin:end]), (
                name,
                begin,
            )
    for name, weight in matrices().items():  # and they are the weights, but for eight bits
        assert (checkpoint.tensor(name) - weight).abs().max() < 0.08 * weight.abs().max()


@pytest.mark.parametrize("kind", FLOAT8)
def test_float8_without_scales_is_taken_at_face_value(tmp_path: Path, kind: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    codes = torch.arange(256, dtype=torch.uint8).view(kind)
    save_file({"a.bias": codes}, path)
    checkpoint = Checkpoint([path])
    assert checkpoint.scales.scheme is None
    values, exact = checkpoint.tensor("a.bias"), codes.double()
    assert values.dtype == torch.float16 and torch.equal(values.isnan(), exact.isnan())
    assert torch.equal(values.double().nan_to_num(), exact.nan_to_num())


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
        "orphan input": (put("q.scale_input", torch.ones(())), "there is no such 'q.weight'"),
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
        "not scaled": (put("z.comfy_quant", text('{"format": "float8_e4m3fn"}')), "no such 'z."),
    }  # fmt: skip


def text(message: str) -> torch.Tensor:
    return torch.tensor(list(message.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("what", damage())
def test_a_scale_that_does_not_match_is_refused(tmp_path: Path, what: str) -> None:
    tensors, _ = written("comfy", matrices())
    spoil, message = damage()[what]
    spoil(tensors)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint([path]).check_numbers()
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


def test_scales_of_what_goes_into_a_norm_are_let_be(tmp_path: Path) -> None:
    """optimum-quanto writes them where it quantises activations too."""
    tensors, _ = written("quanto", matrices())
    beside = {f"b.norm.{side}": torch.ones(()) for side in ("input_scale", "output_scale")}
    path = tmp_path / "x.safetensors"
    save_file(tensors | beside, path)
    assert set(Checkpoint([path]).names) == set(matrices())
    save_file({"a.weight": torch.ones(2, 2), "a.input_scale": torch.ones(())}, path)
    with pytest.raises(CheckpointError, match="input_scale' is written beside an eight-bit"):
        Checkpoint([path])


def test_an_adapter_in_eight_bits_changes_what_its_own_numbers_change(tmp_path: Path) -> None:
    random, name = torch.Generator().manual_seed(0), "lora_unet_mid_block_attentions_0_proj_in"
    plain = {
        f"{name}.lora_down.weight": torch.randn(4, 32, generator=random),
        f"{name}.lora_up.weight": torch.randn(32, 4, generator=random),
    }
    path, wide = tmp_path / "eight.safetensors", tmp_path / "wide.safetensors"
    for scheme in ("comfy", "int8_tensorwise"):
        tensors, _ = written(scheme, plain)
        save_file(tensors, path)
        save_file(real(tensors), wide)
        one, other = (
            next(iter(read_adapter(file).groups.values())).delta(
                Checkpoint([file]), (32, 32), Peft()
            )
            for file in (path, wide)
        )
        assert isinstance(one, LowRank) and isinstance(other, LowRank)
        assert torch.equal(one.weight(), other.weight())


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


# --------------------------------------------------------------------- whole networks


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single file with a UNet and a VAE in float32."""
    return single_file(random_unet(), random_vae(), tmp_path_factory.mktemp("plain") / "x")


UNET = "model.diffusion_model."


@pytest.mark.parametrize("scheme", ["comfy", "comfy_quant", "quanto", "bitsandbytes"])
def test_loader_and_convert_have_the_same_numbers(tmp_path: Path, plain: Path, scheme: str) -> None:
    """`convert` writes without torch what the loader reads with it."""
    path, out, half = (tmp_path / f"{name}.safetensors" for name in ("in", "out", "half"))
    tensors, metadata = written(scheme, load_file(plain), UNET)
    save_file(tensors, path, METADATA | metadata)
    expected = real(tensors)
    info = inspect_checkpoint(path, deep=True)
    assert info.ok and info.parts == ("unet", "vae") and info.scheme is not None
    assert "with a scale for each weight" in info.scheme
    done = convert(path, out)
    assert done.multiplied == info.scheme and done.left_out == () and done.dtype == "F32"
    result = load_file(out)
    assert result.keys() == expected.keys()
    for name, numbers in expected.items():
        assert result[name].dtype == numbers.dtype and torch.equal(result[name], numbers), name
    with safe_open(out, "pt") as file:
        assert set(file.metadata()) == {"format", *METADATA}
    assert inspect_checkpoint(out).scheme is None
    unet = load_unet(path)
    names = keymap.unet_to_ldm(unet.state_dict())
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, expected[UNET + names[name]].float()), name
    convert(path, half, dtype="f16")
    assert same(load_unet(half, dtype=torch.float16), load_unet(path, dtype=torch.float16))


def test_a_scaled_file_in_another_layout_has_the_same_numbers(tmp_path: Path, plain: Path) -> None:
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    tensors, _ = written("float8_rows", load_file(plain), UNET)
    save_file(tensors, path, METADATA)
    convert(path, out, layout="diffusers", part="unet", dtype="bf16")
    theirs, ours = load_unet(out, dtype=torch.bfloat16), load_unet(path, dtype=torch.bfloat16)
    assert same(theirs, ours)


def test_stored_keeps_float8_to_the_bit_and_rounds_products_to_half_precision(
    tmp_path: Path, plain: Path
) -> None:
    path, tensors = tmp_path / "x.safetensors", load_file(plain)
    narrow = {n: t.to(FLOAT8[0]) if n.startswith(UNET) else t for n, t in tensors.items()}
    save_file(narrow, path, METADATA)
    stored, wide = load_unet(path, dtype="stored"), load_unet(path)
    assert inspect_checkpoint(path).scheme == "float8 without scales"
    there = load_unet(path, device="meta")  # stands for any accelerator
    assert {tensor.dtype for tensor in there.parameters()} == {torch.float16}
    for (name, one), other in zip(stored.named_parameters(), wide.parameters(), strict=True):
        assert one.dtype == (torch.float16 if one.ndim > 1 else torch.float32), name
        assert torch.equal(one.float(), other), name
    scaled, _ = written("comfy", tensors, UNET)
    one = UNET + "time_embed.0.scale_weight"
    scaled[one] = scaled[one] * 1e9  # beyond float16
    save_file(scaled, path, METADATA)
    stored, wide = load_unet(path, dtype="stored"), load_unet(path)
    odd = "time_embedding.linear_1.weight"
    for (name, one), other in zip(stored.named_parameters(), wide.parameters(), strict=True):
        if one.ndim == 2:
            assert one.dtype == (torch.bfloat16 if name == odd else torch.float16), name
            assert torch.equal(one, other.to(one.dtype)), name
    with pytest.raises(CheckpointError, match=f"{odd} holds numbers that float16 cannot: give"):
        load_unet(path, dtype=torch.float16)
    need = widened_bytes(path, "unet")
    assert need == 4 * sum(w.numel() for w in wide.parameters() if w.ndim == 2)


def test_numbers_that_are_not_finite_are_counted_with_their_scale(
    tmp_path: Path, plain: Path
) -> None:
    path = tmp_path / "x.safetensors"
    tensors, _ = written("comfy", load_file(plain), UNET)
    name = UNET + "time_embed.0"
    tensors[f"{name}.scale_weight"] = torch.tensor(3e38)
    save_file(tensors, path, METADATA)
    info = inspect_checkpoint(path, deep=True)
    assert info.census is not None and set(info.census.inf) == {f"{name}.weight"}
    tensors[f"{name}.scale_weight"] = torch.tensor(-1.0)
    save_file(tensors, path, METADATA)
    info = inspect_checkpoint(path)
    with pytest.raises(CheckpointError) as caught:
        load_unet(path)
    assert info.problems == (str(caught.value).removeprefix(f"{path}: "),)
    assert "holds -1" in info.problems[0]


def test_an_sdxl_file_as_comfyui_and_diffusers_scale_it_converts_and_is_usable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue leejet/stable-diffusion.cpp 1898: numbers up to 448 where 0.1 was meant."""
    message = {"headstart.head_dim": "16"}
    plain = Model.of("sdxl", 0).write("ldm", tmp_path / "plain", metadata=message)
    tensors = load_file(plain)
    for scheme in ("comfy", "weight_scale"):
        path, out = tmp_path / f"{scheme}.safetensors", tmp_path / f"{scheme}-16.safetensors"
        save_file(written(scheme, tensors, UNET)[0], path, message)
        assert main(["convert", str(path), str(out), "--dtype", "f16"]) == 0
        assert "read float8 with a scale for each weight" in capsys.readouterr().out
        assert load_file(out).keys() == tensors.keys()
        for file in (path, out):
            assert main(["inspect", str(file)]) == 0
            output = capsys.readouterr().out
            assert ("float8 with a scale for each weight" in output) == (file == path)
            unet = load_unet(file)
            for name, weight in load_unet(plain).state_dict().items():
                near = (unet.state_dict()[name] - weight).abs().max()
                assert near <= 2**-4 * weight.abs().max(), name
