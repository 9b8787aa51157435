"""CLIP's vocabulary: found on this machine, never fetched, and equal to CLIP's own code."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from headstart.errors import CheckpointError
from headstart.networks import vocabulary
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.vocabulary import Vocabulary, cached_folder, packaged_file, read_packaged

transformers = pytest.importorskip("transformers")

PROMPTS = [
    "a photo of a cat",
    "A Fox, in the SNOW!!  8k uhd, f/1.8 -- trending on artstation",
    "it's the dog's; they've we'll I'd don't CAN'T",
    "portrait of a woman, 35mm, (masterpiece:1.2), [blurry], <lora:x:0.5>",
    "café naïve Ångström Straße señor",
    "猫が好き 狐 лиса επιστήμη",
    "emoji 🦊🦊 and symbols ©™ € ½ …",
    "numbers 1234567890 3.14 1,000,000 2x4",
    "tabs\tand\nnewlines\r\nand\u00a0spaces\u2003wide",
    "under_score hyphen-ated slash/ed back\\slash",
    "",
    "   ",
    "antidisestablishmentarianism floccinaucinihilipilification",
    "'quoted' \"double\" `tick` “curly” ‘single’",
]
CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture(scope="module")
def packaged() -> Vocabulary:
    path = packaged_file()
    if path is None:
        pytest.skip("needs the extra `clip`, which brings the vocabulary")
    return read_packaged(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache that is the only one there is."""
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path / "hub"


def snapshot(cache: Path, repository: str, inner: str = "", revision: str = "0a1b") -> Path:
    model = cache / f"models--{repository.replace('/', '--')}"
    folder = model / "snapshots" / revision / inner
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def test_the_vocabulary_is_clips(packaged: Vocabulary) -> None:
    assert len(packaged.ids) == 49408 and len(packaged.merges) == 48894
    assert packaged.ids["<|startoftext|>"] == 49406 and packaged.ids["<|endoftext|>"] == 49407
    tokens = ClipTokenizer.from_vocabulary(*packaged).tokens("a photo of a cat")
    assert tokens == [320, 1125, 539, 320, 2368]  # as printed in CLIP's own documentation


def test_tokens_equal_the_librarys(packaged: Vocabulary) -> None:
    ours = ClipTokenizer.from_vocabulary(*packaged)
    theirs = transformers.CLIPTokenizer(vocab=dict(packaged.ids), merges=list(packaged.merges))
    for prompt in PROMPTS:
        want = theirs(prompt, add_special_tokens=False)["input_ids"]
        assert ours.tokens(prompt) == want, prompt


def test_tokens_equal_clips_own_code(packaged: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokenizer alone is run, with ftfy (which repairs broken Unicode) left out."""
    ftfy: Any = ModuleType("ftfy")
    ftfy.fix_text = lambda text: text
    monkeypatch.setitem(sys.modules, "ftfy", ftfy)
    file = packaged_file()
    assert file is not None
    if not (file.parent / "simple_tokenizer.py").is_file():
        pytest.skip("the package has no simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("clips_own", file.parent / "simple_tokenizer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs, ours = module.SimpleTokenizer(str(file)), ClipTokenizer.from_vocabulary(*packaged)
    for prompt in PROMPTS:
        assert ours.tokens(prompt) == theirs.encode(prompt), prompt


def test_a_snapshot_in_the_hubs_cache_is_found(cache: Path) -> None:
    assert cached_folder() is None
    found = snapshot(cache, "stabilityai/stable-diffusion-xl-base-1.0", "tokenizer")
    assert cached_folder() == found
    first = snapshot(cache, "openai/clip-vit-large-patch14")
    assert cached_folder() == first
    snapshot(cache, "somebody/else", "tokenizer")
    assert cached_folder() == first
    assert ClipTokenizer.load(first).eos == 1


def test_the_main_revision_is_preferred_and_torn_snapshots_are_passed_over(cache: Path) -> None:
    old = snapshot(cache, "openai/clip-vit-large-patch14", revision="aaaa")
    new = snapshot(cache, "openai/clip-vit-large-patch14", revision="bbbb")
    assert cached_folder() == old
    refs = cache / "models--openai--clip-vit-large-patch14" / "refs"
    refs.mkdir()
    (refs / "main").write_text("bbbb\n")
    assert cached_folder() == new
    (new / "merges.txt").unlink()
    assert cached_folder() == old


@pytest.mark.parametrize("name", CACHES)
def test_the_cache_is_where_the_hub_library_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for other in CACHES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, str(tmp_path))
    inner = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}.get(name, "")
    found = snapshot(tmp_path / inner, "openai/clip-vit-large-patch14")
    assert cached_folder() == found


def test_a_package_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(vocabulary, "_PACKAGES", ("open_clip",))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packaged_file() is None
    with gzip.open(package / "bpe_simple_vocab_16e6.txt.gz", "wt") as file:
        file.write("version\na b\n")
    found = packaged_file()
    assert found is not None and found.parent == package
    with pytest.raises(CheckpointError, match=r"expected 48894 merges of two tokens, found 1"):
        read_packaged(found)


@pytest.mark.parametrize("raw", [b"", b"not gzip", gzip.compress(b"\xff\xfe\n")[:-3]])
def test_a_damaged_vocabulary_is_a_checkpoint_error(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "v.txt.gz"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError):
        read_packaged(path)


def test_a_file_without_a_tokenizer_finds_clips(
    make_ckpt: Any, cache: Path, packaged: Vocabulary
) -> None:
    """A quarter-size encoder knows all 49408 tokens; a tiny one must be given its own."""
    from headstart.networks.load import load_text

    path = make_ckpt("te1.safetensors", "sd15", "te1", "--scale", "mini")
    text = load_text(path, head_dim=32)
    assert text.ids(["a photo of a cat"])[0][0, :6].tolist() == [49406, 320, 1125, 539, 320, 2368]
