"""Stages of the training recipe by name; a stage's module is imported only when it runs."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from headstart_weights.recipe import StageOptions


class Stage(NamedTuple):
    """Where a stage lives (`module:function`, called with StageOptions) and its time limit."""

    target: str
    about: str
    minutes: float = 0.0


STAGES: dict[str, Stage] = {
    "data": Stage("dataset:main", "fetch artwork, draw sprites and pictures"),
    "restore": Stage("restore:main", "unpack the bundled files, to train on from them"),
    "tokenizer": Stage("tokenizer:main", "fit the byte-pair vocabulary"),
    "codec": Stage("codec:main", "train the VAE", 10.0),
    "base": Stage("base:main", "train the text encoder and the base UNet", 60.0),
    "distill": Stage("distill:main", "distil the base to a few steps", 40.0),
    "control": Stage("distill:control", "distil the base again, from an unguided teacher", 15.0),
    "unnoised": Stage("distill:unnoised", "without noised pictures; not bundled", 40.0),
    "renoise": Stage("distill:renoise", "trained to re-noise; not bundled", 40.0),
    "renoise-unnoised": Stage("distill:renoise_unnoised", "both, as DMD2's is; not bundled", 40.0),
    "progressive": Stage("progressive:main", "distil by regression; a control, not bundled", 8.0),
    "tiny": Stage("tiny:main", "train the small decoder, fit the linear rgb map", 4.0),
    "scorer": Stage("scorer:main", "train the image-text scorer", 12.0),
    "slider": Stage("control:sliders", "train two sliders on the base", 4.0),
    "style": Stage("control:style", "train a style on the base", 4.0),
    "reverse": Stage("control:reverse", "train a slider on the distilled model", 4.0),
    "reference": Stage("reference:main", "describe the training pictures in the scorer's features"),
    "export": Stage("export:main", "write the bundled files and the manifest"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m headstart_weights.recipe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:10} {stage.about}" for name, stage in STAGES.items()),
    )
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="folder of results")
    parser.add_argument("--minutes", type=float, default=None, help="wall-clock limit of the stage")
    parser.add_argument("--steps", type=int, default=None, help="limit it by steps instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=int, default=0, metavar="N", help="keep a student after every N steps too"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.threads is not None:
        import_module("torch").set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    stage = STAGES[options.stage]
    module, function = stage.target.split(":")
    call = getattr(import_module(f"headstart_weights.recipe.{module}"), function)
    minutes = stage.minutes if options.minutes is None else options.minutes
    call(
        StageOptions(
            work=options.work,
            minutes=minutes,
            steps=options.steps,
            seed=options.seed,
            keep=options.keep,
        )
    )


if __name__ == "__main__":
    main()
