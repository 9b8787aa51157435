"""OFT, BOFT and OFTv2: oracles with whole matrices in float64, PEFT itself, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from adapter_samples import Tensors, merge, write
from torch import Tensor

from headstart.adapters.delta import Dense
from headstart.adapters.file import read_adapter
from headstart.adapters.info import describe_adapter
from headstart.errors import AdapterError

EPS = 2.0**-24
SHAPES = {"linear": (16, 12), "conv1": (16, 12, 1, 1), "conv3": (16, 12, 3, 3)}
LAYERS = pytest.mark.parametrize("layer", SHAPES)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def dense(
    tensors: Tensors, shape: tuple[int, ...], folder: Path, name: str = "lora_unet_x"
) -> Dense:
    path = write(
        folder / "adapter_model.safetensors", {f"{name}.{n}": t for n, t in tensors.items()}
    )
    resolution = read_adapter(path).resolve({"unet": {"x": shape}}).require()
    delta = resolution.deltas["unet", "x"]
    assert isinstance(delta, Dense)
    return delta


def cayley(skew: Tensor) -> Tensor:
    one = torch.eye(len(skew), dtype=torch.float64)
    return (one + skew) @ torch.linalg.inv(one - skew)


def orthogonal(matrix: Tensor) -> bool:
    one = torch.eye(len(matrix), dtype=torch.float64)
    return bool((matrix @ matrix.T - one).abs().max() < 1e-12)


def close(ours: Tensor, exact: Tensor, weight: Tensor, terms: int) -> bool:
    """R is rounded once, an entry sums `terms` products, and W is taken off."""
    size = exact.abs().max() + weight.abs().max()
    return bool((ours - exact).abs().max() <= (terms + 4) * EPS * size * math.sqrt(terms))


@LAYERS
@pytest.mark.parametrize("alpha", [None, 0.0, 0.01])
def test_oft_turns_blocks_of_rows(layer: str, alpha: float | None, tmp_path: Path) -> None:
    """arXiv:2306.07280, eq. 6 and 7: R block-diagonal, each (I + Q)(I - Q)^-1; |Q| <= alpha*o."""
    shape, blocks = SHAPES[layer], randn(4, 4, 4)
    rescale = randn(16, *[1] * (len(shape) - 1), seed=1)
    skew = [(block - block.T).double() for block in blocks]
    norm = math.sqrt(sum(float(q.square().sum()) for q in skew))
    bound = 16 * (alpha or math.inf)
    whole = torch.block_diag(*(cayley(q * min(1, bound / norm)) for q in skew))
    assert orthogonal(whole)
    tensors = {"oft_blocks": blocks} | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
    weight = randn(*shape, seed=2)
    exact = (whole.T @ weight.double().flatten(1)).reshape(shape)
    assert close(merge(dense(tensors, shape, tmp_path), weight, 1.0), exact, weight, 4)
    ours = merge(dense(tensors | {"rescale": rescale}, shape, tmp_path), weight, 1.0)
    assert close(ours, exact * rescale.double(), weight * rescale, 4)


@LAYERS
def test_boft_is_a_product_of_butterflies(layer: str, tmp_path: Path) -> None:
    """arXiv:2311.06243, section 4: each factor P^T diag(R_1, ..) P, P pairing rows that are
    2^j*b/2 apart."""
    shape, blocks = SHAPES[layer], randn(3, 4, 4, 4)
    whole = torch.eye(16, dtype=torch.float64)
    for stage, row in enumerate(blocks):
        half = 2**stage * 2
        order = [
            start + side * half + at
            for start in range(0, 16, 2 * half)
            for at in range(half)
            for side in (0, 1)
        ]
        shuffle = torch.eye(16, dtype=torch.float64)[order]
        factor = torch.block_diag(*(cayley((block - block.T).double()) for block in row))
        whole = shuffle.T @ factor @ shuffle @ whole
    assert orthogonal(whole) and bool((whole.abs() > 1e-9).all()), "every row is reached"
    weight = randn(*shape, seed=2)
    ours = merge(dense({"oft_blocks": blocks}, shape, tmp_path), weight, 1.0)
    exact = (whole @ weight.double().flatten(1)).reshape(shape)
    assert close(ours, exact, weight, 12)
    assert describe_adapter(tmp_path / "adapter_model.safetensors").form == "boft"


def series(packed: Tensor, size: int, last: int = 1) -> Tensor:
    """OneTrainer's and PEFT's five terms of one block, from its upper triangle row by row."""
    skew = torch.zeros(size, size, dtype=torch.float64)
    at = 0
    for row in range(size):
        for column in range(row + 1, size):
            skew[row, column], skew[column, row] = packed[at], -packed[at]
            at += 1
    powers = [torch.linalg.matrix_power(skew, n) for n in range(5)]
    return powers[0] + 2 * (powers[1] + powers[2] + powers[3]) + last * powers[4]


@LAYERS
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_oftv2_turns_the_inputs(layer: str, scaled: bool, shared: bool, tmp_path: Path) -> None:
    """arXiv:2506.19847, eq. 4: y = W (R x) blocks of four inputs; OneTrainer's convolution turns
    its kernels by R where a linear layer's weight is turned by R^T."""
    shape = SHAPES[layer]
    columns = math.prod(shape[1:])
    count = 1 if shared else columns // 4
    packed = randn(count, 6) * 0.1
    wide = packed.double() / (2 * math.sqrt(3) if scaled else 1)
    blocks = [series(wide[0 if shared else at], 4) for at in range(columns // 4)]
    whole = torch.block_diag(*blocks)
    tensors = {"oft_R.weight": packed} | (
        {"oft_R.scaled_oft": torch.tensor(True)} if scaled else {}
    )
    weight = randn(*shape, seed=2)
    ours = merge(dense(tensors, shape, tmp_path), weight, 1.0)
    turned = weight.double().flatten(1) @ (whole if len(shape) == 4 else whole.T)
    assert close(ours, turned.reshape(shape), weight, 4)


@pytest.mark.parametrize(("version", "last"), [("0.21.2", 1), ("0.18.0", 1), (None, 2)])
def test_the_last_term_counts_as_in_the_peft_that_wrote_it(
    version: str | None, last: int, tmp_path: Path
) -> None:
    """peft 0.17.1 and 0.18.0, tuners/oft/layer.py `_cayley_batch`; 0.18 says which it is."""
    packed, weight = randn(3, 6) * 0.3, randn(16, 12, seed=2)
    path = write(tmp_path / "a.safetensors", {"base_model.model.x.oft_R.weight": packed})
    config = {"peft_type": "OFT"} | ({} if version is None else {"peft_version": version})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (delta,) = read_adapter(path).resolve({"unet": {"x": (16, 12)}}).require().deltas.values()
    whole = torch.block_diag(*(series(block.double(), 4, last) for block in packed))
    assert close(merge(delta, weight, 1.0), weight.double() @ whole.T, weight, 4)


def test_a_strength_goes_straight_from_the_weight_to_the_turned_one(tmp_path: Path) -> None:
    """sd-scripts, networks/oft.py `get_weight`: multiplier * (R - I) + I."""
    weight, change = randn(16, 12), dense({"oft_blocks": randn(4, 4, 4)}, (16, 12), tmp_path)
    whole = merge(change, weight, 1.0).double() - weight.double()
    assert torch.equal(merge(change, weight, 0.0), weight)
    for strength in (-1.0, 0.5, 2.0):
        exact = weight.double() + strength * whole
        assert (merge(change, weight, strength) - exact).abs().max() <= 8 * EPS * exact.abs().max()


def test_the_names_of_sd_scripts_are_read(tmp_path: Path) -> None:
    """networks/oft.py, `OFT_PREFIX_UNET`."""
    blocks = {"oft_unet_x.oft_blocks": randn(4, 4, 4), "oft_unet_x.alpha": torch.tensor(1e-3)}
    file = read_adapter(write(tmp_path / "a.safetensors", blocks))
    assert file.form.value == "oft" and file.groups["oft_unet_x"].network == "unet"
    assert len(file.resolve({"unet": {"x": (16, 12)}}).require().deltas) == 1


WRONG: dict[str, tuple[Tensors, str]] = {
    "blocks that are not square": ({"oft_blocks": torch.ones(4, 4, 3)}, "square blocks 4, got 3"),
    "rescale of another size": (
        {"oft_blocks": torch.ones(4, 4, 4), "rescale": torch.ones(8)},
        "a rescale of 16, got 8",
    ),
    "rescale alone": ({"rescale": torch.ones(16)}, "expected oft_blocks too"),
    "odd butterflies": ({"oft_blocks": torch.ones(2, 4, 3, 3)}, "an even size, such as 4, got 3"),
    "too many stages": ({"oft_blocks": torch.ones(9, 4, 4, 4)}, "stages, at most 3, got 9"),
    "no triangle": ({"oft_R.weight": torch.ones(3, 5)}, "entries above a diagonal, 3, got 5"),
    "another number of rows": (
        {"oft_blocks": torch.ones(4, 5, 5)},
        r"fits unet; lora_unet_x \[20, any\] instead of \[16, 12\]",
    ),
    "another number of columns": (
        {"oft_R.weight": torch.ones(2, 6)},
        r"fits unet; lora_unet_x \[any, 8\] instead of \[16, 12\]",
    ),
    "a shared block that does not divide": ({"oft_R.weight": torch.ones(1, 10)}, "fits unet"),
    "two kinds": (
        {"oft_blocks": torch.ones(4, 4, 4), "oft_R.weight": torch.ones(3, 6)},
        "one way to change its weight, not OFT and OFTv2",
    ),
    "a magnitude": (
        {"oft_blocks": torch.ones(4, 4, 4), "dora_scale": torch.ones(16, 1)},
        "OFT with dora_scale is not implemented",
    ),
    "NaN": ({"oft_blocks": torch.full((4, 4, 4), math.nan)}, "finite numbers, got NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_blocks_that_make_no_rotation_are_one_clear_error(name: str, tmp_path: Path) -> None:
    tensors, message = WRONG[name]
    with pytest.raises(AdapterError, match=message):
        dense(tensors, (16, 12), tmp_path)


@pytest.mark.parametrize("key", ["oft_blocks", "oft_R.weight"])
def test_numbers_too_large_for_a_rotation_never_reach_a_weight(key: str, tmp_path: Path) -> None:
    huge = torch.full((4, 4, 4) if key == "oft_blocks" else (3, 6), 3e38).triu()
    delta = dense({key: huge}, (16, 12), tmp_path)
    try:
        weight_ = merge(delta, randn(16, 12), 1.0)
    except AdapterError as error:
        assert "numbers so large" in str(error)
    else:
        assert bool(weight_.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coft": True}, "constrained OFT is not implemented"),
        ({"num_cayley_neumann_terms": 10**9}, "at most 64"),
    ],
)
def test_a_configuration_of_oft_that_is_not_followed_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", {"base_model.model.x.oft_R.weight": torch.ones(3, 6)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", **change}))
    with pytest.raises(AdapterError, match=message):
        read_adapter(path)
