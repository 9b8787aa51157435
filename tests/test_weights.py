"""The bundled files are the manifest's, whole, small, and say everything a loader must know."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

import headstart_weights
from headstart.checkpoint.contents import split
from headstart.checkpoint.header import read_header
from headstart.checkpoint.keymap import unet_from_ldm, vae_name, vae_to_ldm
from headstart.errors import InputError
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae
from headstart.plan.schedule import NoiseSchedule
from headstart_weights import WeightsError

MAX_TOTAL_BYTES = 32 * 2**20
FOLDER = Path(headstart_weights.__file__).parent
ROLES = (
    *("base", "distilled", "distilled_unguided", "tiny_decoder", "scorer"),
    *("reference", "yellow"),
)
PAIR_KEYS = {
    "headstart.family": "demo",
    "headstart.prediction": "v",
    "headstart.head_dim": "32",
    "headstart.norm_groups": "16",
    "headstart.vae_norm_groups": "8",
    "headstart.scale_factor": "1.0",
    "headstart.text_heads": "4",
    "headstart.text_act": "quick_gelu",
    "headstart.image_size": "64",
}

bundled = pytest.mark.skipif(
    not (FOLDER / headstart_weights.MANIFEST).is_file(),
    reason="the pair is not trained yet: run the recipe's stages up to `export`",
)


# ------------------------------------------------------------------ the files that are bundled


@bundled
def test_every_bundled_file_has_the_manifests_size_and_hash() -> None:
    headstart_weights.verify()
    assert tuple(entry.role for entry in headstart_weights.manifest().files) == ROLES


@bundled
def test_the_bundled_files_are_small_together() -> None:
    total = sum(headstart_weights.path(role).stat().st_size for role in ROLES)
    assert total == sum(entry.size_bytes for entry in headstart_weights.manifest().files)
    assert total <= MAX_TOTAL_BYTES


@bundled
def test_no_weight_file_lies_beside_the_manifest_unlisted() -> None:
    listed = {entry.file for entry in headstart_weights.manifest().files}
    assert {path.name for path in FOLDER.glob("*.safetensors")} == listed


@bundled
def test_licences_and_attributions_are_stated() -> None:
    manifest = headstart_weights.manifest()
    assert all(entry.licence == "Apache-2.0" and entry.made_by for entry in manifest.files)
    assert {entry.licence for entry in manifest.artwork} == {"MIT", "Apache-2.0"}
    assert "twemoji" not in {entry.name for entry in manifest.artwork}
    notice = (FOLDER.parents[1] / "NOTICE").read_text()
    for entry in manifest.artwork:
        assert f"@iconify-json/{entry.name} {entry.version}" in notice


@bundled
@pytest.mark.parametrize("role", ["base", "distilled"])
def test_the_pair_says_what_its_tensors_cannot(role: str) -> None:
    metadata = read_header(headstart_weights.path(role)).metadata
    assert PAIR_KEYS.items() <= metadata.items()


@bundled
def test_the_base_is_one_complete_ldm_file_in_float16() -> None:
    with safe_open(headstart_weights.path("base"), "pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata: dict[str, str] = file.metadata()
    parts = split(tensors)
    assert set(parts) == {"unet", "vae", "text"}
    assert len(unet_from_ldm(parts["unet"])) == len(parts["unet"])
    schedule = {"alphas_cumprod", "betas"}
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name in schedule else torch.float16)
        assert torch.isfinite(tensor).all()
    vocabulary = json.loads(metadata["headstart.tokenizer"])["model"]["vocab"]
    embedding = parts["text"]["text_model.embeddings.token_embedding.weight"]
    assert tensors[embedding].shape == (len(vocabulary), 128)


@bundled
def test_the_stored_schedule_is_a_matched_scaled_linear_one() -> None:
    with safe_open(headstart_weights.path("base"), "pt") as file:
        alphas = file.get_tensor("alphas_cumprod").double().numpy()
    plain = NoiseSchedule.scaled_linear().sigmas
    ratio = np.sqrt((1 - alphas) / alphas) / plain
    assert alphas.shape == (1000,)
    assert 0.1 < ratio.mean() < 1.0
    # 1 - a is about 1e-4 at the start, so rounding a to float32 (2^-25) costs up to 3e-4 there
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-3)


@bundled
def test_the_distilled_file_is_the_bases_unet_under_other_names() -> None:
    base = read_header(headstart_weights.path("base")).entries
    distilled = read_header(headstart_weights.path("distilled"))
    names = unet_from_ldm(split(base)["unet"])
    prefix = "model.diffusion_model."
    shapes = {ours: base[prefix + ldm].shape for ldm, ours in names.items()}
    assert {name: entry.shape for name, entry in distilled.entries.items()} == shapes
    assert distilled.metadata["headstart.update"] == "euler"
    timesteps = [int(t) for t in distilled.metadata["headstart.timesteps"].split(",")]
    assert len(timesteps) == 4 and timesteps == sorted(timesteps, reverse=True)


@bundled
def test_the_scorer_tells_the_pairs_concepts_apart() -> None:
    manifest = headstart_weights.manifest()
    assert manifest.scorer_top1["seen_pair"] >= 0.98
    assert manifest.scorer_top1["unseen_pair"] >= 0.85
    from headstart.metrics.scorer import load_scorer

    scorer = load_scorer(headstart_weights.path("scorer"))
    prompts = [f"a {concept}" for concept in manifest.concepts]
    similar = scorer.embed_prompts(prompts) @ scorer.embed_prompts(prompts).T
    assert (similar - torch.eye(len(prompts))).max() < 0.9  # no two nouns are one


@bundled
def test_the_linear_map_reads_four_channels() -> None:
    linear = headstart_weights.manifest().linear_rgb
    assert [len(row) for row in linear.factors] == [3, 3, 3, 3]
    assert len(linear.bias) == 3


@bundled
def test_the_readme_beside_the_files_has_their_sizes() -> None:
    text = (FOLDER / "README.md").read_text()
    for entry in headstart_weights.manifest().files:
        assert f"| `{entry.file}` | {entry.size_bytes:,} |" in text


# ------------------------------------------------------------------ reading, on a made-up folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data = b"weights"
    record = {
        "files": [
            {
                "role": "base",
                "file": "base.safetensors",
                "sha256": hashlib.sha256(data).hexdigest(),
                "size_bytes": len(data),
                "licence": "Apache-2.0",
                "made_by": "test",
            }
        ],
        "artwork": [{"name": "n", "version": "1", "licence": "MIT", "attribution": "somebody"}],
        "concepts": ["fox"],
        "styles": ["flat"],
        "backgrounds": ["blue"],
        "linear_rgb": {"factors": [[1.0, 0.0, 0.0]] * 4, "bias": [0.0, 0.0, 0.0]},
        "scorer_top1": {"seen_pair": 1.0},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    (tmp_path / "base.safetensors").write_bytes(data)
    monkeypatch.setattr(headstart_weights, "files", lambda _package: tmp_path)  # pyright: ignore[reportUnknownLambdaType,reportUnknownArgumentType]
    return tmp_path


def test_a_file_is_found_by_role_and_by_name(folder: Path) -> None:
    expected = folder / "base.safetensors"
    assert headstart_weights.path("base") == headstart_weights.path("base.safetensors") == expected
    headstart_weights.verify()


def test_an_unknown_name_lists_the_known_ones(folder: Path) -> None:
    with pytest.raises(WeightsError, match="'turbo': expected one of base"):
        headstart_weights.path("turbo")


def test_a_missing_file_is_an_error(folder: Path) -> None:
    (folder / "base.safetensors").unlink()
    with pytest.raises(WeightsError, match="is missing"):
        headstart_weights.path("base")


def test_a_truncated_file_is_an_error_without_reading_it(folder: Path) -> None:
    (folder / "base.safetensors").write_bytes(b"weight")
    with pytest.raises(WeightsError, match="has 6 bytes, expected 7"):
        headstart_weights.path("base")


def test_verify_finds_a_file_of_the_right_size_and_wrong_content(folder: Path) -> None:
    (folder / "base.safetensors").write_bytes(b"weightz")
    assert headstart_weights.path("base").is_file()
    with pytest.raises(WeightsError, match="sha256"):
        headstart_weights.verify()


def test_a_missing_manifest_is_an_error(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(WeightsError, match=r"manifest\.json is missing"):
        headstart_weights.manifest()


# ------------------------------------------------------------------ writing them


def _work_folder(work: Path) -> Mapping[str, Mapping[str, Tensor]]:
    """Everything that the export reads, untrained."""
    from safetensors.torch import save_file

    from headstart.metrics.scorer import Scorer, ScorerParams
    from headstart.networks.tiny import TinyDecoder
    from headstart_weights.recipe import codec, diffusion, language, tiny, tokenizer

    torch.manual_seed(0)
    fitted = tokenizer.build_tokenizer([("a", "t</w>")])
    (work / "tokenizer.json").write_text(fitted.to_str())
    unet = UNet(diffusion.PARAMS).state_dict()
    decoder = TinyDecoder(tiny.PARAMS).state_dict()
    text = language.Language(fitted).transformer.state_dict()
    scorer = Scorer(ScorerParams(vocabulary=fitted.get_vocab_size()), fitted)
    parts = {
        "base": unet,
        "student": {name: 2 * tensor for name, tensor in unet.items()},
        "control": {name: 3 * tensor for name, tensor in unet.items()},
        "codec": Vae(codec.PARAMS).state_dict(),
        "text": {f"text_model.{key.removeprefix('text_model.')}": t for key, t in text.items()},
        "tiny": {f"decoder.{name}": tensor for name, tensor in decoder.items()},
        "scorer": scorer.state_dict(),
        "reference": {"mean": torch.zeros(128), "covariance": torch.eye(128)},
        "yellow": {"lora_unet_x.alpha": torch.tensor(1.0)},
    }
    for name, tensors in parts.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, work / f"{name}.safetensors")
    linear = {"factors": [[0.1, 0.2, 0.3]] * 4, "bias": [0.0, 0.0, 0.1]}
    (work / "linear_rgb.json").write_text(json.dumps(linear))
    (work / "scorer.json").write_text(json.dumps({"seen_pair": 0.99}))
    return parts


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    work = tmp_path_factory.mktemp("work")
    _work_folder(work)
    return work


@pytest.fixture(scope="module")
def exported(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from headstart_weights.recipe.export import export

    out = tmp_path_factory.mktemp("exported")
    export(work, out)
    return out


def test_an_export_is_what_the_manifest_reader_expects(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headstart_weights, "files", lambda _package: exported)  # pyright: ignore[reportUnknownLambdaType,reportUnknownArgumentType]
    headstart_weights.verify()
    manifest = headstart_weights.manifest()
    assert tuple(entry.role for entry in manifest.files) == ROLES
    assert len(manifest.concepts) >= 24
    assert {path.name for path in exported.iterdir()} == {
        *(entry.file for entry in manifest.files),
        "manifest.json",
        "README.md",
    }


def test_exporting_twice_gives_the_same_bytes(work: Path, exported: Path, tmp_path: Path) -> None:
    from headstart_weights.recipe.export import export

    export(work, tmp_path)
    for path in exported.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_exported_metadata_is_complete(exported: Path) -> None:
    for role in ("base", "distilled", "distilled_unguided"):
        metadata = read_header(exported / f"{role}.safetensors").metadata
        assert PAIR_KEYS.items() <= metadata.items()
    assert "headstart.tokenizer" in read_header(exported / "base.safetensors").metadata


def test_exported_weights_are_the_trained_ones_rounded_to_float16(
    work: Path, exported: Path
) -> None:
    trained = load((work / "base.safetensors").read_bytes())
    written = load((exported / "base.safetensors").read_bytes())
    prefix = "model.diffusion_model."
    names = unet_from_ldm(split(written)["unet"])
    assert {ours for ours in names.values()} == set(trained)
    for ldm, ours in names.items():
        assert torch.equal(written[prefix + ldm], trained[ours].half())


def test_every_vae_tensor_has_an_ldm_name_that_reads_back() -> None:
    from headstart_weights.recipe import codec

    names = Vae(codec.PARAMS).state_dict()
    levels = len(codec.PARAMS.channels)
    ldm = vae_to_ldm(names)
    assert ldm.keys() == names.keys()
    assert {vae_name(other, levels): name for name, other in ldm.items()} == {n: n for n in names}
    assert ldm["decoder.up_blocks.0.resnets.1.conv1.weight"] == "decoder.up.2.block.1.conv1.weight"
    assert ldm["encoder.mid_block.attentions.0.to_out.0.bias"] == "encoder.mid.attn_1.proj_out.bias"


def test_serialised_bytes_do_not_depend_on_the_order_given() -> None:
    from headstart_weights.recipe.export import serialise

    tensors = {"b": torch.ones(3, dtype=torch.float16), "a": torch.arange(2.0)}
    metadata = {"y": "2", "x": "1"}
    first = serialise(tensors, metadata)
    second = serialise(dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert first == second
    read = load(first)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_weight_beyond_float16_is_refused() -> None:
    from headstart_weights.recipe.export import half

    with pytest.raises(InputError, match="does not fit float16"):
        half({"w": torch.tensor([7e4])})


def test_an_export_without_its_parts_names_the_missing_file(work: Path, tmp_path: Path) -> None:
    from headstart_weights.recipe.export import export

    shutil.copytree(work, tmp_path / "work")
    (tmp_path / "work" / "student.safetensors").unlink()
    with pytest.raises(InputError, match=r"student\.safetensors: run the stages"):
        export(tmp_path / "work", tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"[" * 200_000, b"\xff", b'{"files": [{}]}'])
def test_a_damaged_manifest_is_named_with_the_remedy(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(WeightsError, match=r"manifest.json is damaged .*: install headstart again"):
        headstart_weights._manifest(tmp_path)
