"""What an adapter adds to a layer, against layers that are run and formulas written out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adapter_samples import merge, merge_bias
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.adapters.delta import Dense, LowRank
from headstart.adapters.file import read_adapter
from headstart.adapters.kinds import FULL, LOHA, LOKR, LORA, WHOLE
from headstart.adapters.products import with_core
from headstart.errors import AdapterError

EPS = 2.0**-24


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(ours: Tensor, oracle: Tensor, roundings: int) -> bool:
    """Within `roundings` float32 roundings of the largest magnitude of a float64 oracle."""
    assert ours.dtype == torch.float32 and oracle.dtype == torch.float64
    assert ours.shape == oracle.shape
    return bool((ours - oracle).abs().max() <= roundings * EPS * oracle.abs().max())


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((), 1, 0), ((1, 1), 1, 0), ((3, 3), 2, 1)]
)
def test_a_low_rank_change_is_what_down_and_up_compute(
    kernel: tuple[int, ...], stride: int, padding: int
) -> None:
    delta = LowRank(randn(4, 8, *kernel), randn(12, 4), 0.25)
    assert delta.shape == (12, 8, *kernel) and delta.rank == 4
    x = randn(2, 8, 6, 6).double() if kernel else randn(5, 8).double()
    down, up, weight = delta.down.double(), delta.up.double(), delta.weight().double()
    if kernel:
        path = F.conv2d(F.conv2d(x, down, None, stride, padding), up[:, :, None, None]) * 0.25
        merged = F.conv2d(x, weight, None, stride, padding)
    else:
        path, merged = (x @ down.T @ up.T) * 0.25, x @ weight.T
    # weight() has r products, one scale; each output then sums i*k of them exactly in float64
    assert (path - merged).abs().max() <= 6 * EPS * 8 * 9 * path.abs().max()


def test_a_tucker_core_folds_into_down() -> None:
    down, core, up = randn(5, 8, 1, 1), randn(4, 5, 3, 3), randn(12, 4)
    delta = LowRank(with_core(down, core), up, 2.0)
    assert delta.shape == (12, 8, 3, 3)
    x = randn(2, 8, 7, 7).double()
    h = F.conv2d(F.conv2d(x, down.double()), core.double(), None, 2, 1)
    three = F.conv2d(h, up.double()[:, :, None, None]) * 2
    two = F.conv2d(F.conv2d(x, delta.down.double(), None, 2, 1), up.double()[:, :, None, None]) * 2
    assert (three - two).abs().max() <= 8 * EPS * 8 * 9 * three.abs().max()


def test_loha_is_a_product_of_two_low_rank_matrices_entry_by_entry() -> None:
    a1, b1, a2, b2 = randn(6, 2), randn(2, 5), randn(6, 2, seed=1), randn(2, 5, seed=1)
    dense = Dense(LOHA, {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}, 0.5)
    oracle = torch.zeros(6, 5, dtype=torch.float64)
    for row in range(6):
        for column in range(5):
            left = sum(float(a1[row, r]) * float(b1[r, column]) for r in range(2))
            right = sum(float(a2[row, r]) * float(b2[r, column]) for r in range(2))
            oracle[row, column] = 0.5 * left * right
    assert close(dense.change(torch.zeros(6, 5)), oracle, 8)


def test_lokr_is_a_block_matrix() -> None:
    w1, w2 = randn(3, 2), randn(4, 5)
    change = Dense(LOKR, {"lokr_w1": w1, "lokr_w2": w2}).change(torch.zeros(12, 10))
    for row in range(3):
        for column in range(2):
            block = change[4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
            assert torch.equal(block, w1[row, column] * w2)


def test_lokr_of_a_convolution_is_the_same_flat_factored_or_with_a_core() -> None:
    """Its second factor written [o, i, k, k], as a @ b of [o, i*k*k], and as a full-rank core."""
    w1, w2 = randn(3, 2), randn(4, 4, 3, 3)
    zero = torch.zeros(12, 8, 3, 3)
    whole = Dense(LOKR, {"lokr_w1": w1, "lokr_w2": w2}).change(zero)
    flat = {"lokr_w1": w1, "lokr_w2_a": torch.eye(4), "lokr_w2_b": w2.flatten(1)}
    core = {"lokr_w1": w1, "lokr_w2_a": torch.eye(4), "lokr_w2_b": torch.eye(4), "lokr_t2": w2}
    for tensors in (flat, core):
        assert torch.equal(Dense(LOKR, tensors).change(zero), whole)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_dora_gives_every_row_or_column_of_the_sum_the_length_it_was_trained_to(
    axis: int, kernel: tuple[int, ...]
) -> None:
    weight = randn(6, 4, *kernel)
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    magnitude = randn(*shape).abs() + 0.5
    factors = {"down": randn(2, 4, *kernel), "up": randn(6, 2)}
    tuned = merge(Dense(LORA, factors, 0.5, magnitude), weight, 1.0)
    up, down = factors["up"].double(), factors["down"].double()
    direction = weight.double() + 0.5 * (up @ down.flatten(1)).reshape(weight.shape)
    lengths = direction.transpose(0, axis).flatten(1).norm(dim=1)
    oracle = direction * (magnitude.double() / lengths.reshape(shape))
    # |V| sums up to 54 squares, and the change is added back to the W it was taken from
    assert (tuned - oracle).abs().max() <= (54 + 8) * EPS * max(oracle.abs().max(), weight.max())


def _each_form() -> list[Dense]:
    pair = {"down": randn(2, 4), "up": randn(6, 2)}
    loha = {f"hada_w{n}_{x}": randn(*s) for n in "12" for x, s in (("a", (6, 2)), ("b", (2, 4)))}
    return [
        Dense(LORA, pair, 0.5, torch.ones(6, 1)),
        Dense(LOHA, loha, 0.5, bias=randn(6)),
        Dense(LOKR, {"lokr_w1": randn(2, 2), "lokr_w2": randn(3, 2)}),
        Dense(FULL, {"diff": randn(6, 4)}),
        Dense(WHOLE, {"weight": randn(6, 4)}, bias=randn(6)),
        Dense(FULL, bias=randn(6)),
    ]


@pytest.mark.parametrize("dense", _each_form(), ids=lambda dense: dense.kind.title)
def test_a_merge_is_linear_in_strength_and_leaves_the_weight_alone(dense: Dense) -> None:
    weight, bias = randn(6, 4, seed=3), randn(6, seed=3)
    copy = weight.clone()
    assert torch.equal(merge(dense, weight, 0.0), weight)
    assert merge(dense, weight, 0.0).data_ptr() != weight.data_ptr()
    assert torch.equal(merge_bias(dense, bias, 0.0), bias)
    change = merge(dense, weight, 1.0).double() - weight.double()
    for strength in (-2.0, 0.5, 3.0):
        merged = merge(dense, weight, strength)
        assert (merged - (weight.double() + strength * change)).abs().max() <= 32 * EPS * 4
    assert torch.equal(weight, copy)


def test_whole_weights_become_a_difference_from_what_they_were_tuned_on() -> None:
    base, distilled, tuned = randn(6, 4), randn(6, 4, seed=1), randn(6, 4, seed=2)
    whole = Dense(WHOLE, {"weight": tuned}, bias=torch.ones(6))
    assert torch.equal(merge(whole, base, 1.0), base + (tuned - base))
    difference = whole.relative_to(base, torch.full((6,), 0.25))
    assert difference.kind is FULL
    assert torch.equal(merge(difference, distilled, 1.0), distilled + (tuned - base))
    assert torch.equal(merge_bias(difference, torch.zeros(6), 1.0), torch.full((6,), 0.75))
    assert difference.relative_to(distilled) is difference


def test_a_change_of_another_shape_is_an_adapter_error() -> None:
    with pytest.raises(AdapterError, match=r"\[6, 4\].*another network"):
        merge(Dense(LOKR, {"lokr_w1": randn(2, 2), "lokr_w2": randn(2, 2)}), randn(6, 4), 1.0)


# ------------------------------------------------- the vectors: other programs' own results


def test_every_vector_is_met(shared: Path, tmp_path: Path) -> None:
    """../shared/lora_vectors: results of sd-scripts, sliders, LyCORIS and peft, within 1e-5."""
    met = 0
    for path in sorted((shared / "lora_vectors").glob("*.safetensors")):
        tensors = load_file(path)
        peft = path.name.startswith("peft")
        bases = {n: t for n, t in tensors.items() if n.startswith("base.")}
        layers = {n[5:-7] if peft else "x": t for n, t in bases.items()}
        file = _adapter_alone(path, tensors, tmp_path)
        shapes = {name: tuple(weight.shape) for name, weight in layers.items()}
        resolution = read_adapter(file).resolve({"unet": shapes}).require()
        assert {name for _, name in resolution.deltas} == set(layers)
        for name, expected in tensors.items():
            if not name.startswith("expected"):
                continue
            layer, strength = name.removeprefix("expected").rsplit("@", 1)
            layer = layer.strip(".").removesuffix(".weight") or "x"
            merged = merge(resolution.deltas["unet", layer], layers[layer], float(strength))
            assert (merged - expected).abs().max() <= 1e-5, (path.name, name)
            met += 1
    assert met >= 14


def _adapter_alone(path: Path, tensors: dict[str, Tensor], folder: Path) -> Path:
    """The adapter's own tensors as its program saves them; peft's with its configuration."""
    out = folder / path.stem / "adapter_model.safetensors"
    out.parent.mkdir()
    save_file({n: t for n, t in tensors.items() if not n.startswith(("base.", "expected"))}, out)
    if path.name.startswith("peft"):
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "use_rslora": "rslora" in path.name}
        (out.parent / "adapter_config.json").write_text(json.dumps(config))
    return out
