"""`headstart study`: the paper's experiments and other methods on one pair, and a report."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.adapters.strength import parse_adapter
from headstart.commands.arguments import REFERENCE, SIZE, add_features, add_reading, sampling
from headstart.commands.console import note, progress
from headstart.commands.parser import LIST, Command, add_options
from headstart.commands.plan_options import add_diversify
from headstart.commands.session import adapter_path, open_engine, use_local_device
from headstart.commands.values import count, numbers, output, read_size, split_list, uses_bundled
from headstart.commands.width import answer
from headstart.errors import InputError, counted
from headstart.output import check_folder
from headstart.plan.request import parse_seeds
from headstart.study.cases import EXPERIMENTS, PARTS, Part
from headstart.study.lists import DEMO, LISTS, PromptList, read_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from headstart.study.experiments import Attachable
    from headstart.study.setup import Request
    from headstart.study.study import Job, Progress

GRID = ("preset", "steps", "timesteps", "sigmas", "update")
QUICK_PROMPTS, QUICK_SEEDS = 4, 8
MOST_SHOWN = 8
TELL_EVERY_S = 60.0
"""Between two lines about the time left, where there is no terminal to draw a bar on."""


_DRAW_OPTIONS = f"""
    --prompts LIST  {", ".join((*LISTS, DEMO))}, or a text file with one prompt a line; default:
        everything the bundled pair draws, or for other weights the paper's five
    --seeds SEEDS  such as 0-99; default: the list's number
    {SIZE}
    --parts PART,PART  beside the plans: {", ".join((*PARTS[1:], *EXPERIMENTS))}, or plans alone;
        default: all that these weights allow
    --k K,K         steps that the base takes; default: a grid
    --n N,N         grids of the base's own; default: a grid
    --guidance W,W  of the base's step; default: a grid
    --handoff SIGMA,SIGMA  noise levels of the hand-off; default: a grid
"""
_QUICK = """
    --quick         4 prompts, 8 seeds, plans and methods alone
"""
_MEASURE_OPTIONS = f"""
    {REFERENCE}
    --keep N  pictures of each case and prompt that stay as files; default: %(default)s
    --control FILE[:STRENGTH]=WORDS  an adapter, and what it does: its effect on both models is
        measured with the prompt and WORDS behind it, or in place of {{}} in WORDS; default for the
        bundled pair: its slider
    --report  draw nothing; report what is there
"""
_GRID = """
    --preset PRESET  which pair; `headstart presets` lists them
    --steps STEPS    steps of its grid
    --timesteps T,T,...  its own, falling
    --sigmas S,S,...  levels in their place
    --update UPDATE  its rule: euler, ancestral, renoise, tcd ...
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    out = "--out DIR  new, or one to go on with"
    add_options(parser, out, out={"type": output, "required": True})
    group = parser.add_argument_group("what is drawn")
    grids = dict.fromkeys(("k", "n", "guidance", "handoff"), numbers)
    add_options(group, _DRAW_OPTIONS, parts={"default": "all"}, **grids)
    add_diversify(parser)
    add_options(group, _QUICK)
    add_reading(parser)
    group = parser.add_argument_group("what is measured")
    add_features(parser)
    add_options(group, _MEASURE_OPTIONS, keep={"type": count, "default": 16}, control=LIST)
    group = parser.add_argument_group("the distilled model's own way")
    add_options(group, _GRID, steps=int, timesteps=numbers, sigmas=numbers)


def _run(args: argparse.Namespace) -> int:
    try:
        return _study(args)
    except KeyboardInterrupt as stop:
        stop.add_note(f"what is drawn stays in {args.out}; the same command goes on from there")
        raise


def _study(args: argparse.Namespace) -> int:
    from headstart.study.figures import check_figures
    from headstart.sweep.ledger import Shard

    check_figures()
    shard = Shard.of_environment(os.environ)
    read_parts(args.parts)
    prompts, seeds = _prompts_and_seeds(args)
    check_folder(args.out, size_bytes=0)
    use_local_device(args)
    engine = open_engine(args, prompts.prompts)

    from headstart.study.report import write_report
    from headstart.study.setup import reference_of, settings_of, study_of
    from headstart.study.store import open_store
    from headstart.study.study import draw, missing, report_of, share

    request = _request(args, prompts, seeds)
    study, notes = study_of(engine, request)
    for line in notes:
        note(line)
    settings = settings_of(engine, study, request)
    with open_store(args.out, settings, shard) as store:
        if args.report and (cells := missing(study, store)):
            raise InputError(
                f"{len(cells)} cells are missing, the first is {cells[0].key.file}: leave "
                "--report out to draw them"
            )
        jobs = share(study, store)
        height, width = settings["size"]
        job_bytes = min(args.keep, len(seeds)) * height * width * 3
        check_folder(args.out, size_bytes=len(jobs) * job_bytes)
        with _progress(jobs) as show:
            draw(jobs, store, show)
        if others := len(missing(study, store)):
            _print(args, len(jobs), others, {})
            return 0
        report, rows = report_of(study, store)
        report |= {**settings, "command": " ".join(["headstart", *sys.argv[1:]])}
        report |= {"reference": reference_of(study, request), "notes": list(notes)}
        files = write_report(args.out, report, rows, _pictures(args, report, seeds))
    _print(args, len(jobs), 0, report, files)
    return 0


def read_parts(text: str) -> tuple[str, ...] | None:
    """`plans,k` -> its parts; None for all. Raises InputError for one that there is not."""
    if text == "all":
        return None
    parts, names = tuple(split_list(text)), (*PARTS, *EXPERIMENTS)
    if unknown := [part for part in parts if part not in names]:
        raise InputError(f"part {unknown[0]!r:.40}: expected some of {', '.join(names)}, or: all")
    return parts


def _prompts_and_seeds(args: argparse.Namespace) -> tuple[PromptList, tuple[int, ...]]:
    """Prompts and seeds."""
    usual = DEMO if uses_bundled(args) else "paper"
    prompts = read_prompts(args.prompts or usual)
    seeds = tuple(range(prompts.seeds)) if args.seeds is None else parse_seeds(args.seeds)
    if args.quick:
        prompts = prompts._replace(prompts=prompts.prompts[:QUICK_PROMPTS])
        seeds = seeds[:QUICK_SEEDS]
    if len(seeds) < 2:
        raise InputError("a study measures how varied seeds are: give two or more, such as 0-15")
    return prompts, seeds


def _request(args: argparse.Namespace, prompts: PromptList, seeds: tuple[int, ...]) -> Request:
    from headstart.study.setup import Request

    parts = ("plans", "methods") if args.quick and args.parts == "all" else read_parts(args.parts)
    settings = {name: getattr(args, name) for name in GRID}
    varied: dict[Part, Any] = {
        "k": _integers(args.k),
        "n": _integers(args.n),
        "guidance": args.guidance,
        "handoff": args.handoff,
        "methods": args.diversify or None,
    }
    return Request(
        prompts=prompts.prompts,
        seeds=seeds,
        settings={name: value for name, value in settings.items() if value is not None},  # pyright: ignore
        size=read_size(args.size),
        parts=parts,
        grids={part: values for part, values in varied.items() if values is not None},
        features=args.features or None,
        reference=args.reference or _usual_reference(args),
        keep=args.keep,
        controls=_controls(args),
        loading=_loading(args),
    )


def _usual_reference(args: argparse.Namespace) -> str | None:
    """The bundled one where the bundled scorer is the judge: of pictures of its own size."""
    from headstart.metrics.scorer import IMAGE_SIZE

    is_usual_size = read_size(args.size) in (None, (IMAGE_SIZE, IMAGE_SIZE))
    return "bundled" if is_usual_size and uses_bundled(args) and not args.features else None


def _loading(args: argparse.Namespace) -> dict[str, Any]:
    """What decides pictures beside the weights' files and the tables."""
    from headstart.engine import record

    names = ("head_dim", "text_head_dim", "exclamation")
    loading: dict[str, Any] = {n: v for n in names if (v := getattr(args, n)) is not None}
    if args.tokenizer is not None:
        path = Path(args.tokenizer)
        files = tuple(sorted(path.glob("*.*"))) if path.is_dir() else (path,)
        digests = record.weigh({"tokenizer": (path.name, files)})
        loading["tokenizer"] = digests["tokenizer"]["sha256"]
    return loading


def _controls(args: argparse.Namespace) -> list[Attachable]:
    """`FILE[:STRENGTH]=WORDS`, each the name of a bundled control or a file."""
    from headstart.study.control import Control
    from headstart.study.experiments import Attachable, bundled_controls

    if not args.control:
        return bundled_controls() if uses_bundled(args) and not args.lora else []
    controls: list[Attachable] = []
    for text in args.control:
        adapter, equals, words = text.partition("=")
        if not (equals and words.strip()):
            raise InputError(
                f"control {text!r:.80}: expected FILE[:STRENGTH]=WORDS, such as "
                "'yellow:2=yellow background' or 'lego.safetensors={} made of lego'"
            )
        name, strength = parse_adapter(adapter)
        value = strength.constant
        if value is None or value == 0.0:
            raise InputError(f"control {text!r:.80}: its strength is one number, and not 0")
        path = Path(adapter_path(name))
        controls.append(Attachable(path=path, control=Control(path.stem, words.strip(), (value,))))
    if len({item.control.adapter for item in controls}) < len(controls):
        raise InputError("--control: two adapters of one name: give each file once")
    return controls


def _integers(values: list[float] | None) -> list[int] | None:
    if values is None:
        return None
    if not all(value.is_integer() for value in values):
        raise InputError(f"--k and --n are whole numbers, got {values}")
    return [int(value) for value in values]


def _pictures(
    args: argparse.Namespace, report: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, list[Path]]:
    """Of each plan and method, the kept pictures of the first prompt."""
    from headstart.study.store import picture_file

    first_seeds = seeds[: min(args.keep, MOST_SHOWN)]
    return {
        name: [args.out / picture_file(name, 0, seed) for seed in first_seeds]
        for name, row in report["rows"].items()
        if row["part"] in ("plans", "methods")
    }


@contextmanager
def _progress(jobs: Sequence[Job]) -> Generator[Callable[[Job, Progress], None]]:
    """What is left: a bar of network passes on a terminal, else a line a minute."""
    passes, last = sum(job.passes for job in jobs), time.monotonic()
    if jobs:
        note(f"{counted(len(jobs), 'cell')} to draw, {passes:.0f} network passes")
    with progress(round(passes), "drawing", " pass") as bar:

        def show(job: Job, state: Progress) -> None:
            nonlocal last
            bar.update(job.passes)
            if not sys.stderr.isatty() and time.monotonic() - last >= TELL_EVERY_S:
                last = time.monotonic()
                about = "" if state.seconds is None else f", about {duration(state.seconds)} left"
                note(f"{state.done} of {state.total} cells{about}")

        yield show


def duration(seconds: float) -> str:
    """Two units at most: `3 h 20 min`, `4 min`, `30 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _print(
    args: argparse.Namespace,
    drawn: int,
    others: int,
    report: Mapping[str, Any],
    files: Sequence[Path] = (),
) -> None:
    from headstart.study.table import table

    cells = f"{counted(drawn, 'cell')} drawn"
    text = f"{cells}; {others} of other ranks are left · {args.out}"
    if not others:
        text = f"{table(report)}\n\n{cells} · {', '.join(map(str, files))}"
    facts = {"out": str(args.out), "made": drawn, "missing": others, "rows": report.get("rows")}
    answer(args, facts, text)


STUDY = Command(
    "study",
    "the paper's experiments and other methods on one pair, into a report; goes on where it ended",
    sampling(),
    _add_options,
    _run,
    (
        "headstart study --quick --out study",
        "headstart study --base BASE --distilled DISTILLED --prompts car --out car",
    ),
)
