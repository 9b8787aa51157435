"""Who may import whom, which modules never load torch, and how large a file may grow.

Everything is read from the source with `ast`; nothing is imported. Every rule is also run on a
planted violation, so a rule that has stopped looking fails here.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

from sources import imports, read_sources

ROOT = Path(__file__).parents[1]


def read_order() -> list[str]:
    """Every module in the order that CONTRIBUTING.md prints: it imports only what is before it.

    A line "room/ a b" stands for the room itself and its modules room.a and room.b. Of a package
    that has a line of its own only the modules: its `__init__` imports them.
    """
    (block,) = re.findall(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    order: list[str] = []
    for first, *others in map(str.split, block.splitlines()):
        room = first.rstrip("/")
        room_name = [] if room in order or first == "headstart_kernels/" else [room]
        order += [*room_name, *(f"{room}.{name}" if first != room else name for name in others)]
    return order


POSITION = {name: position for position, name in enumerate(read_order())}
BUNDLED = ("headstart_kernels", "headstart_weights", "headstart_weights.recipe")
ROOMS = {name.rpartition(".")[0] for name in POSITION if "." in name} - set(BUNDLED)

TORCH_FREE = {
    *("errors", "lazy", "output", "plan", "checkpoint", "convert", "pictures.lettering"),
    *(
        "pictures.chart",
        "pictures.paper",
        "networks.vocabulary",
        "networks.prompt_style",
        "adapters.names",
        "adapters.strength",
    ),
    *("spaces.extractor", "metrics.metrics", "metrics.gram", "metrics.resample"),
    *("sweep.jobs", "sweep.ledger"),
    *("traces.structure", "traces.timeline", "traces.strip", "traces.filmstrip"),
    *("traces.page", "traces.animation", "commands", "cli", "__main__"),
    *("pictures.inline", "study.digits", "study.table", "study.paper", "study.canvas"),
    *("study.labels", "study.scatter", "study.lines", "study.figures", "study.page"),
    *("study.pdf", "study.report"),
    *("headstart", "headstart_weights"),
}
"""Rooms, of which every module counts, and single modules."""
TORCH_BEARING = {"convert.pickle_contents", "convert.unpickle"}
"""The only modules of such rooms that load it."""
HEAVY = {"torch", "transformers", "triton", "diffusers", "peft", "einops", "headstart_kernels"}
DISTRIBUTION = {"PIL": "pillow", "tokenizers": "transformers"}  # transformers requires tokenizers
EXTRA_OF = {
    "checkpoint.gguf": "gguf",
    "runner.openvino": "openvino",
    "commands.parser": "completion",
    "headstart_weights.recipe": "train",
    "metrics.features": "features",
    "study": "study",
}
"""Of a room or a module."""
FORBIDDEN_WORDS = {
    *("utils", "util", "common", "misc", "helpers", "helper"),
    *("manager", "wrapper", "handler"),
}
MAY_PRINT = {"commands", "cli", "__main__", "headstart_weights.recipe"}
MAY_PRINT |= {"convert.unpickle"}  # a process of its own, which answers on its stdout
FILE_LINES, FUNCTION_LINES = 400, 80


def room_of(module: str) -> str | None:
    """The name a module has in the order, or None for a module outside this repository."""
    top, _, rest = module.partition(".")
    if top == "headstart":
        return rest or "headstart"
    if top == "headstart_kernels":
        return module
    if top == "headstart_weights" and rest.startswith("recipe"):
        return "headstart_weights.recipe"
    return top if top in BUNDLED else None


def among(module: str, names: set[str]) -> bool:
    """Whether `names` has this module or its room."""
    here = str(room_of(module))
    return bool(names & {here, here if here in BUNDLED else here.partition(".")[0]})


def upward(sources: Mapping[str, str]) -> list[str]:
    """Imports of what is not before; those under TYPE_CHECKING or inside a function count too.

    Only the package's own table of public names may name every room: it imports none of them.
    """
    found: list[str] = []
    for module, source in sources.items():
        here = room_of(module)
        assert here in POSITION, f"{module} has no place: give it one in CONTRIBUTING.md"
        for item in imports(source):
            for target in item.targets(sources):
                there = room_of(target)
                if there is None or there == here or (here == "headstart" and not item.eager):
                    continue
                assert there in POSITION, f"{module}:{item.line}: {target} has no place"
                if POSITION[there] >= POSITION[here]:
                    found.append(f"{module}:{item.line} imports {target}")
    return found


def loads(module: str, sources: Mapping[str, str]) -> dict[str, str]:
    """Everything that importing `module` loads -> our module whose import line does it."""
    names: set[str] = set()
    todo = [module]
    rooms: dict[str, str] = {}
    while todo:
        current = todo.pop()
        if current in names or current not in sources:
            continue
        names.add(current)
        todo += [current.rpartition(".")[0]]
        for item in imports(sources[current]):
            if item.eager:
                target = item.target(sources)
                rooms.setdefault(target.partition(".")[0], current)
                rooms.setdefault(target, current)
                todo.append(target)
    return rooms


def heavy(sources: Mapping[str, str]) -> list[str]:
    problems: list[str] = []
    for module in sources:
        if among(module, TORCH_FREE) and room_of(module) not in TORCH_BEARING:
            loaded = loads(module, sources)
            for name in sorted(HEAVY | {"safetensors.torch"}):
                if name in loaded:
                    problems.append(f"importing {module} loads {name}: see {loaded[name]}")
    return problems


def relative(sources: Mapping[str, str]) -> list[str]:
    return [
        f"{module}:{item.line}"
        for module, source in sources.items()
        for item in imports(source)
        if item.relative
    ]


def forbidden_names(sources: Mapping[str, str]) -> list[str]:
    problems = [
        module
        for module in sources
        if FORBIDDEN_WORDS & {word for part in module.split(".") for word in part.split("_")}
    ]
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and node.name.lower().endswith(
                tuple(FORBIDDEN_WORDS)
            ):
                problems.append(f"{module}.{node.name}")
    return problems


def prints(sources: Mapping[str, str]) -> list[str]:
    return [
        f"{module}:{node.lineno}"
        for module, source in sources.items()
        if not among(module, MAY_PRINT)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]


def oversized(sources: Mapping[str, str]) -> list[str]:
    problems = [
        f"{module}: {len(source.splitlines())} lines, {FILE_LINES} allowed"
        for module, source in sources.items()
        if len(source.splitlines()) > FILE_LINES
    ]
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    problems.append(
                        f"{module}.{node.name}: {length} lines, {FUNCTION_LINES} allowed"
                    )
    return problems


def undeclared(sources: Mapping[str, str], declared: Mapping[str, set[str]]) -> list[str]:
    """Third-party imports that the project file does not list for that place."""
    problems: list[str] = []
    for module, source in sources.items():
        here = str(room_of(module))
        extra = EXTRA_OF.get(here) or EXTRA_OF.get(here.partition(".")[0], "")
        allowed = declared[""] | declared[extra] | sys.stdlib_module_names
        for item in imports(source):
            top = item.module.partition(".")[0]
            names = {top, DISTRIBUTION.get(top, top.replace("_", "-"))}
            if room_of(top) is None and not item.relative and not names & allowed:
                problems.append(f"{module}:{item.line} imports {top}")
    return problems


def declared_names() -> dict[str, set[str]]:
    """Extra -> distribution names in pyproject.toml; "" is what every installation has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in lines}
        for extra, lines in groups.items()
    }


def test_every_module_imports_only_rows_above_it() -> None:
    assert upward(read_sources()) == []


def test_planning_modules_never_load_torch() -> None:
    assert heavy(read_sources()) == []


def test_imports_are_absolute() -> None:
    assert relative(read_sources()) == []


def test_names_say_what_a_thing_is() -> None:
    assert forbidden_names(read_sources()) == []


def test_only_the_command_line_prints() -> None:
    assert prints(read_sources()) == []


def test_every_third_party_import_is_a_declared_dependency() -> None:
    assert undeclared(read_sources(), declared_names()) == []


def test_files_and_functions_stay_small() -> None:
    assert oversized(read_sources()) == []


def furnished(sources: Mapping[str, str]) -> list[str]:
    """Rooms whose `__init__` does more than say what the room is for."""
    return [
        module
        for module, source in sources.items()
        if room_of(module) in ROOMS
        and not (ast.get_docstring(tree := ast.parse(source)) and len(tree.body) == 1)
    ]


def test_the_order_names_every_module_once() -> None:
    assert sorted(read_order()) == sorted({str(room_of(module)) for module in read_sources()})


def test_a_room_says_what_it_is_for_and_imports_nothing() -> None:
    assert furnished(read_sources()) == []


def test_a_planted_upward_import_is_caught() -> None:
    sources = {
        "headstart": "",
        "headstart.engine.engine": "",
        "headstart.plan.plan": "from headstart.engine.engine import Engine\n",
        "headstart.sampler": "def run():\n    import headstart.engine.engine\n",
        "headstart.networks.unet": "from headstart.networks import vae\n",
        "headstart.networks.vae": "import torch\nfrom headstart.networks import unet as other\n",
        "headstart_kernels": "import headstart.errors\n",
        "headstart_kernels.api": "",
        "headstart_kernels.dispatch": "def load(name):\n"
        "    import_module(f'headstart_kernels.impl.native_{name}')\n"
        "    import_module('headstart_kernels.api')\n",
        "headstart_kernels.impl.native_step": "from headstart_kernels.dispatch import load\n",
        "headstart.errors": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from headstart.plan.plan import Plan\n",
    }
    assert upward(sources) == [
        "headstart.plan.plan:1 imports headstart.engine.engine",
        "headstart.sampler:2 imports headstart.engine.engine",
        "headstart.networks.unet:1 imports headstart.networks.vae",
        "headstart_kernels:1 imports headstart.errors",
        "headstart_kernels.dispatch:3 imports headstart_kernels.api",
        "headstart_kernels.impl.native_step:1 imports headstart_kernels.dispatch",
        "headstart.errors:3 imports headstart.plan.plan",
    ]


def test_downward_imports_and_the_lazy_table_of_names_are_allowed() -> None:
    sources = {
        "headstart": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from headstart.plan.plan import Plan as Plan\n",
        "headstart.errors": "",
        "headstart.plan.plan": "import numpy\nfrom headstart.errors import PlanError\n",
        "headstart_weights": "import json\n",
        "headstart_weights.recipe": "import torch\nfrom headstart.plan.plan import Plan\n",
    }
    assert upward(sources) == []
    assert heavy(sources) == []


def test_a_planted_torch_import_is_caught_also_through_another_module() -> None:
    sources = {
        "headstart": "",
        "headstart.plan.schedule": "import torch.nn\n",
        "headstart.noise": "from torch import Tensor\n",
        "headstart.cli": "from headstart.noise import Philox\n",
        "headstart.plan.plan": "def late():\n    import torch\n",
        "headstart.plan.leg": "try:\n    import transformers\nexcept ImportError:\n    pass\n",
        "headstart.checkpoint.keymap": "from safetensors.torch import load\n",
        "headstart.convert.unpickle": "import torch\n",
    }
    assert heavy(sources) == [
        "importing headstart.plan.schedule loads torch: see headstart.plan.schedule",
        "importing headstart.cli loads torch: see headstart.noise",
        "importing headstart.plan.leg loads transformers: see headstart.plan.leg",
        "importing headstart.checkpoint.keymap loads safetensors.torch: "
        "see headstart.checkpoint.keymap",
    ]


def test_a_torch_import_in_the_package_init_spoils_every_torch_free_module() -> None:
    sources = {"headstart": "import torch\n", "headstart.plan": "", "headstart.plan.leg": ""}
    assert len(heavy(sources)) == 3


def test_planted_small_violations_are_caught() -> None:
    declared = {"": {"numpy", "pillow"}, "train": {"resvg-py"}, "features": {"efficientnet"}}
    declared["study"] = {"matplotlib"}
    fine = {"headstart.plan": "import json, numpy.linalg\nfrom PIL import Image\n"}
    assert not undeclared(fine, declared)
    assert undeclared({"headstart.plan": "def late():\n    import resvg_py\n"}, declared)
    assert not undeclared({"headstart_weights.recipe.data": "import resvg_py\n"}, declared)
    assert undeclared({"headstart.metrics.metrics": "import efficientnet\n"}, declared)
    assert not undeclared({"headstart.metrics.features": "import efficientnet\n"}, declared)
    drawing = "def draw():\n    import matplotlib\n"
    assert undeclared({"headstart.metrics.metrics": drawing}, declared)
    assert not undeclared({"headstart.study.figures": drawing}, declared)
    assert relative({"headstart.plan": "from . import errors\n"})
    assert relative({"headstart.plan": "from .errors import PlanError\n"})
    assert forbidden_names({"headstart.tensor_utils": ""})
    assert forbidden_names({"headstart.plan": "class PlanManager: ...\n"})
    assert prints({"headstart.plan": "def show():\n    print(1)\n"})
    assert furnished({"headstart.plan": '"""A run."""\nimport json\n'})
    assert furnished({"headstart.plan": ""})
    assert not furnished({"headstart.plan": '"""A run."""\n', "headstart.plan.leg": "import a\n"})
    assert oversized({"headstart.plan": "\n" * (FILE_LINES + 1)})
    assert oversized({"headstart.plan": "def long():\n" + "    pass\n" * FUNCTION_LINES})
    assert not oversized({"headstart.plan": "def long():\n" + "    pass\n" * (FUNCTION_LINES - 1)})
