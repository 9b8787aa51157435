"""Loading: any layout gives the same network, and every tensor is accounted for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.checkpoint import keymap
from headstart.checkpoint.checkpoint import inspect_checkpoint, read_family
from headstart.checkpoint.families import FAMILIES
from headstart.errors import CheckpointError, HeadstartError, InputError
from headstart.interfaces import Conditioning
from headstart.networks.load import load_tiny, load_unet, load_vae
from headstart.networks.unet import Mid, Stage, UNet, UNetParams
from headstart.networks.vae import Vae, VaeParams
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule

Tensors = dict[str, Tensor]

PARAMS = UNetParams(
    down=(Stage(16, (0,), True), Stage(32, (1,), False)),
    mid=Mid(2, 1),
    up=(Stage(32, (1, 1), True), Stage(16, (0, 0), False)),
    context_dim=24,
    head_dim=8,
    norm_groups=8,
)
METADATA = {"headstart.head_dim": "8", "headstart.norm_groups": "8"}
CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": [2, 4],
    "block_out_channels": [16, 32],
    "norm_num_groups": 8,
    "sample_size": 8,
}
VAE = VaeParams(channels=(8, 16), layers=1, norm_groups=4, scale_factor=0.5)
UNET_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(PARAMS).requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> Vae:
    torch.manual_seed(1)
    return Vae(VAE).requires_grad_(False)


def weights(module: torch.nn.Module) -> Tensors:
    return dict(module.state_dict())


def ldm_vae(tensors: Tensors) -> Tensors:
    """A VAE's tensors in LDM form, built here by hand: two levels, single-head attention."""
    names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    found: Tensors = {}
    for name, tensor in tensors.items():
        half, _, rest = name.partition(".")
        if rest.startswith("mid_block.attentions.0."):
            inner, leaf = rest.removeprefix("mid_block.attentions.0.").rsplit(".", 1)
            rest = f"mid.attn_1.{names[inner]}.{leaf}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        elif rest.startswith("mid_block.resnets."):
            rest = f"mid.block_{int(rest.split('.')[2]) + 1}." + rest.split(".", 3)[3]
        elif rest.startswith("down_blocks."):
            _, level, kind, i, leaf = rest.split(".", 4)
            rest = f"down.{level}." + (f"block.{i}" if kind == "resnets" else "downsample")
            rest += f".{leaf}"
        elif rest.startswith("up_blocks."):
            _, level, kind, i, leaf = rest.split(".", 4)
            rest = f"up.{1 - int(level)}." + (f"block.{i}" if kind == "resnets" else "upsample")
            rest += f".{leaf}"
        rest = rest.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        found[f"{half}.{rest}"] = tensor.contiguous()
    return found


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def single_file(unet: UNet, vae: Vae, path: Path, **metadata: str) -> Path:
    names = keymap.unet_to_ldm(unet.state_dict())
    tensors = {f"model.diffusion_model.{names[k]}": v for k, v in weights(unet).items()}
    tensors |= prefixed(ldm_vae(weights(vae)), "first_stage_model.")
    schedule = torch.from_numpy(NoiseSchedule.scaled_linear().alphas_cumprod.copy()).float()
    tensors |= {"alphas_cumprod": schedule, "model_ema.decay": torch.tensor(0.9)}
    save_file(tensors, path, METADATA | metadata)
    return path


def same(loaded: torch.nn.Module, expected: torch.nn.Module) -> bool:
    mine, theirs = weights(loaded), weights(expected)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# --------------------------------------------------------------------- every layout


def test_a_bare_file_loads_in_either_naming(tmp_path: Path, unet: UNet) -> None:
    names = keymap.unet_to_ldm(unet.state_dict())
    ldm = {names[name]: tensor for name, tensor in weights(unet).items()}
    for stem, tensors in (("diffusers", weights(unet)), ("ldm", ldm)):
        save_file(tensors, tmp_path / f"{stem}.safetensors", METADATA)
        loaded = load_unet(tmp_path / f"{stem}.safetensors")
        assert loaded.params == PARAMS and same(loaded, unet)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_single_file_gives_unet_and_vae(tmp_path: Path, unet: UNet, vae: Vae) -> None:
    more = {"headstart.vae_norm_groups": "4", "headstart.scale_factor": "0.5"}
    path = single_file(unet, vae, tmp_path / "model.safetensors", **more)
    assert same(load_unet(path), unet)
    decoder = load_vae(path)
    assert decoder.params == VAE and same(decoder, vae)


def diffusers_folder(root: Path, unet: UNet, vae: Vae) -> Path:
    for part, module in (("unet", unet), ("vae", vae)):
        (root / part).mkdir(parents=True)
        save_file(weights(module), root / part / UNET_FILE)
    (root / "unet" / "config.json").write_text(json.dumps(CONFIG))
    described = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "norm_num_groups": 4}
    (root / "vae" / "config.json").write_text(json.dumps(described))
    (root / "scheduler").mkdir()
    scheduler = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
    }
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return root


def test_a_diffusers_folder_loads_whole_or_by_component(
    tmp_path: Path, unet: UNet, vae: Vae
) -> None:
    root = diffusers_folder(tmp_path / "model", unet, vae)
    for path in (root, root / "unet", root / "unet" / UNET_FILE):
        assert same(load_unet(path), unet)
        assert read_family(path).prediction is Prediction.V
    for path in (root, root / "vae", root / "vae" / UNET_FILE):
        assert same(load_vae(path), vae)
        assert load_vae(path).scale_factor == 0.5
    family = read_family(root)
    assert (family.scale_factor, family.head_dim, family.norm_groups) == (0.5, 8, 8)
    assert family.schedule == NoiseSchedule.scaled_linear()
    info = inspect_checkpoint(root)
    assert (info.layout, info.parts, info.prediction) == ("diffusers", ("unet", "vae"), "v")
    assert info.prediction_declared and info.problems == ()


def test_the_half_variant_of_a_folder_is_found(tmp_path: Path, unet: UNet, vae: Vae) -> None:
    root = diffusers_folder(tmp_path / "model", unet, vae)
    halves = {name: tensor.half() for name, tensor in weights(unet).items()}
    save_file(halves, root / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert same(load_unet(root), unet)
    loaded = load_unet(root, dtype=torch.float16)
    assert all(torch.equal(tensor, halves[name]) for name, tensor in weights(loaded).items())


def test_a_sharded_folder_loads(tmp_path: Path, unet: UNet) -> None:
    names = sorted(unet.state_dict())
    shards = {"s1.safetensors": names[::2], "s2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: unet.state_dict()[name] for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / f"{UNET_FILE}.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert same(load_unet(tmp_path), unet)
    assert same(load_unet(tmp_path / f"{UNET_FILE}.index.json"), unet)


def test_a_vae_loads_in_four_namings(tmp_path: Path, vae: Vae) -> None:
    tensors = weights(vae)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(tensors)
    for name in tensors:
        for new, former in old.items():
            if f"attentions.0.{new}." in name:
                renamed[name.replace(new, former)] = renamed.pop(name)
    ldm = ldm_vae(tensors)
    forms = {
        "new": tensors,
        "old": renamed,
        "ldm": ldm,
        "prefixed": prefixed(ldm, "first_stage_model."),
    }
    for stem, form in forms.items():
        save_file(form, tmp_path / f"{stem}.safetensors")
        loaded = load_vae(tmp_path / f"{stem}.safetensors", scale_factor=0.5, norm_groups=4)
        assert loaded.params == VAE and same(loaded, vae), stem


def test_the_feasibility_pair_loads_from_its_folders(shared: Path) -> None:
    for role in ("base", "student"):
        folder = shared / "data" / "demo-prototype" / role
        loaded = load_unet(folder)
        assert (loaded.params.heads, loaded.params.head_dim) == (None, 32)
        assert [stage.channels for stage in loaded.params.down] == [32, 64, 128]
        stored = load_file(folder / "unet.fp16.safetensors")
        assert all(torch.equal(t, stored[n].float()) for n, t in weights(loaded).items())
        family = read_family(folder)
        assert (family.name, family.prediction, family.image_size) == ("demo", Prediction.V, 64)
    path = shared / "data" / "demo-prototype" / "vae.fp16.safetensors"
    decoder = load_vae(path, scale_factor=0.50975, norm_groups=8)
    assert decoder.params.downscale == 4
    cond = Conditioning(torch.zeros(1, 16, 128))
    with torch.no_grad():
        latents = loaded(torch.randn(1, 4, 16, 16), torch.tensor([999]), cond)
        assert decoder.decode(latents).shape == (1, 3, 64, 64)


# --------------------------------------------------------------------- what the tensors cannot say


def test_head_width_comes_from_argument_metadata_or_config_in_that_order(
    tmp_path: Path, unet: UNet
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(weights(unet), path)
    with pytest.raises(CheckpointError, match=r"head_dim="):
        load_unet(path)
    assert "give --head-dim" in inspect_checkpoint(path).notes[0]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"attention_head_dim": [1, 2]}))
    assert load_unet(path, head_dim=4).params.head_dim == 4
    with pytest.raises(CheckpointError, match="head_dim 7 does not divide the width 32"):
        save_file(weights(unet), path, {"headstart.head_dim": "7"})
        load_unet(path)
    save_file(weights(unet), path, {"headstart.head_dim": "8"})
    assert load_unet(path).params.head_dim == 8
    save_file(weights(unet), path)
    assert load_unet(path).params.head_dim == 16
    with pytest.raises(InputError, match="must be positive"):
        load_unet(path, head_dim=0)


def test_a_config_of_another_class_beside_the_file_is_not_read(tmp_path: Path, unet: UNet) -> None:
    save_file(weights(unet), tmp_path / "x.safetensors", METADATA)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Other", "act_fn": "tanh"}))
    assert same(load_unet(tmp_path / "x.safetensors"), unet)


def test_a_bare_vae_must_be_told_its_scale(tmp_path: Path, vae: Vae) -> None:
    path = tmp_path / "x.safetensors"
    save_file(weights(vae), path, {"headstart.vae_norm_groups": "4"})
    with pytest.raises(CheckpointError, match=r"0\.18215 \(SD 1 and 2\) or 0\.13025 \(SDXL\)"):
        load_vae(path)
    assert load_vae(path, scale_factor=0.13025).scale_factor == 0.13025
    more = {"headstart.vae_norm_groups": "4", "headstart.scale_factor": "0.25"}
    save_file(weights(vae), path, more)
    assert load_vae(path).scale_factor == 0.25


def test_the_vae_in_a_single_file_has_its_familys_scale(
    tmp_path: Path, unet: UNet, vae: Vae
) -> None:
    more = {"headstart.vae_norm_groups": "4", "headstart.family": "sdxl"}
    path = single_file(unet, vae, tmp_path / "x.safetensors", **more)
    assert load_vae(path).scale_factor == FAMILIES["sdxl"].scale_factor
    assert read_family(path).schedule == NoiseSchedule.scaled_linear()
    assert "schedule" in read_family(path).declared


# --------------------------------------------------------------------- dtype and device


def test_the_cpu_gets_float32_unless_it_is_told_otherwise(tmp_path: Path, unet: UNet) -> None:
    halves = {name: tensor.half() for name, tensor in weights(unet).items()}
    save_file(halves, tmp_path / "x.safetensors", METADATA)
    loaded = load_unet(tmp_path / "x.safetensors")
    assert all(torch.equal(t, halves[n].float()) for n, t in weights(loaded).items())
    kept = load_unet(tmp_path / "x.safetensors", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in weights(kept).values()} == {torch.bfloat16}


def test_another_device_keeps_the_files_dtype(tmp_path: Path, unet: UNet, vae: Vae) -> None:
    """The meta device stands for a GPU: it is not the CPU, and any machine has it."""
    halves = {name: tensor.half() for name, tensor in weights(unet).items()}
    save_file(halves, tmp_path / "x.safetensors", METADATA)
    loaded = load_unet(tmp_path / "x.safetensors", device="meta")
    assert {tensor.dtype for tensor in weights(loaded).values()} == {torch.float16}
    halves = {name: tensor.half() for name, tensor in weights(vae).items()}
    for family, dtype in (("sd15", torch.float16), ("sdxl", torch.float32)):
        metadata = {"headstart.family": family, "headstart.vae_norm_groups": "4"}
        save_file(halves, tmp_path / "v.safetensors", metadata)
        decoder = load_vae(tmp_path / "v.safetensors", device="meta")
        assert decoder.quant_conv.weight.dtype == dtype


def test_a_device_that_is_not_there_is_an_input_error(tmp_path: Path, unet: UNet) -> None:
    save_file(weights(unet), tmp_path / "x.safetensors", METADATA)
    with pytest.raises(InputError, match="unknown device"):
        load_unet(tmp_path / "x.safetensors", device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="CUDA"):
            load_unet(tmp_path / "x.safetensors", device="cuda")


# --------------------------------------------------------------------- every tensor accounted for


def test_all_that_does_not_fit_is_told_in_one_error(tmp_path: Path, unet: UNet) -> None:
    tensors = weights(unet)
    del tensors["mid_block.resnets.1.conv2.bias"]
    del tensors["conv_norm_out.weight"]
    tensors["conv_norm_out.gain"] = torch.zeros(16)
    tensors["time_embedding.linear_2.weight"] = torch.zeros(64, 63)
    tensors["conv_out.bias"] = torch.zeros(4, dtype=torch.int32)
    save_file(tensors, tmp_path / "x.safetensors", METADATA)
    with pytest.raises(CheckpointError) as caught:
        load_unet(tmp_path / "x.safetensors")
    message = str(caught.value)
    assert "2 missing: conv_norm_out.weight, mid_block.resnets.1.conv2.bias" in message
    assert "1 unexpected: conv_norm_out.gain" in message
    assert "time_embedding.linear_2.weight [64, 63] instead of [64, 64]" in message
    assert "1 not floating point: conv_out.bias I32" in message


def test_any_single_missing_tensor_is_named(tmp_path: Path, unet: UNet) -> None:
    path = tmp_path / "x.safetensors"
    for name in list(unet.state_dict())[::9]:  # `conv_in.weight` first
        save_file({k: v for k, v in weights(unet).items() if k != name}, path, METADATA)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            load_unet(path)


def test_a_stranger_beside_the_networks_of_a_single_file_is_unexpected(
    tmp_path: Path, unet: UNet, vae: Vae
) -> None:
    path = single_file(unet, vae, tmp_path / "x.safetensors")
    save_file(load_file(path) | {"stranger": torch.zeros(1)}, path, METADATA)
    with pytest.raises(CheckpointError, match="1 unexpected: stranger"):
        load_unet(path)


def test_a_tensor_under_both_of_its_names_is_unexpected(tmp_path: Path, unet: UNet) -> None:
    tensors = weights(unet) | {"input_blocks.0.0.bias": torch.zeros(16)}
    save_file(tensors, tmp_path / "x.safetensors", METADATA)
    with pytest.raises(CheckpointError, match=r"1 unexpected: (input_blocks\.0\.0|conv_in)\.bias"):
        load_unet(tmp_path / "x.safetensors")


def test_the_wrong_kind_of_file_says_what_it_holds(tmp_path: Path, unet: UNet, vae: Vae) -> None:
    save_file(weights(unet), tmp_path / "u.safetensors", METADATA)
    save_file(weights(vae), tmp_path / "v.safetensors")
    save_file({"x.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match="expected a VAE, found UNet"):
        load_vae(tmp_path / "u.safetensors")
    with pytest.raises(CheckpointError, match="expected a UNet, found VAE"):
        load_unet(tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match=r"found an adapter \(LoRA\), not a network"):
        load_unet(tmp_path / "l.safetensors")
    with pytest.raises(CheckpointError, match="expected a tiny autoencoder, found UNet"):
        load_tiny(tmp_path / "u.safetensors")


def test_impossible_shapes_are_an_error_and_allocate_nothing(tmp_path: Path, unet: UNet) -> None:
    path = tmp_path / "x.safetensors"
    save_file(weights(unet), path, METADATA | {"headstart.norm_groups": "5"})
    with pytest.raises(CheckpointError, match="no unet has such shapes"):
        load_unet(path)
    wide = {name: torch.zeros(0, 2**19) for name in unet.state_dict()}
    save_file(wide, path, METADATA)
    with pytest.raises(CheckpointError):
        load_unet(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_one_changed_header_byte_loads_identically_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, unet: UNet, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    good, bad = folder / "good.safetensors", folder / "bad.safetensors"
    if not good.exists():
        save_file(weights(unet), good)
    raw = bytearray(good.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    bad.write_bytes(raw)
    try:
        loaded = load_unet(bad, head_dim=8)
    except HeadstartError:
        return
    assert same(loaded, load_unet(good, head_dim=8))
