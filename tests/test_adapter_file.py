"""Adapter files of every form: what is read is exact, what is wrong is one clear AdapterError."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from headstart.adapters.delta import Dense, DenseForm, LowRank
from headstart.adapters.file import describe_adapter, layer_shapes, read_adapter
from headstart.adapters.names import AdapterForm, Network
from headstart.checkpoint import keymap
from headstart.checkpoint.checkpoint import inspect_checkpoint
from headstart.errors import AdapterError
from headstart.networks.unet import Mid, Stage, UNet, UNetParams

Tensors = dict[str, Tensor]
Layers = dict[Network, dict[str, tuple[int, ...]]]


def _unet(context_dim: int = 24) -> dict[str, tuple[int, ...]]:
    """SD1.5's build at a small size: two levels, a mid block, convolutional projections."""
    params = UNetParams(
        down=(Stage(32, (1, 1), True), Stage(64, (1, 1), False)),
        mid=Mid(2, 1),
        up=(Stage(64, (1, 1, 1), True), Stage(32, (1, 1, 1), False)),
        context_dim=context_dim,
        heads=2,
        norm_groups=8,
        linear_projection=False,
    )
    with torch.device("meta"):
        return layer_shapes(UNet(params))


def _text(width: int, layers: int = 2) -> dict[str, tuple[int, ...]]:
    leaves = {f"self_attn.{x}_proj": (width, width) for x in ("k", "v", "q", "out")}
    leaves |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    return {
        f"text_model.encoder.layers.{i}.{leaf}": shape
        for i in range(layers)
        for leaf, shape in leaves.items()
    }


UNET = _unet()
NETWORKS: Layers = {"unet": UNET, "text": _text(24), "text_2": _text(40, 3)}
ATTENTION = [n for n in UNET if n.rpartition("attn")[2][2:] in ("to_q", "to_k", "to_v", "to_out.0")]
CROSS = [n for n in ATTENTION if n.endswith(("attn2.to_k", "attn2.to_v"))]
FEED = [n for n in UNET if n.endswith("ff.net.0.proj")]
CONVS = [n for n in UNET if len(UNET[n]) == 4 and ".resnets." in n]
Q_AND_OUT = ("self_attn.q_proj", "self_attn.out_proj")


class Known(NamedTuple):
    """A change whose factors are known, of one layer."""

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...], seed: str, rank: int = 3) -> Known:
        generator = torch.Generator().manual_seed(sum(map(ord, seed)))
        down = torch.randn(rank, *shape[1:], generator=generator)
        return cls(down, torch.randn(shape[0], rank, *[1] * len(shape[2:]), generator=generator))


def known(network: Network, modules: list[str]) -> dict[tuple[Network, str], Known]:
    shapes = NETWORKS[network]
    return {(network, module): Known.of(shapes[module], network + module) for module in modules}


def text_modules(network: Network, leaves: tuple[str, ...] = Q_AND_OUT) -> list[str]:
    return [name for name in NETWORKS[network] if name.endswith(leaves)]


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


# ------------------------------------------------- one spelling a form

Changes = dict[tuple[Network, str], Known]
FLAT = {"unet": "lora_unet_", "text": "lora_te1_", "text_2": "lora_te2_"}
DOTTED = {"unet": "unet.", "text": "text_encoder.", "text_2": "text_encoder_2."}


def kohya(changes: Changes, *, ldm: bool = False, single: bool = False) -> Tensors:
    """github.com/kohya-ss/sd-scripts: underscores, an alpha; SDXL's UNet has LDM's names."""
    found: Tensors = {}
    names = keymap.unet_to_ldm(UNET) if ldm else {}
    for (network, module), (down, up) in changes.items():
        prefix = "lora_te_" if single and network == "text" else FLAT[network]
        flat = prefix + names.get(module, module).replace(".", "_")
        found |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        found[f"{flat}.alpha"] = torch.tensor(1.5)
    return found


def processors(changes: Changes, prefix: bool) -> Tensors:
    found: Tensors = {}
    for (network, module), (down, up) in changes.items():
        if network == "unet":
            block, _, leaf = module.rpartition(".to_")
            name = f"{block}.processor.to_{leaf.removesuffix('.0')}_lora"
        else:  # the first releases named CLIP's projections like the UNet's
            block, _, leaf = module.rpartition(".")
            name = f"{block}.to_{leaf.removesuffix('_proj')}_lora"
        name = (DOTTED[network] if prefix else "") + name
        found |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return found


def dotted(changes: Changes, down: str, up: str, text: tuple[str, str] | None = None) -> Tensors:
    found: Tensors = {}
    for (network, module), (a, b) in changes.items():
        ends = (down, up) if network == "unet" or text is None else text
        name = DOTTED[network] + module
        found |= {f"{name}.{ends[0]}.weight": a, f"{name}.{ends[1]}.weight": b}
    return found


def cloneofsimo(changes: Changes) -> Tensors:
    """N counts CrossAttention and GEGLU layers in diffusers' order of registration."""
    order: list[str] = []
    for side in ("down_blocks", "up_blocks", "mid_block"):
        blocks = [n.removesuffix(".attn1.to_q") for n in UNET if n.endswith("attn1.to_q")]
        for block in (b for b in blocks if b.startswith(side)):
            order += [f"{block}.attn1.to_{x}" for x in ("q", "k", "v", "out.0")]
            order += [f"{block}.ff.net.0.proj"]
            order += [f"{block}.attn2.to_{x}" for x in ("q", "k", "v", "out.0")]
    text = [
        f"text_model.encoder.layers.{i}.self_attn.{x}_proj"
        for i in range(2)
        for x in ("k", "v", "q", "out")
    ]
    found: Tensors = {}
    for (network, module), (down, up) in changes.items():
        name = (
            f"unet:{order.index(module)}"
            if network == "unet"
            else f"text_encoder:{text.index(module)}"
        )
        found |= {f"{name}:down": down, f"{name}:up": up}
    return found


class Case(NamedTuple):
    form: AdapterForm
    changes: Changes
    spell: Callable[[Changes], Tensors]
    scale: float


def cases() -> dict[str, Case]:
    attention = known("unet", ATTENTION)
    wide = attention | known("unet", FEED + CONVS)
    text = known("text", text_modules("text"))
    both = text | known("text_2", text_modules("text_2"))
    F = AdapterForm
    linear = ("lora_linear_layer.down", "lora_linear_layer.up")
    return {
        "kohya sd": Case(
            F.KOHYA, known("unet", ATTENTION + FEED) | text, lambda c: kohya(c, single=True), 0.5
        ),
        "kohya sgm": Case(
            F.KOHYA, known("unet", ATTENTION + FEED) | both, lambda c: kohya(c, ldm=True), 0.5
        ),
        "locon": Case(F.LOCON, wide | text, kohya, 0.5),
        "locon sgm": Case(F.LOCON, wide | both, lambda c: kohya(c, ldm=True), 0.5),
        "slider lierla": Case(F.SLIDER, attention, kohya, 0.5),
        "slider c3lier": Case(F.SLIDER, attention | known("unet", CONVS), kohya, 0.5),
        "distillation": Case(F.LOCON, wide, kohya, 0.5),
        "diffusers 0.16": Case(
            F.DIFFUSERS_PROCESSOR, attention, lambda c: processors(c, prefix=False), 1.0
        ),
        "diffusers 0.17": Case(
            F.DIFFUSERS_PREFIXED, attention | both, lambda c: processors(c, prefix=True), 1.0
        ),
        "diffusers 0.22": Case(
            F.DIFFUSERS, wide | both, lambda c: dotted(c, "lora.down", "lora.up", linear), 1.0
        ),
        "peft": Case(F.PEFT, wide | both, lambda c: dotted(c, "lora_A", "lora_B"), 1.0),
        "peft adapter name": Case(
            F.PEFT, attention, lambda c: dotted(c, "lora_A.default", "lora_B.default"), 1.0
        ),
        "cloneofsimo": Case(
            F.CLONEOFSIMO,
            known("unet", ATTENTION + FEED) | known("text", text_modules("text", ("_proj",))),
            cloneofsimo,
            1.0,
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_every_spelling_of_the_same_change_is_that_change(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    file = read_adapter(write(tmp_path / "a.safetensors", case.spell(case.changes)))
    assert file.form is case.form and not file.strays
    found = file.resolve(NETWORKS).require()
    assert found.deltas.keys() == case.changes.keys() and found.rank == 3
    for place, (down, up) in case.changes.items():
        delta = found.deltas[place]
        assert isinstance(delta, LowRank)
        assert torch.equal(delta.down, down) and torch.equal(delta.up, up.flatten(1)), place
        assert delta.scale == case.scale, place
        assert delta.shape == NETWORKS[place[0]][place[1]]


def test_bare_and_ldm_spellings_of_peft_keys_are_read(tmp_path: Path) -> None:
    """`base_model.model.`, no prefix at all, and ComfyUI's `diffusion_model.` with LDM's names."""
    changes = known("unet", ATTENTION + CONVS)
    ldm = keymap.unet_to_ldm(UNET)
    for prefix, names in (("base_model.model.", {}), ("", {}), ("diffusion_model.", ldm)):
        tensors: Tensors = {}
        for (_, module), (down, up) in changes.items():
            name = prefix + names.get(module, module)
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        found = read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS)
        assert found.require().deltas.keys() == changes.keys()


def test_a_bare_text_name_goes_to_the_encoder_whose_width_it_has(tmp_path: Path) -> None:
    """PEFT saves an encoder alone, and transformers 5 dropped `text_model.` from its names."""
    for network in ("text", "text_2"):
        for cut in ("", "text_model."):
            changes = known(network, text_modules(network))
            tensors: Tensors = {}
            for (_, module), (down, up) in changes.items():
                name = "base_model.model." + module.removeprefix(cut)
                tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            file = read_adapter(write(tmp_path / "a.safetensors", tensors))
            texts: Layers = {n: NETWORKS[n] for n in ("text", "text_2")}
            assert file.resolve(texts).require().deltas.keys() == changes.keys()


def test_tucker_cores_become_low_rank_changes(tmp_path: Path) -> None:
    conv = next(n for n in CONVS if UNET[n][2:] == (3, 3))
    outs, ins = UNET[conv][:2]
    down, core, up = torch.randn(4, ins, 1, 1), torch.randn(3, 4, 3, 3), torch.randn(outs, 3, 1, 1)
    name = "lora_unet_" + conv.replace(".", "_")
    factors = {"down": down, "mid": core, "up": up}
    tensors = {f"{name}.lora_{slot}.weight": tensor for slot, tensor in factors.items()}
    tensors[f"{name}.alpha"] = torch.tensor(2.0)
    found = read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS)
    delta = found.deltas["unet", conv]
    assert isinstance(delta, LowRank) and delta.rank == 3
    assert delta.scale == 2 / 4  # LyCORIS divides by the rank of `down`
    oracle = torch.einsum(
        "rckl,or,ci->oikl", core.double(), up.flatten(1).double(), down.flatten(1).double()
    )
    assert (delta.weight() - 0.5 * oracle).abs().max() <= 16 * 2.0**-24 * oracle.abs().max()


# ------------------------------------------------- forms that are merged


def flat(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def dense_cases() -> dict[str, tuple[AdapterForm, DenseForm, Tensors, Tensor]]:
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
    f, d = AdapterForm, DenseForm
    hadamard = (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    kron = torch.kron(w1.double(), w2.double())
    product = torch.kron(w1.double(), (a1[: o // 4].double() @ b1[:, : i // 4].double()))
    factored = {
        f"{n}.lokr_w1": w1,
        f"{n}.lokr_w2_a": a1[: o // 4],
        f"{n}.lokr_w2_b": b1[:, : i // 4],
    }
    return {
        "loha": (f.LOHA, d.LOHA, loha | alpha, hadamard / 2),
        "loha no alpha": (f.LOHA, d.LOHA, loha, hadamard),
        "lokr full": (f.LOKR, d.LOKR, {f"{n}.lokr_w1": w1, f"{n}.lokr_w2": w2} | alpha, kron),
        "lokr factored": (f.LOKR, d.LOKR, factored | alpha, product / 2),
        "difference": (f.FULL, d.FULL, {f"{n}.diff": hadamard.float()}, hadamard),
        "lycoris prefix": (f.LOHA, d.LOHA, lycoris, hadamard),
    }  # fmt: skip


@pytest.mark.parametrize("name", dense_cases())
def test_forms_without_a_low_rank_path_are_merged(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    form, dense, tensors, change = dense_cases()[name]
    file = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert file.form is form
    found = file.resolve(NETWORKS).require()
    delta = found.deltas["unet", ATTENTION[0]]
    assert isinstance(delta, Dense) and delta.form is dense and found.rank == 0
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
    found = read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS).require()
    for module, bias in ((conv, "diff_b"), (norm, "b_norm"), (CONVS[1], "diff_b")):
        delta = found.deltas["unet", module]
        assert isinstance(delta, Dense) and delta.form is DenseForm.FULL
        own = torch.zeros(UNET[module][0])
        assert torch.equal(delta.merge_bias(own, 1.0), tensors[f"{flat(module)}.{bias}"])
    zero = torch.zeros(UNET[norm])
    norm_delta = found.deltas["unet", norm]
    assert isinstance(norm_delta, Dense)
    assert torch.equal(norm_delta.merge(zero, 2.0), 2 * tensors[f"{flat(norm)}.w_norm"])


def test_custom_diffusion_holds_whole_keys_and_values(tmp_path: Path) -> None:
    """diffusers' CustomDiffusionAttnProcessor: what is stored replaces to_k and to_v."""
    tensors = {
        n.replace(".to_", ".processor.to_") + "_custom_diffusion.weight": torch.randn(UNET[n])
        for n in CROSS
    }
    file = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert file.form is AdapterForm.CUSTOM_DIFFUSION
    found = file.resolve(NETWORKS).require()
    assert {module for _, module in found.deltas} == set(CROSS)
    delta = found.deltas["unet", CROSS[0]]
    assert isinstance(delta, Dense) and delta.form is DenseForm.WHOLE
    weight = torch.zeros(UNET[CROSS[0]])
    assert torch.equal(delta.merge(weight, 1.0), next(iter(tensors.values())))


# ------------------------------------------------- where PEFT keeps its alpha


def peft_changes() -> Changes:
    return known("unet", ATTENTION[:2]) | known("text", text_modules("text")[:1])


def peft_file(folder: Path, config: object, metadata: dict[str, str] | None = None) -> Path:
    path = write(folder / "a.safetensors", dotted(peft_changes(), "lora_A", "lora_B"), metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


def scales(path: Path) -> list[float]:
    """Of the two layers of the UNet, then that of the text encoder."""
    deltas = read_adapter(path).resolve(NETWORKS).require().deltas
    ordered = (deltas[place] for place in peft_changes())
    return [delta.scale for delta in ordered if isinstance(delta, LowRank)]


def test_peft_alpha_comes_from_the_configuration_beside_the_file(tmp_path: Path) -> None:
    config: dict[str, object] = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    assert scales(peft_file(tmp_path, config)) == [2.0, 2.0, 2.0]
    assert scales(peft_file(tmp_path, config | {"use_rslora": True})) == [6 / math.sqrt(3)] * 3
    first = {"alpha_pattern": {ATTENTION[0].partition(".")[2]: 12}}
    assert scales(peft_file(tmp_path, config | first)) == [4.0, 2.0, 2.0]
    other = {"alpha_pattern": {"^" + ATTENTION[1]: 9, "^to_q": 12}}
    assert scales(peft_file(tmp_path, config | other)) == [2.0, 3.0, 2.0]
    assert scales(peft_file(tmp_path, None)) == [2.0, 3.0, 2.0], "the folder still has the file"
    (tmp_path / "adapter_config.json").unlink()
    assert scales(peft_file(tmp_path, None)) == [1.0, 1.0, 1.0]


def test_peft_alpha_comes_from_the_metadata_of_diffusers(tmp_path: Path) -> None:
    said = {"unet.r": 3, "unet.lora_alpha": 6, "text_encoder.r": 3, "text_encoder.lora_alpha": 1.5}
    metadata = {"lora_adapter_metadata": json.dumps(said)}
    assert scales(peft_file(tmp_path, None, metadata)) == [2.0, 2.0, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": "8"}, "lora_alpha: expected a positive number"),
        ({"r": 0}, "r: expected a positive number"),
        ({"r": True}, "r: expected a positive number"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "plain names of modules"),
        ({"alpha_pattern": [1]}, "expected an object"),
    ],
)
def test_a_bad_peft_configuration_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        read_adapter(peft_file(tmp_path, {"r": 3, "lora_alpha": 6} | change))


# ------------------------------------------------- what is wrong is an AdapterError


def one(**replaced: Tensor | None) -> Tensors:
    """A whole kohya module and some keys of it replaced, or removed."""
    down, up = Known.of(UNET[ATTENTION[0]], "one")
    parts: dict[str, Tensor | None] = {
        "lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)
    }  # fmt: skip
    parts |= {name.replace("__", "."): tensor for name, tensor in replaced.items()}
    return {f"{flat(ATTENTION[0])}.{n}": t for n, t in parts.items() if t is not None}


def twice() -> Tensors:
    """The same layer under its LDM name."""
    ldm = keymap.unet_to_ldm([*UNET])[ATTENTION[0]]
    return one() | {n.replace(flat(ATTENTION[0]), flat(ldm)): t.clone() for n, t in one().items()}


def nan(shape: tuple[int, ...]) -> Tensor:
    bad = torch.zeros(shape)
    bad.view(-1)[-1] = math.nan
    return bad


OUT, IN = UNET[ATTENTION[0]]
OTHER = {n.replace("down_blocks_0", "down_blocks_1"): t for n, t in one(alpha=None).items()}
CHAR = torch.zeros(OUT, 3, dtype=torch.int8)
WRONG: dict[str, tuple[Tensors, str]] = {
    "rank": (one(lora_up__weight=torch.zeros(OUT, 4)), r"a rank 3 as in its other factor, got 4"),
    "rank 0": (one(lora_down__weight=torch.zeros(0, IN)), r"none empty, got \[0, 32\]"),
    "nan": (one(lora_up__weight=nan((OUT, 3))), "finite numbers, got NaN or infinity"),
    "infinite alpha": (one(alpha=torch.tensor(math.inf)), "finite number that is not 0, got inf"),
    "alpha 0": (one(alpha=torch.tensor(0)), "that is not 0, got 0"),
    "alpha of a row": (one(alpha=torch.ones(3)), "expected one number"),
    "boolean alpha": (one(alpha=torch.tensor(True)), "floating point numbers, got 'BOOL'"),
    "integers": (one(lora_up__weight=CHAR), "point numbers, got 'I8'"),
    "no up": (one(lora_up__weight=None), r"expected up too \(the file is torn\)"),
    "no down": (one(lora_down__weight=None), "expected down too"),
    "no change": (one(lora_down__weight=None, lora_up__weight=None), "expected a change too"),
    "one alpha missing": (
        one() | OTHER,
        "1 of 2 modules have no alpha",
    ),
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
    "unknown": ({"mystery.weight": torch.ones(3, 3)}, "expected the keys of a LoRA"),
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
        found = read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS)
        (delta,) = found.deltas.values()
        assert isinstance(delta, LowRank) and delta.scale == 2.0


def test_no_alpha_anywhere_means_a_scale_of_one(tmp_path: Path) -> None:
    found = read_adapter(write(tmp_path / "a.safetensors", one(alpha=None))).resolve(NETWORKS)
    (delta,) = found.deltas.values()
    assert isinstance(delta, LowRank) and delta.scale == 1.0


def test_an_adapter_of_another_family_is_told_by_its_cross_attention(tmp_path: Path) -> None:
    changes = {("unet", n): Known.of(s, n) for n, s in _unet(768).items() if n in CROSS}
    path = write(tmp_path / "a.safetensors", kohya(changes))
    assert read_adapter(path).family == "sd15"
    with pytest.raises(AdapterError, match="expected an adapter for sdxl, got one for sd15"):
        read_adapter(path).resolve({"unet": _unet(2048)})


def test_a_text_encoder_alone_leaves_nothing_to_steer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya(known("text", text_modules("text"))))
    with pytest.raises(AdapterError, match=r"expected changes of the UNet.*4 in text"):
        read_adapter(path).resolve(NETWORKS)
    assert read_adapter(path).resolve({"text": NETWORKS["text"]}).require().rank == 3


def test_what_does_not_fit_is_listed_and_allowed_only_by_name(tmp_path: Path) -> None:
    changes = known("unet", ATTENTION) | known("text_2", text_modules("text_2"))
    tensors = kohya(changes)
    wrong = flat(ATTENTION[0])
    tensors[f"{wrong}.lora_up.weight"] = torch.ones(OUT + 1, 3)
    tensors["bundle_emb.cat"] = torch.ones(4)
    file = read_adapter(write(tmp_path / "a.safetensors", tensors))
    networks: Layers = {"unet": UNET, "text": NETWORKS["text"]}
    found = file.resolve(networks)
    assert len(found.deltas) == len(ATTENTION) - 1
    assert len(found.matched) == 3 * len(found.deltas)
    assert found.mismatched == ((wrong, (OUT, IN), (OUT + 1, IN)),)
    texts = {name for name in tensors if name.startswith("lora_te2_")}
    assert set(found.unmatched) == texts | {"bundle_emb.cat"}
    assert len(found.matched) + len(found.unmatched) + 3 == len(tensors), "no key is lost"
    with pytest.raises(AdapterError) as caught:
        found.require()
    message = str(caught.value)
    assert all(name in message for name in texts | {wrong, "bundle_emb.cat"})
    with pytest.raises(AdapterError, match=r"fit, but 1 of another shape: [^;]*\. Attach"):
        found.require(allow=("lora_te2_*", "bundle_emb.*"))
    assert found.require(allow=("lora_te2_*", "bundle_emb.*", wrong)) is found
    assert found.require(allow=("*",)) is found


def test_files_that_are_no_adapters_are_refused(tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(AdapterError) as caught:
            read_adapter(path)
        return str(caught.value)

    empty = write(tmp_path / "empty.safetensors", {})
    assert "without tensors" in refused(empty)
    checkpoint = {"conv_in.weight": torch.zeros(4, 4, 3, 3)}
    text = refused(write(tmp_path / "unet.safetensors", checkpoint))
    assert "a checkpoint (unet)" in text and "headstart transfer" in text
    prefixed = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}
    assert "a checkpoint (unet)" in refused(write(tmp_path / "ldm.safetensors", prefixed))
    torch.save(one(), tmp_path / "slider.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    for name in ("slider.pt", "old.pt"):
        assert f"headstart convert '{tmp_path / name}'" in refused(tmp_path / name)
    assert "does not exist" in refused(tmp_path / "absent.safetensors")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(write(tmp_path / "a.safetensors", one()).read_bytes()[:-3])
    assert "truncated" in refused(torn)


def test_a_bias_or_a_norm_of_the_wrong_layer_is_a_mismatch(tmp_path: Path) -> None:
    name = flat(CONVS[0])
    for slot, shape in (("diff", UNET[CONVS[0]][:1]), ("diff_b", (3,)), ("w_norm", (3,))):
        tensors = one() | {f"{name}.{slot}": torch.ones(shape)}
        found = read_adapter(write(tmp_path / "a.safetensors", tensors)).resolve(NETWORKS)
        assert found.mismatched == ((name, UNET[CONVS[0]], shape),), slot


SUFFIXES = [
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
        found = read_adapter(path).resolve(NETWORKS)
    except AdapterError:
        return
    for (network, module), delta in found.deltas.items():
        shape = NETWORKS[network][module]
        assert delta.merge(torch.zeros(shape), 1.0).shape == shape


def test_long_and_odd_keys_are_strays_and_cost_nothing(tmp_path: Path) -> None:
    tensors = one() | {"a" * 900 + ".alpha": torch.ones(1), ".alpha.": torch.ones(1)}
    file = read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert len(file.strays) == 2 and len(file.groups) == 1


def test_an_adapter_is_described_from_its_header(tmp_path: Path) -> None:
    changes = known("unet", ATTENTION + CONVS) | known("text_2", text_modules("text_2"))
    path = write(tmp_path / "a.safetensors", kohya(changes) | {"bundle_emb.x": torch.ones(2)})
    info = describe_adapter(path)
    assert (info.form, info.family, info.ranks) == ("locon", None, (3, 3))
    assert info.modules == {"unet": len(ATTENTION) + len(CONVS), "text_2": 6}
    assert info.strays == ("bundle_emb.x",) and info.tensors == 3 * len(changes) + 1
    assert info.size_bytes == path.stat().st_size and info.dtype == "F32"
    assert json.loads(json.dumps(info.to_json()))["modules"] == info.modules


def test_files_of_differences_and_of_custom_diffusion_are_inspected_as_adapters(
    tmp_path: Path,
) -> None:
    for key in ("lora_unet_x.diff", "mid_block.attn2.processor.to_k_custom_diffusion.weight"):
        path = write(tmp_path / "a.safetensors", {key: torch.ones(3, 3)})
        assert inspect_checkpoint(path).layout == "adapter"


# ------------------------------------------------- the real ones


def manifest(shared: Path, name: str) -> dict[str, tuple[int, ...]]:
    table = json.loads((shared / "manifests" / name).read_text())
    return {n: tuple(shape) for n, (_, shape) in (table.get("diffusers") or table["hf"]).items()}


def full_size(shared: Path, family: str) -> Layers:
    """The families' networks on the meta device, from the manifests' shapes."""
    from headstart.checkpoint.families import FAMILIES
    from headstart.networks.params import unet_params

    with torch.device("meta"):
        unet = UNet(unet_params(manifest(shared, f"unet_{family}.json"), FAMILIES[family]))
    files = {
        "sd15": ["text_clip_l_sd15.json"],
        "sdxl": ["text_clip_l_sdxl.json", "text_openclip_bigg_sdxl.json"],
    }
    networks: Layers = {"unet": layer_shapes(unet)}
    for network, file in zip(("text", "text_2"), files[family], strict=False):
        shapes = manifest(shared, file)
        networks[network] = {n[:-7]: s for n, s in shapes.items() if n.endswith(".weight")}
    return networks


def test_every_full_size_key_set_finds_all_its_layers(shared: Path, tmp_path: Path) -> None:
    """26 files' keys as the original programs write them, on SD1.5 and SDXL at full size."""
    sets = json.loads((shared / "manifests" / "lora_formats.json").read_text())
    networks = {family: full_size(shared, family) for family in ("sd15", "sdxl")}
    for name, keys in sets.items():
        header: dict[str, object] = {}
        end = 0
        for key, (dtype, shape) in keys.items():
            size = math.prod(shape) * {"I64": 8, "F32": 4, "F16": 2}[dtype]
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        path = tmp_path / "a.safetensors"
        with path.open("wb") as file:  # zeros that take no space
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        adapter = read_adapter(path)
        family = "sd15" if "sd15" in name else "sdxl"
        match = adapter.match(networks[family])
        assert not match.unmatched and not match.mismatched, name
        assert len(match.owners) == len(adapter.groups), name
        other = networks["sdxl" if family == "sd15" else "sd15"]
        try:
            found = adapter.match(other)
        except AdapterError as error:
            assert "expected an adapter for" in str(error), name
        else:  # self-attention alone does not tell the family
            assert found.unmatched or found.mismatched, name
        assert ("slider" in name) == (adapter.form is AdapterForm.SLIDER), name


@pytest.mark.parametrize(
    ("name", "form", "layers"),
    [
        ("catundchat_sd15_diffusers_old", AdapterForm.DIFFUSERS_PROCESSOR, 128),
        ("cloneofsimo_analog_svd_rank4", AdapterForm.CLONEOFSIMO, 192),
    ],
)
def test_real_files_resolve_completely(
    name: str, form: AdapterForm, layers: int, shared: Path
) -> None:
    file = read_adapter(shared / "data" / "lora" / f"{name}.safetensors")
    found = file.resolve(full_size(shared, "sd15")).require()
    assert file.form is form and found.rank == 4
    assert len(found.deltas) == layers == len(file.groups)
