"""Engines of others for `bench/peers.py`: a module of ours converted, compiled and called by each.

Each gives (call of tensors -> tensor, what converting took). Shapes are fixed. Names and options:
docs.openvino.ai (convert_model, compile_model, INFERENCE_PRECISION_HINT), onnxruntime.ai
(SessionOptions), github.com/william-murray1204/stable-diffusion-cpp-python.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from sdxl import Memory
from torch import Tensor, nn

Program = tuple[Callable[..., Tensor], dict[str, float]]


@contextmanager
def _measured(what: str, costs: dict[str, float]) -> Iterator[None]:
    memory, begin = Memory(), time.perf_counter()
    memory.start()
    yield
    costs[f"{what}_s"] = round(time.perf_counter() - begin, 2)
    costs[f"{what}_peak_bytes"] = memory.stop()["anonymous"]


def openvino(
    hint: str, module: nn.Module, names: Sequence[str], example: tuple[Tensor, ...]
) -> Program:
    """hint: "f32" or "bf16", what it may compute in."""
    import openvino as ov

    costs: dict[str, float] = {}
    with _measured("convert", costs), torch.no_grad():
        shapes = [list(tensor.shape) for tensor in example]
        model = ov.convert_model(module, example_input=example, input=shapes)
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
    }
    with _measured("compile", costs):
        request = ov.Core().compile_model(model, "CPU", options).create_infer_request()

    def call(*tensors: Tensor) -> Tensor:
        outputs = request.infer([tensor.numpy() for tensor in tensors], share_inputs=True)
        return torch.from_numpy(outputs[0])

    return call, costs


def onnxruntime(module: nn.Module, names: Sequence[str], example: tuple[Tensor, ...]) -> Program:
    import onnxruntime as ort

    costs: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with _measured("convert", costs), torch.no_grad():
            torch.onnx.export(
                module, example, path, dynamo=True, external_data=True, input_names=list(names),
                output_names=["out"], verbose=False,
            )  # fmt: skip
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        with _measured("compile", costs):
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = [own.name for own in session.get_inputs()]

    def call(*tensors: Tensor) -> Tensor:
        arrays = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, {name: arrays[name] for name in inputs})[0])

    return call, costs


STEPS = 3
"""Of a run of stable-diffusion.cpp: the first is warm-up, the others are timed."""


def stable_diffusion_cpp(wtype: str, model: Path, size: int, threads: int) -> Callable[[], float]:
    """A call gives seconds of one step: its API runs whole prompts, and says when a step is done.

    model   a diffusers folder: it knows a UNet in diffusers' names there alone; size: of the latent
    """
    from stable_diffusion_cpp import StableDiffusion

    engine = StableDiffusion(
        model_path=str(model), n_threads=threads, wtype=wtype, vae_decode_only=True, verbose=False
    )

    def call() -> float:
        ends: list[float] = []

        def ended(step: int, steps: int, seconds: float) -> None:
            if steps == STEPS:
                ends.append(time.perf_counter())

        engine.generate_image(
            "a fox", width=8 * size, height=8 * size, cfg_scale=1.0, sample_method="euler",
            sample_steps=STEPS, seed=0, progress_callback=ended,
        )  # fmt: skip
        return (ends[-1] - ends[-STEPS]) / (STEPS - 1)

    return call
