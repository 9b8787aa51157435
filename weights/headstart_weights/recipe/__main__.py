"""Stages of the training recipe by name; a stage's module is imported only when it runs."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from headstart_weights.recipe import StageOptions
from headstart_weights.recipe.stages import STAGES


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
    work, steps, seed, keep = options.work, options.steps, options.seed, options.keep
    call(StageOptions(work=work, minutes=minutes, steps=steps, seed=seed, keep=keep))


if __name__ == "__main__":
    main()
