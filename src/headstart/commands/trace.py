"""`headstart trace`: what each step of each plan is aiming at, as a sheet, animation or page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from headstart.commands.arguments import (
    Command,
    add_seeds,
    read_size,
    sampling,
    uses_bundled,
    worded,
)
from headstart.commands.console import note, progress
from headstart.commands.session import open_engine
from headstart.errors import InputError, PlanError
from headstart.output import check_file, write_file
from headstart.plan.request import MODES, PRESETS, PlanSettings, named_plan, pair_up, parse_seeds

if TYPE_CHECKING:
    from headstart.engine.engine import Engine
    from headstart.plan.table import StepTable
    from headstart.sampler import State
    from headstart.traces.decoders import Decoder
    from headstart.traces.timeline import ConceptScorer
    from headstart.traces.traces import Trace, Traced

FORMATS = (".png", ".gif", ".webp", ".html")
DECODERS = ("linear", "tiny", "full")


class Change(NamedTuple):
    """What is different from a step on; None where nothing was asked for."""

    step: int
    model: str | None
    seeds: tuple[int, ...] | None
    guidance: float | None
    prompt: str | None


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument(
        "--plan", default="base,distilled,hybrid", metavar="PLANS", help="default: %(default)s"
    )
    add_seeds(parser, "0-3")
    parser.add_argument("--preset", choices=PRESETS, help="which pair the weights are")
    parser.add_argument("--steps", type=int, help="steps of the distilled model")
    parser.add_argument("--base-steps", type=int, metavar="K", help="steps the base takes; 1")
    parser.add_argument("--size", help="pixels: 512 or HEIGHTxWIDTH; default: the model's own")
    parser.add_argument(
        "--decoder", choices=DECODERS, help="default: tiny where there is one, else linear"
    )
    parser.add_argument(
        "--every", type=int, metavar="N", help="look at every N-th step of the longest plan"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("trace.png"),
        help=".png, .gif, .webp or .html; default: %(default)s",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    group = parser.add_argument_group("when does a concept appear?")
    group.add_argument("--watch", action="append", default=[], metavar="PHRASE")
    group.add_argument("--scorer", type=Path, metavar="FOLDER", help="a CLIP model's folder")
    group = parser.add_argument_group("go on differently from a step, shown beside the original")
    group.add_argument("--from-step", type=int, metavar="K", help="the first step that changes")
    group.add_argument("--switch", metavar="MODEL@K", help="this model takes over at step K")
    group.add_argument("--reseed", metavar="SEEDS", help="what is predicted, under fresh noise")
    group.add_argument("--guidance", type=float, metavar="W")
    group.add_argument("--prompt-from", metavar="TEXT", help="another prompt from there on")


def _run(args: argparse.Namespace) -> int:
    prompt = worded(args.prompt)
    _, seeds = pair_up(prompt, parse_seeds(args.seeds))
    size = read_size(args.size)
    names = _plan_names(args)
    change = _change(args)
    _check_output(args.out, args.overwrite)
    if args.every is not None and args.every < 1:
        raise InputError(f"--every is at least 1, got {args.every}")
    if args.scorer is not None and not args.watch:
        raise InputError("--scorer scores what --watch names: give --watch PHRASE too")
    engine = open_engine(args)
    tables = {name: engine.compile(name, **_settings(name, args)) for name in names}
    _check_change(change, tables, engine)
    decoder, scorer = _tools(args, engine)
    for table in tables.values():
        engine.iterate(prompt, plan=table, seeds=seeds, size=size)  # checks it, and runs nothing
    note(_memory(engine, tables, len(seeds), size, change))
    runs = _sampled(engine, prompt, tables, seeds, size, change)
    found = _traced(args, runs, decoder, scorer)
    write_file(args.out, _encoded(found, args.out.suffix.lower()))
    for problem in found.problems:
        note(f"warning: {problem}")
    if args.json:
        print(json.dumps({"out": str(args.out), **found.to_json()}))
    else:
        print(f"{prompt!r}, {len(seeds)} seeds\n\n{found}\n\n{found.footer()}\n{args.out}")
    return 0


def _settings(name: str, args: argparse.Namespace) -> PlanSettings:
    """--steps and --base-steps belong to the distilled grid; plan base has its own 30 steps."""
    if name == "base":
        return {"preset": args.preset}
    k = None if name == "distilled" else args.base_steps
    return {"preset": args.preset, "steps": args.steps, "k": k}


def _plan_names(args: argparse.Namespace) -> tuple[str, ...]:
    names = tuple(name.strip() for name in args.plan.split(","))
    known = (*MODES, *PRESETS)
    for name in names:
        if name not in known:
            raise PlanError(f"unknown plan {name!r}: expected some of {', '.join(known)}")
        if names.count(name) > 1:
            raise PlanError(f"plan {name!r} is given twice: leave one out")
        if uses_bundled(args):
            named_plan(name, _settings(name, args), "demo")
    return names


def _check_output(out: Path, overwrite: bool) -> None:
    if out.suffix.lower() not in FORMATS:
        raise InputError(f"output {str(out)!r} must end in one of {', '.join(FORMATS)}")
    check_file(out, size_bytes=4_000_000)
    if out.exists() and not overwrite:
        raise InputError(f"{str(out)!r} exists: choose another --out, or give --overwrite")


def _change(args: argparse.Namespace) -> Change | None:
    model, step = None, args.from_step
    if args.switch is not None:
        model, mark, row = args.switch.partition("@")
        if not (mark and model and row.isdecimal()):
            raise InputError(f"--switch {args.switch!r:.40}: expected MODEL@STEP, as in base@2")
        if step not in (None, int(row)):
            raise InputError(f"--switch {args.switch} and --from-step {step} name two steps")
        step = int(row)
    asked = (args.reseed, args.guidance, args.prompt_from, args.switch)
    if step is None:
        if any(value is not None for value in asked):
            raise InputError("--reseed, --guidance and --prompt-from need --from-step K")
        return None
    if all(value is None for value in asked):
        raise InputError(
            "--from-step changes nothing by itself: give --reseed, --switch, --guidance or "
            "--prompt-from"
        )
    seeds = None if args.reseed is None else parse_seeds(args.reseed)
    text = None if args.prompt_from is None else worded(args.prompt_from)
    return Change(step, model, seeds, args.guidance, text)


def _check_change(change: Change | None, tables: dict[str, StepTable], engine: Engine) -> None:
    if change is None:
        return
    from headstart.traces.branches import changed

    for name, table in tables.items():
        if not 1 <= change.step < len(table):
            raise InputError(
                f"plan {name!r} has steps 0 to {len(table) - 1}, so it can change from step 1 to "
                f"{len(table) - 1}, not from {change.step}: choose another step or plan"
            )
        predictions = engine.weights.predictions
        changed(table, change.step, predictions, model=change.model, guidance=change.guidance)


def _tools(args: argparse.Namespace, engine: Engine) -> tuple[Decoder, ConceptScorer | None]:
    from headstart.traces.decoders import decoder
    from headstart.traces.timeline import check_phrases

    name = args.decoder or ("tiny" if engine.weights.preview is not None else "linear")
    found = decoder(engine, name)
    if not check_phrases(args.watch):
        return found, None
    if args.scorer is not None:
        from headstart.traces.clip import clip_scorer

        return found, clip_scorer(args.scorer)
    from headstart.traces.traces import demo_scorer

    return found, demo_scorer(engine.weights.lineage)


def _memory(
    engine: Engine,
    tables: dict[str, StepTable],
    images: int,
    size: tuple[int, int] | None,
    change: Change | None,
) -> str:
    weights = engine.weights
    height, width = size or (weights.image_size,) * 2
    cells = (height // weights.downscale) * (width // weights.downscale)
    rows = sum(map(len, tables.values())) * (1 if change is None else 2)
    kept = rows * images * weights.latent_channels * cells * 4
    return f"keeping x0 of {rows} steps x {images} images: {kept / 1e6:.1f} MB"


def _sampled(
    engine: Engine,
    prompt: str,
    tables: dict[str, StepTable],
    seeds: tuple[int, ...],
    size: tuple[int, int] | None,
    change: Change | None,
) -> dict[str, Traced]:
    from headstart.traces.branches import branch

    runs: dict[str, Traced] = {}
    with progress(sum(map(len, tables.values())), "sampling") as bar:
        for name, table in tables.items():
            kept: list[State] = []

            def see(state: State, kept: list[State] = kept) -> None:
                bar.update()
                if change is not None and state.step == change.step - 1:
                    kept.append(state)

            run = engine.sample(
                prompt, plan=table, seeds=seeds, size=size, keep_x0=True, on_step=see
            )
            runs[name] = run
            if change is not None:
                other = branch(
                    engine, run, kept[0], model=change.model, reseed=change.seeds,
                    guidance=change.guidance, prompt=change.prompt,
                )  # fmt: skip
                runs[f"{name} · {other.change}"] = other
    return runs


def _traced(
    args: argparse.Namespace,
    runs: dict[str, Traced],
    decoder: Decoder,
    scorer: ConceptScorer | None,
) -> Trace:
    from headstart.traces.traces import trace

    with progress(None, "decoding"):
        return trace(runs, decoder, phrases=args.watch, scorer=scorer, every=args.every or 1)


def _encoded(found: Trace, suffix: str) -> bytes:
    from headstart.pictures.sheet import encode_png

    if suffix == ".html":
        return found.page().encode()
    if suffix == ".png":
        return encode_png(found.sheet())
    return found.animation().encode("webp" if suffix == ".webp" else "gif")


TRACE = Command(
    "trace",
    "show what each step is aiming at, plan by plan, as a sheet, an animation or a page",
    sampling(),
    _add_options,
    _run,
)
