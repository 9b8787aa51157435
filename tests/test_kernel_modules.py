"""Which modules the kernels consist of: alternatives stay apart, and none is for tests alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from sources import imports, read_sources

KERNELS = "headstart_kernels"


def kernel_cross_imports(sources: Mapping[str, str]) -> list[str]:
    """Implementations of a kernel are alternatives, so none may lean on another."""
    room = "headstart_kernels.impl."
    return [
        f"{module}:{item.line} imports {target}"
        for module, source in sources.items()
        if module.startswith(room)
        for item in imports(source)
        if (target := item.target(sources)).startswith(room) and target != module
    ]


def needs(source: str) -> Iterator[str]:
    """The kernels' modules that a source names: in an import line, or for `import_module`."""
    for item in imports(source):
        if item.module.partition(".")[0] == KERNELS:
            yield from (item.module, f"{item.module}.{item.name}")
    if f"{KERNELS}." in source:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and str(node.value).startswith(f"{KERNELS}."):
                yield str(node.value)


def unreached(sources: Mapping[str, str]) -> list[str]:
    """Modules of the kernels that neither their public names nor another package lead to.

    A text that ends with a dot, as in an f-string, names every module below it.
    """
    kernels = {name for name in sources if name.startswith(f"{KERNELS}.")}
    todo = list(sources.keys() - kernels)
    reached: set[str] = set()
    while todo:
        current = todo.pop()
        if current not in reached:
            reached.add(current)
            todo.append(current.rpartition(".")[0] or current)
            for name in needs(sources.get(current, "")):
                below = name if name.endswith(".") else f"{name} "
                todo += [other for other in kernels if f"{other} ".startswith(below)]
    return sorted(kernels - reached)


def test_implementations_do_not_import_each_other() -> None:
    assert kernel_cross_imports(read_sources()) == []


def test_the_wheel_holds_no_module_that_only_tests_use() -> None:
    assert unreached(read_sources()) == []


def test_planted_violations_are_caught() -> None:
    assert kernel_cross_imports(
        {
            "headstart_kernels.impl.reference": "",
            "headstart_kernels.impl.triton": "from headstart_kernels.impl import reference\n",
        }
    )
    assert not kernel_cross_imports(
        {
            "headstart_kernels.impl.reference": "",
            "headstart_kernels.api": "from headstart_kernels.impl import reference\n",
        }
    )
    sources = {
        "headstart.noise": "from headstart_kernels import host\n",
        "headstart_kernels": "import headstart_kernels.api\n",
        "headstart_kernels.api": "def late(name):\n    load(f'headstart_kernels.impl.{name}')\n",
        "headstart_kernels.impl": "",
        "headstart_kernels.impl.one": "",
        "headstart_kernels.host": "",
        "headstart_kernels.testing": "import headstart_kernels.testing.oracle\n",
        "headstart_kernels.testing.oracle": "",
    }
    assert unreached(sources) == ["headstart_kernels.testing", "headstart_kernels.testing.oracle"]
