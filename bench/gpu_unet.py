"""A pass of the UNet for `bench/gpu.py`: our runners, and diffusers' network with the same weights.

Sources of what diffusers advises: docs/source/en/optimization/fp16.md of huggingface/diffusers
(channels_last, four flags of inductor, mode "max-autotune" with fullgraph, fuse_qkv_projections).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from gpu_case import Bench, Call, Figure, TooOldError, in_turns
from gpu_networks import call, twin, unet
from torch import Tensor
from untrained import diffusers_unet

from headstart.errors import InputError
from headstart.networks.unet import UNet
from headstart.runner.graph import GraphRunner
from headstart.runner.runner import choose_runner, open_runner

NHWC = torch.channels_last
INDUCTOR = (
    *("conv_1x1_as_mm", "coordinate_descent_tuning"),
    *("coordinate_descent_check_all_directions",),
)


PASSES = (
    *("eager", "graph", "graph, channels_last", "graph, cudnn.benchmark", "diffusers eager"),
    *("diffusers eager, channels_last", "diffusers in torch's graph"),
)
"""What costs no compilation: ours eager and captured, theirs eager and captured."""
COMPILED = ("graph", "compiled", "diffusers compiled by block", "diffusers compiled")
"""Ours compiled, as the runner of that name does it; theirs compiled whole and by block."""
RECIPE = ("graph", "diffusers' own recipe")
"""What diffusers advises for the highest speed; it may search for minutes."""


def passes(bench: Bench, batch: int = 1, variants: Sequence[str] = PASSES) -> Iterator[Figure]:
    network, inputs = unet(bench), call(bench, batch)
    theirs = partial(peer, bench, network, inputs)
    every: dict[str, Callable[[], Call]] = {
        "eager": lambda: partial(opened("eager", network), *inputs),
        "graph": lambda: partial(opened("graph", network), *inputs),
        "graph, channels_last": lambda: partial(
            GraphRunner(_copy(network, NHWC), memory_format=NHWC), *inputs
        ),
        "graph, cudnn.benchmark": lambda: _with_benchmark(
            partial(GraphRunner(_copy(network)), *inputs)
        ),
        "diffusers eager": theirs,
        "diffusers eager, channels_last": partial(theirs, layout=NHWC),
        "diffusers in torch's graph": lambda: captured(theirs(quiet=torch.no_grad)),
        "compiled": lambda: partial(opened("compiled", network), *inputs),
        "diffusers compiled by block": partial(theirs, regions=True),
        "diffusers compiled": partial(theirs, mode="default"),
        "diffusers' own recipe": lambda: _recipe(bench, theirs),
    }
    yield from in_turns(bench, {name: every[name] for name in variants})


compiled = partial(passes, variants=COMPILED)
recipe = partial(passes, variants=RECIPE)


def four(bench: Bench) -> Iterator[Figure]:
    if bench.dry:
        yield "not run", "the lines of case unet"
        return
    yield from passes(bench, 4)


def _with_benchmark(run: Call) -> Call:
    """Convolutions are chosen in the runs before the capture."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        run()
    finally:
        torch.backends.cudnn.benchmark = before
    return run


def _recipe(bench: Bench, theirs: Callable[..., Call]) -> Call:
    if not bench.dry:
        config: Any = import_module("torch._inductor.config")
        for name in INDUCTOR:
            setattr(config, name, True)
        config.epilogue_fusion = False
    return theirs(layout=NHWC, mode="max-autotune", fused=True)


def opened(name: Any, network: UNet) -> Any:
    try:
        return open_runner(choose_runner(name, "cuda").name, network)
    except InputError as error:
        raise TooOldError(f"runner {name!r}") from error


def _copy(network: UNet, layout: torch.memory_format | None = None) -> UNet:
    with torch.device("meta"):
        copy = UNet(network.params)
    return twin(network, copy, layout)


def peer(
    bench: Bench,
    network: UNet,
    inputs: tuple[Any, ...],
    *,
    layout: torch.memory_format | None = None,
    mode: str | None = None,
    regions: bool = False,
    fused: bool = False,
    quiet: Callable[[], Any] = torch.inference_mode,
) -> Call:
    """diffusers' UNet with our weights. Raises ModuleNotFoundError where it is not installed."""
    shapes = bench.networks
    run = twin(network, diffusers_unet(shapes.unet, shapes.pooled), layout)
    if fused:
        run.fuse_qkv_projections()
    if regions:
        run.compile_repeated_blocks(fullgraph=True)
    if mode is not None:
        run = torch.compile(run, mode=mode, fullgraph=True)  # pyright: ignore
    x_in, timestep, cond = inputs
    x_in = x_in if layout is None else x_in.contiguous(memory_format=layout)
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}

    def once() -> Tensor:
        with quiet():
            return run(x_in, timestep, cond.context, added_cond_kwargs=added, return_dict=False)[0]

    # Graphs that inductor captures own what they give, until the next call.
    return (lambda: once().clone()) if mode == "max-autotune" else once


def captured(once: Call) -> Call:
    """A call as torch's own graph, with nothing around its launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            once()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = once()
    torch.cuda.synchronize()

    def launch() -> Tensor:
        graph.replay()
        return out

    return launch
