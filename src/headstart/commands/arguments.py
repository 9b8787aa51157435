"""What a command is, the options that commands share, and how their text is read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from headstart.errors import InputError
from headstart.networks.prompt_style import EXCLAMATIONS, PROMPT_STYLES

if TYPE_CHECKING:
    from headstart.diversify.method import Method
    from headstart.plan.by_name import PlanSettings

OWN_WEIGHTS = (
    *("base", "distilled", "distilled_lora", "vae", "text", "tokenizer", "preview"),
    *("prediction", "embedded_guidance", "ema", "head_dim", "text_head_dim", "exclamation"),
)
"""Options that say nothing about the bundled pair."""

RUNNERS = ("auto", "eager", "compiled", "graph", "replay", "trajectory")
"""As in `headstart.runner.runner.RunnerName`, which loads torch."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as every other error."""
        self.exit(2, f"headstart: error: {message}; see `{self.prog} --help`\n")


class Command(NamedTuple):
    """One thing that can be typed after `headstart`.

    parents      groups of options that it shares with others: `every()`, `*sampling()`
    add_options  its own options
    run          does it, and returns the exit status; imports what is heavy when it is called
    """

    name: str
    about: str
    parents: Sequence[Parser]
    add_options: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], int]


def plan_settings(args: argparse.Namespace) -> PlanSettings:
    """The plan options, None where not given."""
    return {
        "preset": args.preset,
        "steps": args.steps,
        "k": args.base_steps,
        "n": args.base_grid,
        "handoff": args.handoff,
        "base_guidance": args.base_guidance,
        "distilled_guidance": args.distilled_guidance,
        "timesteps": args.timesteps,
        "sigmas": args.sigmas,
        "update": args.update,
    }


def uses_bundled(args: argparse.Namespace) -> bool:
    """Whether the bundled pair is meant. Raises InputError for a lone --vae or --text."""
    own = [name for name in OWN_WEIGHTS if getattr(args, name) is not None]
    if own and not {"base", "distilled"} & set(own):
        option = own[0].replace("_", "-")
        raise InputError(f"--{option} alone: give --base and/or --distilled of your own too")
    return not own


def read_predictions(text: str | None) -> str | dict[str, str] | None:
    """`v`, or `base=v,distilled=eps`. Raises InputError for anything else."""
    return None if text is None else _by_model(text, "prediction", "eps, v, x0, flow, or base=v")


def read_device(text: str) -> str | dict[str, str]:
    """`cuda:1`, or `base=cuda:0,distilled=cuda:1`. Raises InputError for anything else."""
    return _by_model(text, "device", "auto, cpu, cuda, cuda:N, or base=cuda:0,distilled=cuda:1")


def _by_model(text: str, what: str, expected: str) -> str | dict[str, str]:
    if "=" not in text:
        return text
    pairs = [part.strip().partition("=") for part in text.split(",")]
    if any(not value for _, _, value in pairs) or len({role for role, *_ in pairs}) < len(pairs):
        raise InputError(f"{what} {text!r:.60}: expected {expected}")
    return {role: value for role, _, value in pairs}


def worded(prompt: str) -> str:
    """The API takes an empty prompt for sampling without text; typed here, it is a mistake."""
    if not prompt.strip():
        raise InputError('the prompt is empty: say what to draw, such as "a fox"')
    return prompt


def read_size(text: str | None, what: str = "size") -> tuple[int, int] | None:
    """`512` or `HEIGHTxWIDTH`, in pixels. Raises InputError for anything else."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 9 for side in sides):
        raise InputError(f"{what} {text!r:.40}: expected pixels such as 512, or HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def read_texts(given: Sequence[str]) -> str | list[str] | None:
    """An option that may be repeated: None where it was not given, one for all, or one an image."""
    return None if not given else given[0] if len(given) == 1 else [*given]


def text_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_texts` asks of a run, None where it was not given."""
    return {
        "negative": read_texts(args.negative),
        "second": read_texts(args.second_prompt),
        "negative_second": read_texts(args.second_negative),
        "original_size": read_size(args.original_size, "--original-size"),
        "target_size": read_size(args.target_size, "--target-size"),
        "crop": args.crop,
        "literal": args.literal or None,
    }


def offset(text: str) -> tuple[int, int]:
    """`TOP,LEFT` in pixels, as the `type` of an option."""
    sides = [part.strip() for part in text.split(",")]
    if len(sides) != 2 or not all(side.isdecimal() and len(side) < 9 for side in sides):
        expected = "TOP,LEFT in pixels, such as 0,0"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r:.40}")
    return int(sides[0]), int(sides[1])


def listed(text: str) -> list[str]:
    """`a,b` -> its parts, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def count(text: str) -> int:
    """A whole number of at least 1, as the `type` of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r:.40}")
    return int(text)


def batch(text: str) -> int | tuple[int, ...]:
    """`8`, or `8,2,16`, as the `type` of an option."""
    found = tuple(map(count, text.split(",")))
    if len(found) > 3:
        expected = "samples in a network, in the decoder, and bands of a decode, such as 8,2,16"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r:.40}")
    return found[0] if len(found) == 1 else found


BATCH_HELP = "samples in a network at once, or those, in the decoder, and its bands: 8,2,16"


def numbers(text: str) -> list[float]:
    """`999,749` as the `type` of an option."""
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        expected = "numbers such as 999,749,499,249"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r:.60}") from None


def sampling() -> Sequence[Parser]:
    """Parents of a command that loads weights."""
    weights = Parser(add_help=False)
    group = weights.add_argument_group("weights (default: the bundled pair)")
    for name in ("base", "distilled", "vae", "text", "tokenizer", "preview"):
        group.add_argument(f"--{name}", metavar="PATH")
    group.add_argument(
        "--distilled-lora", metavar="FILE", help="the distilled model is this LoRA on the base"
    )
    add_adapters(weights)
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N, or base=cuda:0,distilled=cuda:1"
    )
    group.add_argument(
        "--memory",
        default="auto",
        metavar="SIZE",
        help="of the GPU that may be had, such as 8GB: what does not fit takes turns; auto: what "
        "is free, none: nothing takes turns",
    )
    group.add_argument(
        "--dtype", default="auto", help="auto, float32, float16, bfloat16, stored, float8"
    )
    group.add_argument("--vae-dtype", default="auto", help="of the decoder; bfloat16 on a GPU")
    group.add_argument(
        "--packed",
        action=argparse.BooleanOptionalAction,
        help="lay weights out for the CPU's products: on for full-size models",
    )
    group.add_argument("--runner", choices=RUNNERS, default="auto", help="how networks are called")
    group.add_argument("--prediction", help="eps, v, x0, flow, edm, edm_v, or base=v,distilled=eps")
    group.add_argument(
        "--embedded-guidance", type=float, metavar="W", help="what an LCM imitates; 8"
    )
    group.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the averaged weights of files that have both, or the trained ones",
    )
    about = "attention head width of a scaled-down "
    group.add_argument("--head-dim", type=int, metavar="N", help=about + "UNet")
    group.add_argument("--text-head-dim", type=int, metavar="N", help=about + "text encoder")
    group.add_argument(
        "--exclamation",
        choices=EXCLAMATIONS,
        help='what "!" becomes with SD 2 and SDXL: as their encoders were trained, or as diffusers '
        "has it; openclip",
    )
    return every(), weights


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """--lora and --embedding, once for each file, and --allow."""
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH[@LEGS]]",
        help="attach it to both models; legs: models and/or the highest timestep, such as "
        "@distilled or @base+800",
    )
    group.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="tensors of checkpoints and modules or keys of adapters that may find no place, such "
        "as 'lora_te_*' or 'control_model.*'",
    )
    group.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:TOKEN]",
        help="a textual inversion: prompts may say its token; by default the file's own, or its "
        "name",
    )


def every() -> Parser:
    every = Parser(add_help=False)
    every.add_argument("--json", action="store_true", help="print JSON for machines")
    every.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return every


def add_reading(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:  # pyright: ignore
    """How every prompt of a command is read; `session.open_engine` sets it."""
    group = parser.add_argument_group("how prompts are read")
    group.add_argument(
        "--prompt-style",
        choices=PROMPT_STYLES,
        help="plain: as typed; with weights such as (fox:1.3) as that program reads them: "
        "default: plain",
    )
    group.add_argument(
        "--clip-skip",
        type=count,
        metavar="N",
        help="read the text encoders' N-th layer from the end, counted from 1",
    )
    group.add_argument(
        "--lora-folder",
        type=Path,
        metavar="DIR",
        help="where <lora:NAME:0.8> in a prompt finds NAME.safetensors, if no --lora has that name",
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
        "--literal", action="store_true", help="prompts are letters alone: no `->`, no <lora:...>"
    )
    group.add_argument(
        "--second-prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="SDXL's second encoder reads it: once for all images, or once for each",
    )
    group.add_argument(
        "--second-negative", action="append", default=[], metavar="TEXT", help="its negative prompt"
    )
    group.add_argument(
        "--original-size", metavar="HxW", help="SDXL is told that pictures like it had; the size"
    )
    group.add_argument(
        "--crop", type=offset, metavar="TOP,LEFT", help="and were cut there; 0,0, uncut"
    )
    group.add_argument("--target-size", metavar="HxW", help="to this; the size")


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


def add_diversify(parser: argparse.ArgumentParser, about: str = "may be repeated") -> None:
    """The names are those of `headstart.diversify.methods`, which loads torch."""
    parser.add_argument(
        "--diversify",
        action="append",
        default=[],
        metavar="METHOD:VALUE",
        help="another way to variety: cads:0.1, embedding-noise:1, interval:0.28,high=5.42, "
        f"particles:128, pink:1, dial:0.25, select:4; {about}",
    )


def read_diversify(args: argparse.Namespace, *, apart: bool = False) -> tuple[Method, ...]:
    """The methods that were typed; `apart`: each is a run of its own, so that a name may come
    again. Raises InputError for one that there is not."""
    if not args.diversify:
        return ()
    from headstart.diversify.methods import parse_method, read_methods

    if apart:
        return tuple(dict.fromkeys(map(parse_method, args.diversify)))
    return read_methods(args.diversify)


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    from headstart.plan.by_name import MODES  # loads numpy, which `inspect` does without

    group = parser.add_argument_group("plan")
    group.add_argument(
        "--plan",
        default="hybrid",
        help=f"{', '.join(MODES)}, a preset, or FILE.toml; default: hybrid",
    )
    group.add_argument("--preset", help="which pair; `headstart presets` lists them")
    group.add_argument("--steps", type=int, help="steps of the distilled grid, or of plan base")
    group.add_argument("--base-steps", type=int, metavar="K", help="steps the base takes; 1")
    group.add_argument(
        "--base-grid", type=int, metavar="N", help="the base covers them on its own N-step grid"
    )
    group.add_argument(
        "--handoff", type=float, metavar="SIGMA", help="hand over at this noise level or below it"
    )
    group.add_argument(
        "--timesteps", type=numbers, metavar="T,T,...", help="the distilled model's own, falling"
    )
    group.add_argument(
        "--sigmas", type=numbers, metavar="S,S,...", help="its levels, in their place"
    )
    group.add_argument(
        "--update", help="its rule: euler, ddim, ancestral, renoise, tcd, dpmpp_2m ..."
    )
    group.add_argument("--base-guidance", type=float, metavar="W", help="1 = conditional only")
    group.add_argument("--distilled-guidance", type=float, metavar="W", help="1 by default")
