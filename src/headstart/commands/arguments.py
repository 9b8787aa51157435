"""The options that commands share."""

from __future__ import annotations

import argparse
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path

from headstart.commands.parser import LIST, Parser, add_options
from headstart.commands.values import batch, count, offset, output
from headstart.networks.prompt_style import EXCLAMATIONS, PROMPT_STYLES

RUNNERS = ("auto", "eager", "compiled", "graph", "replay", "trajectory", "openvino")
"""As in `headstart.runner.runner.RunnerName`, which loads torch."""

SIZE = """
    --size SIZE  pixels: 512 or HEIGHTxWIDTH; default: the model's own
"""
OVERWRITE = """
    --overwrite  replace what is there
"""
METADATA = """
    --no-metadata  leave out of the PNGs what they are of: prompt, seed, plan, digests
"""
REFERENCE = """
    --reference DIR  a folder of pictures to compare with, or: bundled
"""
PREDICTION = """
    * --prediction KIND  eps, v, x0, flow, edm, edm_v, or base=v,distilled=eps; default: what the
        file says
"""
_WEIGHTS = f"""
    --base PATH            the base model: a file, or a model's folder
    --distilled PATH       the distilled model; a UNet alone is enough
    --distilled-lora FILE  in its place: the LoRA that makes it of the base
    --vae PATH             decodes for both; default: the base's, else the distilled's
    * --text PATH          text encoders for both; default: as --vae
    * --tokenizer PATH     a tokenizer.json or a folder with one; default: the file's own, else
        CLIP's
    * --preview PATH       a tiny autoencoder (TAESD) for `trace`; default: none
    --device DEVICE        auto, cpu, cuda, cuda:N, or base=cuda:0,distilled=cuda:1; default:
        %(default)s
    --memory SIZE          of the GPU that may be had, such as 8GB: what does not fit takes turns;
        none: nothing does; default: auto, what is free
    --dtype DTYPE          float32, float16, bfloat16, stored, float8; default: auto, float32 on a
        CPU and the files' own on a GPU
    * --vae-dtype DTYPE    of the decoder; default: auto, bfloat16 on a GPU
    * --packed             lay weights out for the CPU's products; default: for full-size models
    * --runner NAME        how networks are called: {", ".join(RUNNERS)}; default: %(default)s
    {PREDICTION}
    * --embedded-guidance W  what an LCM imitates; default: 8
    * --ema                the averaged weights of files that have both, or the trained ones;
        default: the file's main ones
    * --head-dim N         attention head width of a scaled-down UNet; default: the file's
    * --text-head-dim N    attention head width of a scaled-down text encoder; default: the file's
    * --exclamation        what "!" becomes with SD 2 and SDXL: as their encoders were trained, or
        as diffusers has it; default: openclip
"""
_ADAPTERS = """
    --lora FILE[:STRENGTH[@LEGS]]  attach it to both models, at strength 1; legs: models and/or the
        highest timestep, such as @distilled or @base+800; may be repeated
    --embedding FILE[:TOKEN]  a textual inversion: prompts may say its token; default: the file's
        own, or its name
"""
_READING = """
    --prompt-style    plain: as typed; the others: weights such as (fox:1.3) as that program reads
        them; default: plain
    * --clip-skip N   read the text encoders' N-th layer from the end; default: the family's
    * --lora-folder DIR  where <lora:NAME:0.8> in a prompt finds NAME.safetensors, if no --lora has
        that name
"""
_TEXTS = """
    * --literal             prompts are letters alone: no `->`, no <lora:...>
    * --second-prompt TEXT  SDXL's second encoder reads it: once for all images, or once for each;
        default: the prompt
    * --second-negative TEXT  its negative prompt; default: --negative
    * --original-size HxW   SDXL is told that pictures like it had this size; default: --size
    * --crop TOP,LEFT       and were cut there; default: 0,0, uncut
    * --target-size HxW     to this size; default: --size
"""


def sampling() -> Sequence[Parser]:
    """Parents of a command that loads weights."""
    weights, auto = Parser(add_help=False), {"default": "auto"}
    add_options(
        weights.add_argument_group("weights: the bundled pair, or your own"),
        _WEIGHTS,
        device=auto,
        memory=auto,
        dtype=auto,
        vae_dtype=auto,
        packed={"action": BooleanOptionalAction},
        runner={"choices": RUNNERS, "default": "auto"},
        embedded_guidance=float,
        ema={"action": BooleanOptionalAction},
        head_dim=int,
        text_head_dim=int,
        exclamation={"choices": EXCLAMATIONS},
    )
    adapters = weights.add_argument_group("adapters")
    add_options(adapters, _ADAPTERS, lora=LIST, embedding=LIST)
    add_allow(adapters)
    return weights, every()


def add_allow(group: argparse._ActionsContainer) -> None:  # pyright: ignore
    rows = """
        * --allow NAME  tensors or keys that may find no place, such as 'lora_te_*' or
            'control_model.*'; default: none
    """
    add_options(group, rows, allow=LIST)


def every() -> Parser:
    """What every command takes."""
    parser = Parser(add_help=False)
    rows = """
        --json     print JSON for machines
        * --debug  show the traceback of an error
    """
    add_options(parser, rows)
    return parser


def add_out(
    parser: argparse.ArgumentParser, default: str | None = None, about: str = "PNG"
) -> None:
    """The file that a command writes."""
    path = None if default is None else Path(default)
    rows = f"--out FILE  {about}; default: {default or 'none'}" + OVERWRITE
    add_options(parser, rows, out={"type": output, "default": path})


def add_batch(parser: argparse._ActionsContainer) -> None:  # pyright: ignore
    rows = """
        * --batch N[,N[,N]]  samples in a network at once, or those, in the decoder, and its bands:
            8,2,16; default: what memory holds
    """
    add_options(parser, rows, batch=batch)


def add_reading(parser: argparse.ArgumentParser, rows: str = "") -> None:
    """How every prompt of a command is read, which `session.open_engine` sets; and `rows`."""
    add_options(
        parser.add_argument_group("how prompts are read"),
        _READING + rows,
        prompt_style={"choices": PROMPT_STYLES},
        clip_skip=count,
        lora_folder=Path,
        second_prompt=LIST,
        second_negative=LIST,
        crop=offset,
    )


def add_negative(parser: argparse.ArgumentParser, about: str = "") -> None:
    rows = f"""
        --negative TEXT  what guidance moves away from{about}; "" is an empty text, default: none
    """
    add_options(parser, rows, negative=LIST)


def add_texts(parser: argparse.ArgumentParser) -> None:
    """The texts of a run besides its prompts, and SDXL's sizes."""
    add_negative(parser, ": once for all images, or once for each")
    add_reading(parser, _TEXTS)


def add_features(parser: argparse.ArgumentParser) -> None:
    rows = """
        --features NAME  scorer, structure, colours, imagenet, or a file or folder with published
            weights: Inception (for FID), LPIPS, DreamSim, CLIP, DINOv2, DINOv3, ImageReward (scores
            only); several times for several spaces, the first is the main one, and the first that
            reads prompts scores; default: scorer for pictures of the bundled pair, structure for
            others
    """
    add_options(parser, rows, features={"action": "append"})


def add_seeds(parser: argparse.ArgumentParser, default: str) -> None:
    rows = "--seeds, --seed SEEDS  such as 0-15 or 3,7; default: %(default)s"
    add_options(parser, rows, seeds={"default": default})


def add_prompt(parser: argparse.ArgumentParser, default: str | None, seeds: str) -> None:
    """One prompt, which may be left out where it has a default, and its seeds."""
    parser.add_argument(
        "prompt",
        nargs=None if default is None else "?",
        default=default,
        metavar="PROMPT",
        help="what to draw" + ("" if default is None else "; default: %(default)s"),
    )
    add_seeds(parser, seeds)
