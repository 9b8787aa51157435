"""The source of everything that goes into the wheel, and its import lines; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ROOTS = (ROOT / "src", ROOT / "kernels", ROOT / "weights")


class Import(NamedTuple):
    module: str
    name: str | None
    """The b of `from a import b`, which may be a module or something inside `a`."""
    line: int
    eager: bool
    """Runs when the module is imported: not inside a function, not under TYPE_CHECKING."""
    relative: bool = False

    def target(self, sources: Mapping[str, str]) -> str:
        """The module this line needs: `a.b` where that is one of ours, else `a`."""
        inner = f"{self.module}.{self.name}"
        return inner if inner in sources else self.module

    def targets(self, sources: Mapping[str, str]) -> list[str]:
        """The same for a text that may name a whole room."""
        if not self.module.endswith("."):
            return [self.target(sources)]
        return [module for module in sources if module.startswith(self.module)]


def read_sources() -> dict[str, str]:
    """Dotted module name -> source text of everything that goes into the wheel."""
    sources: dict[str, str] = {}
    for root in ROOTS:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


@cache
def imports(source: str) -> list[Import]:
    """The import lines of a source, then what it gives to `import_module` as a text.

    The name of a module that begins such a text ends with a dot: every module below it is meant.
    """
    tree = ast.parse(source)
    return [*_walk(tree.body, eager=True), *(_by_text(tree) if "import_module" in source else ())]


def _by_text(tree: ast.AST) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            text, *_ = node.args
            if isinstance(text, ast.Constant):
                yield Import(str(text.value), None, node.lineno, eager=False)
            elif isinstance(text, ast.JoinedStr) and isinstance(text.values[0], ast.Constant):
                room = str(text.values[0].value).rpartition(".")[0]
                yield Import(f"{room}.", None, node.lineno, eager=False)


def _walk(body: list[ast.stmt], eager: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(node.module or "", alias.name, node.lineno, eager, node.level > 0)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _walk(node.body, eager=False)
            yield from _walk(node.orelse, eager)
        else:
            inner = eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for field in ("body", "orelse", "finalbody"):
                yield from _walk(getattr(node, field, []), inner)
            for branch in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
                yield from _walk(branch.body, inner)
