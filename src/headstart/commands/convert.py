"""`headstart convert`: a pickle, another layout or another dtype into one safetensors file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from headstart.commands.arguments import OVERWRITE, every
from headstart.commands.console import progress
from headstart.commands.parser import Command, add_options
from headstart.commands.values import output
from headstart.commands.width import answer

if TYPE_CHECKING:
    from headstart.convert.convert import Conversion

MOST_LINES = 8
"""Of the tensors that are left out; --json has all of them."""


_OPTIONS = f"""
    --layout NAMES  same, diffusers, ldm: how tensors are named; default: %(default)s
    --dtype DTYPE   same, f16, bf16, f32; default: %(default)s
    --part PART     of several: unet, vae, text, text_2, tiny; default: all
    {OVERWRITE}
    --timeout SECONDS  for reading a pickle; default: by its size
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="a file, or a model's folder")
    parser.add_argument("target", type=output, metavar="OUT", help="a new .safetensors file")
    same = {"default": "same"}
    add_options(parser, _OPTIONS, layout=same, dtype=same, timeout=float)


def _run(args: argparse.Namespace) -> int:
    from headstart.convert.convert import convert

    with progress(None, "converting") as bar:
        conversion = convert(
            args.source,
            args.target,
            layout=args.layout,
            dtype=args.dtype,
            part=args.part,
            overwrite=args.overwrite,
            timeout_s=args.timeout,
            on_bytes=lambda count: bar.set_description(f"converting, {count / 1e6:.0f} MB"),
        )
    answer(args, conversion.to_json(), "\n".join(_lines(conversion)))
    return 0


def _lines(conversion: Conversion) -> Iterator[str]:
    size = f"{conversion.size_bytes / 1e6:.1f} MB"
    yield f"{conversion.target}: {conversion.tensors} tensors, mostly {conversion.dtype}, {size}"
    if conversion.multiplied is not None:
        yield f"read {conversion.multiplied}: every number has its scale in it now"
    if conversion.left_out:
        yield f"left out, {len(conversion.left_out)}:"
        yield from (f"  {what}" for what in conversion.left_out[:MOST_LINES])
        if len(conversion.left_out) > MOST_LINES:
            yield "  ... (--json lists all)"


CONVERT = Command(
    "convert",
    "write a safetensors file from a pickle, another layout or another dtype",
    (every(),),
    _add_options,
    _run,
    (
        "headstart convert dmd2_sdxl_4step_unet_fp16.bin dmd2.safetensors",
        "headstart convert model.safetensors half.safetensors --dtype f16",
    ),
)
