"""The options that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from headstart.commands.parser import Expert, Parser
from headstart.commands.values import batch, count, offset, output
from headstart.networks.prompt_style import EXCLAMATIONS, PROMPT_STYLES

RUNNERS = ("auto", "eager", "compiled", "graph", "replay", "trajectory")
"""As in `headstart.runner.runner.RunnerName`, which loads torch."""


def sampling() -> Sequence[Parser]:
    """Parents of a command that loads weights."""
    weights = Parser(add_help=False)
    group = weights.add_argument_group("weights: the bundled pair, or your own")
    group.add_argument("--base", metavar="PATH", help="the base model: a file, or a model's folder")
    group.add_argument(
        "--distilled", metavar="PATH", help="the distilled model; a UNet alone is enough"
    )
    group.add_argument(
        "--distilled-lora", metavar="FILE", help="in its place: the LoRA that makes it of the base"
    )
    group.add_argument(
        "--vae", metavar="PATH", help="decodes for both; default: the base's, else the distilled's"
    )
    group.add_argument(
        "--text", metavar="PATH", help=Expert("text encoders for both; default: as --vae")
    )
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help=Expert("a tokenizer.json or a folder with one; default: the file's own, else CLIP's"),
    )
    group.add_argument(
        "--preview",
        metavar="PATH",
        help=Expert("a tiny autoencoder (TAESD) for `trace`; default: none"),
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N, or base=cuda:0,distilled=cuda:1; default: %(default)s",
    )
    group.add_argument(
        "--memory",
        default="auto",
        metavar="SIZE",
        help="of the GPU that may be had, such as 8GB: what does not fit takes turns; none: "
        "nothing does; default: auto, what is free",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        metavar="DTYPE",
        help="float32, float16, bfloat16, stored, float8; default: auto, float32 on a CPU and the "
        "files' own on a GPU",
    )
    _add_experts(group)
    add_adapters(weights)
    return weights, every()


def _add_experts(group: argparse._ArgumentGroup) -> None:  # pyright: ignore
    group.add_argument(
        "--vae-dtype",
        default="auto",
        metavar="DTYPE",
        help=Expert("of the decoder; default: auto, bfloat16 on a GPU"),
    )
    group.add_argument(
        "--packed",
        action=argparse.BooleanOptionalAction,
        help=Expert("lay weights out for the CPU's products; default: for full-size models"),
    )
    group.add_argument(
        "--runner",
        choices=RUNNERS,
        default="auto",
        help=Expert("how networks are called; default: %(default)s"),
    )
    group.add_argument(
        "--prediction",
        metavar="KIND",
        help=Expert(PREDICTION_HELP),
    )
    group.add_argument(
        "--embedded-guidance",
        type=float,
        metavar="W",
        help=Expert("what an LCM imitates; default: 8"),
    )
    group.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help=Expert(
            "the averaged weights of files that have both, or the trained ones; default: the "
            "file's main ones"
        ),
    )
    for option, network in (("--head-dim", "UNet"), ("--text-head-dim", "text encoder")):
        group.add_argument(
            option,
            type=int,
            metavar="N",
            help=Expert(f"attention head width of a scaled-down {network}; default: the file's"),
        )
    group.add_argument(
        "--exclamation",
        choices=EXCLAMATIONS,
        help=Expert(
            'what "!" becomes with SD 2 and SDXL: as their encoders were trained, or as diffusers '
            "has it; default: openclip"
        ),
    )


PREDICTION_HELP = (
    "eps, v, x0, flow, edm, edm_v, or base=v,distilled=eps; default: what the file says"
)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """--lora and --embedding, once for each file, and --allow."""
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH[@LEGS]]",
        help="attach it to both models, at strength 1; legs: models and/or the highest timestep, "
        "such as @distilled or @base+800; may be repeated",
    )
    group.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:TOKEN]",
        help="a textual inversion: prompts may say its token; default: the file's own, or its name",
    )
    add_allow(group)


def add_allow(group: argparse._ActionsContainer) -> None:  # pyright: ignore
    group.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help=Expert(
            "tensors or keys that may find no place, such as 'lora_te_*' or 'control_model.*'; "
            "default: none"
        ),
    )


def every() -> Parser:
    every = Parser(add_help=False)
    every.add_argument("--json", action="store_true", help="print JSON for machines")
    every.add_argument(
        "--debug", action="store_true", help=Expert("show the traceback of an error")
    )
    return every


def add_out(
    parser: argparse.ArgumentParser, default: str | None = None, about: str = "PNG"
) -> None:
    """The file that a command writes."""
    parser.add_argument(
        "--out",
        type=output,
        default=None if default is None else Path(default),
        metavar="FILE",
        help=f"{about}; default: {default or 'none'}",
    )
    add_overwrite(parser)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def add_metadata(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-metadata",
        action="store_true",
        help="leave out of the PNGs what they are of: prompt, seed, plan, digests",
    )


def add_size(parser: argparse._ActionsContainer) -> None:  # pyright: ignore
    parser.add_argument(
        "--size", metavar="SIZE", help="pixels: 512 or HEIGHTxWIDTH; default: the model's own"
    )


def add_batch(parser: argparse._ActionsContainer) -> None:  # pyright: ignore
    parser.add_argument(
        "--batch",
        type=batch,
        metavar="N[,N[,N]]",
        help=Expert(
            "samples in a network at once, or those, in the decoder, and its bands: 8,2,16; "
            "default: what memory holds"
        ),
    )


def add_reading(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:  # pyright: ignore
    """How every prompt of a command is read; `session.open_engine` sets it."""
    group = parser.add_argument_group("how prompts are read")
    group.add_argument(
        "--prompt-style",
        choices=PROMPT_STYLES,
        help="plain: as typed; the others: weights such as (fox:1.3) as that program reads them; "
        "default: plain",
    )
    group.add_argument(
        "--clip-skip",
        type=count,
        metavar="N",
        help=Expert("read the text encoders' N-th layer from the end; default: the family's"),
    )
    group.add_argument(
        "--lora-folder",
        type=Path,
        metavar="DIR",
        help=Expert(
            "where <lora:NAME:0.8> in a prompt finds NAME.safetensors, if no --lora has that name"
        ),
    )
    return group


def add_negative(parser: argparse.ArgumentParser, about: str = "") -> None:
    parser.add_argument(
        "--negative",
        action="append",
        default=[],
        metavar="TEXT",
        help=f'what guidance moves away from{about}; "" is an empty text, default: none',
    )


def add_texts(parser: argparse.ArgumentParser) -> None:
    """The texts of a run besides its prompts, and what SDXL is told of sizes."""
    add_negative(parser, ": once for all images, or once for each")
    group = add_reading(parser)
    group.add_argument(
        "--literal",
        action="store_true",
        help=Expert("prompts are letters alone: no `->`, no <lora:...>"),
    )
    group.add_argument(
        "--second-prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help=Expert(
            "SDXL's second encoder reads it: once for all images, or once for each; default: the "
            "prompt"
        ),
    )
    group.add_argument(
        "--second-negative",
        action="append",
        default=[],
        metavar="TEXT",
        help=Expert("its negative prompt; default: --negative"),
    )
    group.add_argument(
        "--original-size",
        metavar="HxW",
        help=Expert("SDXL is told that pictures like it had this size; default: --size"),
    )
    group.add_argument(
        "--crop",
        type=offset,
        metavar="TOP,LEFT",
        help=Expert("and were cut there; default: 0,0, uncut"),
    )
    group.add_argument("--target-size", metavar="HxW", help=Expert("to this size; default: --size"))


def add_features(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        action="append",
        metavar="NAME",
        help="scorer, structure, colours, imagenet, or a file or folder with published weights: "
        "Inception (for FID), LPIPS, DreamSim, CLIP, DINOv2, DINOv3, ImageReward (scores only); "
        "several times for several spaces, the first is the main one, and the first that reads "
        "prompts scores; default: scorer for pictures of the bundled pair, structure for others",
    )


def add_seeds(parser: argparse.ArgumentParser, default: str) -> None:
    about = "such as 0-15 or 3,7; default: %(default)s"
    parser.add_argument("--seeds", "--seed", default=default, metavar="SEEDS", help=about)


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
