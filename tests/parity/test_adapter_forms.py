"""Every form of adapter file made here, and its weights by the form's own formula in float64 numpy.

The names are those of the thirty vector files of ../shared, which hold what the original programs
compute; a formula is written out as its paper or program has it, not as `adapters.delta` does.
Tolerance: every product and sum of the formula is rounded once in float32, so the error is within
(number of roundings) * 2^-24 * (the formula with absolute values).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from adapter_samples import merge
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from headstart.adapters.file import read_adapter
from headstart.adapters.names import AdapterForm as F

Array = NDArray[np.float64]
Parts = dict[str, Tensor]
Formula = Callable[[dict[str, Array]], Array]
SHAPES = {"lin": (40, 24), "conv1": (40, 24, 1, 1), "conv3": (40, 24, 3, 3)}
ALPHA, RANK = 2.0, 4
ROUNDINGS = 64  # sums of at most 36 products, a norm of at most 360 squares in pairwise halves


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


class Case(NamedTuple):
    """Suffix -> tensor of one module, the change as a function of them, the form that is told."""

    parts: Parts
    change: Formula
    form: F
    magnitude: str = ""
    config: dict[str, Any] | None = None


def lora(shape: tuple[int, ...], **more: Any) -> Case:
    o, i, *k = shape
    parts = {
        "lora_down.weight": randn(RANK, i, *k),
        "lora_up.weight": randn(o, RANK, *[1] * len(k)),
        "alpha": torch.tensor(ALPHA),
    }

    def change(t: dict[str, Array]) -> Array:
        up = t["lora_up.weight"].reshape(o, RANK)
        return ALPHA / RANK * np.einsum("or,r...->o...", up, t["lora_down.weight"])

    return Case(parts, change, **{"form": F.KOHYA, **more})


def dora(shape: tuple[int, ...], axis: int) -> Case:
    size = [n if at == axis else 1 for at, n in enumerate(shape)]
    case = lora(shape, form=F.DORA, magnitude="dora_scale")
    return case._replace(parts=case.parts | {"dora_scale": torch.rand(size) + 0.5})


def tucker(shape: tuple[int, ...]) -> Case:
    o, i, *k = shape
    parts = {
        "lora_down.weight": randn(RANK, i, 1, 1),
        "lora_mid.weight": randn(RANK, RANK, *k),
        "lora_up.weight": randn(o, RANK, 1, 1),
        "alpha": torch.tensor(ALPHA),
    }

    def change(t: dict[str, Array]) -> Array:
        names = ("lora_up.weight", "lora_mid.weight", "lora_down.weight")
        up, mid, down = (t[name] for name in names)
        return ALPHA / RANK * np.einsum("or,rckl,ci->oikl", up[..., 0, 0], mid, down[..., 0, 0])

    return Case(parts, change, F.KOHYA)


def loha(shape: tuple[int, ...], *, cores: bool = False) -> Case:
    o, i, *k = shape
    flat = i * int(np.prod(k)) if k else i
    a, b = ((RANK, o), (RANK, i)) if cores else ((o, RANK), (RANK, flat))
    parts = {f"hada_w{n}_{x}": randn(*s) for n in "12" for x, s in (("a", a), ("b", b))}
    if cores:
        parts |= {f"hada_t{n}": randn(RANK, RANK, *k) for n in "12"}
    parts["alpha"] = torch.tensor(ALPHA)

    def side(t: dict[str, Array], n: str) -> Array:
        first, second = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
        if cores:
            return np.einsum("ijkl,ip,jr->prkl", t[f"hada_t{n}"], first, second)
        return (first @ second).reshape(shape)

    return Case(parts, lambda t: ALPHA / RANK * side(t, "1") * side(t, "2"), F.LOHA)


def lokr(shape: tuple[int, ...], *, left: bool = False, right: bool = True) -> Case:
    """LyCORIS: a product of two sides, each whole or of low rank; no alpha where both are whole."""
    o, i, *k = shape
    (o1, i1), (o2, i2) = (4, 4), (o // 4, i // 4)
    area = int(np.prod(k)) if k else 1
    parts = (
        {"lokr_w1_a": randn(o1, RANK), "lokr_w1_b": randn(RANK, i1)}
        if left
        else {"lokr_w1": randn(o1, i1)}
    )
    parts |= (
        {"lokr_w2_a": randn(o2, RANK), "lokr_w2_b": randn(RANK, i2 * area)}
        if right
        else {"lokr_w2": randn(o2, i2, *k)}
    )
    parts["alpha"] = torch.tensor(ALPHA)
    scale = ALPHA / RANK if left or right else 1.0

    def change(t: dict[str, Array]) -> Array:
        w1 = t["lokr_w1_a"] @ t["lokr_w1_b"] if left else t["lokr_w1"]
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"] if right else t["lokr_w2"]
        blocks = np.multiply.outer(w1, w2.reshape(o2, i2, area))  # [o1, i1, o2, i2, area]
        return scale * blocks.transpose(0, 2, 1, 3, 4).reshape(shape)

    return Case(parts, change, F.LOKR)


def difference(shape: tuple[int, ...]) -> Case:
    return Case({"diff": randn(*shape)}, lambda t: t["diff"], F.FULL)


def peft(shape: tuple[int, ...], *, form: F = F.PEFT, rslora: bool = False) -> Case:
    o, i, *k = shape
    scale = ALPHA / (RANK**0.5 if rslora else RANK)
    parts = {"lora_A.weight": randn(RANK, i, *k), "lora_B.weight": randn(o, RANK, *[1] * len(k))}
    name = "lora_magnitude_vector" if form is F.DORA else ""
    if name:
        parts[name] = torch.rand((1, o, 1, 1) if k else (o,)) + 0.5

    def change(t: dict[str, Array]) -> Array:
        up = t["lora_B.weight"].reshape(o, RANK)
        return scale * np.einsum("or,r...->o...", up, t["lora_A.weight"])

    config = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": rslora}
    return Case(parts, change, form, name, config)


MAKERS: dict[str, Callable[[tuple[int, ...]], Case]] = {
    "kohya": lora,
    "slider": lora,
    "locon": lora,
    "locon_tucker": tucker,
    "dora_out": lambda shape: dora(shape, 0),
    "dora_in": lambda shape: dora(shape, 1),
    "loha": loha,
    "loha_tucker": lambda shape: loha(shape, cores=True),
    "lokr": lokr,
    "lokr_both": lambda shape: lokr(shape, left=True),
    "lokr_full": lambda shape: lokr(shape, right=False),
    "full": difference,
    "peft_lora": peft,
    "peft_dora": lambda shape: peft(shape, form=F.DORA),
    "peft_rslora": lambda shape: peft(shape, rslora=True),
}
CASES = [
    (name, layer) for name in MAKERS for layer in SHAPES if "tucker" not in name or layer == "conv3"
]


def expected(case: Case, weight: Array, strength: float) -> tuple[Array, Array]:
    """W + strength*(W' - W) in float64, and the magnitude of its terms."""
    wide = {name: part.double().numpy() for name, part in case.parts.items()}
    change = case.change(wide)
    size = case.change({name: np.abs(part) for name, part in wide.items()})
    if case.magnitude:
        m = wide[case.magnitude]
        columns = case.magnitude == "dora_scale" and m.shape[0] == 1
        axes = tuple(at for at in range(weight.ndim) if at != int(columns))
        tuned = weight + change
        norm = np.sqrt((tuned**2).sum(axes, keepdims=True))
        factor = m.reshape(norm.shape) / norm
        size = (np.abs(weight) + size) * factor + np.abs(weight)
        change = tuned * factor - weight
    return weight + strength * change, np.abs(weight) + abs(strength) * size


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_a_form_gives_the_weights_of_its_own_formula(name: str, layer: str, tmp_path: Path) -> None:
    torch.manual_seed(sum(map(ord, name + layer)))
    shape = SHAPES[layer]
    case = MAKERS[name](shape)
    module = "x" if case.config else "lora_unet_x"
    path = tmp_path / "a.safetensors"
    save_file({f"{module}.{part}": t.contiguous() for part, t in case.parts.items()}, path)
    if case.config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(case.config))
    file = read_adapter(path)
    assert file.form is case.form
    (delta,) = file.resolve({"unet": {"x": shape}}).require().deltas.values()
    weight = randn(*shape)
    for strength in (1.0, 0.7, -1.3):
        exact, size = expected(case, weight.double().numpy(), strength)
        ours = merge(delta, weight, strength).double().numpy()
        bound = ROUNDINGS * 2.0**-24 * size
        assert (np.abs(ours - exact) <= bound).all(), strength
        assert np.abs(ours - exact).max() <= 1e-5 * np.abs(exact).max()


def test_every_name_of_the_vectors_is_among_them(shared: Path) -> None:
    names = {f"{name}_{layer}" for name, layer in CASES}
    names |= {name for name in MAKERS if name.startswith("peft")}
    index = json.loads((shared / "lora_vectors" / "INDEX.json").read_text())
    assert {Path(name).stem for name in index} <= names
