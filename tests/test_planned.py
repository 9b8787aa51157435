"""What headers tell of a request is an error before weights are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_readme_commands import bare, whole

import headstart_weights
from headstart.cli import main
from headstart.engine.engine import Engine

BASE, LIGHTNING = "sd_xl_base_1.0.safetensors", "sdxl_lightning_4step_unet.safetensors"
TURBO = "sd_xl_turbo_1.0_fp16.safetensors"


class LoadedError(Exception):
    """Weights were about to be read."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, make in {BASE: whole(0), LIGHTNING: bare, TURBO: whole(4)}.items():
        make(folder / name)
    return folder


@pytest.fixture
def typed(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What a command prints on stderr before it would read weights, or as it fails."""

    def load(*_: object, **__: object) -> None:
        raise LoadedError

    def run(*words: str, command: str = "sample") -> str:
        out = ["--out", "out.png" if command == "compare" else "out"]
        try:
            status = main([command, "a castle", *words, *out])
        except LoadedError:
            status = 0
        output = capsys.readouterr().err
        assert ("error:" in output) == (status != 0), output
        return output

    monkeypatch.chdir(files)
    monkeypatch.setattr(Engine, "load", load)
    return run


def test_files_in_each_others_place_are_an_error_or_with_a_preset_a_warning(
    typed: Callable[..., str],
) -> None:
    swapped = ("--base", LIGHTNING, "--distilled", BASE)
    assert "error: the base is taken for Lightning" in typed(*swapped)
    for command in ("sample", "compare"):
        shown = typed(*swapped, "--preset", "lightning", command=command)
        assert "warning: the base is taken for Lightning" in shown and "swapped?" in shown
    shown = typed("--base", LIGHTNING, "--distilled", TURBO)
    assert "warning: the base is taken for Lightning, a distilled model too" in shown


def test_bundled_files_in_each_others_place_are_a_warning(typed: Callable[..., str]) -> None:
    """Their names say nothing of a distillation, and their metadata does."""
    base, distilled, other = (
        str(headstart_weights.path(role)) for role in ("base", "distilled", "distilled_unguided")
    )
    shown = typed("--base", distilled, "--distilled", base)
    assert "warning: the base is taken for a model distilled at timesteps 999,749,499" in shown
    assert "swapped?" in shown
    shown = typed("--base", distilled, "--distilled", other)
    assert "warning: the base is taken for" in shown and "not distilled, so give that" in shown
    for right in (distilled, base):
        assert "warning" not in typed("--base", base, "--distilled", right)


def test_a_model_that_is_missing_is_named_with_its_option(typed: Callable[..., str]) -> None:
    assert "--distilled is missing: give --distilled FILE" in typed("--base", BASE)
    assert "--distilled is missing" in typed("--base", BASE, command="compare")
    assert "--base is missing: give --base FILE" in typed("--distilled", LIGHTNING)
    for plan in ("distilled", "skip-first"):
        assert "missing" not in typed("--distilled", LIGHTNING, "--plan", plan)
    assert "missing" not in typed("--base", BASE, "--plan", "base", "--preset", "lightning")


def test_a_preset_that_the_file_is_not_is_a_warning_with_the_right_options(
    typed: Callable[..., str],
) -> None:
    shown = typed("--base", BASE, "--distilled", LIGHTNING, "--preset", "turbo")
    assert "warning: the distilled model is taken for Lightning" in shown
    assert "use --preset lightning --steps 4" in shown
    shown = typed("--base", BASE, "--distilled", LIGHTNING, "--timesteps", "999,700,500,200")
    assert shown.count("trained at timesteps") == 1


def test_a_step_count_without_a_network_is_a_warning(
    typed: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--preset", "lightning", "--steps", "5"]) == 0
    message = "lightning has a network for each step count, and none for 5: give --steps 2, 4 or 8"
    assert message in capsys.readouterr().err
    assert main(["plan", "--preset", "lightning", "--steps", "8"]) == 0
    assert main(["plan", "--preset", "lcm", "--steps", "6"]) == 0
    assert capsys.readouterr().err == ""


def test_a_repository_in_place_of_a_file_is_answered_with_the_download(
    typed: Callable[..., str],
) -> None:
    for words in (("--base", "stabilityai/sdxl-turbo"), ("--lora", "ByteDance/Hyper-SD")):
        pair = () if "--base" in words else ("--base", BASE)
        assert "`hf download " in typed(*pair, "--distilled", LIGHTNING, *words)
