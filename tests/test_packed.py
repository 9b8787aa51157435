"""Weights laid out for a CPU's products: the layer's numbers, whatever happens to its weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from networks import PARAMS, VAE, random_pass, random_unet
from torch import Tensor, nn

from headstart.interfaces import Conditioning
from headstart.networks import packed
from headstart.networks.casting import keep_stored
from headstart.networks.packed import FEW, PackedConv2d, PackedLinear, is_packed, pack
from headstart.networks.vae import Vae
from headstart_kernels.dispatch import has_c
from headstart_kernels.winograd import winograd_conv

pytestmark = pytest.mark.skipif(
    packed.unpackable(torch.float32) is not None, reason="this torch has no oneDNN"
)
DTYPES = [dtype for dtype in packed.DTYPES if packed.unpackable(dtype) is None]
"""Those that this processor computes in."""
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.manual_seed(0)


def linear(inputs: int = 48, outputs: int = 40, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def convolution(kernel: int = 3, stride: int = 1, channels: int = 12) -> nn.Conv2d:
    layer = nn.Conv2d(channels, 20, kernel, stride=stride, padding=kernel // 2)
    return layer.requires_grad_(False)


def budget(layer: nn.Linear | nn.Conv2d, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The rounding of one product in `dtype`: of a sum of n terms at most n + 2 halves of a step in
    float32, and of each number where it is rounded to bfloat16."""
    wide = copy.deepcopy(layer).double()
    wide.weight.abs_()
    if wide.bias is not None:
        wide.bias.abs_()
    magnitude = wide(x.double().abs())
    terms = layer.weight[0].numel() + 2
    return magnitude * (
        terms * EPS[torch.float32] + (0 if dtype == torch.float32 else 3 * EPS[dtype])
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (linear(), (2, 9, 48)),
        (linear(bias=False), (FEW, 48)),
        (linear(1, 1), (64, 1)),
        (convolution(), (2, 12, 9, 7)),
        (convolution(1), (1, 12, 5, 5)),
        (convolution(3, 2), (3, 12, 8, 6)),
        (nn.Conv2d(12, 20, 3).requires_grad_(False), (1, 12, 5, 4)),
        (nn.Conv2d(12, 24, 3, padding=1, groups=4).requires_grad_(False), (1, 12, 5, 4)),
        (nn.Conv2d(12, 20, 3, padding=2, dilation=2).requires_grad_(False), (1, 12, 7, 6)),
    ],
    ids=str,
)
def test_a_packed_layer_gives_the_layers_own_numbers(
    layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, own = torch.randn(shape), copy.deepcopy(layer)
    got = pack(own.to(dtype))(x.to(dtype))
    assert isinstance(own, PackedLinear | PackedConv2d) and got.dtype == dtype
    error = (got.double() - copy.deepcopy(layer).double()(x.double())).abs()
    assert bool((error <= budget(layer, x, dtype)).all())


def test_a_network_differs_from_the_unpacked_one_by_rounding() -> None:
    unet = random_unet()
    plain, wide = random_pass(unet), random_pass(copy.deepcopy(unet).double())
    got = random_pass(pack(unet))
    own = (plain.double() - wide).norm() / wide.norm()
    assert is_packed(unet) and bool((got.double() - wide).norm() / wide.norm() <= 4 * own + 1e-7)


def test_bits_do_not_depend_on_which_size_or_batch_came_first() -> None:
    layers = [pack(convolution(channels=32)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    small, large = torch.randn(1, 32, 4, 4), torch.randn(2, 32, 24, 24)
    first = layers[0](small), layers[0](large)
    second = layers[1](large), layers[1](small)
    assert torch.equal(first[0], second[1]) and torch.equal(first[1], second[0])


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "parameter": lambda layer: setattr(
        layer, "weight", nn.Parameter(layer.weight * 2, requires_grad=False)
    ),
    "state dict": lambda layer: layer.load_state_dict({"weight": layer.weight * 2}, strict=False),
    "assigned": lambda layer: layer.load_state_dict(
        {"weight": layer.weight * 2}, strict=False, assign=True
    ),
    "moved": lambda layer: layer.double().float().weight.mul_(2),
    "twice": lambda layer: [
        setattr(layer.weight, "data", layer.weight.data * by) for by in (4, 0.5)
    ],
    "kept": lambda layer: (layer.weight.data.mul_(2), pack(layer)),
    "numpy": lambda layer: (layer.weight.numpy().__imul__(2), pack(layer)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("made", [linear, convolution])
def test_weights_that_change_are_laid_out_again(made: Any, change: str) -> None:
    layer: Any = made()
    layer.bias.zero_()
    x = torch.randn(9, 48) if made is linear else torch.randn(1, 12, 5, 5)
    pack(layer)
    before = layer(x)
    with torch.no_grad():
        CHANGES[change](layer)
    assert torch.equal(layer(x), 2 * before)  # a power of two changes no rounding


def test_a_weight_that_lies_otherwise_in_the_same_memory_is_laid_out_again() -> None:
    layer, x = pack(linear(48, 48)), torch.randn(9, 48)
    layer(x)
    layer.weight.data = layer.weight.data.t()
    expected = pack(copy.deepcopy(layer))(x)
    assert torch.equal(layer(x), expected)


def test_a_weight_whose_writes_nobody_counts_has_no_layout() -> None:
    with torch.inference_mode():
        layer, x = pack(linear()), torch.randn(9, 48)
        plain = nn.Linear(48, 40)
        for _ in range(2):
            layer.weight.copy_(torch.randn(40, 48))
            plain.load_state_dict(layer.state_dict())
            assert torch.equal(layer(x), plain(x))


def test_wide_convolutions_of_many_tiles_take_a_quarter_of_the_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Size] = []

    def counted(x: Tensor, filter: packed.Filter, bias: Tensor | None) -> Tensor:
        seen.append(x.shape)
        return winograd_conv(x, filter, bias)

    monkeypatch.setattr(packed, "winograd_conv", counted)
    monkeypatch.setattr(packed, "pays_tiles", lambda weight, x, gain: x[-1] >= 24)
    for layer in (convolution(), convolution(3, 2), convolution(1)):
        pack(layer)
        for side in (24, 8, 24):  # both layouts stay
            x = torch.randn(1, 12, side, side).to(layer.weight.dtype)
            assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert seen == [(1, 12, 24, 24)] * 2
    layer, x = convolution(), torch.randn(1, 12, 24, 24)
    wide = copy.deepcopy(layer).double()(x.double())
    got = pack(layer)(x)
    assert (got.double() - wide).norm() <= 1e-6 * wide.norm()  # five times a direct sum's
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.mul_(2)  # type: ignore[union-attr]
    assert torch.equal(layer(x), 2 * got)


@pytest.mark.skipif(len(DTYPES) < 2, reason="this processor has no bfloat16 products")
def test_a_bfloat16_convolution_in_tiles_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its inputs' values, by float32 sums: within half a bit and those sums' errors."""
    monkeypatch.setattr(packed, "pays_tiles", lambda weight, x, gain: gain == 3.0)
    layer, x = pack(convolution().bfloat16()), torch.randn(1, 12, 24, 24).bfloat16()
    with torch.inference_mode():
        got = layer(x)
    assert (
        list(packed._PACKS._layouts[layer.weight]) == [("tiles",)] and got.dtype == torch.bfloat16
    )
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()  # type: ignore[union-attr]
    exact = nn.functional.conv2d(x.double(), weight, bias, padding=1)
    assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()


def test_of_bfloat16_convolutions_those_of_much_memory_stay_direct() -> None:
    """SDXL's of 640 channels would take 59 MB each in tiles."""
    many = (1, 320, 64, 64)
    assert packed.is_tiled((320, 320, 3, 3), many, torch.float32) == has_c(multiplies=True)
    assert packed.is_tiled((320, 320, 3, 3), many, torch.bfloat16) == has_c(multiplies=True)
    assert not packed.is_tiled((640, 640, 3, 3), (1, 640, 32, 32), torch.bfloat16)
    assert not packed.is_tiled((320, 320, 3, 3), (1, 320, 8, 8), torch.bfloat16)
    assert not packed.is_tiled((320, 320, 3, 3), many, torch.float16)


def test_layouts_go_with_their_weights() -> None:
    held = len(packed._PACKS._layouts)
    layer = pack(linear())
    layer(torch.randn(9, 48))
    assert len(packed._PACKS._layouts) == held + 1
    del layer
    assert len(packed._PACKS._layouts) == held


def test_a_copy_and_a_pickle_are_packed_and_hold_no_layout() -> None:
    unet = pack(random_unet())
    before = random_pass(unet)
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert is_packed(other) and torch.equal(random_pass(other), before)


def test_gradients_compilers_and_other_devices_find_the_layer_that_it_was() -> None:
    layer = linear()
    plain, x = copy.deepcopy(layer), torch.randn(9, 48, requires_grad=True)
    pack(layer)
    assert torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    assert x.grad is not None
    weighted = pack(linear().requires_grad_(True))
    weighted(torch.randn(9, 48)).sum().backward()
    assert weighted.weight.grad is not None
    traced = torch.export.export(pack(nn.Sequential(linear())), (torch.randn(9, 48),))
    assert "packed_linear" not in str(traced.graph)
    assert pack(linear()).to("meta")(torch.empty(9, 48, device="meta")).shape == (9, 40)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, and what converters use
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_transforms_tracers_and_autocast_find_the_layer_that_it_was(kernel: int) -> None:
    layer = convolution(kernel) if kernel else linear()
    x = torch.randn(1, 12, 5, 5) if kernel else torch.randn(9, 48)
    plain = copy.deepcopy(layer)
    pack(layer)
    jvp = [torch.func.jvp(own, (x,), (x,))[1] for own in (layer, plain)]
    assert torch.equal(*jvp) and bool(jvp[0].any())
    with torch.no_grad():
        assert torch.equal(torch.func.jvp(layer, (x,), (x,))[1], jvp[1])
    two = torch.stack((x, 2 * x))
    assert torch.equal(torch.func.vmap(layer)(two), torch.func.vmap(plain)(two))
    assert torch.equal(torch.jit.trace(layer, (x,))(2 * x), plain(2 * x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == plain(x).dtype == torch.bfloat16


def test_few_rows_no_rows_and_other_dtypes_stay_with_torch() -> None:
    layer, plain = linear(), linear()
    plain.load_state_dict(layer.state_dict())
    pack(layer)
    for x in (torch.randn(FEW - 1, 48), torch.randn(48), torch.randn(0, 48)):
        assert torch.equal(layer(x), plain(x))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(9, 48).bfloat16())
    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(9, 47))
    conv = pack(convolution())
    assert conv(torch.randn(0, 12, 5, 5)).shape == (0, 20, 5, 5)
    assert conv(torch.randn(12, 5, 5)).shape == (20, 5, 5)
    with pytest.raises(RuntimeError, match="channels"):
        conv(torch.randn(1, 11, 5, 5))


def test_nan_and_infinity_go_through() -> None:
    x = torch.randn(9, 48)
    x[3, 5] = float("nan")
    got = pack(linear())(x)
    assert bool(got[3].isnan().all()) and bool(got[[0, 8]].isfinite().all())


def test_threads_that_come_first_at_once_make_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    lay_out = packed._lay_out

    def counted(weight: Tensor, *form: tuple[object, ...]) -> Tensor:
        made.append(1)
        return lay_out(weight, *form)

    monkeypatch.setattr(packed, "_lay_out", counted)
    layer, x = pack(linear()), torch.randn(9, 48)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: layer(x), range(16)))
    assert len(made) == 1 and all(torch.equal(one, found[0]) for one in found)


def test_a_layer_widened_at_use_is_laid_out_from_its_half_precision() -> None:
    unet = random_unet()
    for tensor in unet.parameters():
        tensor.data = tensor.data.half().float()
    plain = random_pass(pack(copy.deepcopy(unet)))
    stored = pack(keep_stored(unet.half()))
    assert {t.dtype for t in stored.parameters() if t.ndim > 1} == {torch.float16}
    assert torch.equal(random_pass(stored), plain)


def test_a_decoder_packs_too() -> None:
    vae = Vae(VAE).requires_grad_(False).eval()
    z = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        plain, wide = vae.decode(z), copy.deepcopy(vae).double().decode(z.double())
        got = pack(vae).decode(z)
        banded = vae.decode(z, bands=3)
    own = (plain.double() - wide).norm() / wide.norm()
    assert bool((got.double() - wide).norm() / wide.norm() <= 4 * own + 1e-7)
    assert bool((banded.double() - wide).norm() / wide.norm() <= 4 * own + 1e-7)


def test_a_recording_of_a_packed_network_sees_weights_that_are_written_to() -> None:
    from headstart.runner.runner import open_runner

    unet = pack(random_unet())
    replay = open_runner("replay", unet)
    x, cond = torch.randn(1, 4, 8, 8), Conditioning(torch.randn(1, 9, PARAMS.context_dim))
    args = x, torch.tensor(500.0), cond
    with torch.no_grad():
        assert torch.equal(replay(*args), unet(*args)) and torch.equal(replay(*args), unet(*args))
        unet.conv_in.weight.mul_(1.5)
        assert torch.equal(replay(*args), unet(*args))


def test_packed_again_a_network_has_tiles_as_it_is_then_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed, "pays_tiles", lambda *_: True)
    layer, x = pack(convolution(), tiles=False), torch.randn(1, 12, 24, 24)
    layer(x)
    assert ("tiles",) not in packed._PACKS._layouts[layer.weight]
    pack(layer)(x)
    assert list(packed._PACKS._layouts[layer.weight]) == [("tiles",)]


@pytest.mark.parametrize("any_size", [True, False])
def test_a_layout_is_of_the_images_size_where_onednn_has_one_for_each(
    monkeypatch: pytest.MonkeyPatch, any_size: bool
) -> None:
    sizes: list[tuple[int, ...]] = []

    def counted(weight: Tensor, form: tuple[object, ...], size: tuple[int, ...]) -> Tensor:
        sizes.append(tuple(size))
        return lay_out(weight, form, size)

    lay_out = packed._lay_out
    monkeypatch.setattr(packed, "_lay_out", counted)
    monkeypatch.setattr(packed, "_ANY_SIZE", any_size)
    layer = pack(convolution())
    for side in (4, 4, 8, 8, 4):
        x = torch.randn(1, 12, side, side)
        expected = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert sizes == ([(32, 32)] if any_size else [(4, 4), (8, 8), (4, 4)])
