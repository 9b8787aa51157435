"""The built distributions, not the checkout: what is inside, and that it runs somewhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("src/headstart", "kernels/headstart_kernels", "weights/headstart_weights")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, without the checkout on its path -> its standard output."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(source: Path, target: str, out: Path) -> Path:
    pytest.importorskip("build")
    run(sys.executable, "-m", "build", "--no-isolation", f"--{target}", "-o", out, source, cwd=out)
    (artefact,) = out.iterdir()
    return artefact


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts folder of a new environment that holds the wheel and borrows its dependencies."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home)
    scripts = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = (sys.executable, "-m", "pip", "--python", scripts / "python", "install")
    run(*pip, "--no-deps", "--no-index", wheel, cwd=home)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = run(scripts / "python", "-c", code, cwd=home).strip()
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return scripts


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def source_files() -> set[str]:
    """Every file of the three import roots as the wheel should name it, caches left out."""
    return {
        path.relative_to((ROOT / room).parent).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_source_file_and_every_weight(wheel: Path) -> None:
    inside = {name for name in wheel_names(wheel) if ".dist-info/" not in name}
    assert inside == source_files()
    assert {f"{room.split('/')[1]}/py.typed" for room in ROOMS} <= inside


def test_the_wheel_carries_its_licence_and_the_notice_of_the_artwork(wheel: Path) -> None:
    carried = {name.rpartition("/licenses/")[2] for name in wheel_names(wheel)}
    assert {"LICENSE", "NOTICE"} <= carried


def test_the_wheel_is_small_enough_to_be_downloaded_without_thought(wheel: Path) -> None:
    assert wheel.stat().st_size < 40e6


def test_a_wheel_built_from_the_sdist_is_the_same(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    (tmp_path / "out").mkdir()
    again = build(source, "wheel", tmp_path / "out")
    assert wheel_names(again) == wheel_names(wheel)


def test_the_sdist_holds_tests_and_bench(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"constraints.txt", "LICENSE", "README.md", "pyproject.toml"} <= names
    assert {"tests/test_wheel.py", "bench/README.md"} <= names


def test_the_installed_package_is_the_one_imported(installed: Path, tmp_path: Path) -> None:
    code = (
        "import headstart, headstart_kernels, headstart_weights; "
        "print(headstart.__file__, headstart_kernels.__file__, headstart_weights.__file__)"
    )
    for file in run(installed / "python", "-c", code, cwd=tmp_path).split():
        assert Path(file).is_relative_to(installed.parent), file


def test_the_installed_command_answers(installed: Path, tmp_path: Path) -> None:
    import headstart

    assert headstart.__version__ in run(installed / "headstart", "--version", cwd=tmp_path)
    assert run(installed / "headstart", "plan", cwd=tmp_path).strip()
    table = run(installed / "python", "-m", "headstart", "plan", "--json", cwd=tmp_path)
    assert json.loads(table)


def test_every_public_name_works_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    code = "import headstart as hs; print(len([getattr(hs, name) for name in dir(hs)]))"
    assert int(run(installed / "python", "-c", code, cwd=tmp_path)) > 20


def test_the_bundled_weights_are_found_where_they_are_installed(
    installed: Path, tmp_path: Path
) -> None:
    weights = sorted((ROOT / "weights" / "headstart_weights").glob("*.safetensors"))
    if not weights:
        pytest.skip("this checkout has no trained weights to install")
    code = (
        "import importlib.resources as r; room = r.files('headstart_weights'); "
        "print(*(f'{p.name}={len(p.read_bytes())}' for p in room.iterdir() if p.is_file()))"
    )
    paths = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert {f"{path.name}={path.stat().st_size}" for path in weights} <= set(paths)
