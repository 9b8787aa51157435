"""One module of an adapter: its change is exact in every form, what is wrong is one clear error."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from adapter_samples import (
    ATTENTION,
    CONVS,
    CROSS,
    FEED,
    IN,
    NETWORKS,
    OUT,
    UNET,
    Known,
    Tensors,
    flat,
    merge,
    merge_bias,
    one,
    write,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.adapters.delta import Dense, LowRank
from headstart.adapters.file import read_adapter
from headstart.adapters.info import describe_adapter
from headstart.adapters.kind import Kind
from headstart.adapters.kinds import FULL, LOHA, LOKR, WHOLE
from headstart.adapters.names import AdapterForm
from headstart.checkpoint import keymap
from headstart.cli import main
from headstart.errors import AdapterError


def test_tucker_cores_become_low_rank_changes(tmp_path: Path) -> None:
    conv = next(n for n in CONVS if UNET[n][2:] == (3, 3))
    outs, ins = UNET[conv][:2]
    down, core, up = torch.randn(4, ins, 1, 1), torch.randn(3, 4, 3, 3), torch.randn(outs, 3, 1, 1)
    name = "lora_unet_" + conv.replace(".", "_")
    factors = {"down": down, "mid": core, "up": up}
    tensors = {f"{name}.lora_{slot}.weight": tensor for slot, tensor in factors.items()}
    tensors[f"{name}.alpha"] = torch.tensor(2.0)
    resolution = read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS)
    delta = resolution.deltas["unet", conv]
    assert isinstance(delta, LowRank) and delta.rank == 3
    assert delta.scale == 2 / 4  # LyCORIS divides by the rank of `down`
    oracle = torch.einsum(
        "rckl,or,ci->oikl", core.double(), up.flatten(1).double(), down.flatten(1).double()
    )
    assert (delta.weight() - 0.5 * oracle).abs().max() <= 16 * 2.0**-24 * oracle.abs().max()


def dense_cases() -> dict[str, tuple[AdapterForm, Kind, Tensors, Tensor]]:
    """Form -> the keys of one layer's change, and the change in float64."""
    linear = ATTENTION[0]
    n, (o, i) = flat(linear), UNET[linear]
    a1, b1, a2, b2 = (torch.randn(*s) for s in ((o, 2), (2, i), (o, 2), (2, i)))
    w1, w2 = torch.randn(4, 4), torch.randn(o // 4, i // 4)
    alpha = {f"{n}.alpha": torch.tensor(1, dtype=torch.int64)}
    loha = {
        f"{n}.hada_w{w}_{x}": t
        for w, x, t in (("1", "a", a1), ("1", "b", b1), ("2", "a", a2), ("2", "b", b2))
    }
    lycoris = {key.replace("lora_unet", "lycoris"): tensor for key, tensor in loha.items()}
    f = AdapterForm
    hadamard = (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    kron = torch.kron(w1.double(), w2.double())
    product = torch.kron(w1.double(), (a1[: o // 4].double() @ b1[:, : i // 4].double()))
    factored = {
        f"{n}.lokr_w1": w1,
        f"{n}.lokr_w2_a": a1[: o // 4],
        f"{n}.lokr_w2_b": b1[:, : i // 4],
    }
    return {
        "loha": (f.LOHA, LOHA, loha | alpha, hadamard / 2),
        "loha no alpha": (f.LOHA, LOHA, loha, hadamard),
        "lokr full": (f.LOKR, LOKR, {f"{n}.lokr_w1": w1, f"{n}.lokr_w2": w2} | alpha, kron),
        "lokr factored": (f.LOKR, LOKR, factored | alpha, product / 2),
        "difference": (f.FULL, FULL, {f"{n}.diff": hadamard.float()}, hadamard),
        "lycoris prefix": (f.LOHA, LOHA, lycoris, hadamard),
    }  # fmt: skip


@pytest.mark.parametrize("name", dense_cases())
def test_forms_without_a_low_rank_path_are_merged(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    form, dense, tensors, change = dense_cases()[name]
    file = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert file.form is form
    resolution = file.resolve(NETWORKS).require()
    delta = resolution.deltas["unet", ATTENTION[0]]
    assert isinstance(delta, Dense) and delta.kind is dense
    assert resolution.rank == (2 if any(key[-2:] in ("_a", "_b") for key in tensors) else 0)
    ours = delta.change(torch.zeros(UNET[ATTENTION[0]]))
    assert (ours - change).abs().max() <= 16 * 2.0**-24 * change.abs().max()


def test_loha_and_lokr_of_a_convolution_are_read_flat_and_with_cores(tmp_path: Path) -> None:
    conv = next(n for n in CONVS if UNET[n] == (64, 64, 3, 3))
    name, zero = flat(conv), torch.zeros(64, 64, 3, 3)
    o1, o2, i1, i2 = (torch.randn(4, 64) for _ in range(4))
    t1, t2 = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
    tucker = {"w1_a": o1, "w1_b": i1, "t1": t1, "w2_a": o2, "w2_b": i2, "t2": t2}
    sides = [torch.einsum("ijkl,ip,jr->prkl", t, a, b) for t, a, b in ((t1, o1, i1), (t2, o2, i2))]
    wide = [torch.randn(64, 2), torch.randn(2, 64 * 9), torch.randn(64, 2), torch.randn(2, 64 * 9)]
    flat_loha = dict(zip(("w1_a", "w1_b", "w2_a", "w2_b"), wide, strict=True))
    block = torch.randn(16, 16, 3, 3)
    kron = {"w1": torch.randn(4, 4), "w2": block}
    for kind, tensors, expected in (
        ("hada", tucker, sides[0] * sides[1]),
        ("hada", flat_loha, ((wide[0] @ wide[1]) * (wide[2] @ wide[3])).reshape(zero.shape)),
        ("lokr", kron, torch.einsum("ab,cdkl->acbdkl", kron["w1"], block).reshape(zero.shape)),
    ):
        file = write(
            tmp_path / "a.safetensors", {f"{name}.{kind}_{k}": t for k, t in tensors.items()}
        )
        delta = read_adapter(file).resolve(NETWORKS).require().deltas["unet", conv]
        assert isinstance(delta, Dense)
        error = (delta.change(zero) - expected).abs().max()
        assert error <= 64 * 2.0**-24 * expected.abs().max(), kind


@pytest.mark.parametrize(
    ("slot", "shape", "axis"),
    [
        ("dora_scale", (64, 1, 1, 1), 0),
        ("dora_scale", (1, 32, 1, 1), 1),
        ("dora_scale", (64,), 0),
        ("lora_magnitude_vector", (1, 64, 1, 1), 0),
        ("lora_magnitude_vector", (64,), 0),
    ],
)
def test_the_axis_of_a_dora_magnitude_is_decided_by_its_key(
    slot: str, shape: tuple[int, ...], axis: int, tmp_path: Path
) -> None:
    """PEFT writes [1, o, 1, 1] for the rows of a convolution, which LyCORIS writes for columns."""
    conv = next(n for n in CONVS if UNET[n] == (64, 32, 3, 3))
    down, up = Known.of(UNET[conv], "dora")
    magnitude = torch.rand(shape) + 0.5
    tensors = {
        f"{conv}.lora_A.weight": down,
        f"{conv}.lora_B.weight": up,
        f"{conv}.{slot}": magnitude,
    }
    file = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert file.form is AdapterForm.DORA
    delta = file.resolve(NETWORKS).require().deltas["unet", conv]
    assert isinstance(delta, Dense) and delta.magnitude is not None
    expected = (64, 1, 1, 1) if axis == 0 else (1, 32, 1, 1)
    assert torch.equal(delta.magnitude, magnitude.reshape(expected))


def test_a_full_difference_reaches_biases_and_norms(tmp_path: Path) -> None:
    conv, norm = CONVS[0], next(n for n in UNET if n.endswith("norm1"))
    tensors = {
        f"{flat(conv)}.diff": torch.randn(UNET[conv]),
        f"{flat(conv)}.diff_b": torch.randn(UNET[conv][0]),
        f"{flat(norm)}.w_norm": torch.randn(UNET[norm]),
        f"{flat(norm)}.b_norm": torch.randn(UNET[norm]),
        f"{flat(CONVS[1])}.diff_b": torch.randn(UNET[CONVS[1]][0]),
    }
    resolution = (
        read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS).require()
    )
    for module, bias in ((conv, "diff_b"), (norm, "b_norm"), (CONVS[1], "diff_b")):
        delta = resolution.deltas["unet", module]
        assert isinstance(delta, Dense) and delta.kind is FULL
        zeros = torch.zeros(UNET[module][0])
        assert torch.equal(merge_bias(delta, zeros, 1.0), tensors[f"{flat(module)}.{bias}"])
    zero = torch.zeros(UNET[norm])
    norm_delta = resolution.deltas["unet", norm]
    assert isinstance(norm_delta, Dense)
    assert torch.equal(merge(norm_delta, zero, 2.0), 2 * tensors[f"{flat(norm)}.w_norm"])


def test_custom_diffusion_holds_whole_keys_and_values(tmp_path: Path) -> None:
    """diffusers' CustomDiffusionAttnProcessor: what is stored replaces to_k and to_v."""
    tensors = {
        n.replace(".to_", ".processor.to_") + "_custom_diffusion.weight": torch.randn(UNET[n])
        for n in CROSS
    }
    file = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert file.form is AdapterForm.CUSTOM_DIFFUSION
    resolution = file.resolve(NETWORKS).require()
    assert {module for _, module in resolution.deltas} == set(CROSS)
    delta = resolution.deltas["unet", CROSS[0]]
    assert isinstance(delta, Dense) and delta.kind is WHOLE
    weight = torch.zeros(UNET[CROSS[0]])
    assert torch.equal(merge(delta, weight, 1.0), next(iter(tensors.values())))


def twice() -> Tensors:
    """The same layer under its LDM name."""
    ldm = keymap.unet_to_ldm([*UNET])[ATTENTION[0]]
    return one() | {n.replace(flat(ATTENTION[0]), flat(ldm)): t.clone() for n, t in one().items()}


def nan(shape: tuple[int, ...]) -> Tensor:
    bad = torch.zeros(shape)
    bad.view(-1)[-1] = math.nan
    return bad


CHAR = torch.zeros(OUT, 3, dtype=torch.int8)
WRONG: dict[str, tuple[Tensors, str]] = {
    "rank": (one(lora_up__weight=torch.zeros(OUT, 4)), r"a rank 3, got 4"),
    "rank 0": (one(lora_down__weight=torch.zeros(0, IN)), r"none empty, got \[0, 32\]"),
    "nan": (one(lora_up__weight=nan((OUT, 3))), "finite numbers, got NaN or infinity"),
    "infinite alpha": (one(alpha=torch.tensor(math.inf)), "finite numbers, got NaN or infinity"),
    "alpha of a row": (one(alpha=torch.ones(3)), "expected one number"),
    "boolean alpha": (one(alpha=torch.tensor(True)), "floating point numbers, got 'BOOL'"),
    "integers": (one(lora_up__weight=CHAR), "point numbers, got 'I8'"),
    "no up": (one(lora_up__weight=None), r"expected up too \(the file is torn\)"),
    "no down": (one(lora_down__weight=None), "expected down too"),
    "no change": (one(lora_down__weight=None, lora_up__weight=None), "expected a change too"),
    "duplicate": (twice(), "expected each layer once"),
    "same part twice": (
        one() | {f"lycoris_{ATTENTION[0].replace('.', '_')}.lora_A.weight": torch.zeros(3, IN)}
        | {f"{flat(ATTENTION[0])}.lora_A.weight": torch.zeros(3, IN)},
        "the same part",
    ),
    "loha half": ({f"{flat(ATTENTION[0])}.hada_w1_a": CHAR.half()}, "expected hada_w1_b too"),
    "lokr half": ({f"{flat(ATTENTION[0])}.lokr_w1": torch.ones(2, 2)}, "expected lokr_w2_a too"),
    "magnitude": (one(dora_scale=torch.ones(5, 1)), r"a DoRA magnitude \[32, 1\], got \[5, 1\]"),
    "two ways": (one() | {f"{flat(ATTENTION[0])}.diff": torch.ones(OUT, IN)}, "one way to change"),
    "two sides": (
        {f"{flat(ATTENTION[0])}.lokr_{x}": torch.ones(2, 2) for x in ("w1", "w1_a", "w1_b", "w2")},
        "one way to change",
    ),
    "unknown": ({"mystery.weight": torch.ones(3, 3)}, "computed here .* got the keys mystery"),
    "elsewhere": (
        {n.replace("unet_down", "unet_sideways"): t for n, t in one().items()},
        "none of its 1 modules .* fits unet and text and text_2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    tensors, message = WRONG[name]
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterError, match=message):
        read_adapter(path).resolve(NETWORKS).require()


def test_alpha_may_be_an_integer_of_any_width(tmp_path: Path) -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float16, torch.bfloat16):
        tensors = one(alpha=torch.tensor(6, dtype=dtype))
        resolution = read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS)
        (delta,) = resolution.deltas.values()
        assert isinstance(delta, LowRank) and delta.scale == 2.0


def test_no_alpha_anywhere_means_a_scale_of_one(tmp_path: Path) -> None:
    resolution = read_adapter(write(tmp_path / "a.safetensors", one(alpha=None))).resolve(NETWORKS)
    (delta,) = resolution.deltas.values()
    assert isinstance(delta, LowRank) and delta.scale == 1.0


def test_a_bias_or_a_norm_of_the_wrong_layer_is_a_mismatch(tmp_path: Path) -> None:
    name = flat(CONVS[0])
    for slot, shape in (("diff", UNET[CONVS[0]][:1]), ("diff_b", (3,)), ("w_norm", (3,))):
        tensors = one() | {f"{name}.{slot}": torch.ones(shape)}
        resolution = read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS)
        assert resolution.mismatched == ((name, UNET[CONVS[0]], shape),), slot


def test_an_alpha_that_is_missing_or_0_is_a_scale_of_one_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ComfyUI and A1111 have the first, sd-scripts and LyCORIS the second."""
    first, second, third = (
        {n.replace("attn1_to_q", leaf): t for n, t in one(alpha=alpha).items()}
        for leaf, alpha in (
            ("attn1_to_q", torch.tensor(6.0)),
            ("attn1_to_k", None),
            ("attn1_to_v", torch.tensor(0)),
        )
    )
    path = write(tmp_path / "a.safetensors", first | second | third)
    resolution = read_adapter(path).resolve(NETWORKS).require()
    scales = {d.scale for d in resolution.deltas.values() if isinstance(d, LowRank)}
    assert len(resolution.deltas) == 3 and scales == {2.0, 1.0}
    name = flat(ATTENTION[0]).removesuffix("attn1_to_q")
    assert resolution.notes == describe_adapter(path).notes == (
        f"1 of 3 modules have no alpha (such as {name}attn1_to_k): their scale is 1",
        f"1 of 3 modules have an alpha of 0 (such as {name}attn1_to_v): their scale is 1",
    )  # fmt: skip
    assert main(["inspect", str(path)]) == 0
    output = capsys.readouterr().out
    assert all(f"note        {note}" in output for note in resolution.notes)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_adapter_in_eight_bits_is_its_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    narrow = {n: t.to(dtype) if t.ndim else t for n, t in one().items()}
    wide = {n: t.float() for n, t in narrow.items()}
    deltas = [
        next(
            iter(
                read_adapter(write(tmp_path / f"{i}.safetensors", t))
                .resolve(NETWORKS)
                .deltas.values()
            )
        )
        for i, t in enumerate((narrow, wide))
    ]
    assert torch.equal(*(delta.change(torch.zeros(OUT, IN)) if isinstance(delta, Dense)
                         else delta.weight() for delta in deltas))  # fmt: skip


def test_an_int8_adapter_is_widened_with_its_scales(tmp_path: Path) -> None:
    tensors = one()
    rows = torch.rand(3, 1) + 0.5
    down = f"{flat(ATTENTION[0])}.lora_down"
    tensors[f"{down}.weight"] = torch.randint(-128, 128, (3, IN), dtype=torch.int8)
    tensors[f"{down}.weight_scale"] = rows
    resolution = (
        read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS).require()
    )
    (delta,) = resolution.deltas.values()
    assert isinstance(delta, LowRank)
    assert torch.equal(delta.down, tensors[f"{down}.weight"].float() * rows)


def test_factors_and_magnitudes_of_a_matrix_fit_no_norm(tmp_path: Path) -> None:
    name = flat("conv_norm_out")
    factors = {"lora_down.weight": torch.ones(2, 1), "lora_up.weight": torch.ones(32, 2)}
    for suffixes in (factors, {"diff": torch.ones(32), "dora_scale": torch.ones(1, 2)}):
        tensors = one() | {f"{name}.{suffix}": t for suffix, t in suffixes.items()}
        with pytest.raises(AdapterError, match=r"of another shape|a DoRA magnitude \[32\]"):
            read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS).require()


SUFFIXES = [
    *("scalar", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "oft_blocks"),
    *("rescale", "oft_R.weight", "oft_R.scaled_oft", "weight", "on_input", "set_weight"),
    *("lora_B.bias", "vera_lambda_b"),
    *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "lora_A.weight", "diff"),
    *("lora_B.weight", "lora.down.weight", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    *("hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "diff_b"),
    *("lokr_w2_b", "lokr_t2", "dora_scale", "lora_magnitude_vector", "w_norm", "b_norm", "x"),
]
SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 32, 64, 288]), max_size=5)
PIECES = st.lists(
    st.tuples(
        st.sampled_from([ATTENTION[0], CONVS[0], FEED[0], "conv_norm_out", "nowhere"]),
        st.sampled_from(SUFFIXES),
        SIZES,
        st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]),
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pieces=PIECES)
def test_no_heap_of_tensors_raises_anything_but_an_adapter_error(
    pieces: list[tuple[str, str, list[int], torch.dtype]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = {
        f"{flat(module)}.{suffix}": torch.ones(shape, dtype=dtype)
        for module, suffix, shape, dtype in pieces
        if math.prod(shape) < 10**6
    }
    path = write(tmp_path_factory.mktemp("heap") / "a.safetensors", tensors)
    try:
        resolution = read_adapter(path).resolve(NETWORKS)
    except AdapterError:
        return
    for (network, module), delta in resolution.deltas.items():
        shape = NETWORKS[network][module]
        assert merge(delta, torch.zeros(shape), 1.0).shape == shape
