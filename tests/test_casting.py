"""Half-precision weights that stay where they are: the bits of float32, the memory of the file."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headstart as hs
from headstart.interfaces import Conditioning
from headstart.networks import packed
from headstart.networks.bfloat16 import bfloat16_cost
from headstart.networks.casting import HALVES, compute_dtype, keep_stored
from headstart.networks.load import load_text, load_unet, load_vae, widened_bytes
from headstart.networks.unet import UNet
from headstart.runner.runner import EagerRunner

Maker = Callable[..., Path]
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def mapped(tensor: Tensor, path: Path) -> bool:
    """Whether the tensor's bytes lie in a mapping of that file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = re.match(r"([0-9a-f]+)-([0-9a-f]+) .* (/.*)", line)
        if match and int(match[1], 16) <= address < int(match[2], 16):
            return match[3] == str(path)
    return False


def halves(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in module.named_parameters() if t.dtype in HALVES}


def conditioning(unet: UNet) -> Conditioning:
    pooled = (unet.params.added_dim or 0) - 6 * 32
    return Conditioning(
        torch.randn(2, 77, unet.params.context_dim), torch.randn(2, pooled), torch.rand(2, 6) * 64
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_unet_gives_the_bits_of_float32_from_weights_that_stay(
    make_ckpt: Maker, dtype: str
) -> None:
    path = make_ckpt("sdxl.safetensors", "sdxl", "unet", "--dtype", dtype)
    stored = load_unet(path, dtype="stored", head_dim=8)
    plain = load_unet(path, dtype=torch.float32, head_dim=8)
    stays = halves(stored)
    assert {tensor.dtype for tensor in stays.values()} == {DTYPES[dtype]}
    matrices = {name for name, tensor in plain.named_parameters() if tensor.ndim > 1}
    assert set(stays) == matrices and stored.state_dict().keys() == plain.state_dict().keys()
    assert compute_dtype(stored) == compute_dtype(plain) == torch.float32
    torch.manual_seed(0)
    x, cond, times = torch.randn(2, 4, 16, 16), conditioning(plain), torch.tensor([999, 249])
    assert torch.equal(EagerRunner(stored)(x, times, cond), EagerRunner(plain)(x, times, cond))


def test_every_matrix_is_a_view_of_the_file(make_ckpt: Maker) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not tell what is mapped")
    path = make_ckpt("base.safetensors", "sdxl", "ldm", "--dtype", "F16")
    for network in (load_unet(path, dtype="stored", head_dim=8), load_vae(path, dtype="stored")):
        assert all(mapped(tensor, path) for tensor in halves(network).values())


@pytest.mark.parametrize("arch", ["sdxl", "sd15", "sd21"])
def test_text_and_vae_give_the_bits_of_float32_too(
    make_ckpt: Maker, small_tokenizer: Path, arch: str
) -> None:
    path = make_ckpt("base.safetensors", arch, "ldm", "--dtype", "F16")
    options = {"tokenizer": small_tokenizer, "head_dim": 32}
    network, plain = (load_text(path, dtype=d, **options) for d in ("stored", None))  # type: ignore[arg-type]
    assert halves(network) and not halves(plain)
    one, other = network.encode(["a fox", "an owl"]), plain.encode(["a fox", "an owl"])
    assert torch.equal(one.context, other.context) and one.context.dtype == torch.float32
    if other.pooled is not None:
        assert one.pooled is not None and torch.equal(one.pooled, other.pooled)
    latents = torch.randn(1, 4, 8, 8)
    stored, wide = load_vae(path, dtype="stored"), load_vae(path)
    with torch.no_grad():
        assert torch.equal(stored.decode(latents), wide.decode(latents))


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_data_that_starts_anywhere_loads_right(
    make_ckpt: Maker, tmp_path: Path, shift: int
) -> None:
    """Old writers do not pad the header: data then starts 1, 2 or 4 bytes beside a multiple."""
    for dtype in ("F16", "F32"):
        good = make_ckpt("sdxl.safetensors", "sdxl", "unet", "--dtype", dtype)
        raw = good.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        moved = tmp_path / f"{dtype}.safetensors"
        header = raw[8 : 8 + length] + b" " * shift
        moved.write_bytes((length + shift).to_bytes(8, "little") + header + raw[8 + length :])
        stored = load_file(good)
        for kind in ("stored", None):
            unet = load_unet(moved, dtype=kind, head_dim=8)  # type: ignore[arg-type]
            for name, tensor in unet.state_dict().items():
                assert torch.equal(tensor.float(), stored[name].float()), name


def engines(make_ckpt: Maker, tokenizer: Path, **more: str) -> hs.Engine:
    return hs.Engine.load(
        make_ckpt("base.safetensors", "sdxl", "ldm", "--dtype", "F16"),
        make_ckpt("sdxl_turbo.safetensors", "sdxl-turbo", "unet", "--dtype", "F16"),
        tokenizer=tokenizer, head_dim=8, text_head_dim=32, device="cpu", **more,
    )  # fmt: skip


def test_a_model_that_would_not_fit_stays_in_half_precision_and_says_so(
    make_ckpt: Maker, small_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = engines(make_ckpt, small_tokenizer)
    base = make_ckpt("base.safetensors", "sdxl", "ldm", "--dtype", "F16")
    turbo = make_ckpt("sdxl_turbo.safetensors", "sdxl-turbo", "unet", "--dtype", "F16")
    need = sum(widened_bytes(base, part) for part in ("unet", "vae", "text"))  # type: ignore[arg-type]
    need += widened_bytes(turbo, "unet")
    wide = [*roomy.denoisers.values(), roomy.vae, roomy.text]
    assert need == sum(4 * p.numel() for m in wide for p in m.parameters())  # type: ignore[union-attr]
    for free, stays in ((need / 0.8 + 1, False), (need / 0.8 - 1, True)):
        with monkeypatch.context() as patch:
            patch.setattr("headstart.engine.dtypes.available_bytes", lambda _, free=free: free)
            engine = engines(make_ckpt, small_tokenizer, dtype="float32")
        assert bool(halves(engine.denoisers["base"])) == stays  # type: ignore[arg-type]
        assert any("stay in half precision" in note for note in engine.weights.notes) == stays
        assert (engine.weights.dtype, engine.weights.vae_dtype) == (torch.float32,) * 2
        done = engine.sample("a fox", seeds=[1, 2], size=64)
        assert torch.equal(done.latents, roomy.sample("a fox", seeds=[1, 2], size=64).latents)


@pytest.mark.parametrize("able", [True, False])
def test_in_short_memory_bfloat16_comes_first_where_the_processor_has_it(
    able: bool, make_ckpt: Maker, small_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("networks.packed", "engine.dtypes"):
        monkeypatch.setattr(f"headstart.{module}.computes_bfloat16", lambda: able)
    roomy = engines(make_ckpt, small_tokenizer)
    parts = [*roomy.denoisers.values(), roomy.vae, roomy.text]
    half = sum(2 * tensor.numel() for part in parts for tensor in part.parameters())  # type: ignore[union-attr]
    monkeypatch.setattr("headstart.engine.dtypes.available_bytes", lambda _: half / 0.8 + 1)
    weights = engines(make_ckpt, small_tokenizer).weights
    assert weights.dtype == (torch.bfloat16 if able else torch.float32)
    assert any("computing in bfloat16" in note for note in weights.notes) == able
    assert any("stay in half precision" in note for note in weights.notes) != able


@pytest.mark.parametrize(
    ("able", "cost", "noted"), [(True, 0.5, True), (True, 1.6, False), (False, 0.5, False)]
)
def test_bfloat16_is_recommended_where_its_products_are_measured_to_be_faster(
    able: bool, cost: float, noted: bool, make_ckpt: Maker, small_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for module in ("networks.packed", "engine.dtypes"):
        monkeypatch.setattr(f"headstart.{module}.computes_bfloat16", lambda: able)
    monkeypatch.setattr("headstart.engine.dtypes.bfloat16_cost", lambda: cost)
    monkeypatch.setattr("headstart.engine.dtypes._LARGE", 0)
    weights = engines(make_ckpt, small_tokenizer).weights
    assert weights.dtype == torch.float32
    line = "multiplies in bfloat16 in 0.50 of the time of float32"
    assert any(line in note and "--dtype bfloat16" in note for note in weights.notes) == noted
    chosen = engines(make_ckpt, small_tokenizer, dtype="float32").weights
    assert not any("multiplies in" in note for note in chosen.notes)


@pytest.mark.skipif(packed.unpackable(torch.bfloat16) is not None, reason="no bfloat16 products")
def test_what_a_bfloat16_product_costs_is_measured_once() -> None:
    assert 0.02 < bfloat16_cost() < 50
    assert bfloat16_cost() == bfloat16_cost()


def test_stored_can_be_asked_for_and_threads_do_not_share_a_buffer(
    make_ckpt: Maker, small_tokenizer: Path
) -> None:
    engine = engines(make_ckpt, small_tokenizer, dtype="stored")
    alone = [engine.sample("a fox", seeds=seed, size=64).latents for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda seed: engine.sample("a fox", seeds=seed, size=64), range(4))
        assert all(torch.equal(run.latents, one) for run, one in zip(runs, alone, strict=True))


def test_hooks_classes_and_a_second_call_survive() -> None:
    layer = nn.Sequential(nn.Linear(4, 4).half(), nn.LayerNorm(4).half())
    calls: list[int] = []
    layer[0].register_forward_hook(lambda *_: calls.append(1))
    stored = keep_stored(keep_stored(layer.requires_grad_(False)))
    assert stored is layer and isinstance(layer[0], nn.Linear)
    assert (layer[0].weight.dtype, layer[1].weight.dtype) == (torch.float16, torch.float32)
    assert stored(torch.ones(1, 4)).dtype == torch.float32 and calls == [1]


def test_gradients_flow_to_the_input_of_a_widened_layer(tmp_path: Path) -> None:
    """The buffer is for inference: what autograd keeps must not be overwritten."""
    layers = keep_stored(nn.Sequential(nn.Linear(3, 3).half(), nn.Linear(3, 3).half()))
    layers.requires_grad_(False)
    x = torch.ones(1, 3, requires_grad=True)
    layers(x).sum().backward()
    wide = (layers[1].weight.float() @ layers[0].weight.float()).sum(0)
    torch.testing.assert_close(x.grad, wide[None])


def test_a_float32_file_is_mapped_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    save_file({"weight": torch.ones(2, 2)}, path)
    layer = keep_stored(nn.Linear(2, 2))
    assert type(layer) is nn.Linear and compute_dtype(layer) == torch.float32


def test_a_widened_convolution_keeps_its_order_of_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of a convolution depend on it, so a stored one would differ from a float32 one."""
    inputs: list[Tensor] = []

    def convolve(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        inputs.append(weight)
        return x

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", convolve)
    for form in (torch.channels_last, torch.contiguous_format):
        layer = nn.Conv2d(3, 5, 3).half().to(memory_format=form)  # type: ignore[call-overload]
        with torch.inference_mode():
            keep_stored(layer)(torch.zeros(1, 3, 4, 4))
        assert inputs[-1].dtype == torch.float32 and inputs[-1].is_contiguous(memory_format=form)
        assert torch.equal(inputs[-1], layer.weight.float())
