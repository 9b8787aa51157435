"""`headstart bench --estimate`: what plans would cost on a card that is not here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headstart.commands.parser import add_options
from headstart.commands.planned import compile_plans, headers_of
from headstart.commands.values import read_size, uses_bundled
from headstart.cost.cards import CARDS, card_of
from headstart.errors import InputError, counted
from headstart.plan.by_name import PlanSettings, named_pair, named_plan
from headstart.plan.pairs import PAIRS
from headstart.plan.request import check_size, parse_seeds

if TYPE_CHECKING:
    from headstart.cost.sizes import Sizes
    from headstart.plan.pair import Pair
    from headstart.plan.table import StepTable

FAMILIES = ("sd15", "sd21", "sdxl")
"""As in `headstart.cost.sizes.FULL`, which loads torch."""
_PRESETS = {"sd15": "lcm", "sd21": "sd-turbo", "sdxl": "dmd2"}
"""The pair of a family where --preset does not say."""
_PUBLISHED = {"sd-turbo": "sd21"} | dict.fromkeys(
    (
        *("lightning", "lightning-1step", "turbo", "dmd2", "dmd2-1step", "hyper-sd-1step"),
        *("nitrofusion", "nitrofusion-vibrant", "sdxl-flash"),
    ),
    "sdxl",
)
"""The family of presets whose model cards (`plan.pairs`) have files of one family alone."""
_DTYPES = ("float16", "bfloat16", "float32")
_UNCOUNTED = ("lora", "embedding", "distilled_lora", "versus")
_IDLE = ("rounds", "warmup", "tokenizer", "preview", "embedded_guidance", "ema", "exclamation")
"""Options of a run that change nothing that is counted."""


def add_estimate(parser: argparse.ArgumentParser) -> None:
    rows = f"""
        --estimate  time nothing: count FLOPs, bytes and launches, for --device one of
            {", ".join(CARDS)}
        --family    of this family at full size, without any file
    """
    group = parser.add_argument_group("an estimate instead")
    add_options(group, rows, family={"choices": FAMILIES})


def check_estimate(args: argparse.Namespace) -> None:
    """Raise InputError for options that do not belong together."""
    if args.family is not None and not args.estimate:
        raise InputError("--family is for --estimate: leave it out, or give --estimate too")
    if not args.estimate:
        return
    card_of(args.device)
    if args.family is not None and not uses_bundled(args):
        raise InputError("--family is a model without a file: leave out --base and the others")
    for name in _UNCOUNTED:
        if getattr(args, name):
            option = name.replace("_", "-")
            raise InputError(f"--{option} is not counted by --estimate: leave it out, or measure")
    if args.runner != "auto":
        raise InputError("--estimate tells of eager and graph side by side: leave out --runner")
    if args.memory != "auto":
        raise InputError(
            "--memory is not counted by --estimate, where all weights are on the card: leave it out"
        )
    for name in ("dtype", "vae_dtype"):
        if (dtype := getattr(args, name)) not in ("auto", *_DTYPES):
            option, dtypes = name.replace("_", "-"), ", ".join(_DTYPES)
            raise InputError(f"--{option} {dtype!r:.40}: --estimate counts {dtypes}")
    _chunks(args)


def estimate_plans(
    args: argparse.Namespace, plans: Mapping[str, PlanSettings]
) -> tuple[str, dict[str, Any]]:
    """The estimates of all plans, as text and as JSON."""
    import torch

    from headstart.cost.estimate import ASSUMPTIONS, estimate

    card, (models, tables) = card_of(args.device), _sizes_and_tables(args, plans)
    first = next(iter(models.values()))
    side = max(8, first.vae.downscale)
    pixels = check_size(read_size(args.size), first.family.image_size, side)
    dtype = getattr(torch, "float16" if args.dtype == "auto" else args.dtype)
    estimates = [
        estimate(
            *(models, table, card),
            pixels=pixels,
            batch=len(parse_seeds(args.seeds)),
            chunks=_chunks(args),
            dtype=dtype,
            vae_dtype=None if args.vae_dtype == "auto" else getattr(torch, args.vae_dtype),
        )
        for table in tables
    ]
    idle = [f"--{name.replace('_', '-')}" for name in _IDLE if getattr(args, name) is not None]
    notes = [
        *ASSUMPTIONS,
        *([f"of no account to an estimate: {', '.join(idle)}"] if idle else []),
        *_other_families(args, plans),
    ]
    return "\n\n".join([*map(str, estimates), "\n".join(notes)]), {
        "evidence": "estimate",
        "estimates": [row.to_json() for row in estimates],
        "assumptions": notes,
    }


def _chunks(args: argparse.Namespace) -> tuple[int, int, int]:
    """Images in a network at once, in the decoder, and bands. Raises InputError for more at once
    than there are seeds, since then it would be the estimate of another run."""
    images = len(parse_seeds(args.seeds))
    batch = args.batch or images
    networks, *others = (batch,) if isinstance(batch, int) else batch
    decode, bands = (*others, *(networks, 1)[len(others) :])
    if max(networks, decode) > images:
        raise InputError(
            f"--batch {max(networks, decode)} is of {counted(images, 'image')}: --estimate counts "
            "an image for each seed, give as many, such as --seeds 0-7"
        )
    return networks, decode, bands


def _other_families(args: argparse.Namespace, plans: Mapping[str, PlanSettings]) -> list[str]:
    """A line for each preset that is published for another family than --family."""
    names = dict.fromkeys(pair.name for pair in _pairs(args, plans).values())
    return [
        f"preset {name} is published for {_PUBLISHED[name]}: here its steps are counted on a "
        f"network of {args.family}"
        for name in names
        if _PUBLISHED.get(name, args.family) != args.family
    ]


def _pairs(args: argparse.Namespace, plans: Mapping[str, PlanSettings]) -> dict[str, Pair]:
    """Plan -> the pair of --family that it is of. Raises InputError for one whose noise schedule
    no network of that family has."""
    if args.family is None:
        return {}
    usual = _PRESETS[args.family]
    pairs = {name: named_pair(name, settings, usual) for name, settings in plans.items()}
    for pair in pairs.values():
        if pair.schedule.fingerprint() != PAIRS[usual].schedule.fingerprint():
            raise InputError(
                f"preset {pair.name!r} has another noise schedule than {args.family}: leave "
                f"--family out, or give a preset of it, such as --preset {usual}"
            )
    return pairs


def _sizes_and_tables(
    args: argparse.Namespace, plans: Mapping[str, PlanSettings]
) -> tuple[Mapping[str, Sizes], list[StepTable]]:
    """Role -> sizes, and the tables. One file alone is both models, as for `headstart plan`."""
    from headstart.checkpoint.network_info import Overrides
    from headstart.cost.sizes import sizes_of_family, sizes_of_files

    if args.family is not None:
        return dict.fromkeys(("base", "distilled"), sizes_of_family(args.family)), [
            named_plan(name, plans[name], pair.name).compile(
                pair.schedules, prediction=pair.predictions
            )
            for name, pair in _pairs(args, plans).items()
        ]
    if not uses_bundled(args):
        args.base, args.distilled = args.base or args.distilled, args.distilled or args.base
    tables = compile_plans(args, plans)
    paths = {role: model.path for role, model in headers_of(args).models.items()}
    overrides = Overrides(
        head_dim=args.head_dim, text_head_dim=args.text_head_dim, allow=args.allow
    )
    return sizes_of_files(paths, overrides, vae=args.vae, text=args.text), tables
