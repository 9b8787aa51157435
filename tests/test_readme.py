"""README.md against the code: its first commands are CI's, its names exist, its Python runs."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from contextlib import suppress
from functools import reduce
from importlib.metadata import PackageNotFoundError, requires
from itertools import chain
from pathlib import Path

import pytest
from fresh import python

import headstart as hs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
WEIGHTS = ROOT / "weights" / "headstart_weights"
NEED_TORCHVISION = {"torchvision", "clip-anytorch", "open-clip-torch", "timm", "dreamsim", "lpips"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def marked(name: str) -> list[str]:
    """Lines of the one shell block that follows `<!-- ci: name -->`."""
    (block,) = re.findall(rf"<!-- ci: {name} -->\n```bash\n(.*?)```", README, flags=re.DOTALL)
    return block.splitlines()


def constraints() -> dict[str, str]:
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        bare = line.partition("#")[0].strip()
        if bare:
            name, version = bare.split("==")
            pins[name] = version
    return pins


def public(path: list[str]) -> object:
    """`["Plan", "compile"]` -> hs.Plan.compile; AttributeError names what is not there."""
    return reduce(getattr, path, hs)


def names_used(code: str) -> list[list[str]]:
    """Attribute paths on `hs` in a piece of code: `hs.Plan.compile` gives also `hs.Plan`."""
    paths: list[list[str]] = []
    for node in ast.walk(ast.parse(code)):
        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.insert(0, node.attr)
            node = node.value
        if path and isinstance(node, ast.Name) and node.id == "hs":
            paths.append(path)
    return paths


def test_ci_runs_the_readmes_test_commands() -> None:
    listed = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "--list"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    ).stdout.splitlines()
    install, tests = marked("tests")
    assert listed[0] == install
    assert listed[-1] == tests
    assert [line.split()[0] for line in listed[2:-1]] == [
        ".venv/bin/ruff",
        ".venv/bin/ruff",
        ".venv/bin/pyright",
    ]


def test_both_first_commands_make_the_same_pinned_environment() -> None:
    clone, install, compare = marked("compare")
    assert clone.startswith("git clone ")
    assert marked("tests")[0] == install.removesuffix(" .") + " -e '.[test]'"
    assert compare.startswith(".venv/bin/headstart compare ")


def test_every_dependency_is_pinned_to_a_version_it_allows() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = constraints()
    extras = project["optional-dependencies"].values()
    for line in chain(project["dependencies"], *extras):
        requirement = Requirement(line)
        assert requirement.name in pins, f"{line} has no pin in constraints.txt"
        assert pins[requirement.name] in requirement.specifier, line


def test_no_extra_brings_torchvision_or_what_is_not_pinned() -> None:
    """torchvision wants a torch of its own. Looks into what is installed here, but for torch."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {canonicalize_name(name) for name in constraints()}
    left = [line for extra in project["optional-dependencies"].values() for line in extra]
    names = {"torch"}
    while left:
        requirement = Requirement(left.pop())
        name = canonicalize_name(requirement.name)
        if name in names or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        names.add(name)
        assert name in pins and name not in NEED_TORCHVISION, name
        with suppress(PackageNotFoundError):
            left += requires(name) or []
    assert len(names) > 20 and not NEED_TORCHVISION & pins


def test_every_python_block_uses_names_that_exist() -> None:
    paths = [path for code in blocks("python") for path in names_used(code)]
    assert len(paths) > 5
    for path in paths:
        assert public(path) is not None


def test_a_planted_wrong_name_is_caught() -> None:
    paths = names_used("import headstart as hs\nhs.Plan.complie(1).x")
    assert ["Plan", "complie"] in paths
    with pytest.raises(AttributeError, match="complie"):
        public(["Plan", "complie"])


@pytest.mark.parametrize("code", blocks("python"))
def test_every_python_block_runs_with_the_bundled_pair(code: str, tmp_path: Path) -> None:
    if not list(WEIGHTS.glob("*.safetensors")):
        pytest.skip("this checkout has no trained weights")
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md"]
)
def test_every_file_a_page_points_to_exists(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    paths = re.findall(
        r"`(\.?\w[\w.-]*/[\w./-]*|[A-Z][\w-]+\.md|[\w-]+\.(?:txt|toml)|LICENSE)`", text
    )
    assert len(paths) > 5 or page != "README.md"
    folders = (ROOT, (ROOT / page).parent, ROOT / "src" / "headstart")  # rooms are named alone
    missing = [path for path in paths if not any((folder / path).exists() for folder in folders)]
    assert missing == []
