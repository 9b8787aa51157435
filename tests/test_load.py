"""Loading: any layout gives the same network; what no tensor says comes from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import ldm_vae, prefixed
from networks import (
    CONFIG,
    METADATA,
    PARAMS,
    UNET_FILE,
    VAE,
    random_unet,
    random_vae,
    same,
    single_file,
    weights,
)
from safetensors.torch import load_file, save_file

from headstart.checkpoint import keymap
from headstart.checkpoint.checkpoint import inspect_checkpoint, read_family
from headstart.checkpoint.families import FAMILIES
from headstart.errors import CheckpointError, InputError
from headstart.interfaces import Conditioning
from headstart.networks.load import load_unet, load_vae
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule


@pytest.fixture(scope="module")
def unet() -> UNet:
    return random_unet()


@pytest.fixture(scope="module")
def vae() -> Vae:
    return random_vae()


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
    for file, tensors in shards.items():
        save_file({name: unet.state_dict()[name] for name in tensors}, tmp_path / file)
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
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


PLAYGROUND = {
    "edm_mean": torch.tensor([-1.6574, 1.886, -1.383, 2.5155]).reshape(1, 4, 1, 1),
    "edm_std": torch.tensor([8.4927, 5.9022, 6.5498, 5.2299]).reshape(1, 4, 1, 1),
}
COSXL = {"edm_vpred.sigma_max": torch.tensor(100.0), "edm_vpred.sigma_min": torch.tensor(0.004)}


def with_statements(tmp_path: Path, unet: UNet, vae: Vae, more: dict[str, torch.Tensor]) -> Path:
    path = single_file(unet, vae, tmp_path / "x.safetensors")
    tensors, path = load_file(path) | more, tmp_path / "y.safetensors"
    save_file(tensors, path, METADATA | {"headstart.vae_norm_groups": "4"})
    return path


def test_a_file_that_states_edm_is_run_as_it(tmp_path: Path, unet: UNet, vae: Vae) -> None:
    """Playground 2.5's tensors: EDM's prediction and levels, its latents by mean and deviation."""
    family = read_family(path := with_statements(tmp_path, unet, vae, PLAYGROUND))
    assert family.prediction is Prediction.EDM
    assert family.schedule == NoiseSchedule.edm(0.002, 80.0, 0.5)
    assert {"prediction", "schedule", "scale_factor"} <= family.declared
    decoder = load_vae(path)
    mean, std = (PLAYGROUND[f"edm_{name}"].flatten().tolist() for name in ("mean", "std"))
    assert decoder.params.latents_mean == tuple(mean) and decoder.params.latents_std == tuple(std)
    assert decoder.scale_factor == 0.5
    latents = torch.randn(2, 4, 4, 4)
    plain = load_vae(single_file(unet, vae, tmp_path / "z.safetensors", **{
        "headstart.vae_norm_groups": "4", "headstart.scale_factor": "1.0",
    }))  # fmt: skip
    z = latents * PLAYGROUND["edm_std"] / 0.5 + PLAYGROUND["edm_mean"]
    assert torch.allclose(decoder.decode(latents), plain.decode(z), atol=1e-5)
    pixels = torch.rand(2, 3, 8, 8)
    back = (plain.encode(pixels) - PLAYGROUND["edm_mean"]) * 0.5 / PLAYGROUND["edm_std"]
    assert torch.allclose(decoder.encode(pixels), back, atol=1e-5)


def test_a_file_that_states_edms_v_is_run_as_it(tmp_path: Path, unet: UNet, vae: Vae) -> None:
    """CosXL's tensors: what they say of the levels is used, and not the family's table."""
    family = read_family(path := with_statements(tmp_path, unet, vae, COSXL))
    assert family.prediction is Prediction.EDM_V
    low, high = (float(COSXL[f"edm_vpred.sigma_{end}"]) for end in ("min", "max"))
    assert family.schedule == NoiseSchedule.edm(low, high, 1.0)
    info = inspect_checkpoint(path)
    assert info.prediction == "edm_v" and info.prediction_declared


def test_a_stated_scale_of_the_latents_is_used(tmp_path: Path, unet: UNet, vae: Vae) -> None:
    """ldm's `scale_by_std` keeps the number as a tensor."""
    path = with_statements(tmp_path, unet, vae, {"scale_factor": torch.tensor(0.25)})
    assert load_vae(path).scale_factor == 0.25


def test_the_decoder_of_a_vae_alone_decodes_and_says_that_it_cannot_encode(
    tmp_path: Path, vae: Vae
) -> None:
    half = {n: t for n, t in weights(vae).items() if n.startswith(("decoder", "post_quant"))}
    save_file(half, tmp_path / "x.safetensors", {"headstart.vae_norm_groups": "4"})
    decoder = load_vae(tmp_path / "x.safetensors", scale_factor=0.5)
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(decoder.decode(latents), vae.decode(latents))
    with pytest.raises(InputError, match="a decoder alone"):
        decoder.encode(torch.zeros(1, 3, 8, 8))


# --------------------------------------------------------------------- dtype and device


def test_the_cpu_gets_float32_unless_it_is_told_otherwise(tmp_path: Path, unet: UNet) -> None:
    halves = {name: tensor.half() for name, tensor in weights(unet).items()}
    save_file(halves, tmp_path / "x.safetensors", METADATA)
    loaded = load_unet(tmp_path / "x.safetensors")
    assert all(torch.equal(t, halves[n].float()) for n, t in weights(loaded).items())
    network = load_unet(tmp_path / "x.safetensors", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in weights(network).values()} == {torch.bfloat16}


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
