"""Names of the Hugging Face Hub in place of paths."""

from __future__ import annotations

from pathlib import Path

import pytest

import headstart as hs
from headstart.checkpoint.hub import download_of

TURBO = "hf download stabilityai/sdxl-turbo"


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("stabilityai/sdxl-turbo", f"{TURBO} FILE --local-dir models"),
        ("https://huggingface.co/stabilityai/sdxl-turbo", f"{TURBO} FILE --local-dir models"),
        ("https://huggingface.co/stabilityai/sdxl-turbo/", f"{TURBO} FILE --local-dir models"),
        ("hf.co/stabilityai/sdxl-turbo/tree/main", f"{TURBO} FILE --local-dir models"),
        (
            "https://huggingface.co/stabilityai/sdxl-turbo/resolve/main/a/b.safetensors?download=1",
            f"{TURBO} a/b.safetensors --local-dir models",
        ),
    ],
)
def test_a_repository_is_answered_with_the_line_that_fetches_it(path: str, command: str) -> None:
    for form in (path, Path(path)):
        hint = download_of(form)
        assert hint is not None and f"`{command}`" in hint


@pytest.mark.parametrize(
    "path", ["model.safetensors", "models/x.safetensors", "/a/b", "./a/b", "a/b/c", "~/a", ""]
)
def test_what_reads_like_a_path_is_one(path: str) -> None:
    assert download_of(path) is None


def test_a_folder_that_is_there_is_no_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert download_of("models/sdxl") is None


def test_python_hears_of_it_too() -> None:
    with pytest.raises(hs.CheckpointError, match="hf download stabilityai/sdxl-turbo"):
        hs.Engine.load("stabilityai/sdxl-turbo")
