"""The Stable-Diffusion UNet, read top to bottom: F = UNet(c_in*x, timestep, cond).

Module names are the diffusers checkpoint's key names, so a state dict is assigned as it is.
One class serves SD1.5, SD2.1, SDXL and every smaller relative: a network is its `UNetParams`.
Architecture: arXiv:2112.10752 (latent diffusion), arXiv:2307.01952 (SDXL's conditioning),
arXiv:2310.04378 (the guidance embedding of LCM).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.checkpoint.params import Mid, Stage, UNetParams
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.networks.convolution import Conv2d, nearest
from headstart.networks.fusion import NormSilu
from headstart.networks.joint_linear import (
    join,
    joint_weights,
    project_each,
    project_together,
    replace_parameter,
    split_joint,
)
from headstart.networks.layout import FORMATS
from headstart.networks.numbers import Embedding, sinusoid
from headstart.networks.state import Watch, calling
from headstart.networks.transformer import TEXTS, Inputs, SpatialTransformer, Text, TransformerBlock
from headstart.prompt_cache import cached_prompt


class ResBlock(nn.Module):
    """x [B, C, h, w], shift [B, C'] -> [B, C', h, w]: two normalised convolutions and a shortcut.

    shift   time_emb_proj(silu(emb))
    """

    def __init__(self, in_channels: int, channels: int, time_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = NormSilu(groups, in_channels, eps=1e-5)
        self.conv1 = Conv2d(in_channels, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, channels)
        self.norm2 = NormSilu(groups, channels, eps=1e-5)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, channels, 1) if in_channels != channels else None

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h, shift))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Resample(nn.Module):
    """The stride-2 (down) or post-upsampling (up) 3x3 convolution."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.conv(x if size is None else nearest(x, size))


class Layers(nn.Module):
    """The resnets of one stage, each followed by its transformer; shared by down, mid and up."""

    def __init__(
        self, inputs: Iterable[int], channels: int, depths: tuple[int, ...], params: UNetParams
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(c, channels, params.time_dim, params.norm_groups) for c in inputs
        )
        if any(depths):
            self.attentions = nn.ModuleList(
                SpatialTransformer(channels, depth, params) for depth in depths if depth
            )
        self.has_attention = any(depths)

    def step(self, i: int, x: Tensor, inputs: Inputs) -> Tensor:
        """Resnet i and, where the stage has transformers, transformer i."""
        x = self.resnets[i](x, next(inputs.shifts))
        if self.has_attention and i < len(self.attentions):
            x = self.attentions[i](x, inputs)
        return x

    def transformers(self) -> Iterator[TransformerBlock]:
        """In the order in which they run."""
        for transformer in self.attentions if self.has_attention else ():
            yield from cast("SpatialTransformer", transformer).blocks()


class DownStage(Layers):
    def __init__(self, in_channels: int, stage: Stage, params: UNetParams) -> None:
        inputs = [in_channels] + [stage.channels] * (len(stage.depths) - 1)
        super().__init__(inputs, stage.channels, stage.depths, params)
        if stage.resample:
            self.downsamplers = nn.ModuleList([Resample(stage.channels, stride=2)])
        self._resample = stage.resample

    def forward(self, x: Tensor, inputs: Inputs, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.step(i, x, inputs)
            skips.append(x)
        if self._resample:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class MidStage(Layers):
    def __init__(self, channels: int, mid: Mid, params: UNetParams) -> None:
        super().__init__([channels] * mid.resnets, channels, (mid.depth,), params)

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.step(i, x, inputs)
        return x


class UpStage(Layers):
    def __init__(
        self, in_channels: int, skips: list[int], stage: Stage, params: UNetParams
    ) -> None:
        below = [in_channels] + [stage.channels] * (len(stage.depths) - 1)
        inputs = [channels + skips.pop() for channels in below]
        super().__init__(inputs, stage.channels, stage.depths, params)
        if stage.resample:
            self.upsamplers = nn.ModuleList([Resample(stage.channels, stride=1)])
        self._resample = stage.resample

    def forward(self, x: Tensor, inputs: Inputs, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.step(i, torch.cat([x, skips.pop()], dim=1), inputs)
        if self._resample:
            height, width = skips[-1].shape[2:]  # odd sizes come back to what they were
            x = self.upsamplers[0](x, (height, width))
        return x


class UNet(nn.Module):
    """x_in [B, C, h, w], timestep [B] or [], cond -> F [B, C, h, w], in the network's dtype."""

    def __init__(self, params: UNetParams) -> None:
        super().__init__()
        self.params = params
        channels, time_dim, groups = params.channels, params.time_dim, params.norm_groups
        self.conv_in = Conv2d(params.in_channels, channels, 3, padding=1)
        self.time_embedding = Embedding(channels, time_dim, params.guidance_dim)
        self.add_embedding = Embedding(params.added_dim, time_dim) if params.added_dim else None
        widths = [channels]
        self.down_blocks = nn.ModuleList()
        for stage in params.down:
            self.down_blocks.append(DownStage(channels, stage, params))
            channels = stage.channels
            widths += [channels] * (len(stage.depths) + stage.resample)
        self.mid_block = MidStage(channels, params.mid, params) if params.mid else None
        self.up_blocks = nn.ModuleList()
        for stage in params.up:
            self.up_blocks.append(UpStage(channels, widths, stage, params))
            channels = stage.channels
        self.conv_norm_out = NormSilu(groups, channels, eps=1e-5)
        self.conv_out = Conv2d(channels, params.out_channels, 3, padding=1)
        self._text_watch = Watch()

    def __call__(self, *args: Any, **arguments: Any) -> Tensor:
        """`forward`, with the prompt's cached keys and values. They are read before the call,
        because for adapters that is a call of its own."""
        arguments = {name: cached_prompt(self, argument) for name, argument in arguments.items()}
        return super().__call__(*(cached_prompt(self, argument) for argument in args), **arguments)

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        inputs = self._inputs(timestep.expand(x_in.shape[0]), cond, x_in.dtype)
        x: Tensor = self.conv_in(x_in)  # in the memory format of its weight from here on
        skips = [x]
        for block in self.down_blocks:
            x = block(x, inputs, skips)
        if self.mid_block is not None:
            x = self.mid_block(x, inputs)
        for block in self.up_blocks:
            x = block(x, inputs, skips)
        return self.conv_out(self.conv_norm_out(x))

    def lay_out(self, device: torch.device | None = None) -> None:
        """Lay the weights as `device` computes with them fastest, wherever they are now; by default
        as their own device does. No number changes.

        Convolutions get the device's memory format. Linear layers of one input are joined: queries,
        keys and values, keys and values of the prompt in all layers, projections of the timestep.
        For a CPU, where weights are mapped from a file, nothing moves.
        """
        form = FORMATS.get((device or self.conv_in.weight.device).type)
        if form is None:
            return
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                weight = layer.weight.detach().contiguous(memory_format=form)
                replace_parameter(layer, "weight", weight)
        join(self._time_layers())
        join(self._text_layers())
        for block in self._transformers():
            join(block.attn1.layers)

    def prompt_key(self, cond: Conditioning) -> Hashable | None:
        """None where a change of the prompt's keys and values cannot be noticed, as with a hook."""
        return self._text_watch.key(self, self._text_layers(), cond)

    def read_prompt(self, cond: Conditioning) -> Mapping[str, Tensor]:
        """Keys and values of the context in every layer, for `Conditioning.extra`; 26 MB a sample
        of SDXL in half precision. Adapters act as they would in the call."""
        with calling(self, cond):
            return {TEXTS: project_together(self._text_layers(), cond.context)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moved to a device, weights are laid out for it, as torch's recurrent layers do it."""
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]
        self.lay_out()
        return self

    def _stages(self) -> Iterator[Layers]:
        """In the order in which they run."""
        mid = () if self.mid_block is None else (self.mid_block,)
        return cast("Iterator[Layers]", chain(self.down_blocks, mid, self.up_blocks))

    def _transformers(self) -> Iterator[TransformerBlock]:
        return chain.from_iterable(stage.transformers() for stage in self._stages())

    def _time_layers(self) -> list[nn.Linear]:
        return [resnet.time_emb_proj for stage in self._stages() for resnet in stage.resnets]  # pyright: ignore

    def _text_layers(self) -> list[nn.Linear]:
        """Every layer that reads the context: keys and values in turn. It runs before every row, so
        it reads the modules' tables: 140 times three attributes would take 0.2 ms."""
        try:
            stages: Any = [stage for stage in self._stages() if stage.has_attention]
            transformers = [t for s in stages for t in s._modules["attentions"]._modules.values()]
            tables = [t._modules["transformer_blocks"]._modules for t in transformers]
            blocks = [block for table in tables for block in table.values()]
            crosses = [block._modules["attn2"]._modules for block in blocks]
            return [layer for cross in crosses for layer in (cross["to_k"], cross["to_v"])]
        except KeyError:  # a module that stands for another, and forwards attributes
            crossing = [block.attn2 for block in self._transformers()]
            return [layer for cross in crossing for layer in (cross.to_k, cross.to_v)]

    def _inputs(self, timestep: Tensor, cond: Conditioning, dtype: torch.dtype) -> Inputs:
        emb = F.silu(self._embed(timestep, cond, dtype))
        return Inputs(iter(project_each(self._time_layers(), emb)), cond.context, self._texts(cond))

    def _texts(self, cond: Conditioning) -> Iterator[Text | None]:
        """Keys and values read before; or of all layers at once, where that is one product; else
        None, so that each layer computes its own: together they take 51 MB a sample of SDXL in
        float32."""
        layers, joint = self._text_layers(), cond.extra.get(TEXTS)
        if joint is None and layers and joint_weights(layers) is not None:
            joint = project_together(layers, cond.context)
        if joint is None:
            return iter([None] * (len(layers) // 2))
        parts = split_joint(layers, joint)
        return iter(list(zip(parts[::2], parts[1::2], strict=True)))

    def _embed(self, timestep: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        guidance = cond.guidance_embedding if self.params.guidance_dim else None
        if self.params.guidance_dim and guidance is None:
            raise InputError(
                "this UNet has a `cond_proj` (LCM): expected Conditioning with "
                f"`guidance_embedding` [B, {self.params.guidance_dim}], got none; pass "
                "headstart.networks.numbers.guidance_embedding of the guidance to imitate"
            )
        emb = self.time_embedding(sinusoid(timestep, self.params.channels).to(dtype), guidance)
        return emb if self.add_embedding is None else emb + self._embed_added(cond, dtype)

    def _embed_added(self, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        """SDXL: pooled text beside six embedded sizes (arXiv:2307.01952, section 2.2)."""
        if cond.pooled is None or cond.time_ids is None or self.add_embedding is None:
            raise InputError(
                "this UNet has an `add_embedding` (SDXL family): expected Conditioning with "
                "`pooled` [B, P] and `time_ids` [B, 6], got none; encode the prompt with both "
                "text encoders, or pass the two tensors"
            )
        batch, count = cond.time_ids.shape
        dim = (self.add_embedding.linear_1.in_features - cond.pooled.shape[1]) // count
        sizes = sinusoid(cond.time_ids.flatten(), dim).view(batch, count * dim)
        return self.add_embedding(torch.cat([cond.pooled, sizes.to(dtype)], dim=-1))
