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
from peers_networks import Source, conditioning, diffusers_unet, diffusers_vae, filled
from torch import Tensor, nn

from headstart.interfaces import Conditioning
from headstart.networks.load import load_unet, load_vae
from headstart.runner.runner import CompiledRunner, EagerRunner

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

    def __call__(self, *given: Any) -> Tensor:
        return self.call(*given)


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
    head_dim = source.given.head_dim
    network = load_unet(source.path, dtype=dtype, head_dim=head_dim, packed=packed)
    runner = make(network)
    return Network(runner, runner.dtype, network)


def our_vae(
    dtype: torch.dtype, source: Source, examples: Sequence[Inputs], packed: bool = False
) -> Network:
    scale = source.given.scale_factor
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


def _twin(source: Source, dtype: torch.dtype, made: Callable[[Any], Any]) -> Any:
    return filled(made(source.params()), source.plain(dtype).state_dict())


def _quiet(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def quiet(*given: Any) -> Tensor:
        with torch.inference_mode():
            return call(*given)

    return quiet


def _frozen(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Inductor freezes where nothing can ask for a gradient; inference mode it does not take."""
    import torch._inductor.config as config

    config.freezing = True  # of this process, which compiles nothing else

    def frozen(*given: Any) -> Tensor:
        with torch.no_grad():
            return call(*given)

    return frozen


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
        given = tuple(example[name] for name in names)
        programs[len(given[0])], told = convert(Flat(plain, names), names, given)
        facts = together(facts, told)

    def call(x: Tensor, *more: Any) -> Tensor:
        given: tuple[Tensor, ...] = (x,)
        if more:
            timestep, cond = more
            others = (cond.context, cond.pooled, cond.time_ids)
            given = (x, timestep, *(other for other in others if other is not None))
        return programs[len(x)](*given)

    return Network(call, facts=facts)


def together(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Costs of two programs of one process: seconds are added, of peaks the higher one counts."""
    found = dict(one)
    for key, value in other.items():
        before = found.get(key, 0)
        found[key] = round(before + value, 2) if key.endswith("_s") else max(before, value)
    return found


class Flat(nn.Module):
    """A network of ours called with tensors alone, float32 outside, as exporters want it."""

    def __init__(self, network: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names
        self.dtype = next(network.parameters()).dtype

    def forward(self, *given: Tensor) -> Tensor:
        held = {name: tensor for name, tensor in zip(self.names, given, strict=True)}
        if "latents" in held:
            return self.network.decode(held["latents"].to(self.dtype)).float()
        cond = conditioning(held).to(held["x"].device, self.dtype)
        return self.network(held["x"].to(self.dtype), held["timestep"], cond).float()


F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
_OPENVINO = {"package": "openvino", "install": "pip install 'headstart[peers]'"}
_ONNX = {"package": "onnxruntime", "install": "pip install 'headstart[peers]'"}
_DIFFUSERS = {"package": "diffusers", "install": "pip install 'headstart[bench]'"}
_CPP = {
    "package": "stable_diffusion_cpp",
    "install": "no wheel: pip install stable-diffusion-cpp-python builds one, with cmake and g++",
}


def _openvino(hint: str) -> Build:
    return partial(converted, partial(peers_engines.openvino, hint), F32)


_ONNXRUNTIME: Build = partial(converted, peers_engines.onnxruntime, F32)


def _diffusers(how: str, dtype: torch.dtype) -> Build:
    return partial(diffusers, how, dtype)


def _cpp(wtype: str) -> Callable[..., Any]:
    return partial(peers_engines.stable_diffusion_cpp, wtype)


def _packed(dtype: torch.dtype) -> tuple[Build, Build]:
    unet = partial(ours, EagerRunner, dtype, packed=True)
    return unet, partial(our_vae, dtype, packed=True)


_SLOW = {"slow": True}
ROWS: Mapping[str, Row] = {
    "ours float32": Row(partial(ours, EagerRunner, F32), partial(our_vae, F32)),
    "ours bfloat16": Row(partial(ours, EagerRunner, BF16), partial(our_vae, BF16), 0.5),
    "ours packed": Row(*_packed(F32), 2.5),
    "ours packed bfloat16": Row(*_packed(BF16), 0.6),
    "ours stored": Row(partial(ours, EagerRunner, "stored"), None, 0.2),
    "ours compiled": Row(partial(ours, CompiledRunner, F32), partial(our_vae, F32), **_SLOW),
    "ours frozen": Row(partial(our_frozen, F32), None, 1.3, **_SLOW),
    "ours frozen bfloat16": Row(partial(our_frozen, BF16), None, 1.2, **_SLOW),
    "ours float64": Row(partial(ours, EagerRunner, F64), partial(our_vae, F64), 2),
    "diffusers float32": Row(
        _diffusers("eager", F32), partial(diffusers_decoder, F32), **_DIFFUSERS
    ),
    "diffusers bfloat16": Row(
        _diffusers("eager", BF16), partial(diffusers_decoder, BF16), 0.5, **_DIFFUSERS
    ),
    "diffusers compiled": Row(_diffusers("compiled", F32), None, **_SLOW, **_DIFFUSERS),
    "diffusers frozen": Row(_diffusers("frozen", F32), None, 1.3, **_SLOW, **_DIFFUSERS),
    "diffusers frozen bfloat16": Row(
        _diffusers("frozen", BF16), None, 1.2, **_SLOW, **_DIFFUSERS
    ),
    "OpenVINO float32": Row(_openvino("f32"), _openvino("f32"), 1.2, **_OPENVINO),
    "OpenVINO bfloat16": Row(_openvino("bf16"), _openvino("bf16"), 1.2, **_OPENVINO),
    "onnxruntime float32": Row(_ONNXRUNTIME, _ONNXRUNTIME, 1.2, **_ONNX),
    "stable-diffusion.cpp float32": Row(None, None, 1.2, whole=_cpp("f32"), **_SLOW, **_CPP),
    "stable-diffusion.cpp float16": Row(None, None, 0.7, whole=_cpp("f16"), **_SLOW, **_CPP),
}  # fmt: skip
