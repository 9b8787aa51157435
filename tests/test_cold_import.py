"""What a fresh interpreter loads: planning and error reports must not pay for torch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from fresh import python

ROOT = Path(__file__).parents[1]
SOURCES = [str(ROOT / room) for room in ("src", "kernels", "weights")]
HEAVY = ("torch", "transformers", "triton", "diffusers", "PIL", "safetensors")
PICTURE = {
    *("headstart", "headstart_kernels", "headstart_weights", "einops", "tokenizers", "PIL", "tqdm"),
    *("torch", "torchgen", "numpy"),
}
"""What a picture takes besides what `import torch` loads: a build for CUDA has more."""
NOT_OF_TORCH = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor")
"""What torch imports when it is first used, a second and more for each of the first two."""

DRIVER = """
import json, runpy, sys
try:
    {body}
finally:
    print("LOADED", json.dumps(sorted(sys.modules)))
"""
COMMAND = "sys.argv[1:] = {arguments!r}; runpy.run_module('headstart', run_name='__main__')"


def loaded_after(body: str, status: int = 0) -> tuple[set[str], str]:
    """Run `body` in a fresh interpreter -> (modules it had loaded at its end, its output)."""
    done = python("-c", DRIVER.format(body=body), PYTHONPATH=os.pathsep.join(SOURCES))
    output, mark, report = done.stdout.rpartition("LOADED ")
    assert mark and done.returncode == status, output + done.stderr
    return set(json.loads(report)), output + done.stderr


def test_importing_the_package_loads_no_third_party_module() -> None:
    bare, _ = loaded_after("pass")
    loaded, _ = loaded_after("import headstart")
    assert "headstart" in loaded
    tops = {name.partition(".")[0] for name in loaded - bare}
    assert tops - set(sys.stdlib_module_names) == {"headstart"}


def test_a_bridge_loads_without_its_host() -> None:
    loaded, _ = loaded_after("import headstart.bridges.diffusers, headstart.bridges.k_diffusion")
    assert "headstart.bridges.k_diffusion" in loaded
    assert not loaded & {"diffusers", "k_diffusion", "transformers", "peft"}


def test_clips_vocabulary_is_read_with_the_standard_library_alone() -> None:
    bare, _ = loaded_after("pass")
    body = (
        "from headstart.networks.vocabulary import clip_vocabulary as read; print(len(read().ids))"
    )
    loaded, output = loaded_after(body)
    assert output.strip() == "49408"
    tops = {name.partition(".")[0] for name in loaded - bare}
    assert tops - set(sys.stdlib_module_names) == {"headstart"}


def test_errors_are_reached_without_numpy() -> None:
    loaded, _ = loaded_after("import headstart; headstart.PlanError")
    assert "headstart.errors" in loaded
    assert not {"numpy", "torch"} & loaded


@pytest.mark.parametrize("name", ["NoiseSchedule", "Prediction", "Plan", "preset", "StepTable"])
def test_planning_names_load_numpy_at_most(name: str) -> None:
    loaded, _ = loaded_after(f"import headstart; headstart.{name}")
    assert {"headstart.plan", "headstart.prediction", "headstart.schedule"} & loaded
    assert set(HEAVY) & loaded == set()


def test_compiling_a_plan_needs_no_torch() -> None:
    body = (
        "import headstart as hs; "
        "print(len(hs.preset('lightning').compile(hs.NoiseSchedule.scaled_linear())))"
    )
    loaded, output = loaded_after(body)
    assert output.strip() == "4"
    assert set(HEAVY) & loaded == set()


@pytest.mark.parametrize(
    "arguments", [["plan"], ["plan", "--json"], ["presets"], ["--version"], ["--help"]]
)
def test_the_command_answers_without_torch(arguments: list[str]) -> None:
    loaded, output = loaded_after(COMMAND.format(arguments=arguments))
    assert output.strip()
    assert set(HEAVY) & loaded == set()


def test_a_torch_bearing_name_is_imported_on_first_use() -> None:
    loaded, _ = loaded_after("import headstart; headstart.Conditioning")
    assert "torch" in loaded


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "a fox", "--out", "fox"],
        ["compare", "a fox", "--seeds", "0", "--rounds", "1", "--out", "fox.png"],
    ],
)
def test_a_picture_of_the_bundled_pair_loads_torch_and_little_else(
    arguments: list[str], tmp_path: Path
) -> None:
    bare, _ = loaded_after("import multiprocessing, torch")
    arguments = [*arguments[:-1], str(tmp_path / arguments[-1]), "--device", "cpu"]
    loaded, _ = loaded_after(COMMAND.format(arguments=arguments))
    tops = {name.partition(".")[0] for name in loaded - bare}
    assert tops - set(sys.stdlib_module_names) <= PICTURE
    assert not set(NOT_OF_TORCH) & loaded


def test_an_unknown_name_is_an_attribute_error() -> None:
    _, output = loaded_after("import headstart; headstart.Pipeline", status=1)
    assert "AttributeError: module 'headstart' has no attribute 'Pipeline'" in output
