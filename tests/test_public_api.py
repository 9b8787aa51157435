"""The public names and their signatures, compared with the committed `public_api.txt`.

After a deliberate change: python tests/test_public_api.py > tests/public_api.txt
"""

from __future__ import annotations

import ast
import difflib
import inspect
import tomllib
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

import headstart as hs

SNAPSHOT = Path(__file__).with_name("public_api.txt")
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def describe() -> str:
    """One line for each public name, field, method and enum member, in alphabetical order."""
    lines: list[str] = []
    for name in dir(hs):
        if not name.startswith("_"):
            value = getattr(hs, name)
            lines += _describe_class(name, value) if isinstance(value, type) else []
            lines += [] if isinstance(value, type) else [f"{name}{_signature(value)}"]
    return "\n".join(lines) + "\n"


class _Written(str):
    """An annotation as its source has it: without the quotes that a string's repr adds."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _signature(function: Callable[..., object]) -> str:
    signature = inspect.signature(function)
    parameters = [
        p.replace(annotation=_written(p.annotation)) for p in signature.parameters.values()
    ]
    returned = _written(signature.return_annotation)
    return str(signature.replace(parameters=parameters, return_annotation=returned))


def _written(annotation: object) -> object:
    text = getattr(annotation, "__forward_arg__", annotation)
    return _Written(text) if isinstance(text, str) else annotation


def _describe_class(name: str, cls: type) -> Iterator[str]:
    if issubclass(cls, Exception):
        yield f"{name}: {', '.join(base.__name__ for base in cls.__bases__)}"
        return
    if issubclass(cls, Enum):
        yield f"{name}: {', '.join(f'{member.name}={member.value!r}' for member in cls)}"
    else:
        yield f"{name}{_signature(cls)}"
    for member, value in sorted(vars(cls).items()):
        if member.startswith("_") or isinstance(value, Enum):
            continue
        plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(plain):
            yield f"{name}.{member}{_signature(plain)}"
        elif isinstance(value, property) or hasattr(value, "func"):
            yield f"{name}.{member}"


def test_public_names_and_signatures_are_the_committed_ones() -> None:
    difference = "\n".join(
        difflib.unified_diff(
            SNAPSHOT.read_text().splitlines(),
            describe().splitlines(),
            "committed",
            "now",
            "",
            "",
            0,
        )
    )
    assert not difference, f"{difference}\n\nIf this is meant:{(__doc__ or '').partition(':')[2]}"


def test_type_checkers_see_the_names_that_run_time_serves() -> None:
    tree = ast.parse(Path(hs.__file__ or "").read_text())
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("headstart."):
            assert [alias.asname for alias in node.names] == [alias.name for alias in node.names]
            modules |= {alias.name: node.module or "" for alias in node.names}
    assert modules == vars(hs)["_MODULE_OF"]


def test_every_public_name_has_a_docstring() -> None:
    bare = [name for name in dir(hs) if not name.startswith("_") and not getattr(hs, name).__doc__]
    assert bare == []


def test_the_version_is_the_projects() -> None:
    assert hs.__version__ == tomllib.loads(PYPROJECT.read_text())["project"]["version"]


if __name__ == "__main__":
    import sys

    sys.stdout.write(describe())
