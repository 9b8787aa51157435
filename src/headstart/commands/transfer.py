"""`headstart transfer`: a fine-tune of the base carried over to the distilled model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from headstart.commands.arguments import OVERWRITE, every
from headstart.commands.console import progress
from headstart.commands.parser import Command, add_options
from headstart.commands.values import output
from headstart.commands.width import answer
from headstart.errors import InputError

if TYPE_CHECKING:
    from headstart.adapters.extract import Extraction
    from headstart.adapters.names import Network
    from headstart.adapters.transfer import Transfer

MOST_LAYERS = 5
"""How many of the worst captured layers are printed; --json has all of them."""


_OPTIONS = f"""
    --base B       a checkpoint
    --tuned T      fine-tuned from B
    --distilled D  gets T - B added; default: none, with --rank
    --out FILE     a new .safetensors file
    {OVERWRITE}
    --strength S   times the difference; default: 1
    --parts PARTS  of unet,text,text_2; default: %(default)s
    --rank R       write T - B as an adapter of rank R, where D may be absent
    --naming NAMES  of an adapter: kohya, diffusers; default: %(default)s
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_options(
        parser,
        _OPTIONS,
        base={"type": Path, "required": True},
        tuned={"type": Path, "required": True},
        distilled=Path,
        out={"type": output, "required": True},
        strength={"type": float, "default": 1.0},
        parts={"default": "unet"},
        rank=int,
        naming={"default": "kohya"},
    )


def _run(args: argparse.Namespace) -> int:
    from headstart.adapters.transfer import read_parts

    parts = read_parts(args.parts)
    if args.rank is not None:
        _extract(args, parts)
    elif args.distilled is not None:
        _transfer(args, parts)
    else:
        raise InputError("--distilled is missing: give the model to change, or --rank for a LoRA")
    return 0


def _transfer(args: argparse.Namespace, parts: tuple[Network, ...]) -> None:
    from headstart.adapters.transfer import transfer

    with progress(None, "transferring") as bar:
        result = transfer(
            args.base,
            args.tuned,
            args.distilled,
            args.out,
            strength=args.strength,
            parts=parts,
            overwrite=args.overwrite,
            on_bytes=lambda count: bar.set_description(f"transferring, {count / 1e6:.0f} MB"),
        )
    answer(args, result.to_json(), _transfer_text(result))


def _extract(args: argparse.Namespace, parts: tuple[Network, ...]) -> None:
    from headstart.adapters.extract import extract

    with progress(None, "extracting") as bar:
        result = extract(
            args.base,
            args.tuned,
            args.out,
            rank=args.rank,
            strength=args.strength,
            distilled=args.distilled,
            parts=parts,
            naming=args.naming,
            overwrite=args.overwrite,
            on_layer=lambda module: bar.set_description(f"extracting {module}"),
        )
    answer(args, result.to_json(), _extraction_text(result))


def _transfer_text(result: Transfer) -> str:
    lines = [f"{result.target}: {result.size_bytes / 1e6:.1f} MB"]
    for part, count in result.changed.items():
        share = f"{100 * result.relative[part]:.2f} % of its norm"
        lines.append(f"  {part:<8} {count} tensors changed by {share}")
    if result.kept:
        names = ", ".join(result.kept)
        lines.append(f"  kept, because only the distilled model has them: {names}")
    if result.copied:
        lines.append(f"  copied   {result.copied} tensors of other parts")
    return "\n".join(lines)


def _extraction_text(result: Extraction) -> str:
    energy = f"{100 * result.energy:.2f} % of the layers' difference"
    lines = [
        f"{result.target}: rank {result.rank}, {result.naming} names, {len(result.layers)} layers, "
        f"{result.size_bytes / 1e6:.1f} MB",
        f"captured energy {energy}; the least captured:",
    ]
    for layer in sorted(result.layers, key=lambda layer: layer.energy)[:MOST_LAYERS]:
        lines.append(f"  {100 * layer.energy:6.2f} %  {layer.network} {layer.module}")
    if result.left_out:
        share = f"{100 * result.left_share:.2g} % of the whole difference"
        lines.append(f"left out: {len(result.left_out)} biases, norms and embeddings, {share}")
    return "\n".join(lines)


TRANSFER = Command(
    "transfer",
    "add a fine-tune's difference to the distilled model, or write it as a LoRA",
    (every(),),
    _add_options,
    _run,
    (
        "headstart transfer --base B --tuned T --distilled D --out tuned_distilled.safetensors",
        "headstart transfer --base B --tuned T --rank 16 --out tuned_lora.safetensors",
    ),
)
