"""`headstart trace`: what each step of each plan is aiming at, as a sheet, animation or page."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.commands.arguments import (
    SIZE,
    add_negative,
    add_out,
    add_prompt,
    add_reading,
    sampling,
)
from headstart.commands.console import note, progress
from headstart.commands.intervention import Intervention, add_intervention, read_intervention
from headstart.commands.parser import LIST, Command, add_options
from headstart.commands.plan_options import PLAN_OPTION, add_plans
from headstart.commands.planned import compile_plans
from headstart.commands.session import open_engine
from headstart.commands.values import count, one_prompt, read_size, read_texts
from headstart.commands.width import answer
from headstart.errors import InputError, PlanError, counted
from headstart.output import check_file, write_file
from headstart.plan.by_name import TOML, PlanSettings, check_name

if TYPE_CHECKING:
    from headstart.engine.engine import Engine
    from headstart.plan.table import StepTable
    from headstart.sampler import State
    from headstart.traces.decoders import Decoder
    from headstart.traces.timeline import ConceptScorer
    from headstart.traces.traces import Trace, Traced

FORMATS = (".png", ".gif", ".webp", ".html")
DECODERS = ("linear", "tiny", "full")
PLAN_OPTIONS = ("steps", "k", "n", "handoff", "base_guidance", "distilled_guidance")
MOST_COLUMNS = 60
"""Of steps on a sheet, which is then 9000 pixels wide."""


_OPTIONS = """
    --decoder  default: tiny where there is one, else linear
    --every N  look at every N-th step of the longest plan, and give each its column; default: look
        at all, of which a sheet shows 8
"""
_CONCEPT = """
    --watch PHRASE[=CONTROL]  say when it is there beyond the same seeds with another prompt,
        CONTROL; default: PROMPT with the phrase taken out. A phrase that is not in PROMPT is never
        there
    --scorer FOLDER  a CLIP model's folder; default: the bundled scorer
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_prompt(parser, None, "0-3")
    add_out(parser, "trace.png", ", ".join(FORMATS))
    add_options(parser, SIZE)
    add_plans(parser.add_argument_group("plans"), modes=True)
    add_negative(parser, ": once for all images, or once for each")
    add_reading(parser)
    add_options(parser, _OPTIONS, decoder={"choices": DECODERS}, every=count)
    group = parser.add_argument_group("when does a concept appear?")
    add_options(group, _CONCEPT, watch=LIST, scorer=Path)
    add_intervention(parser)


def _run(args: argparse.Namespace) -> int:
    prompt, seeds = one_prompt(args)
    size = read_size(args.size)
    names = _plan_names(args)
    change = read_intervention(args)
    _check_output(args.out, args.overwrite)
    if args.scorer is not None and not args.watch:
        raise InputError("--scorer scores what --watch names: give --watch PHRASE too")
    controls = _controls(args.watch, prompt)
    texts = (prompt, *sorted({control for control in controls.values() if control is not None}))
    later = [] if change is None or change.prompt is None else [change.prompt]
    engine = open_engine(args, [prompt, *later, *texts[1:]])
    tables = {name: engine.compile(name, **_settings(name, names, args)) for name in names}
    if change is not None:
        change.check(tables, engine)
    decoder, scorer = _tools(args, engine, bool(controls))
    negatives = _negatives(read_texts(args.negative), tables, change)
    options: dict[str, dict[str, Any]] = {
        name: {"plan": table, "seeds": seeds, "negative": negatives[name], "size": size}
        for name, table in tables.items()
    }
    for text in texts:
        for run in options.values():
            engine.iterate(text, **run)  # checks it, and runs nothing
    note(_memory(engine, tables, len(seeds) * len(texts), size, change))
    sampled = {text: _sample(engine, text, options, change) for text in texts}

    from headstart.traces.traces import trace

    with progress(None, "decoding"):
        result = trace(
            sampled[prompt],
            decoder,
            phrases=tuple(controls),
            controls={p: sampled[text] for p, text in controls.items() if text is not None},
            scorer=scorer,
            every=args.every or 1,
        )
    write_file(args.out, _encode(result, args.out.suffix.lower(), args.every is not None))
    for problem in result.problems:
        note(f"warning: {problem}")
    title = f"{prompt!r}, {counted(len(seeds), 'seed')}"
    text = f"{title}\n\n{result}\n\n{result.footer()}\n{args.out}"
    answer(args, {"out": str(args.out), **result.to_json()}, text)
    return 0


def _settings(name: str, names: tuple[str, ...], args: argparse.Namespace) -> PlanSettings:
    """Those that act in a plan: the grid is the distilled one, since plan base has its own 30
    steps, and guidance belongs to the models that run."""
    if name == "base":
        base: PlanSettings = {"preset": args.preset, "base_guidance": args.base_guidance}
        return {**base, "steps": args.steps} if names == ("base",) else base
    if name.endswith(TOML):
        return {"preset": args.preset}
    settings: PlanSettings = {
        "preset": args.preset,
        "steps": args.steps,
        "distilled_guidance": args.distilled_guidance,
    }
    if name != "distilled" and not (name == "skip-first" and args.handoff is not None):
        settings["k"] = args.base_steps
    if name not in ("distilled", "replace-final"):
        settings["handoff"] = args.handoff
    if name not in ("distilled", "skip-first"):
        settings["n"], settings["base_guidance"] = args.base_grid, args.base_guidance
    return settings


def _negatives(
    negative: str | list[str] | None, tables: Mapping[str, StepTable], change: Intervention | None
) -> dict[str, str | list[str] | None]:
    """The negative prompt of each plan: none where no row has guidance, which is said."""
    negatives = {
        name: negative if any(step.guidance != 1.0 for step in table) else None
        for name, table in tables.items()
    }
    unguided = [name for name, text in negatives.items() if negative is not None and text is None]
    if unguided and len(unguided) == len(tables) and not (change is not None and change.guided):
        raise InputError(
            f"the negative prompt would do nothing: plan {', '.join(tables)} runs without "
            "guidance; leave it out, or give --base-guidance or --distilled-guidance"
        )
    if unguided:
        note(f"no guidance in plan {', '.join(unguided)}: the negative prompt does nothing there")
    return negatives


def _plan_names(args: argparse.Namespace) -> tuple[str, ...]:
    names = tuple(name.strip() for name in args.plan.split(","))
    for name in names:
        check_name(name)
        if names.count(name) > 1:
            raise PlanError(f"plan {name!r} is given twice: leave one out")
    compile_plans(args, {name: _settings(name, names, args) for name in names})
    keys = {key for name in names for key in _settings(name, names, args)}
    for key in PLAN_OPTIONS:
        option = PLAN_OPTION.get(key, key)
        if getattr(args, option) is not None and key not in keys:
            raise PlanError(
                f"--{option.replace('_', '-')} does nothing in plan {', '.join(names)}: leave it "
                "out, or name a plan that takes it"
            )
    return names


def _check_output(out: Path, overwrite: bool) -> None:
    if out.suffix.lower() not in FORMATS:
        raise InputError(f"output {str(out)!r} must end in one of {', '.join(FORMATS)}")
    check_file(out, size_bytes=4_000_000, overwrite=overwrite)


def _controls(options: list[str], prompt: str) -> dict[str, str | None]:
    """Phrase -> the prompt without it, or None where the prompt does not have it."""
    from headstart.conditioning.stages import stages
    from headstart.traces.timeline import check_phrases, without

    levels = [stage.level for stage in stages(prompt)]
    parts = [option.partition("=") for option in options]
    check_phrases([phrase for phrase, _, _ in parts])
    controls: dict[str, str | None] = {}
    for phrase, mark, text in parts:
        controls[phrase] = control = text.strip() if mark else without(prompt, phrase)
        if control is None:
            note(f"{phrase!r} is not in the prompt: not asked for, so it is never called there")
        elif control and not mark and len(levels) > 1 and not _has_levels(control, levels):
            raise InputError(
                f"--watch {phrase!r}: the prompt without it has not the same parts by level, so it "
                f"is no control: give one, --watch {phrase + '=PROMPT'!r}, or watch other words"
            )
        elif control == prompt:
            raise InputError(
                f"--watch {phrase!r}: its control is the prompt itself; name the prompt without it"
            )
    return controls


def _has_levels(control: str, levels: Sequence[object]) -> bool:
    """Whether a text is left for every level."""
    from headstart.conditioning.stages import stages

    try:
        return [stage.level for stage in stages(control)] == levels
    except InputError:
        return False


def _tools(
    args: argparse.Namespace, engine: Engine, watched: bool
) -> tuple[Decoder, ConceptScorer | None]:
    from headstart.traces import decoders

    name = args.decoder or ("tiny" if engine.weights.preview is not None else "linear")
    decoder, scorer = decoders.decoder(engine, name), None
    if watched and args.scorer is not None:
        from headstart.traces.clip import clip_scorer

        scorer = clip_scorer(args.scorer)
    elif watched:
        from headstart.traces.traces import demo_scorer

        scorer = demo_scorer(engine.weights.lineage)
    return decoder, scorer


def _memory(
    engine: Engine,
    tables: Mapping[str, StepTable],
    images: int,
    size: tuple[int, int] | None,
    change: Intervention | None,
) -> str:
    """What keeping x0 will take; a branch from a step has the rows before that step too."""
    weights, rows = engine.weights, sum(map(len, tables.values()))
    height, width = size or (weights.image_size,) * 2
    cells = (height // weights.downscale) * (width // weights.downscale)
    what, count = f"{rows} steps x {counted(images, 'image')}", rows * images
    if change is not None:
        more, wide = rows * len(change.steps), change.images(images)
        what += f" and {more} steps x {counted(wide, 'image')} of changes"
        count += more * wide
    mb = count * weights.latent_channels * cells * 4 / 1e6
    return f"keeping x0 of {what}: {mb:.{1 if mb >= 0.1 else 3}f} MB"


def _sample(
    engine: Engine,
    prompt: str,
    options: Mapping[str, Mapping[str, Any]],
    change: Intervention | None,
) -> dict[str, Traced]:
    before = () if change is None else [step - 1 for step in change.steps]
    runs: dict[str, Traced] = {}
    with progress(sum(len(settings["plan"]) for settings in options.values()), "sampling") as bar:
        for name, settings in options.items():
            states: dict[int, State] = {}

            def on_step(state: State, states: dict[int, State] = states) -> None:
                bar.update()
                if state.step in before:
                    states[state.step] = state

            run = runs[name] = engine.sample(prompt, **settings, keep_x0=True, on_step=on_step)
            if change is not None:
                runs.update(change.branches(name, engine, run, states))
    return runs


def _encode(result: Trace, suffix: str, all_columns: bool) -> bytes:
    from headstart.pictures.png import encode_png

    if suffix == ".html":
        return result.page().encode()
    if suffix == ".png":
        longest = max(len(strip.rows) for strip in result.strips)
        return encode_png(result.sheet(columns=min(longest, MOST_COLUMNS) if all_columns else 8))
    return result.animation().encode("webp" if suffix == ".webp" else "gif")


TRACE = Command(
    "trace",
    "show what each step is aiming at, plan by plan, as a sheet, an animation or a page",
    sampling(),
    _add_options,
    _run,
    (
        'headstart trace "a fox"',
        'headstart trace "a fox" --seeds 0-3 --out trace.html',
        'headstart trace "a ladybug and a pumpkin" --watch "a pumpkin" --out timeline.png',
        'headstart trace "a fox" --plan hybrid --from-step 1-3 --reseed 7,8 --out again.png',
    ),
)
