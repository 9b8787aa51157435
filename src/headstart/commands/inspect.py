"""`headstart inspect`: what a checkpoint is, from its header; exit status 1 if it is bad."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from headstart.checkpoint.families import FAMILIES
from headstart.checkpoint.fit import first_few
from headstart.checkpoint.leftovers import is_allowed
from headstart.commands.arguments import add_allow, every
from headstart.commands.console import fail, progress
from headstart.commands.parser import Command, add_options
from headstart.commands.width import answer
from headstart.errors import AdapterError, CheckpointError

if TYPE_CHECKING:
    from headstart.adapters.info import AdapterInfo
    from headstart.checkpoint.checkpoint import CheckpointInfo

_LAYOUTS = {
    "ldm": "ldm, the original single file",
    "diffusers": "diffusers, a folder of components",
    "unet": "a UNet alone",
    "vae": "a VAE alone",
    "text": "a text encoder alone",
    "tiny": "a tiny autoencoder (TAESD)",
    "single": "a single file of several networks",
    "adapter": "an adapter (LoRA, slider)",
    "embedding": "a textual inversion: vectors of learned tokens",
    "unknown": "unknown",
}


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a file, or a model's folder")
    add_options(parser, "--deep  read every number: NaN, infinities")
    add_allow(parser)


def _run(args: argparse.Namespace) -> int:
    try:
        info = _read(args.file, args.allow, deep=args.deep)
    except CheckpointError as error:
        if args.debug:
            raise
        if not args.json:
            return fail(str(error), 1)
        print(json.dumps({"path": str(args.file), "ok": False, "problems": [str(error)]}))
        return 1
    adapter = None
    if info.layout == "adapter" and info.ok:
        adapter, problem = _adapter(args.file, args.allow)
        if problem is not None:
            info = replace(info, problems=(problem,), notes=(), next=None)
        elif adapter is not None and adapter.family not in (None, *FAMILIES):
            info = replace(info, notes=(), next=_ELSEWHERE)
    facts = {} if adapter is None else {"adapter": adapter.to_json()}
    answer(args, info.to_json() | facts, "\n".join(_table(info, adapter)))
    return 0 if info.ok else 1


_LEAVE = "`--allow NAME` lets such keys be, here and beside --lora"
_ELSEWHERE = (
    "AdapterSet(...).attach(FILE) in Python, on such a network of another program: no option here "
    "takes one"
)


def _adapter(file: Path, allow: list[str]) -> tuple[AdapterInfo | None, str | None]:
    """What kind of adapter it is, and the sentence with which `--lora` refuses it, if it does."""
    from headstart.adapters.info import describe_adapter

    try:
        adapter = describe_adapter(file)
    except AdapterError as error:
        return None, str(error).removeprefix(f"{file}: ")
    keys = [key for key in adapter.strays if not is_allowed(key, allow)]
    problem = f"{len(keys)} keys are of no naming that is known: {first_few(keys)}. {_LEAVE}"
    return adapter, problem if keys else None


def _read(file: Path, allow: list[str], *, deep: bool) -> CheckpointInfo:
    from headstart.checkpoint.checkpoint import inspect_checkpoint

    if not deep:
        return inspect_checkpoint(file, allow=allow)
    with progress(1, "reading every number", "B") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return inspect_checkpoint(file, deep=True, allow=allow, on_bytes=show)


def _table(info: CheckpointInfo, adapter: AdapterInfo | None) -> Iterator[str]:
    """One fact a line; what is wrong and what to do come last, where the eye ends."""
    yield info.path
    for name, value in (*_facts(info), *_token_facts(info), *_adapter_facts(adapter)):
        yield f"  {name:<12}{value}"
    notes = (*info.notes, *(adapter.notes if adapter else ()))
    for name, lines in (("note", notes), ("problem", info.problems)):
        for line in lines:
            yield f"  {name:<12}{line}"
    if info.next is not None:
        yield f"  {'next':<12}{info.next}"
    else:
        yield f"  {'verdict':<12}not usable as it is"


def _facts(info: CheckpointInfo) -> Iterator[tuple[str, str]]:
    if info.layout not in ("adapter", "embedding"):
        size = "" if info.family == "unknown" else ", full size" if info.exact else ", scaled down"
        yield "family", info.family + size
    yield "layout", _LAYOUTS[info.layout]
    for part, count in info.weights.items():
        yield part, f"{count / 1e6:.1f} M parameters"
    if info.prediction is not None:
        where = "says the file" if info.prediction_declared else "not in the file, so guessed"
        yield "prediction", f"{info.prediction} ({where})"
    yield "dtype", info.dtype if info.scheme is None else f"{info.dtype}; {info.scheme}"
    yield "size", f"{_size(info.size_bytes)} in {info.tensors} tensors"
    if info.census is not None:
        clean = not (info.census.nan or info.census.inf)
        yield "numbers", "all finite" if clean else "some are not finite"


def _adapter_facts(adapter: AdapterInfo | None) -> Iterator[tuple[str, str]]:
    if adapter is None:
        return
    yield "form", adapter.form
    yield "family", adapter.family or "not in the names"
    if adapter.ranks is not None:
        low, high = adapter.ranks
        yield "rank", str(low) if low == high else f"{low} to {high}"
    counts = (
        f"{count} of {network or 'a network that the keys do not name'}"
        for network, count in adapter.modules.items()
    )
    yield "layers", ", ".join(counts)
    if adapter.tokens:
        yield "tokens", _first_names(adapter.tokens)


def _token_facts(info: CheckpointInfo) -> Iterator[tuple[str, str]]:
    if (embedding := info.embedding) is None:
        return
    yield "family", embedding.family or "scaled down, or not known"
    counts = zip(embedding.tokens, embedding.vectors, strict=True)
    names = [f"{token:.80} ({n} vector{'s' if n > 1 else ''})" for token, n in counts]
    yield "tokens", _first_names(names)


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


INSPECT = Command(
    "inspect",
    "say what a checkpoint is; exit 1 if it is bad",
    (every(),),
    _add_options,
    _run,
    ("headstart inspect model.safetensors", "headstart inspect model.safetensors --deep"),
)
