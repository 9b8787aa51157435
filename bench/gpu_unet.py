"""A pass of the UNet for `bench/gpu.py`: our runners, and diffusers' network with the same weights.

Sources of what diffusers advises: docs/source/en/optimization/fp16.md of huggingface/diffusers
(channels_last, four flags of inductor, mode "max-autotune" with fullgraph, fuse_qkv_projections).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from gpu_case import Bench, Call, Figure, NotInThisVersionError, in_turns
from gpu_networks import call, twin, unet
from torch import Tensor

from headstart.errors import InputError
from headstart.networks.unet import UNet
from headstart.runner.graph import GraphRunner
from headstart.runner.runner import choose_runner, open_runner

NHWC = torch.channels_last
INDUCTOR = (
    *("conv_1x1_as_mm", "coordinate_descent_tuning"),
    *("coordinate_descent_check_all_directions",),
)


def passes(bench: Bench, batch: int = 1) -> Iterator[Figure]:
    """What costs no compilation: ours eager and captured, theirs eager and captured."""
    network, given = unet(bench), call(bench, batch)

    def runner(name: Any) -> Callable[[], Call]:
        return lambda: _called(opened(name, network), given)

    def with_benchmark() -> Call:
        found = _called(GraphRunner(_copy(network)), given)
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            found()  # convolutions are chosen in the runs before the capture
        finally:
            torch.backends.cudnn.benchmark = before
        return found

    yield from in_turns(
        bench,
        {
            "eager": runner("eager"),
            "graph": runner("graph"),
            "graph, channels_last": lambda: _called(
                GraphRunner(_copy(network, NHWC), memory_format=NHWC), given
            ),
            "graph, cudnn.benchmark": with_benchmark,
            "diffusers eager": lambda: peer(bench, network, given),
            "diffusers eager, channels_last": lambda: peer(bench, network, given, layout=NHWC),
            "diffusers in torch's graph": lambda: captured(
                peer(bench, network, given, quiet=torch.no_grad)
            ),
        },
    )


def four(bench: Bench) -> Iterator[Figure]:
    if bench.dry:
        yield "not run", "the lines of case unet"
        return
    yield from passes(bench, 4)


def compiled(bench: Bench, batch: int = 1) -> Iterator[Figure]:
    """Ours compiled, as the runner of that name does it; theirs compiled whole and by block."""
    network, given = unet(bench), call(bench, batch)
    yield from in_turns(
        bench,
        {
            "graph": lambda: _called(opened("graph", network), given),
            "compiled": lambda: _called(opened("compiled", network), given),
            "diffusers compiled by block": lambda: peer(bench, network, given, regions=True),
            "diffusers compiled": lambda: peer(bench, network, given, mode="default"),
        },
    )


def recipe(bench: Bench) -> Iterator[Figure]:
    """What diffusers advises for the highest speed; it may search for minutes."""
    network, given = unet(bench), call(bench, 1)

    def theirs() -> Call:
        if not bench.dry:
            config: Any = import_module("torch._inductor.config")
            for name in INDUCTOR:
                setattr(config, name, True)
            config.epilogue_fusion = False
        return peer(bench, network, given, layout=NHWC, mode="max-autotune", fused=True)

    yield from in_turns(
        bench,
        {
            "graph": lambda: _called(opened("graph", network), given),
            "diffusers' own recipe": theirs,
        },
    )


def opened(name: Any, network: UNet) -> Any:
    try:
        return open_runner(choose_runner(name, "cuda").name, network)
    except InputError as error:
        raise NotInThisVersionError(f"runner {name!r}") from error


def _called(runner: Any, given: tuple[Any, ...]) -> Call:
    return lambda: runner(*given)


def _copy(network: UNet, layout: torch.memory_format | None = None) -> UNet:
    with torch.device("meta"):
        made = UNet(network.params)
    return twin(network, made, layout)


def peer(
    bench: Bench,
    network: UNet,
    given: tuple[Any, ...],
    *,
    layout: torch.memory_format | None = None,
    mode: str | None = None,
    regions: bool = False,
    fused: bool = False,
    quiet: Callable[[], Any] = torch.inference_mode,
) -> Call:
    """diffusers' UNet with our weights. Raises ModuleNotFoundError where it is not installed."""
    made = _diffusers_unet(bench, network, layout)
    if fused:
        made.fuse_qkv_projections()
    if regions:
        made.compile_repeated_blocks(fullgraph=True)
    run: Any = made
    if mode is not None:
        run = torch.compile(made, mode=mode, fullgraph=True)  # pyright: ignore
    x_in, timestep, cond = given
    x_in = x_in if layout is None else x_in.contiguous(memory_format=layout)
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}

    def once() -> Tensor:
        with quiet():
            return run(x_in, timestep, cond.context, added_cond_kwargs=added, return_dict=False)[0]

    # Graphs that inductor captures own what they give, until the next call.
    return (lambda: once().clone()) if mode == "max-autotune" else once


def _diffusers_unet(bench: Bench, network: UNet, layout: torch.memory_format | None) -> Any:
    kind: Any = import_module("diffusers").UNet2DConditionModel
    shapes = bench.networks.unet
    crossed = [any(stage.depths) for stage in shapes.down]
    depths = [max(1, *stage.depths) for stage in shapes.down]
    with torch.device("meta"):
        made = kind(
            addition_embed_type="text_time",
            addition_time_embed_dim=((shapes.added_dim or 0) - bench.networks.pooled) // 6,
            attention_head_dim=[shapes.heads_of(stage.channels) for stage in shapes.down],
            block_out_channels=[stage.channels for stage in shapes.down],
            layers_per_block=len(shapes.down[0].depths),
            cross_attention_dim=shapes.context_dim,
            down_block_types=["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossed],
            up_block_types=["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in crossed[::-1]],
            projection_class_embeddings_input_dim=shapes.added_dim,
            transformer_layers_per_block=depths,
            use_linear_projection=True,
        )
    return twin(network, made, layout)


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
