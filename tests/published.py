"""Files as their authors publish them, with numbers from a seed in place of what was learned.

The same numbers came out of the authors' own programs with these files: `parity/spaces.json`, which
`parity/record_spaces.py` writes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headstart.spaces.inception import Inception
from headstart.spaces.lpips import LAYERS, PAD, Net
from headstart.spaces.vit import Vit, VitParams

Shapes = Mapping[str, tuple[int, ...]]
WIDTH, DEPTH, RANK, ALPHA = 128, 12, 4, 2.0
VISUAL = 192
"""ImageReward's pictures are wider than its words."""
LPIPS_WIDTHS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
VGG = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256,
       17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}  # fmt: skip
ALEX = {0: 64, 3: 192, 6: 384, 8: 256, 10: 256}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "fox", "in", "the", "snow", "##y", "owl", ",")


def seeded(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Uniform numbers, each tensor by its own name: of a scale that neither vanishes nor grows.

    Variances and the weights of norms lie around 1, `lin` weights are at least 0.
    """
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.random(shape, dtype=np.float32)
        if name.startswith("lin"):
            tensors[name] = torch.from_numpy(values)
            continue
        values = 2.0 * values - 1.0
        norm = len(shape) == 1 and name.endswith(("weight", "running_var", "gamma"))
        inputs = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        scale = np.float32(0.1 if len(shape) < 2 else (6.0 / inputs) ** 0.5)
        tensors[name] = torch.from_numpy(1.0 + 0.5 * values if norm else scale * values)
    return tensors


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def pictures(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, height, width, 3]: blocks of colour with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((count, 4, 4, 3), dtype=np.float32)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    noise = rng.random((count, height, width, 3), dtype=np.float32)
    return (255.0 * (0.7 * coarse[:, rows][:, :, columns] + 0.3 * noise)).astype(np.uint8)


def inception_tensors() -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = shapes_of(Inception())
    return seeded({**shapes, "fc.weight": (1008, 2048), "fc.bias": (1008,)})


def backbone_tensors(net: Net) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    widths = ALEX if net == "alex" else VGG
    for layer in LAYERS[net]:
        width = widths[layer.number]
        shapes[f"features.{layer.number}.weight"] = (width, channels, layer.kernel, layer.kernel)
        shapes[f"features.{layer.number}.bias"] = (width,)
        channels = width
        assert layer.kernel in PAD
    return seeded(shapes)


def lin_tensors(net: Net) -> dict[str, Tensor]:
    widths = enumerate(LPIPS_WIDTHS[net])
    return seeded({f"lin{n}.model.1.weight": (1, width, 1, 1) for n, width in widths})


def small_alex() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """AlexNet and LPIPS' linear layers with a few channels each: widths are the file's."""
    widths = dict(zip((0, 3, 6, 8, 10), (4, 6, 8, 6, 5), strict=True))
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for layer in LAYERS["alex"]:
        width = widths[layer.number]
        shapes[f"features.{layer.number}.weight"] = (width, channels, layer.kernel, layer.kernel)
        shapes[f"features.{layer.number}.bias"] = (width,)
        channels = width
    lin = {f"lin{n}.model.1.weight": (1, w, 1, 1) for n, w in enumerate(widths.values())}
    return seeded(shapes), seeded(lin)


def write_small_lpips(folder: Path) -> Path:
    folder.mkdir()
    backbone, lin = small_alex()
    save_file(backbone, folder / "alexnet.safetensors")
    save_file(lin, folder / "lin.safetensors")
    return folder


def vit_tensors(
    seed: int,
    patch: int = 16,
    side: int = 224,
    *,
    width: int = WIDTH,
    depth: int = DEPTH,
    clip: bool = False,
    scaled: bool = False,
) -> dict[str, Tensor]:
    """A vision transformer in DINO's naming; `clip` has a norm before its blocks, and `proj`."""
    tokens = 1 + (side // patch) ** 2
    params = VitParams(width, depth, 4 * width, patch, tokens, clip, scaled, 1e-6, "gelu")
    with torch.device("meta"):
        shapes = shapes_of(Vit(params))
    if clip:
        shapes["proj"] = (width, 2 * width // 3)
    if scaled:
        shapes["mask_token"] = (1, width)
    return seeded(shapes, seed)


def write_dreamsim(home: Path, variant: str, *, width: int = WIDTH, pickles: bool = True) -> Path:
    """A cache folder of the package dreamsim with one variant; the folder of its LoRA.

    Without pickles the same as safetensors files, as `headstart convert` makes them.
    """
    (home / "checkpoints").mkdir(parents=True, exist_ok=True)
    folder = home / f"{variant}_lora"
    folder.mkdir()
    for name, document in _backbones(variant, width).items():
        if pickles:
            torch.save(document, home / name)
        else:
            inner = document.get("state_dict", document.get("model", document))
            save_file(inner, home / f"{name.partition('.')[0]}.safetensors")
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(3 if variant == "ensemble" else 1):
        for block in range(DEPTH):
            name = f"base_model.model.extractor_list.{n}.model.blocks.{block}.attn.qkv"
            shapes[f"{name}.lora_A.weight"] = (RANK, width)
            shapes[f"{name}.lora_B.weight"] = (3 * width, RANK)
    adapter = seeded(shapes, 9)
    if pickles:
        torch.save(adapter, folder / "adapter_model.bin")
    else:
        save_file(adapter, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.3,
              "bias": "none", "target_modules": ["qkv"]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _backbones(variant: str, width: int) -> dict[str, dict[str, Any]]:
    kind = variant.replace("_single", "").replace("_patch", "")
    clip16 = {
        f"{name}_vitb16_pretrain.pth.tar": {"state_dict": vit_tensors(n, clip=True, width=width)}
        for n, name in ((2, "clip"), (3, "open_clip"))
    }
    dino = {"checkpoints/dino_vitbase16_pretrain.pth": vit_tensors(1, width=width)}
    plain = vit_tensors(4, width=width)
    layouts: dict[str, dict[str, dict[str, Any]]] = {
        "ensemble": {**dino, **clip16},
        "dino_vitb16": {**dino},
        "dinov2_vitb14": {
            "checkpoints/dinov2_vitb14_pretrain.pth": vit_tensors(
                5, 14, 518, scaled=True, width=width
            )
        },
        "synclr_vitb16": {
            "synclr_vit_b_16.pth": {"model": {f"module.visual.{n}": t for n, t in plain.items()}}
        },
        **{
            f"{name}_vitb32": {
                f"{name}_vitb32_pretrain.pth.tar": {
                    "state_dict": vit_tensors(seed, 32, clip=True, width=width)
                }
            }
            for seed, name in ((6, "clip"), (7, "open_clip"))
        },
    }
    return layouts[kind]


def reward_tensors(width: int = WIDTH, layers: int = 2) -> dict[str, Tensor]:
    """ImageReward.pt with a picture and a text encoder of this width."""
    visual = vit_tensors(8, width=VISUAL, depth=layers)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(WORDS) + 2, width),
        "embeddings.position_embeddings.weight": (40, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for n in range(layers):
        at = f"encoder.layer.{n}"
        for part in ("attention", "crossattention"):
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                reads = part == "crossattention" and name in ("self.key", "self.value")
                shapes[f"{at}.{part}.{name}.weight"] = (width, VISUAL if reads else width)
                shapes[f"{at}.{part}.{name}.bias"] = (width,)
            for kind in ("weight", "bias"):
                shapes[f"{at}.{part}.output.LayerNorm.{kind}"] = (width,)
        for name, out, inside in (("intermediate", 4 * width, width), ("output", width, 4 * width)):
            shapes[f"{at}.{name}.dense.weight"] = (out, inside)
            shapes[f"{at}.{name}.dense.bias"] = (out,)
        for kind in ("weight", "bias"):
            shapes[f"{at}.output.LayerNorm.{kind}"] = (width,)
    text = seeded(shapes, 10)
    sides = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    head = {f"mlp.layers.{n}.weight": shape for n, shape in sides.items()}
    head |= {f"mlp.layers.{n}.bias": shape[:1] for n, shape in sides.items()}
    return {
        **{f"blip.visual_encoder.{name}": tensor for name, tensor in visual.items()},
        **{f"blip.text_encoder.{name}": tensor for name, tensor in text.items()},
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.vision_proj.weight": torch.zeros(256, VISUAL),
        **seeded(head, 11),
    }


def write_reward(folder: Path, *, pickles: bool = True) -> Path:
    """ImageReward.pt, or .safetensors, with BERT's kind of vocabulary beside it."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    if pickles:
        torch.save(reward_tensors(), folder / "ImageReward.pt")
        return folder / "ImageReward.pt"
    save_file(reward_tensors(), folder / "ImageReward.safetensors")
    return folder / "ImageReward.safetensors"


def write_lpips(folder: Path, net: Net) -> Path:
    """A backbone of torchvision's and lpips' linear layers, as safetensors files."""
    save_file(backbone_tensors(net), folder / f"{net}net.safetensors")
    save_file(lin_tensors(net), folder / f"{net}.safetensors")
    return folder
