"""Which modules the kernels consist of: alternatives stay apart, and none is for tests alone."""

from __future__ import annotations

from collections.abc import Mapping

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


def unreached(sources: Mapping[str, str]) -> list[str]:
    """Modules of the kernels that neither their public names nor another package lead to."""
    kernels = {name: source for name, source in sources.items() if name.startswith(KERNELS)}
    todo = [KERNELS] + [name for name in sources if name not in kernels]
    reached: set[str] = set()
    while todo:
        current = todo.pop()
        if current not in reached:
            reached.add(current)
            todo.append(current.rpartition(".")[0] or current)
            for item in imports(sources.get(current, "")):
                if item.module.startswith(KERNELS):
                    todo += item.targets(kernels)
    return sorted(kernels.keys() - reached)


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
        "headstart_kernels.api": "def late(name):\n"
        "    import_module(f'headstart_kernels.impl.a_{name}')\n",
        "headstart_kernels.impl": "",
        "headstart_kernels.impl.a_step": "",
        "headstart_kernels.host": "",
        "headstart_kernels.testing": "import headstart_kernels.testing.oracle\n",
        "headstart_kernels.testing.oracle": "",
    }
    assert unreached(sources) == ["headstart_kernels.testing", "headstart_kernels.testing.oracle"]
