"""Small checkpoints of every lineage in every layout, made of random numbers here and now.

The names of the original code are written out as literal tables, apart from `checkpoint.keymap`:
what loads these files was not used to make them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headstart.checkpoint.families import FAMILIES
from headstart.networks.tower import ClipParams, Tower
from headstart.networks.unet import Mid, Stage, UNet, UNetParams
from headstart.networks.vae import Vae, VaeParams
from headstart.plan.schedule import NoiseSchedule

M = TypeVar("M", bound=nn.Module)
Tensors = dict[str, Tensor]
LINEAGES = ("sd15", "sd21", "sdxl")
LAYOUTS = ("ldm", "folder", "fp16", "sharded", "bare", "bare-ldm")
WHOLE = LAYOUTS[:4]
"""Layouts that hold text encoders and a VAE too."""
UNET_FILE = "diffusion_pytorch_model"
VOCABULARY = 55  # of the fixture `small_tokenizer`
POOLED, TIME = 48, 16

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@dataclass(frozen=True)
class Model:
    """The networks of one model; files of one seed hold the same numbers in every layout."""

    lineage: str
    unet: UNet
    vae: Vae
    towers: tuple[Tower, ...]

    @classmethod
    def of(
        cls,
        lineage: str,
        seed: int,
        *,
        vocabulary: int = VOCABULARY,
        guidance_dim: int | None = None,
    ) -> Model:
        torch.manual_seed(seed)
        xl, sd15 = lineage == "sdxl", lineage == "sd15"
        rules = FAMILIES[lineage].text
        text = ClipParams(
            width=32, layers=2, heads=1, mlp_width=64, act=rules[0].act, positions=16,
            vocabulary=vocabulary,
        )  # fmt: skip
        towers = [_random(Tower(text, rules[0]))]
        if xl:
            second = replace(text, width=64, heads=2, act=rules[1].act, projection=POOLED)
            towers.append(_random(Tower(second, rules[1])))
        top = (1, 1) if not xl else (0, 0)  # SDXL's top level has no transformers
        params = UNetParams(
            down=(Stage(32, top[:1], True), Stage(64, (1,), False)),
            mid=Mid(2, 1),
            up=(Stage(64, (1, 1), True), Stage(32, top, False)),
            context_dim=sum(tower.params.width for tower in towers),
            heads=8 if sd15 else None,
            head_dim=16,
            linear_projection=not sd15,
            added_dim=POOLED + 6 * TIME if xl else None,
            guidance_dim=guidance_dim,
        )
        vae = Vae(VaeParams(channels=(32, 32, 32, 32), layers=1))
        return cls(lineage, _random(UNet(params)), _random(vae), tuple(towers))

    def write(
        self,
        layout: str,
        path: Path,
        *,
        bare: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """The file or folder at `path` (given without suffix), in F16 as releases are.

        `bare` writes the UNet alone where the layout could hold more. `metadata` is a file's.
        """
        unet = halved(self.unet.state_dict())
        if layout in ("folder", "fp16", "sharded"):
            self._folder(path, layout, bare)
            return path
        tensors = unet if layout == "bare" else ldm_unet(unet)
        if layout == "ldm":
            tensors = prefixed(tensors, "model.diffusion_model.")
            tensors |= {} if bare else self._beside()
        path = path.with_name(f"{path.name}.safetensors")  # a name may have dots
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"format": "pt", **(metadata or {})})
        return path

    def _beside(self) -> Tensors:
        """What lies beside the UNet in a single file, with what loaders leave aside."""
        vae = prefixed(ldm_vae(halved(self.vae.state_dict())), "first_stage_model.")
        states = [halved(tower.state_dict()) for tower in self.towers]
        ids = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
        if self.lineage == "sdxl":
            first = prefixed(states[0] | ids, "conditioner.embedders.0.transformer.")
            return vae | first | prefixed(openclip(states[1]), "conditioner.embedders.1.model.")
        schedule = torch.from_numpy(NoiseSchedule.scaled_linear().alphas_cumprod.copy())
        vae |= {"alphas_cumprod": schedule.float(), "model_ema.decay": torch.tensor(0.9)}
        if self.lineage == "sd15":
            return vae | prefixed(states[0] | ids, "cond_stage_model.transformer.")
        return vae | prefixed(openclip(states[0], one_more=True), "cond_stage_model.model.")

    def _folder(self, root: Path, layout: str, bare: bool) -> None:
        variant = ".fp16" if layout == "fp16" else ""
        parts: list[tuple[str, str, nn.Module]] = [("unet", UNET_FILE, self.unet)]
        if not bare:
            texts = zip(("text_encoder", "text_encoder_2"), self.towers, strict=False)
            parts.append(("vae", UNET_FILE, self.vae))
            parts += [(folder, "model", tower) for folder, tower in texts]
        for folder, stem, network in parts:
            where, tensors = root / folder, halved(network.state_dict())
            where.mkdir(parents=True)
            (where / "config.json").write_text(json.dumps(self._config(network)))
            if layout == "sharded" and folder == "unet":
                sharded(tensors, where, stem)
            else:
                save_file(tensors, where / f"{stem}{variant}.safetensors", {"format": "pt"})
        (root / "scheduler").mkdir(parents=True)
        kind = "v_prediction" if self.lineage == "sd21" else "epsilon"
        config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        config |= {"prediction_type": kind}
        (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))

    def _config(self, network: nn.Module) -> dict[str, Any]:
        if isinstance(network, Tower):
            heads, act = network.params.heads, network.params.act
            kind = ["CLIPTextModel"]
            return {"architectures": kind, "num_attention_heads": heads, "hidden_act": act}
        if isinstance(network, Vae):
            scale = FAMILIES[self.lineage].scale_factor
            return {"_class_name": "AutoencoderKL", "scaling_factor": scale}
        heads = 8 if self.lineage == "sd15" else [2, 4]
        return {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": heads,
            "block_out_channels": [32, 64],
        }


def _random(module: M) -> M:
    """Norm scales and biases too, which are born as ones and zeros."""
    for parameter in module.requires_grad_(False).parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return module


def halved(tensors: dict[str, Any]) -> Tensors:
    return {name: tensor.half() for name, tensor in tensors.items()}


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor.clone() for name, tensor in tensors.items()}


def sharded(tensors: Tensors, folder: Path, stem: str) -> None:
    """Two files and their index."""
    names, table = sorted(tensors), dict[str, str]()
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))


# --------------------------------------------------------------------- the original code's names


def ldm_unet(tensors: Tensors) -> Tensors:
    """The UNet of a `Model`, two levels with one resnet each, under the names of LDM files."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        ours = next(ours for ours in _UNET if name.startswith(ours + "."))
        rest = name.removeprefix(ours + ".")
        if ".resnets." in f".{ours}.":
            inner, leaf = rest.split(".")
            rest = f"{_RESNET[inner]}.{leaf}"
        renamed[f"{_UNET[ours]}.{rest}"] = tensor
    return renamed


def ldm_vae(tensors: Tensors) -> Tensors:
    """A VAE's tensors in LDM form: levels of the decoder counted from the outside in."""
    names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    ups = [name.split(".")[2] for name in tensors if name.startswith("decoder.up_blocks.")]
    last = max(map(int, ups))
    renamed: Tensors = {}
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
            rest = f"up.{last - int(level)}."
            rest += (f"block.{i}" if kind == "resnets" else "upsample") + f".{leaf}"
        rest = rest.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        renamed[f"{half}.{rest}"] = tensor.contiguous()
    return renamed


def openclip(state: Tensors, one_more: bool = False) -> Tensors:
    """A text encoder in OpenCLIP's form: fused in_proj, transposed projection, logit scale.

    `one_more` adds the last layer that SD2.1's files carry and never run.
    """
    width = state["text_model.final_layer_norm.weight"].shape[0]
    tensors: Tensors = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
        "text_projection": state.get("text_projection.weight", torch.zeros(7, width)).T,
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
    inner |= {"mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    count = len({name.split(".")[3] for name in state if ".encoder.layers." in name})
    for position, layer in enumerate([*range(count), *([0] if one_more else [])]):
        ours, theirs = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{position}."
        for leaf in ("weight", "bias"):
            parts = [state[f"{ours}self_attn.{q}_proj.{leaf}"] for q in "qkv"]
            tensors[f"{theirs}attn.in_proj_{leaf}"] = torch.cat(parts)
            tensors |= {f"{theirs}{b}.{leaf}": state[f"{ours}{a}.{leaf}"] for a, b in inner.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
