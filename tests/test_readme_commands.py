"""Every command block of README.md is run as it stands.

A block stands alone: its lines run in order in an empty folder, with the bundled pair. Where it
needs more, a comment before it says so:

<!-- ci: downloads -->  needs files: tiny ones of the same build lie where the block expects them
<!-- ci: compare -->    clones and installs first, as `.ci/run` does (see test_readme.py)
<!-- ci: tests -->      is run by `.ci/run`, line for line
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from bundled import needs_pair
from checkpoints import Model, halved

from headstart.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MARKERS = ("", "downloads", "compare", "tests")
pytestmark = needs_pair

# What full-size files need not say: how wide their heads are, and the size of their pictures.
METADATA = {"headstart.head_dim": "16", "headstart.text_heads": "1", "headstart.image_size": "64"}
CLIP = 49408  # tokens of the bundled vocabulary: the files bring no tokenizer

# A pickle has no metadata, so what is converted from it cannot say how wide its heads are.
PICKLE, NEEDED = "models/dmd2_sdxl_4step_unet_fp16", ["--head-dim", "16"]
PROMPTS = "case_number,prompt,evaluation_seed\n0,a fox,1\n1,an owl,2\n2,a ladybug,3\n"


class Block(NamedTuple):
    """A fenced block: what its comment says, its language, its lines that do something."""

    marker: str
    language: str
    lines: list[str]


def blocks_of(page: str) -> list[Block]:
    fence = r"(?:^<!-- ci: (\w+) -->\n)?^```(\w*)\n(.*?)^```$"
    blocks = re.findall(fence, page, flags=re.MULTILINE | re.DOTALL)
    return [
        Block(marker, language, re.findall(r"^[^#\n].*", text.replace("\\\n", " "), re.MULTILINE))
        for marker, language, text in blocks
    ]


def shell(*markers: str) -> list[Block]:
    return [b for b in blocks_of(README) if b.language == "bash" and b.marker in markers]


def unread(page: str) -> list[str]:
    """What no test would run: blocks of another kind, and lines that are no command we know."""
    blocks = blocks_of(page)
    wrong = [f"```{b.language}" for b in blocks if b.language not in ("bash", "python", "bibtex")]
    wrong += [b.marker for b in blocks if b.marker not in MARKERS]
    for block in blocks:
        commands = (
            ("headstart ", "hf download ") if block.marker == "downloads" else ("headstart ",)
        )
        if block.language == "bash" and block.marker in ("", "downloads"):
            wrong += [line for line in block.lines if not line.startswith(commands)]
    return wrong + ["a fence"] * (page.count("```") - 2 * len(blocks))


def run(block: Block) -> None:
    """Run its commands as they are typed in the current folder, and look for what they write."""
    for line in block.lines:
        words = shlex.split(line.removeprefix(".venv/bin/"), comments=True)
        if words[0] == "hf":
            assert all(path.is_file() for path in downloaded(words)), line
        elif words[0] == "headstart":
            more = NEEDED if line.startswith("headstart sample") and PICKLE in line else []
            assert main([*words[1:], *more]) == 0, line
            outs = [Path(words[i + 1]) for i, word in enumerate(words) if word == "--out"]
            assert all(out.exists() for out in outs), line


# --------------------------------------------------------------------- tiny files


@cache
def base() -> Model:
    return Model.of("sdxl", 0, vocabulary=CLIP)


def whole(seed: int) -> Callable[[Path], object]:
    """A single file with text encoders and VAE, which are the base's."""

    def make(path: Path) -> None:
        model = replace(base(), unet=Model.of("sdxl", seed).unet)
        model.write("ldm", path.with_suffix(""), metadata=METADATA)

    return make


def bare(path: Path) -> None:
    """A UNet alone, under the names that diffusers gives it."""
    Model.of("sdxl", 1).write("bare", path.with_suffix(""), metadata=METADATA)


def pickled(path: Path) -> None:
    torch.save(halved(Model.of("sdxl", 2).unet.state_dict()), path)


def lcm(path: Path) -> None:
    """One of the two files of a diffusers folder that is a UNet alone."""
    folder = path.parents[2] / "made-lcm"
    if not folder.exists():
        Model.of("sdxl", 3, guidance_dim=256).write("fp16", folder, bare=True)
    (folder / "unet" / path.name).replace(path)


# Each file that README's commands read: what `hf download` brings, and three of the reader's own.
FILES: dict[str, Callable[[Path], object]] = {
    "models/sd_xl_base_1.0.safetensors": whole(0),
    "models/sdxl_lightning_4step_unet.safetensors": bare,
    f"{PICKLE}.bin": pickled,
    "models/lcm-sdxl/diffusion_pytorch_model.fp16.safetensors": lcm,
    "models/lcm-sdxl/config.json": lcm,
    "models/sd_xl_turbo_1.0_fp16.safetensors": whole(4),
    "base.safetensors": whole(0),
    "tuned.safetensors": whole(5),
    "distilled.safetensors": bare,
}


def downloaded(words: list[str]) -> list[Path]:
    """Where `hf download OWNER/REPOSITORY FILE ... --local-dir FOLDER` puts its files."""
    _, download, repository, *names, flag, folder = words
    assert download == "download" and repository.count("/") == 1 and flag == "--local-dir" and names
    return [Path(folder) / name for name in names]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, make in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make(folder / name)
    return folder


# --------------------------------------------------------------------- tests


def test_every_block_is_run_or_says_what_it_needs() -> None:
    assert unread(README) == []
    assert len(shell(*MARKERS)) > 5 and len(shell("compare")) == len(shell("tests")) == 1


def test_the_files_made_here_are_those_that_the_readme_downloads() -> None:
    lines = [shlex.split(line) for block in shell("downloads") for line in block.lines]
    brought = [str(path) for words in lines if words[0] == "hf" for path in downloaded(words)]
    assert brought == [name for name in FILES if name.startswith("models/")]


@pytest.mark.parametrize(
    "page",
    [
        "```bash\npip install x\n```\n",
        "```\nheadstart plan\n```\n",
        "<!-- ci: downlods -->\n```bash\nheadstart plan\n```\n",
        "```bash\nhf download a/b c --local-dir d\n```\n",
        "  ```bash\n  headstart plan\n  ```\n",
    ],
)
def test_a_block_that_nothing_runs_is_noticed(page: str) -> None:
    assert unread(page) != []


@pytest.mark.parametrize("block", shell("", "compare"), ids=lambda block: block.lines[-1])
def test_a_block_runs_in_an_empty_folder_with_the_bundled_pair(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if any("prompts.csv" in line for line in block.lines):
        Path("prompts.csv").write_text(PROMPTS)  # the reader's own, with the columns README names
    run(block)


@pytest.mark.parametrize("block", shell("downloads"), ids=lambda block: block.lines[-1])
def test_a_block_that_needs_files_runs_on_tiny_ones_of_the_same_names(
    block: Block, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    run(block)
