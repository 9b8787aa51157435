"""Weights kept as float8: rounded once, used as what they are, half of float16's bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import write
from eight_bits import SCHEMES, real, written
from gguf_files import gguf, meaning, random_blocks
from gguf_files import plain as plain_numbers
from networks import METADATA, PARAMS, random_unet, weights
from safetensors.torch import save_file
from torch import Tensor, nn

import headstart as hs
from evidence.audit import Hazard, audit
from evidence.fake_tensors import DEVICE, UnknownBuildError, fake_tensors
from headstart.adapters.layers import Matrix, layers_of
from headstart.convert.convert import convert
from headstart.errors import CheckpointError, InputError
from headstart.interfaces import Conditioning
from headstart.networks import load
from headstart.networks.assembly import loading_for
from headstart.networks.casting import FLOAT8, compute_dtype, in_float8, keep_float8, weight_of
from headstart.networks.load import load_text, load_tiny, load_unet, load_vae
from headstart.networks.unet import Stage, UNet

Maker = Callable[..., Path]
GROUPS_OF_32 = replace(
    PARAMS,
    down=(Stage(32, (0,), True), Stage(64, (1,), False)),
    up=(Stage(64, (1, 1), True), Stage(32, (0, 0), False)),
    norm_groups=32,
)


def matrices(network: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def eight_bit_names(network: nn.Module) -> set[str]:
    return {name for name, layer in matrices(network).items() if layer.weight.dtype == FLOAT8}


def rounded(network: Any) -> Any:
    """The same network in plain float32, with the weights that float8 left."""
    plain = UNet(network.params).requires_grad_(False).eval()
    plain.load_state_dict({name: t.float() for name, t in network.state_dict().items()})
    for name in eight_bit_names(network):
        plain.get_submodule(name).weight.data = weight_of(network.get_submodule(name))
    return plain


def call(network: Any, strengths: Tensor | None = None) -> Tensor:
    torch.manual_seed(3)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 16, PARAMS.context_dim)
    with torch.inference_mode():
        return network(x, torch.tensor(500), Conditioning(context, strengths=strengths))


@pytest.fixture
def unet_file(tmp_path: Path) -> Path:
    save_file(weights(random_unet()), tmp_path / "u.safetensors", METADATA)
    return tmp_path / "u.safetensors"


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_a_number_is_off_by_a_sixteenth_at_most_or_by_half_of_the_smallest_step(
    size: float,
) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(8, 3, 3, 3).mul(size * torch.logspace(-6, 0, 27).view(3, 3, 3))
    matrix[5] = 0
    stored, scale = in_float8(matrix)
    wide = stored.float() * scale
    bound = torch.maximum(matrix.abs() / 16, scale * 2.0**-10)
    assert bool(((wide - matrix).abs() <= bound).all()) and stored.dtype == FLOAT8
    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5)), "powers of two"
    largest = stored.float().abs().flatten(1).amax(1)
    assert bool(((largest > 216) | (matrix.flatten(1).amax(1) == 0)).all()), "no range is wasted"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float8_numbers_of_a_file_are_kept_and_widened_without_rounding(
    dtype: torch.dtype,
) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    every = every[every.isfinite()].view(2, 127).repeat(3, 1)
    every[0], every[4] = 0, every[4].clamp(-3, 3)
    stored, scale = in_float8(every.half())
    assert torch.equal((stored.to(dtype) * scale.to(dtype)).float(), every)


def test_a_unet_is_the_one_of_the_rounded_weights_to_the_bit(unet_file: Path) -> None:
    few = load_unet(unet_file, dtype="float8")
    assert compute_dtype(few) == torch.float32
    wide = {n for n in matrices(few) if n.startswith(("conv_in", "conv_out", "time_embedding"))}
    wide |= {n for n in matrices(few) if n.endswith("time_emb_proj")}
    assert eight_bit_names(few) == set(matrices(few)) - wide and len(wide) > 6
    assert few.state_dict().keys() == random_unet().state_dict().keys()
    assert torch.equal(call(few), call(rounded(few)))
    off = (call(few) - call(load_unet(unet_file))).norm() / call(load_unet(unet_file)).norm()
    assert 0 < off < 0.1


def test_it_takes_a_byte_a_weight(unet_file: Path) -> None:
    few = load_unet(unet_file, dtype="float8")
    for name in eight_bit_names(few):
        layer = few.get_submodule(name)
        assert layer.weight.untyped_storage().nbytes() == layer.weight.numel()
        assert dict(layer.named_buffers())["weight_scale"].numel() == len(layer.weight)


def test_a_file_of_float8_loads_as_what_it_says(tmp_path: Path) -> None:
    tensors = weights(random_unet())
    few = {n: t.to(FLOAT8) if t.ndim > 1 else t for n, t in tensors.items()}
    save_file(few, tmp_path / "x.safetensors", METADATA)
    network = load_unet(tmp_path / "x.safetensors", dtype="float8")
    for name in eight_bit_names(network):
        assert torch.equal(weight_of(network.get_submodule(name)), few[f"{name}.weight"].float())
    assert torch.equal(call(network), call(load_unet(tmp_path / "x.safetensors")))


def test_what_float8_cannot_hold_is_named(tmp_path: Path) -> None:
    tensors = weights(random_unet())
    name = "mid_block.resnets.1.conv2.weight"
    tensors[name] = tensors[name].clone().fill_(torch.inf)
    save_file(tensors, tmp_path / "x.safetensors", METADATA)
    with pytest.raises(CheckpointError, match=f"{name}: float8 cannot hold NaN or infinity"):
        load_unet(tmp_path / "x.safetensors", dtype="float8")
    for loads in (load_vae, load_tiny):
        with pytest.raises(InputError, match='dtype "float8" is for UNets and text encoders'):
            loads(tmp_path / "x.safetensors", dtype="float8")


@pytest.mark.parametrize("largest", [57344.0, 65504.0, 1e5])
def test_what_float16_cannot_hold_once_it_is_widened_is_named(
    tmp_path: Path, largest: float
) -> None:
    """It was infinity on a GPU, and pictures NaN. 65504, the last of float16, becomes 65536."""
    tensors = weights(random_unet())
    name = "mid_block.resnets.1.conv2.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 0] = -largest
    save_file(tensors, tmp_path / "x.safetensors", METADATA)
    with loading_for(torch.device("cuda", 0)):
        if largest < 6e4:
            few = load_unet(tmp_path / "x.safetensors", dtype="float8").get_submodule(name[:-7])
            assert bool((few.weight.half() * few.weight_scale.half()).isfinite().all())
            return
        with pytest.raises(CheckpointError, match=f"{name} holds numbers that float16 cannot"):
            load_unet(tmp_path / "x.safetensors", dtype="float8")
    assert bool(call(load_unet(tmp_path / "x.safetensors", dtype="float8")).isfinite().all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_of_eight_bits_is_the_float8_of_its_real_numbers(
    tmp_path: Path, scheme: str
) -> None:
    """Scales multiplied in float32 and rounded once: from the file, and from what convert wrote."""
    tensors, about = written(scheme, weights(random_unet()))
    save_file(tensors, tmp_path / "few.safetensors", METADATA | about)
    plain = {name: tensor.float().contiguous() for name, tensor in real(tensors).items()}
    save_file(plain, tmp_path / "real.safetensors", METADATA)
    convert(tmp_path / "few.safetensors", tmp_path / "converted.safetensors")
    want = load_unet(tmp_path / "real.safetensors", dtype="float8")
    for name in ("few", "converted"):
        assert alike(load_unet(tmp_path / f"{name}.safetensors", dtype="float8"), want)


def test_a_gguf_file_is_the_float8_of_its_real_numbers(tmp_path: Path) -> None:
    """Q8_0 where rows allow it, 32 weights a block; head and group sizes are of its family."""
    torch.manual_seed(0)
    packed = {
        name: random_blocks("Q8_0", tuple(tensor.shape), number)
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        else plain_numbers(tensor.numpy())
        for number, (name, tensor) in enumerate(weights(UNet(GROUPS_OF_32)).items())
    }
    assert sum(entry.kind == "Q8_0" for entry in packed.values()) > 40
    (tmp_path / "few.gguf").write_bytes(gguf(packed, {"general.architecture": "sd1"}))
    meant = {
        name: torch.from_numpy(meaning(entry).astype("<f4")).contiguous()
        for name, entry in packed.items()
    }
    save_file(meant, tmp_path / "real.safetensors", {"headstart.head_dim": "8"})
    convert(tmp_path / "few.gguf", tmp_path / "converted.safetensors")
    want = load_unet(tmp_path / "real.safetensors", dtype="float8")
    for name in ("few.gguf", "converted.safetensors"):
        assert alike(load_unet(tmp_path / name, dtype="float8", head_dim=8), want)


def alike(one: UNet, other: UNet) -> bool:
    """To the bit, scales too, and in float8 both."""
    mine, theirs = (dict(n.named_parameters()) | dict(n.named_buffers()) for n in (one, other))
    return (
        mine.keys() == theirs.keys()
        and bool(eight_bit_names(one))
        and all(
            tensor.dtype == theirs[name].dtype and torch.equal(tensor.float(), theirs[name].float())
            for name, tensor in mine.items()
        )
    )


def test_the_large_text_encoder_alone_is_kept_so(
    make_ckpt: Maker, small_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_ckpt("base.safetensors", "sdxl", "ldm", "--dtype", "F16")
    options: dict[str, Any] = {"tokenizer": small_tokenizer, "head_dim": 32, "dtype": "float8"}
    assert [eight_bit_names(tower) for tower in load_text(path, **options).towers] == [set(), set()]
    second = load_text(path, **options).towers[1]
    monkeypatch.setattr(load, "_LARGE", second.params.width)
    first, second = load_text(path, **options).towers
    assert bool(eight_bit_names(first)) == (first.params.width >= second.params.width)
    assert eight_bit_names(second) == set(matrices(second)) - {"text_projection"}
    words = load_text(path, **options).encode(["a fox"])
    plain = load_text(path, **(options | {"dtype": None})).encode(["a fox"])
    assert words.context.dtype == torch.float32
    assert 0 < (words.context - plain.context).norm() < 0.2 * plain.context.norm()


FORMS = {
    "lora": lambda name, rows, columns: {
        f"lora_unet_{name}.lora_down.weight": torch.randn(2, columns),
        f"lora_unet_{name}.lora_up.weight": torch.randn(rows, 2),
    },
    "whole difference": lambda name, rows, columns: {
        f"lora_unet_{name}.diff": torch.randn(rows, columns)
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_adapters_see_the_layer_as_what_it_is(unet_file: Path, tmp_path: Path, form: str) -> None:
    """Beside it and merged into it: as on a plain float32 network of the rounded weights."""
    few = load_unet(unet_file, dtype="float8")
    plain = rounded(few)
    path = next(name for name in sorted(eight_bit_names(few)) if name.endswith("attn1.to_q"))
    layer = layers_of(few)[path]
    assert isinstance(layer, Matrix)
    rows, columns = layer.weight.shape
    file = write(tmp_path / "a.safetensors", FORMS[form](path.replace(".", "_"), rows, columns))
    before = call(few)
    outputs: list[Tensor] = []
    for network in (few, plain):
        adapters = hs.AdapterSet({"base": network})
        adapters.attach(file, 0.5)
        outputs.append(call(network, torch.full((2, 1), 0.5) if form == "lora" else None))
        adapters.detach("a")
    assert torch.equal(*outputs) and not torch.equal(outputs[0], before)
    assert torch.equal(call(few), before)


def test_an_engine_records_it_and_replays(tmp_path: Path) -> None:
    engine = hs.Engine.demo(device="cpu", dtype="float8")
    assert (engine.weights.dtype, engine.weights.vae_dtype) == (torch.float32,) * 2
    trajectory = engine.sample("a red circle", seeds=[1], plan="distilled")
    machine = trajectory.record()["machine"]
    assert (machine["dtype"], machine["vae_dtype"]) == ("float8", "float32")
    hs.replay(trajectory.record(), hs.Engine.demo(device="cpu", dtype="float8"))
    with pytest.raises(InputError, match="dtype 'float8' then, 'float32' now"):
        hs.replay(trajectory.record(), hs.Engine.demo(device="cpu"))


def test_on_a_gpu_it_computes_in_half_and_allocates_by_no_value() -> None:
    """Audited on fake CUDA tensors: nothing waits, nothing depends on a number."""
    try:
        fake = fake_tensors()
    except UnknownBuildError as error:
        pytest.skip(str(error))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with fake, torch.device(DEVICE):
            plain, network = (UNet(PARAMS).requires_grad_(False).eval() for _ in range(2))
            scales: dict[str, Tensor] = {}
            for name, layer in matrices(network).items():
                if load._ENDS.fullmatch(name) is None:
                    few = torch.empty_like(layer.weight, dtype=FLOAT8)
                    layer.weight = nn.Parameter(few, requires_grad=False)
                    scales[f"{name}.weight"] = torch.empty(len(few), *[1] * (few.ndim - 1)).float()
            keep_float8(network, scales, torch.float16)
            x, context = torch.empty(2, 4, 8, 8), torch.empty(2, 16, PARAMS.context_dim)
            times = torch.empty(2, dtype=torch.float32)
    finally:
        torch.set_default_dtype(before)
    memory = [*network.parameters(), *network.buffers(), *plain.parameters()]
    outputs: list[Tensor] = []

    def step(called: UNet) -> None:
        with torch.inference_mode():
            outputs.append(called(x, times, Conditioning(context)))

    declared = [*memory, x, times, context]
    half = audit(lambda _: step(plain), [(), ()], fake=fake, declared=declared)
    report = audit(lambda _: step(network), [(), ()], fake=fake, declared=declared)
    assert {f.operator for f in report.findings} == {f.operator for f in half.findings}
    assert {f.hazard for f in report.findings} <= {Hazard.RANDOM}, "attention over small heads"
    assert {out.dtype for out in outputs} == {torch.float16}
    names, other = ([operator.name for operator in each.operators] for each in (report, half))
    assert len(names) - len(other) == 2 * len(scales), "each widened and scaled, and nothing else"
