"""Numbers of the authors' own programs for the files of `published.py`, written to spaces.json.

Each in float32, as they run, and in float64: that is what ours is compared with.

    PYTHONPATH=src:tests python tests/parity/record_spaces.py inception lpips dreamsim imagereward

Run where those programs are: pytorch-fid 0.3.0, torch-fidelity 0.4.0, lpips 0.1.4 and torchvision;
dreamsim 0.2.1 with DINO_REPO and DINOV2_REPO (checkouts of facebookresearch/dino and dinov2), which
it gets from torch.hub; image-reward 1.5 with timm 0.6.13, fairscale 0.4.13 and transformers 4.30.2.
None of them is in the test extra: torchvision's wheel does not load beside a torch without CUDA,
and image-reward does not import with a transformers of today.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import published
import torch
from PIL import Image

FILE = Path(__file__).with_name("spaces.json")
RGB = published.pictures(4, 96, 80)
FOLDERS = {"a": 1, "b": 2}
KEY = "frechet_inception_distance"
PROMPTS = ("a fox", "A foxy owl, in the snow", "the unknown " * 30, "")
VARIANTS = ("ensemble", "dino_vitb16_single", "dinov2_vitb14_single", "clip_vitb32_single",
            "open_clip_vitb32_single", "synclr_vitb16_single", "dino_vitb16_patch",
            "dinov2_vitb14_patch")  # fmt: skip


def inception(home: Path) -> dict[str, object]:
    """Every 64th feature of two pictures, and the FID of two folders of three."""
    import pytorch_fid.fid_score as fid
    import pytorch_fid.inception as theirs
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    tensors = published.inception_tensors()
    theirs.load_state_dict_from_url = lambda *_, **__: tensors
    network = theirs.InceptionV3([3]).eval()
    for name, seed in FOLDERS.items():
        (home / name).mkdir()
        for n, rgb in enumerate(published.pictures(3, 96, 80, seed)):
            Image.fromarray(rgb).save(home / name / f"{n}.png")
    folders = [str(home / name) for name in FOLDERS]
    value = fid.calculate_fid_given_paths(folders, 3, "cpu", 2048, 0)
    torch.save(tensors, home / "weights.pth")
    pixels = torch.tensor(RGB[:2]).permute(0, 3, 1, 2)
    record: dict[str, object] = {"fid": float(value)}
    for bits in (32, 64):
        dtype = getattr(torch, f"float{bits}")
        with torch.no_grad():
            rows = network.to(dtype)(pixels.to(dtype) / 255.0)[0]
        record[f"pytorch-fid {bits}"] = rows[:, ::64, 0, 0].tolist()
    other = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(home / "weights.pth")
    )
    record["torch-fidelity"] = other(pixels)[0][:, ::64].tolist()
    sets = [torch.tensor(published.pictures(3, 96, 80, seed)) for seed in FOLDERS.values()]
    stats = [
        fid_features_to_statistics(other(pictures.permute(0, 3, 1, 2))[0]) for pictures in sets
    ]
    record["torch-fidelity fid"] = fid_statistics_to_metric(*stats, False)[KEY]
    return record


def lpips(home: Path) -> dict[str, object]:
    """Distances of all pairs of four pictures, alex and vgg."""
    import lpips as package

    record: dict[str, object] = {}
    for net in ("alex", "vgg"):
        module = package.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
        tensors = {**published.backbone_tensors(net), **published.lin_tensors(net)}
        state = module.state_dict()
        for name in state:
            if name.startswith("net.slice"):
                state[name] = tensors[f"features.{name.split('.', 2)[2]}"]
            elif name.startswith("lin"):
                state[name] = tensors[name.replace("lins.", "lin")]
        module.load_state_dict(state)
        for bits in (32, 64):
            dtype = getattr(torch, f"float{bits}")
            pixels = torch.tensor(RGB).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0
            copy = module.to(dtype)
            with torch.no_grad():
                rows = [[float(copy(a[None], b[None])) for b in pixels] for a in pixels]
            record[f"{net} {bits}"] = rows
    return record


def dreamsim(home: Path) -> dict[str, object]:
    """Distances of all pairs, by variant; the environment's WIDTH=768 is the published size."""
    import dreamsim as package
    import dreamsim.feature_extraction.extractor as extractor
    from dreamsim.feature_extraction import (
        load_clip_as_dino,
        load_open_clip_as_dino,
        load_synclr_as_dino,
        vision_transformer,
    )

    width = int(os.environ.get("WIDTH", published.WIDTH))
    sizes = {"embed_dim": width, "depth": 12, "num_heads": width // 64}

    def small(patch_size: int = 16, **_: object) -> Any:
        return vision_transformer.VisionTransformer(
            patch_size=patch_size, qkv_bias=True, norm_layer=_norm, **sizes
        )

    for module in (load_clip_as_dino, load_open_clip_as_dino, load_synclr_as_dino):
        module.vit_base = small
    record: dict[str, object] = {}
    for variant in VARIANTS:
        cache = home / variant
        published.write_dreamsim(cache, variant, width=width)
        torch.hub.load = _hub(cache, sizes)
        kind = variant.removesuffix("_single").removesuffix("_patch")
        head = {f"module.head.{n}": t for n, t in _head(extractor).items()}
        torch.save({"student": head}, cache / "dino_vitb16_pretrain.pth")
        if kind == "dinov2_vitb14":
            (cache / "dinov2_vitb14_pretrain.pth").touch()
        model, preprocess = package.dreamsim(
            True, "cpu", str(cache), dreamsim_type=kind, use_patch_model="patch" in variant
        )
        for bits in (32, 64):
            dtype = getattr(torch, f"float{bits}")
            model = model.to(dtype)
            for own in model.base_model.model.extractor_list:
                if isinstance(getattr(own, "proj", None), torch.Tensor):
                    own.proj = own.proj.to(dtype)
            pixels = [preprocess(Image.fromarray(rgb)).to(dtype) for rgb in RGB]
            with torch.no_grad():
                rows = [[float(model(a, b)) for b in pixels] for a in pixels]
            record[f"{variant} {bits}"] = rows
    return record


def _norm(width: int) -> torch.nn.LayerNorm:
    return torch.nn.LayerNorm(width, eps=1e-6)


def _head(extractor: ModuleType) -> dict[str, torch.Tensor]:
    return extractor.DINOHead(768, 2048).state_dict() | {"last_layer.weight": torch.ones(2048, 256)}


def _hub(cache: Path, sizes: dict[str, int]) -> Callable[..., Any]:
    """What torch.hub gives: the authors' networks, with the checkpoints of this cache."""

    def load(repo: str, name: str) -> Any:
        second = "dinov2" in repo
        sys.path.insert(0, os.environ["DINOV2_REPO" if second else "DINO_REPO"])
        if second:
            from dinov2.models.vision_transformer import DinoVisionTransformer

            network: Any = DinoVisionTransformer(
                img_size=518, patch_size=14, init_values=1.0, block_chunks=0,
                interpolate_offset=0.1, **sizes,
            )  # fmt: skip
        else:
            import vision_transformer

            network = vision_transformer.VisionTransformer(
                patch_size=16, qkv_bias=True, num_classes=0,
                norm_layer=_norm, **sizes,
            )  # fmt: skip
        file = "dinov2_vitb14_pretrain.pth" if second else "dino_vitbase16_pretrain.pth"
        network.load_state_dict(torch.load(cache / "checkpoints" / file))
        return network

    return load


def imagereward(home: Path) -> dict[str, object]:
    """Rewards of four pictures for a prompt each."""
    import importlib.util

    root = Path(next(iter(importlib.util.find_spec("ImageReward").submodule_search_locations)))  # type: ignore[union-attr]
    for name in ("ImageReward", "ImageReward.models"):  # without what training and CLIP need
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    from ImageReward.models.BLIP import blip_pretrain, vit
    from transformers import BertTokenizer

    file = published.write_reward(home)
    width, vision = published.WIDTH, published.VISUAL

    def tokenizer() -> Any:
        images = BertTokenizer(str(home / "vocab.txt"))
        images.add_special_tokens({"bos_token": "[DEC]"})
        images.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        return images

    blip_pretrain.init_tokenizer = tokenizer
    blip_pretrain.create_vit = lambda *_: (
        vit.VisionTransformer(img_size=224, embed_dim=vision, depth=2, num_heads=vision // 64),
        vision,
    )
    from ImageReward.ImageReward import MLP, ImageReward

    config = {"hidden_act": "gelu", "hidden_size": width, "intermediate_size": 4 * width,
              "layer_norm_eps": 1e-12, "max_position_embeddings": 40, "model_type": "bert",
              "num_attention_heads": width // 64, "num_hidden_layers": 2, "pad_token_id": 0,
              "add_type_embeddings": False, "vocab_size": len(published.WORDS) + 2,
              "encoder_width": width, "add_cross_attention": True}  # fmt: skip
    (home / "med_config.json").write_text(json.dumps(config))
    model = ImageReward(str(home / "med_config.json"))
    model.mlp = MLP(width)
    result = model.load_state_dict(torch.load(file), strict=False)
    left = [
        name for name in result.missing_keys if not name.startswith(("blip.text_proj", "blip.vis"))
    ]
    assert not left, left
    model.eval()
    images = [Image.fromarray(rgb) for rgb in RGB]
    scores = {
        "32": [model.score(prompt, image) for prompt, image in zip(PROMPTS, images, strict=True)]
    }
    model = model.double()
    read = model.blip.tokenizer
    scores["64"] = []
    for prompt, image in zip(PROMPTS, images, strict=True):
        tokens = read(
            prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        pixels = model.preprocess(image)[None].double()
        with torch.no_grad():
            reward = model.score_gard(tokens.input_ids, tokens.attention_mask, pixels)
        scores["64"].append(reward.item())
    return scores


def main(parts: list[str]) -> None:
    makers = {"inception": inception, "lpips": lpips, "dreamsim": dreamsim,
              "imagereward": imagereward}  # fmt: skip
    record = json.loads(FILE.read_text()) if FILE.exists() else {}
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            record[part] = makers[part](Path(folder))
    FILE.write_text(json.dumps(record, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
