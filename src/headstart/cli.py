"""The `headstart` command: arguments are checked before torch is loaded, results go to stdout.

Exit status: 0 done, 1 `inspect` found a bad file, 2 an error, 130 Ctrl-C. Progress, warnings and
errors go to stderr, errors as one message `headstart: error: ...`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from headstart.arguments import build_parser, plan_settings, read_size, uses_bundled, worded
from headstart.errors import CheckpointError, HeadstartError, InputError
from headstart.output import check_file, check_folder, write_file, write_folder
from headstart.request import PRESETS, named_plan, pair_up, parse_seeds

if TYPE_CHECKING:
    from tqdm import tqdm

    from headstart.engine import Engine
    from headstart.table import StepTable
    from headstart.trajectory import Trajectory

__all__ = ["build_parser", "main"]

BAR_AFTER_S = 1.0
"""A progress bar appears on a terminal once a command has run this long."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = build_parser().parse_args(argv)
    with _plain_warnings():
        try:
            status = _COMMANDS[args.command](args)
            sys.stdout.flush()  # a full disk behind `> file` is an error of ours, not of the exit
            return status
        except KeyboardInterrupt:
            print("headstart: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our stdout went away, as in `headstart plan | head`
            _drop_output()
            return 141
        except HeadstartError as error:
            if args.debug:
                raise
            return _fail(str(error))
        except (OSError, MemoryError, RuntimeError) as error:
            if args.debug:
                raise
            told = str(error).strip() or type(error).__name__
            _drop_output()
            return _fail(f"{told.splitlines()[0]} (--debug shows where)")


# ----------------------------------------------------------------------- commands without torch


def _plan(args: argparse.Namespace) -> int:
    table = _planned(args)
    print(table.to_json() if args.json else table)
    return 0


def _planned(args: argparse.Namespace) -> StepTable:
    from headstart.plan import DEMO_SCHEDULE
    from headstart.prediction import Prediction
    from headstart.schedule import NoiseSchedule

    plan = named_plan(args.plan, plan_settings(args), "demo")
    if args.base is not None:
        from headstart.checkpoint import read_family

        family = read_family(args.base)
        return plan.compile(family.schedule, prediction=family.prediction)
    if plan.name.startswith("demo-"):
        return plan.compile(DEMO_SCHEDULE, prediction=Prediction.V)
    return plan.compile(NoiseSchedule.scaled_linear(), prediction=Prediction.EPS)


def _inspect(args: argparse.Namespace) -> int:
    from headstart.checkpoint import inspect_checkpoint

    try:
        info = inspect_checkpoint(args.file)
    except CheckpointError as error:
        if args.debug:
            raise
        if args.json:
            print(json.dumps({"path": str(args.file), "ok": False, "problems": [str(error)]}))
        else:
            _fail(str(error))
        return 1
    facts = info.to_json()
    if args.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            shown = "; ".join(getattr(info, name)) or "none" if isinstance(value, tuple) else value
            print(f"{name.replace('_', ' '):<22}{shown}")
    return 0 if info.ok else 1


# -------------------------------------------------------------------------- commands that sample


def _compare(args: argparse.Namespace) -> int:
    prompt = worded(args.prompt)
    _, seeds = pair_up(prompt, parse_seeds(args.seeds))
    check_file(args.out, size_bytes=4 * len(seeds) * 192 * 192 * 3, suffix=".png")
    demo = uses_bundled(args)
    if not demo and args.preset is None:
        raise InputError(f"compare needs --preset with your own weights: {', '.join(PRESETS)}")
    engine = _engine(args)

    from headstart.compare import (
        compare,
        compare_tables,
        demo_judge,
        footer_of,
        pixel_judge,
        sheet_of,
    )
    from headstart.sheet import encode_png

    judge = demo_judge() if demo else pixel_judge()
    tables = compare_tables(engine, preset=args.preset, steps=args.steps)
    with _progress(sum(map(len, tables.values())), "sampling") as bar:
        found = compare(engine, prompt, seeds, judge, tables=tables, on_step=lambda _: bar.update())
    write_file(args.out, encode_png(sheet_of(found)))
    if args.json:
        print(json.dumps(found.to_json(str(args.out))))
    else:
        print(f"{prompt!r}, {len(seeds)} seeds\n\n{found}\n\n{footer_of(found)}\n{args.out}")
    return 0


def _sample(args: argparse.Namespace) -> int:
    prompts, seeds = pair_up([worded(text) for text in args.prompts], parse_seeds(args.seeds))
    size = read_size(args.size)
    if uses_bundled(args):
        named_plan(args.plan, plan_settings(args), "demo")
    check_folder(args.out, size_bytes=0)
    if (args.out / "record.json").exists() and not args.overwrite:
        raise InputError(
            f"{str(args.out)!r} holds a run already: choose another --out, or give --overwrite"
        )
    engine = _engine(args)
    table = engine.compile(args.plan, **plan_settings(args))
    asked: dict[str, Any] = {
        "seeds": seeds,
        "negative": args.negative,
        "size": size,
        "batch": args.batch,
    }
    engine.iterate(prompts, plan=table, **asked)  # checks all of it, memory too, and runs nothing
    height, width = size or (engine.weights.image_size,) * 2
    check_folder(args.out, size_bytes=len(seeds) * height * width * 3)
    with _progress(len(table), "sampling") as bar:
        trajectory = engine.sample(prompts, plan=table, **asked, on_step=lambda _: bar.update())
    _write_images(args.out, trajectory)
    _report(args, trajectory, f"{len(trajectory)} images in {args.out}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    from headstart.record import parse, read_record

    record = read_record(args.record)
    recorded = parse(record)
    if args.out is not None:
        height, width = recorded.size
        check_folder(args.out, size_bytes=len(recorded.seeds) * height * width * 3)
    engine = _engine(_as_recorded(args, recorded.weights, recorded.machine))

    from headstart.engine import replay

    with _progress(len(recorded.table), "replaying") as bar:
        trajectory = replay(record, engine, on_step=lambda _: bar.update())
    if args.out is not None:
        _write_images(args.out, trajectory)
    _report(args, trajectory, f"equal: {len(trajectory)} images, to the bit")
    return 0


def _as_recorded(args: argparse.Namespace, weights: Any, machine: Any) -> argparse.Namespace:
    """Weights and dtype as recorded, where the command line does not say otherwise."""
    for role, file in weights.items():
        bundled = file["file"].startswith("headstart_weights/")
        if getattr(args, role, None) is None and not bundled:
            setattr(args, role, file["file"])
    if args.dtype == "auto":
        args.dtype = machine.get("dtype", "auto")
    args.preset = None
    return args


def _engine(args: argparse.Namespace) -> Engine:
    with _progress(None, "loading weights"):
        from headstart.engine import Engine

        if uses_bundled(args):
            return Engine.demo(device=args.device, dtype=args.dtype)
        return Engine.load(
            args.base,
            args.distilled,
            vae=args.vae,
            text=args.text,
            tokenizer=args.tokenizer,
            preview=args.preview,
            preset=args.preset,
            device=args.device,
            dtype=args.dtype,
        )


def _write_images(folder: Path, trajectory: Trajectory) -> None:
    from headstart.sheet import encode_png

    images = trajectory.rgb.cpu().numpy()
    files = {f"{number:06d}.png": encode_png(image) for number, image in enumerate(images)}
    record = json.dumps(trajectory.record(), indent=1) + "\n"
    write_folder(folder, {**files, "record.json": record.encode()})
    for stale in folder.glob("[0-9]" * 6 + ".png"):
        if stale.name not in files:  # of the longer run that was overwritten
            stale.unlink()


def _report(args: argparse.Namespace, trajectory: Trajectory, done: str) -> None:
    latency = {stage: round(ms, 2) for stage, ms in trajectory.latency_ms.items()}
    if args.json:
        facts = {
            "out": None if args.out is None else str(args.out),
            "images": len(trajectory),
            "prompts": trajectory.prompts,
            "seeds": trajectory.seeds,
            "plan": trajectory.table.name,
            "passes": trajectory.passes,
            "latency_ms": latency,
        }
        print(json.dumps(facts))
        return
    took = ", ".join(f"{stage} {ms / 1e3:.2f} s" for stage, ms in latency.items() if ms)
    print(f"{done} · plan {trajectory.table.name}, {trajectory.passes} passes · {took}")


@contextmanager
def _progress(total: int | None, what: str) -> Generator[tqdm[NoReturn]]:
    from tqdm import tqdm

    form = "{desc} {elapsed}" if total is None else None
    with tqdm(
        total=total, desc=what, delay=BAR_AFTER_S, disable=None, leave=False, bar_format=form
    ) as bar:
        yield bar


@contextmanager
def _plain_warnings() -> Generator[None]:
    """Warnings as one line without a source line."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _warn
        yield


def _warn(message: Warning | str, *_: object) -> None:
    print(f"headstart: warning: {message}", file=sys.stderr)


def _drop_output() -> None:
    """What stdout still holds cannot be written; without this the interpreter tries at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    print(f"headstart: error: {message}", file=sys.stderr)
    return 2


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "compare": _compare,
    "sample": _sample,
    "plan": _plan,
    "inspect": _inspect,
    "replay": _replay,
}
