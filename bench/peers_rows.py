"""Who runs a case of `bench/peers.py`: one row a way, and how it is built.

A Way makes a network of a file, for the shapes that it will be called with, and answers as ours do:
unet  (x [B, C, h, w], timestep [B], cond) -> F        vae  latents -> pixels
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import peers_engines
import torch
from peers_networks import Source, conditioning
from torch import Tensor, nn
from untrained import diffusers_unet, diffusers_vae, filled

from headstart.interfaces import Conditioning
from headstart.networks.load import load_unet, load_vae
from headstart.runner.runner import CompiledRunner, EagerRunner, open_runner

Inputs = Mapping[str, Tensor]
ARGUMENTS = ("x", "timestep", "context", "pooled", "time_ids", "latents")
"""Of an exported network, in order."""


@dataclass
class Network:
    """Something that is called, the module whose weights it should follow if it has one, and what
    making it cost."""

    call: Callable[..., Tensor]
    dtype: torch.dtype = torch.float32
    module: nn.Module | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def __call__(self, *inputs: Any) -> Tensor:
        return self.call(*inputs)


Build = Callable[[Source, Sequence[Inputs]], Network]


class Row(NamedTuple):
    """
    unet, vae   what is made of a file; None: it has none
    copies      of the weights in float32 that it takes while it is made, beside the file
    package     to import; install: the command that brings it
    slow        it may take minutes until it is ready: not in --quick, and its limit is longer
    whole       in place of networks: seconds of a call, by itself
    """

    unet: Build | None
    vae: Build | None
    copies: float = 0.1
    package: str | None = None
    install: str = ""
    slow: bool = False
    whole: Callable[..., Any] | None = None


def ours(
    make: Any, dtype: Any, source: Source, examples: Sequence[Inputs], packed: bool = False
) -> Network:
    """As a user's file is loaded, and run by a runner of ours; `packed`: as an engine loads one of
    full size."""
    head_dim = source.overrides.head_dim
    network = load_unet(source.path, dtype=dtype, head_dim=head_dim, packed=packed)
    runner = make(network)
    return Network(runner, runner.dtype, network)


def our_vae(
    dtype: torch.dtype, source: Source, examples: Sequence[Inputs], packed: bool = False
) -> Network:
    scale = source.overrides.scale_factor
    vae = load_vae(source.path, dtype=dtype, scale_factor=scale, packed=packed)
    return Network(_quiet(lambda z: vae.decode(z.to(dtype))), dtype, vae)


def our_frozen(dtype: torch.dtype, source: Source, examples: Sequence[Inputs]) -> Network:
    """Our UNet whole through inductor, its weights folded into what is compiled."""
    network = source.plain(dtype)
    return Network(_frozen(_typed(torch.compile(network), dtype)), dtype, network)


def diffusers(how: str, dtype: torch.dtype, source: Source, examples: Sequence[Inputs]) -> Network:
    network = _twin(source, dtype, diffusers_unet)
    run: Any = network if how == "eager" else torch.compile(network)

    def call(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        return run(x, timestep, cond.context, added_cond_kwargs=added, return_dict=False)[0]

    quiet = _frozen if how == "frozen" else _quiet
    return Network(quiet(_typed(call, dtype)), dtype, network)


def diffusers_decoder(dtype: torch.dtype, source: Source, examples: Sequence[Inputs]) -> Network:
    network, scale = _twin(source, dtype, diffusers_vae), source.params().scale_factor

    def call(z: Tensor) -> Tensor:
        return network.decode(z.to(dtype) / scale, return_dict=False)[0]

    return Network(_quiet(call), dtype, network)


def _twin(source: Source, dtype: torch.dtype, make: Callable[[Any], Any]) -> Any:
    return filled(make(source.params()), source.plain(dtype).state_dict())


_quiet = torch.inference_mode()


def _frozen(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Inductor freezes where nothing can ask for a gradient; inference mode it does not take."""
    import torch._inductor.config as config

    config.freezing = True  # of this process, which compiles nothing else
    return torch.no_grad()(call)


def _typed(call: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    def typed(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return call(x.to(dtype), timestep, cond.to(x.device, dtype))

    return typed


def converted(
    convert: Callable[..., Any], dtype: torch.dtype, source: Source, examples: Sequence[Inputs]
) -> Network:
    """By an engine of fixed shapes: one program a batch, each called with what has that batch."""
    plain = source.plain(dtype)
    programs: dict[int, Callable[..., Tensor]] = {}
    facts: dict[str, Any] = {}
    for example in examples:
        names = tuple(name for name in ARGUMENTS if name in example)
        inputs = tuple(example[name] for name in names)
        programs[len(inputs[0])], costs = convert(Flat(plain, names), names, inputs)
        facts = together(facts, costs)

    def call(x: Tensor, *more: Any) -> Tensor:
        if more:
            timestep, cond = more
            others = (cond.context, cond.pooled, cond.time_ids)
            more = (timestep, *(other for other in others if other is not None))
        return programs[len(x)](x, *more)

    return Network(call, facts=facts)


def together(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Costs of two programs of one process: seconds are added, of peaks the higher one counts."""
    both = dict(one)
    for key, value in other.items():
        before = both.get(key, 0)
        both[key] = round(before + value, 2) if key.endswith("_s") else max(before, value)
    return both


class Flat(nn.Module):
    """A network of ours called with tensors alone, float32 outside, as exporters want it."""

    def __init__(self, network: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names
        self.dtype = next(network.parameters()).dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        if "latents" in named:
            return self.network.decode(named["latents"].to(self.dtype)).float()
        cond = conditioning(named).to(named["x"].device, self.dtype)
        return self.network(named["x"].to(self.dtype), named["timestep"], cond).float()


F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
_OPENVINO = {"package": "openvino", "install": "pip install 'headstart[peers]'"}
_ONNX = {"package": "onnxruntime", "install": "pip install 'headstart[peers]'"}
_DIFFUSERS = {"package": "diffusers", "install": "pip install 'headstart[bench]'"}
_CPP = {
    "package": "stable_diffusion_cpp",
    "install": "no wheel: pip install stable-diffusion-cpp-python builds one, with cmake and g++",
    "slow": True,
}


_cpp = peers_engines.stable_diffusion_cpp
_ONNXRUNTIME: Build = partial(converted, peers_engines.onnxruntime, F32)


def _openvino(hint: str) -> Build:
    return partial(converted, partial(peers_engines.openvino, hint), F32)


def _ours(dtype: torch.dtype, make: Any = EagerRunner, packed: bool = False) -> tuple[Build, Build]:
    return (
        partial(ours, make, dtype, packed=packed),
        partial(our_vae, dtype, packed=packed),
    )


_SLOW = {"slow": True}
ROWS: Mapping[str, Row] = {
    "ours float32": Row(*_ours(F32)),
    "ours bfloat16": Row(*_ours(BF16), 0.5),
    "ours packed": Row(*_ours(F32, packed=True), 2.5),
    "ours packed bfloat16": Row(*_ours(BF16, packed=True), 0.6),
    "ours stored": Row(partial(ours, EagerRunner, "stored"), None, 0.2),
    "ours replay": Row(*_ours(F32, partial(open_runner, "replay"))),
    "ours compiled": Row(*_ours(F32, CompiledRunner), **_SLOW),
    "ours frozen": Row(partial(our_frozen, F32), None, 1.3, **_SLOW),
    "ours frozen bfloat16": Row(partial(our_frozen, BF16), None, 1.2, **_SLOW),
    "ours float64": Row(*_ours(F64), 2),
    "diffusers float32": Row(
        partial(diffusers, "eager", F32), partial(diffusers_decoder, F32), **_DIFFUSERS
    ),
    "diffusers bfloat16": Row(
        partial(diffusers, "eager", BF16), partial(diffusers_decoder, BF16), 0.5, **_DIFFUSERS
    ),
    "diffusers compiled": Row(partial(diffusers, "compiled", F32), None, **_SLOW, **_DIFFUSERS),
    "diffusers frozen": Row(partial(diffusers, "frozen", F32), None, 1.3, **_SLOW, **_DIFFUSERS),
    "diffusers frozen bfloat16": Row(
        partial(diffusers, "frozen", BF16), None, 1.2, **_SLOW, **_DIFFUSERS
    ),
    "OpenVINO float32": Row(_openvino("f32"), _openvino("f32"), 1.2, **_OPENVINO),
    "OpenVINO bfloat16": Row(_openvino("bf16"), _openvino("bf16"), 1.2, **_OPENVINO),
    "onnxruntime float32": Row(_ONNXRUNTIME, _ONNXRUNTIME, 1.2, **_ONNX),
    "stable-diffusion.cpp float32": Row(None, None, 1.2, whole=partial(_cpp, "f32"), **_CPP),
    "stable-diffusion.cpp float16": Row(None, None, 0.7, whole=partial(_cpp, "f16"), **_CPP),
}  # fmt: skip
