"""Every loader on a file, compared with what inspect says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from checkpoints import Tensors

from headstart.adapters.file import read_adapter
from headstart.adapters.textual_inversion import read_embeddings
from headstart.checkpoint.checkpoint import CheckpointInfo, inspect_checkpoint
from headstart.checkpoint.families import FAMILIES
from headstart.errors import CheckpointError, HeadstartError
from headstart.networks.load import load_text, load_tiny, load_unet, load_vae

Maker = Callable[..., Path]
VAE_METADATA = {"headstart.vae_norm_groups": "4"}


def loads(part: str, path: Path, text: str, words: Path) -> str | None:
    """Load a network onto the meta device with what `next` asks for: None, or the error."""
    head = 8 if "--head-dim" in text else None
    try:
        if part == "unet":
            load_unet(path, device="meta", head_dim=head)
        elif part == "vae":
            load_vae(path, device="meta", like=FAMILIES["sd15"])
        elif part == "tiny":
            load_tiny(path, device="meta")
        else:
            wide = 32 if "--text-head-dim" in text else None
            inputs = words if "--tokenizer" in text else None
            load_text(path, device="meta", head_dim=wide, tokenizer=inputs)
    except HeadstartError as error:
        assert isinstance(error, CheckpointError), error
        return str(error)
    return None


def agreed(path: Path, words: Path) -> CheckpointInfo | None:
    """What inspect says, after every loader has said the same."""
    try:
        info = inspect_checkpoint(path)
    except CheckpointError as error:
        for part in ("unet", "vae", "text", "tiny"):
            assert loads(part, path, "", words) == str(error)
        return None
    sentences = {f"{path}: {problem}" for problem in info.problems}
    assert all(sentence.count("\n") < 10 and len(sentence) < 1500 for sentence in sentences)
    assert (info.next is None) == (not info.ok)
    if info.layout in ("adapter", "embedding"):
        assert info.next is not None
        (read_adapter if info.layout == "adapter" else read_embeddings)(path)
        return info
    # What a refused file would need is not said: as much as may be is given to its networks.
    options = info.next or "--head-dim --text-head-dim --tokenizer"
    every = ("unet", "vae", "text") if path.is_dir() else ("unet", "vae", "text", "tiny")
    known = () if path.is_dir() and not info.ok else info.parts
    parts = dict.fromkeys(part.removesuffix("_2") for part in known) or dict.fromkeys(every)
    errors = {part: loads(part, path, options, words) for part in parts}
    problems = {error for error in errors.values() if error is not None}
    if info.ok:
        assert not problems
    else:
        assert problems and problems <= sentences
        assert problems == sentences
    return info


Mutation = Callable[[Tensors], Tensors]
UNET, FIRST = "model.diffusion_model.", "first_stage_model."


ONE = torch.zeros(1)


def named(*names: str) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, torch.zeros(2, 2)) for name in names)
