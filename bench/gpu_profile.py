"""Which kernels run, for `bench/gpu.py`: by the graph where torch tells, and by a profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from gpu_case import Bench, Figure, failed, wait
from gpu_networks import PLAN, call, unet, vae, words
from gpu_unet import opened

from evidence.ptx.on_gpu import launched
from headstart.noise import Philox
from headstart.plan.schedule import NoiseSchedule
from headstart.runner.capture import Site
from headstart.runner.trajectory_graph import TrajectoryGraph

MOST = 25
"""Kernels that are listed, those of the most time first."""


def names(bench: Bench) -> Iterator[Figure]:
    try:
        yield from graph_nodes(bench)
    except Exception as error:
        yield "nodes of a run's graph", failed(error)
    network, inputs = unet(bench), call(bench, 1)
    for name in ("eager", "graph", "compiled"):
        try:
            run = partial(opened(name, network), *inputs)
            run()
            yield from profiled(bench, f"a pass, {name}", run)
        except Exception as error:
            yield f"a pass, {name}", failed(error)


def graph_nodes(bench: Bench) -> Iterator[Figure]:
    """What one graph of a whole run holds, and whether each row is one fused step.

    get_graph_data is of torch 2.13, needs cuda-bindings, and a driver of CUDA 13.1.
    """
    backend = KeptGraphs()
    networks = {name: unet(bench) for name in ("base", "distilled")}
    site: Any = Site(bench.device, backend)  # pyright: ignore[reportArgumentType]
    graph = TrajectoryGraph(networks, vae(bench), site=site)
    table, cond = PLAN.compile(NoiseSchedule.scaled_linear()), words(bench, 1)
    with launched(bench.emulated) if bench.emulated else nullcontext():
        graph(table, cond, Philox([0]), check=False, uncond=cond, shape=bench.networks.latent)
    nodes = nodes_of(*backend.graphs)
    steps = sum(count for name, count in nodes.items() if "fused_step" in name)
    yield "nodes of a run's graph", dict(nodes.most_common(MOST)) | {"all": nodes.total()}
    wrong = {} if steps == len(table) else {"failed": "a row is not one fused step"}
    yield "fused steps", {"nodes": steps, "rows": len(table), **wrong}
    host = [n for n in nodes if "host" in n.lower() and "memcpy" in n.lower()]
    yield "copies to or from the host", host or "none"


def nodes_of(graph: Any) -> Counter[str]:
    """The kernels, copies and fills of a captured graph, by name.

    Raises AttributeError, ImportError or RuntimeError where torch does not tell. An emulated graph
    names its own.
    """
    tape = getattr(graph, "tape", None)
    if tape is not None:
        return Counter(one.name for one in tape.calls)
    nodes = graph.get_graph_data()["nodes"]
    return Counter(node["kernel_name"] or node["node_type"] for node in nodes)


class KeptGraphs:
    """torch.cuda, but for graphs that keep what they were made of."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def CUDAGraph(self) -> Any:  # noqa: N802
        try:
            graph = torch.cuda.CUDAGraph(keep_graph=True)
        except TypeError:  # torch 2.6
            graph = torch.cuda.CUDAGraph()
        self.graphs.append(graph)
        return graph

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def profiled(bench: Bench, name: str, run: Callable[[], object]) -> Iterator[Figure]:
    """Kernels by their time on the device, of one call; in a dry run, operators of the host."""
    from torch.profiler import ProfilerActivity, profile

    wait()
    activities = [ProfilerActivity.CPU if bench.dry else ProfilerActivity.CUDA]
    with profile(activities=activities) as recorded:
        run()
        wait()
    kernels = [event for event in recorded.key_averages() if bench.dry or _on_device(event)]
    kernels.sort(key=_device_us, reverse=True)
    total = sum(map(_device_us, kernels))
    yield name, {"kernels": sum(k.count for k in kernels), "device_ms": total / 1e3}
    lines = [f"{k.key[:90]} {_device_us(k) / 1e3:.3f} ms x{k.count}" for k in kernels[:MOST]]
    yield f"{name}, most time", lines


def _on_device(event: Any) -> bool:
    return "CUDA" in str(event.device_type).upper()


def _device_us(event: Any) -> float:
    """Of the kernel itself; the name changed in torch 2.6."""
    own = getattr(event, "self_device_time_total", None)
    return float(getattr(event, "self_cuda_time_total", 0) if own is None else own)
