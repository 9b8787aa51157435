"""Fine-tunes carried over: the numbers, whatever the layouts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import merge
from networks import METADATA, PARAMS
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.adapters import transfer as transfer_module
from headstart.adapters.delta import LowRank
from headstart.adapters.extract import extract, nearest
from headstart.adapters.file import layer_shapes, read_adapter
from headstart.adapters.transfer import transfer
from headstart.checkpoint import contents, keymap
from headstart.cli import main
from headstart.errors import CheckpointError, HeadstartError, InputError
from headstart.networks.load import load_unet
from headstart.networks.unet import UNet

Tensors = dict[str, Tensor]
with torch.device("meta"):
    META = UNet(PARAMS)
SHAPES = {name: tuple(tensor.shape) for name, tensor in META.state_dict().items()}
EPS = 2.0**-24


def weights(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def clip(seed: int, width: int = 16, layers: int = 2) -> Tensors:
    """An OpenCLIP text encoder as SDXL's single file has it: in_proj holds q, k and v."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (49, width),
        "positional_embedding": (7, width),
        "ln_final.weight": (width,),
        "text_projection": (width, 12),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.mlp.c_fc.weight": (2 * width, width),
        }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata or METADATA)
    return path


def ldm(tensors: Tensors) -> Tensors:
    names = keymap.unet_to_ldm(tensors)
    return {f"model.diffusion_model.{names[n]}": t for n, t in tensors.items()}


def trio(folder: Path, base: Tensors, tuned: Tensors, distilled: Tensors) -> tuple[Path, ...]:
    return tuple(
        save(folder / f"{name}.safetensors", tensors)
        for name, tensors in (("base", base), ("tuned", tuned), ("distilled", distilled))
    )


def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def test_with_the_base_as_distilled_model_the_result_is_the_fine_tune(tmp_path: Path) -> None:
    paths = trio(tmp_path, weights(0), weights(1), weights(0))
    transfer(*paths, out(tmp_path))
    result = load_file(out(tmp_path))
    assert result.keys() == SHAPES.keys()
    assert all(torch.equal(result[name], tensor) for name, tensor in weights(1).items())


def test_without_a_difference_the_result_is_the_distilled_model(tmp_path: Path) -> None:
    distilled = {name: tensor.half() for name, tensor in weights(2).items()}
    paths = trio(tmp_path, weights(0), weights(0), distilled)
    done = transfer(*paths, out(tmp_path), strength=3.0)
    result = load_file(out(tmp_path))
    assert all(torch.equal(result[name], tensor) for name, tensor in distilled.items())
    assert done.relative == {"unet": 0.0} and done.changed == {"unet": len(SHAPES)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1001, 2**20])
def test_each_number_is_the_formula_rounded_to_the_dtype_of_the_distilled_model(
    dtype: torch.dtype, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_module, "CHUNK", chunk)
    base, tuned = weights(0), {name: tensor.half() for name, tensor in weights(1).items()}
    distilled = {name: tensor.to(dtype) for name, tensor in weights(2).items()}
    done = transfer(*trio(tmp_path, base, tuned, distilled), out(tmp_path), strength=-0.7)
    result = load_file(out(tmp_path))
    changes = {name: -0.7 * (tuned[name].double() - base[name].double()) for name in SHAPES}
    for name, change in changes.items():
        assert torch.equal(result[name], (distilled[name].double() + change).to(dtype)), name
    top = sum(float(change.square().sum()) for change in changes.values())
    bottom = sum(float(tensor.double().square().sum()) for tensor in distilled.values())
    assert done.relative["unet"] == pytest.approx((top / bottom) ** 0.5, rel=1e-9)


def test_layouts_may_differ_and_the_distilled_models_own_is_written(tmp_path: Path) -> None:
    base, tuned, distilled = weights(0), weights(1), weights(2)
    folder = tmp_path / "tuned" / "unet"
    folder.mkdir(parents=True)
    save(folder / "diffusion_pytorch_model.safetensors", tuned)
    other = {"first_stage_model.decoder.conv_in.weight": torch.randn(4, 4, 3, 3).bfloat16()}
    other["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
    other["empty"] = torch.zeros(0, 3)
    one = save(tmp_path / "base.safetensors", ldm(base))
    three = save(tmp_path / "distilled.safetensors", ldm(distilled) | other)
    with pytest.raises(CheckpointError, match="1 of no network: empty"):
        transfer(one, tmp_path / "tuned", three, out(tmp_path))
    del other["empty"]
    three = save(three, ldm(distilled) | other, METADATA | {"note": "kept"})
    done = transfer(one, tmp_path / "tuned", three, out(tmp_path))
    result = load_file(out(tmp_path))
    assert set(result) == set(ldm(distilled)) | set(other) and done.copied == len(other)
    assert all(torch.equal(result[name], tensor) for name, tensor in other.items())
    loaded = load_unet(out(tmp_path)).state_dict()
    for name in SHAPES:
        expected = distilled[name].double() + (tuned[name].double() - base[name].double())
        assert torch.equal(loaded[name], expected.float()), name
    from headstart.checkpoint.tensors import Checkpoint

    metadata = Checkpoint([out(tmp_path)]).metadata
    assert metadata["note"] == "kept" and json.loads(metadata["headstart.transfer"])["parts"] == [
        "unet"
    ]


def separated(tensors: Tensors) -> Tensors:
    """The same encoder as transformers names it: q, k, v apart, the projection transposed."""
    state: Tensors = {}
    for name, source in contents.sources("text", {name: name for name in tensors}).items():
        tensor = tensors[source.name]
        if source.op in ("q", "k", "v"):
            tensor = tensor.chunk(3)["qkv".index(source.op)]
        state[name] = (tensor.T if source.op == "transpose" else tensor).clone()
    return state


def test_fused_and_transposed_tensors_of_a_text_encoder_keep_their_places(tmp_path: Path) -> None:
    """B and D are single files whose in_proj holds q, k and v; T is a folder, with them apart."""
    b, t, d = (clip(seed) for seed in range(3))
    prefix = "conditioner.embedders.1.model."
    first = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"
    files = [
        save(
            tmp_path / f"{index}.safetensors",
            {prefix + name: tensor for name, tensor in tensors.items()} | {first: torch.ones(4)},
        )
        for index, tensors in enumerate((b, d))
    ]
    folder = tmp_path / "tuned" / "text_encoder_2"
    folder.mkdir(parents=True)
    save(folder / "model.safetensors", separated(t))
    done = transfer(files[0], folder.parent, files[1], out(tmp_path), parts=("text_2",))
    result = load_file(out(tmp_path))
    for name in d:
        expected = d[name].double() + (t[name].double() - b[name].double())
        assert torch.equal(result[prefix + name], expected.float()), name
    assert done.changed == {"text_2": 4 + 2 * 7} and done.copied == 1


def test_what_only_the_distilled_model_has_is_kept_and_told(tmp_path: Path) -> None:
    """LCM's projection of the guidance scale has no counterpart in its base."""
    projection = {"time_embedding.cond_proj.weight": torch.randn(16, 8)}
    paths = trio(tmp_path, weights(0), weights(1), weights(2) | projection)
    done = transfer(*paths, out(tmp_path))
    assert done.kept == ("time_embedding.cond_proj.weight",) and done.copied == 0
    assert torch.equal(load_file(out(tmp_path))[done.kept[0]], projection[done.kept[0]])


# ------------------------------------------------- refused


def without(tensors: Tensors, name: str) -> Tensors:
    return {n: t for n, t in tensors.items() if n != name}


NORM = "conv_norm_out.weight"
HALF = {name: tensor.half() for name, tensor in weights(2).items()}
BAD: dict[str, tuple[Any, str]] = {
    "tuned lacks one": (
        lambda: (weights(0), without(weights(1), NORM), weights(2)),
        "1 missing: conv_norm_out.weight",
    ),
    "distilled lacks one": (
        lambda: (weights(0), weights(1), without(weights(2), NORM)),
        "1 missing: conv_norm_out.weight",
    ),
    "tuned has more": (
        lambda: (weights(0), weights(1) | {"mystery.weight": torch.ones(3)}, weights(2)),
        "1 of no network: mystery.weight",
    ),
    "another shape": (
        lambda: (weights(0), weights(1) | {NORM: torch.ones(17)}, weights(2)),
        r"conv_norm_out.weight \[17\] instead of \[16\]",
    ),
    "integers": (
        lambda: (weights(0), weights(1), weights(2) | {NORM: torch.ones(16, dtype=torch.int8)}),
        "conv_norm_out.weight I8",
    ),
    "nan": (
        lambda: (weights(0), weights(1) | {NORM: torch.full((16,), torch.nan)}, weights(2)),
        "conv_norm_out.weight of the unet: expected finite numbers",
    ),
    "overflow": (
        lambda: (weights(0), weights(1) | {NORM: torch.full((16,), 1e6)}, HALF),
        "got NaN or infinity in float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_together_leaves_no_file(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    paths = trio(tmp_path, *make())
    with pytest.raises(CheckpointError, match=message):
        transfer(*paths, out(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in paths)


def test_models_of_different_families_are_told_apart_first(tmp_path: Path) -> None:
    other = weights(1) | {"add_embedding.linear_1.weight": torch.ones(64, 8)}
    paths = trio(tmp_path, weights(0), other, weights(2))
    with pytest.raises(CheckpointError, match=r"models of one family, got .*sdxl in .*tuned"):
        transfer(*paths, out(tmp_path))


def test_bad_requests_are_input_errors(tmp_path: Path) -> None:
    paths = trio(tmp_path, weights(0), weights(1), weights(2))

    def refused(message: str, *args: Any, **more: Any) -> None:
        with pytest.raises(HeadstartError, match=message) as caught:
            transfer(*args, **more)
        assert isinstance(caught.value, InputError | CheckpointError)

    refused("is one of the inputs", *paths, paths[1], overwrite=True)
    (tmp_path / "there.safetensors").write_bytes(b"kept")
    refused("give --overwrite", *paths, tmp_path / "there.safetensors")
    assert (tmp_path / "there.safetensors").read_bytes() == b"kept"
    refused(r"must end in \.safetensors", *paths, tmp_path / "out.ckpt")
    refused("is a file", *paths, tmp_path / "there.safetensors" / "out.safetensors")
    refused("expected some of unet, text, text_2", *paths, out(tmp_path), parts=("vae",))
    refused("each once", *paths, out(tmp_path), parts=("unet", "unet"))
    refused("expected a text, got unet", *paths, out(tmp_path), parts=("text",))
    refused("does not exist", tmp_path / "nothing", *paths[1:], out(tmp_path))
    assert not out(tmp_path).exists()


# ------------------------------------------------- as an adapter


def tuned_by(rank: int, base: Tensors) -> tuple[Tensors, set[str]]:
    """The base with a difference of that rank in every attention and convolution layer.

    Factors are small integers and `base` holds multiples of 1/256, so T and T - B are exact.
    """
    generator = torch.Generator().manual_seed(9)
    tuned = dict(base)
    for name, tensor in base.items():
        if tensor.ndim in (2, 4) and (".attn" in name or ".conv" in name):
            up = torch.randn(tensor.shape[0], rank, generator=generator).round()
            down = torch.randn(rank, tensor[0].numel(), generator=generator).round()
            tuned[name] = tensor + (up @ down).reshape(tensor.shape)
    changed = {name.removesuffix(".weight") for name in base if tuned[name] is not base[name]}
    return tuned, changed


def rounded(tensors: Tensors) -> Tensors:
    return {n: t.mul(256).round().div(256) for n, t in tensors.items()}


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_a_difference_of_that_rank_is_captured_whole_and_comes_back(
    naming: Any, tmp_path: Path
) -> None:
    base = rounded(weights(0))
    tuned, changed = tuned_by(3, base)
    paths = trio(tmp_path, base, tuned, weights(2))[:2]
    done = extract(*paths, out(tmp_path), rank=3, naming=naming)
    assert done.energy == pytest.approx(1.0, abs=1e-12)
    assert {layer.module for layer in done.layers} == changed and not done.left_out
    resolution = read_adapter(out(tmp_path)).resolve({"unet": layer_shapes(META)}).require()
    assert {module for _, module in resolution.deltas} == changed and resolution.rank == 3
    for (_, module), delta in resolution.deltas.items():
        assert isinstance(delta, LowRank)
        weight, expected = base[f"{module}.weight"], tuned[f"{module}.weight"]
        error = (merge(delta, weight, 1.0) - expected).abs().max()
        # the two factors rounded to float32, their product of rank 3, its sum with W
        assert error <= 3 * 8 * EPS * (expected - weight).abs().max() + EPS * expected.abs().max()


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (8, 6, 3, 3), (20, 2, 1, 1), (6, 6)])
def test_the_nearest_change_is_that_of_a_singular_value_decomposition(
    shape: tuple[int, ...],
) -> None:
    change = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
    for rank in (1, 3, 100):
        delta, energy = nearest(change, rank)
        count = min(rank, len(s))
        assert delta.rank == count and delta.shape == shape
        oracle = (u[:, :count] * s[:count]) @ v[:count]
        assert (delta.up @ delta.down.flatten(1) - oracle).abs().max() <= 1e-12
        assert energy == pytest.approx(
            float(s[:count].square().sum() / s.square().sum()), abs=1e-12
        )


def test_norms_and_biases_are_left_out_and_said_so(tmp_path: Path) -> None:
    base = weights(0)
    tuned = base | {NORM: base[NORM] + 1, "conv_in.weight": base["conv_in.weight"] + 1}
    done = extract(*trio(tmp_path, base, tuned, base)[:2], out(tmp_path), rank=1)
    assert done.left_out == (f"unet {NORM}",)
    assert [layer.module for layer in done.layers] == ["conv_in"]
    inside = base["conv_in.weight"].numel()
    assert done.left_share == pytest.approx(16 / (16 + inside), rel=1e-5)


def test_strength_is_in_the_factors_and_halves_stay_halves(tmp_path: Path) -> None:
    base = {n: t.half() for n, t in rounded(weights(0)).items()}
    tuned = base | {"conv_in.weight": base["conv_in.weight"] + 1}
    paths = trio(tmp_path, base, tuned, weights(2))
    extract(*paths[:2], out(tmp_path), rank=1, strength=-2.0, distilled=paths[2])
    resolution = read_adapter(out(tmp_path)).resolve({"unet": layer_shapes(META)})
    (delta,) = resolution.deltas.values()
    assert isinstance(delta, LowRank) and delta.down.dtype == torch.float16
    change = tuned["conv_in.weight"].double() - base["conv_in.weight"].double()
    assert (delta.weight() + 2 * change).abs().max() <= 2 * 2 * 2.0**-11 * 1.01


def test_models_that_do_not_differ_make_no_adapter(tmp_path: Path) -> None:
    paths = trio(tmp_path, weights(0), weights(0), weights(2))
    with pytest.raises(CheckpointError, match="got the same"):
        extract(*paths[:2], out(tmp_path), rank=4)
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        extract(*paths[:2], out(tmp_path), rank=0)
    with pytest.raises(CheckpointError, match="expected finite"):
        bad = save(tmp_path / "bad.safetensors", weights(1) | {NORM: torch.full((16,), torch.inf)})
        extract(paths[0], bad, out(tmp_path), rank=4)
    assert not out(tmp_path).exists()


# ------------------------------------------------- typed


def test_the_command_transfers_and_extracts(tmp_path: Path, capsys: Any) -> None:
    base = rounded(weights(0))
    tuned, _ = tuned_by(2, base)
    names = [str(path) for path in trio(tmp_path, base, tuned, weights(2))]
    models = ["transfer", "--base", names[0], "--tuned", names[1]]
    whole = [*models, "--distilled", names[2], "--out", str(out(tmp_path))]
    assert main([*whole, "--strength", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == {"unet": len(SHAPES)}
    assert main(whole) == 2
    assert "give --overwrite" in capsys.readouterr().err
    lora = [*models, "--rank", "2", "--out", str(tmp_path / "lora.safetensors")]
    assert main(lora) == 0
    assert "captured energy 100.00 %" in capsys.readouterr().out
    assert main([*models, "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "--distilled is missing" in capsys.readouterr().err
