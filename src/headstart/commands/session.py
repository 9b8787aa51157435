"""What commands that sample share: the engine of their options, and the report of a run."""

from __future__ import annotations

import argparse
import os
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import headstart_weights
from headstart.adapters.strength import parse_adapter
from headstart.checkpoint.families import FAMILIES
from headstart.checkpoint.hub import download_of
from headstart.commands.console import loading, note, progress, warning
from headstart.commands.demo import odd_in
from headstart.commands.planned import headers_of
from headstart.commands.values import read_device, read_predictions, read_size, uses_bundled
from headstart.commands.width import answer
from headstart.errors import AdapterError, CheckpointError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headstart.adapters.report import AdapterReport
    from headstart.engine.engine import Engine
    from headstart.engine.trajectory import Trajectory


def open_engine(
    args: argparse.Namespace, prompts: Sequence[str] = (), *, largest: tuple[int, int] | None = None
) -> Engine:
    """The bundled pair, or the files that the options of `arguments.sampling` name; with its
    adapters attached, those too that `prompts` name, and reading prompts as asked.

    largest   (height, width) that it has to leave memory for, where --size does not say it
    """
    args.plan_size = largest or read_size(getattr(args, "size", None))
    if uses_bundled(args) and not args.embedding:  # before anything loads
        for line in odd_in(list(dict.fromkeys(prompts)), getattr(args, "size", None), args.lora):
            warning(line)
    adapters = [
        (name, adapter_path(name), strength) for name, strength in map(parse_adapter, args.lora)
    ]
    _check_families(args, [path for _, path, _ in adapters])
    with loading(), progress(None, "loading weights"):
        engine = _load(args)
        reports = [
            engine.attach(path, strength, name=free_name(name, engine), allow=args.allow)
            for name, path, strength in adapters
        ]
        if not getattr(args, "literal", False):
            reports += _attach_from_prompts(engine, args, prompts)
    from headstart.engine.models import one_file

    _compile_c(engine)
    if (line := one_file(args.base, args.distilled)) is not None:
        warning(line)
    for line in engine.weights.notes:
        note(line)
    for report in reports:
        note(str(report))
    if hasattr(args, "prompt_style"):
        return engine.with_reading(args.prompt_style, args.clip_skip)
    return engine


def _check_families(args: argparse.Namespace, adapters: Sequence[str | Path]) -> None:
    """Raise AdapterError for an adapter whose header says that it is for another family."""
    if not adapters:
        return
    from headstart.adapters.info import describe_adapter

    lineages = {model.family.lineage for model in headers_of(args).models.values()}
    for path in adapters:
        family = describe_adapter(path).family
        if family in FAMILIES and FAMILIES[family].lineage not in lineages:
            raise AdapterError(
                f"{path}: expected an adapter for {', '.join(lineages)}, as the model is, got one "
                f"for {family}: leave it out, or give a model of {family}"
            )


def _compile_c(engine: Engine) -> None:
    """Have the C kernels compiled now, where a CPU runs them, and not within the first step."""
    if engine.device.type != "cpu":
        return
    from headstart_kernels.native.library import why_not

    begin = time.perf_counter()
    with progress(None, "compiling C, once"):
        absent = why_not()
    if absent is not None:
        _say_without_c(absent)
    elif (seconds := time.perf_counter() - begin) > 1.0:
        note(f"compiled C, once, in {seconds:.0f} s")


@cache
def _say_without_c(why: str) -> None:
    """Once a process, and not where the user switched C off or the system has no compiler."""
    from headstart_kernels.native.library import SWITCH

    if os.name == "posix" and os.environ.get(SWITCH) != "0":
        note(
            f"steps take longer without the C kernels: {why}; install a C compiler, such as gcc or "
            f"clang, or name yours in CC ({SWITCH}=0: without them, and without this line)"
        )


def _attach_from_prompts(
    engine: Engine, args: argparse.Namespace, prompts: Sequence[str]
) -> list[AdapterReport]:
    """Attach the adapters that `<lora:NAME:S>` in prompts names and no option has attached, from
    --lora-folder or the bundled controls; at strength 0 for images whose prompts do not name
    them."""
    from headstart.conditioning.texts import named_adapters

    reports: list[AdapterReport] = []
    for name, tags in named_adapters(prompts).items():
        if name in engine.adapters:
            continue
        strengths = {(0.0, 0.0) if tag is None else (tag.text, tag.unet) for tag in tags}
        (text, unet), *others = strengths
        strength = unet if text == unet and not others else 0.0
        path = _in_folder(name, args.lora_folder)
        reports.append(engine.attach(path, strength, name=name, allow=args.allow))
    return reports


def _in_folder(name: str, folder: Path | None) -> str | Path:
    path = None if folder is None else folder / f"{name}.safetensors"
    inside = ".." not in Path(name).parts and not Path(name).is_absolute()
    if path is not None and inside and path.is_file():
        return path
    if name in _controls():
        return headstart_weights.path(name)
    where = "no --lora-folder was given" if folder is None else f"{str(path)!r:.120} is no file"
    raise InputError(
        f"a prompt names adapter {name!r:.60}, which is not there: {where}; give --lora FILE, or "
        f"--lora-folder DIR with {name:.60}.safetensors in it, or take <lora:...> out"
    )


def _controls() -> Sequence[str]:
    with suppress(headstart_weights.WeightsError):
        return headstart_weights.manifest().controls
    return ()


def use_local_device(args: argparse.Namespace) -> None:
    """Under torchrun every rank has a GPU of its own, LOCAL_RANK of its machine."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or args.device not in ("auto", "cuda"):
        return
    import torch

    if torch.cuda.is_available():
        args.device = f"cuda:{int(local) % torch.cuda.device_count()}"


def free_name(path: str, engine: Engine) -> str:
    """The file's name without its suffix; `name-2` where another file of that name is attached, as
    every LoRA that diffusers saves is called `pytorch_lora_weights`."""
    stem = Path(path).stem
    names = (stem, *(f"{stem}-{number}" for number in range(2, len(engine.adapters) + 2)))
    return next(name for name in names if name not in engine.adapters)


def adapter_path(name: str) -> str | Path:
    """A file, or by its name a control that comes with the bundled pair."""
    if os.path.lexists(name):
        return name
    role = name.removeprefix("headstart_weights/").removesuffix(".safetensors")
    try:
        controls = headstart_weights.manifest().controls
        if role in controls:
            return headstart_weights.path(role)
    except headstart_weights.WeightsError as error:
        raise CheckpointError(f"the bundled control {role!r} cannot be used: {error}") from error
    path, _, tail = name.rpartition(":")
    if path in controls or (path and Path(path).exists()):
        raise InputError(
            f"adapter {name!r:.80}: {tail!r:.40} is no strength: expected a number, and behind '@' "
            f"where it acts, such as {path}:1.5 or {path}:-2@base+800"
        )
    what = download_of(name) or (
        "give the path of an adapter's file, or the name of a bundled control: "
        + ", ".join(controls)
    )
    raise InputError(f"{name} does not exist: {what}")


_OF_ANY = ("memory", "dtype", "vae_dtype", "packed", "runner")
"""Options of `Engine.demo` and `Engine.load`."""
_OF_FILES = (
    *("distilled_lora", "vae", "text", "tokenizer", "preview", "preset", "embedded_guidance"),
    *("ema", "head_dim", "text_head_dim", "allow", "plan_size"),
)


def _load(args: argparse.Namespace) -> Engine:
    from headstart.adapters.textual_inversion import parse_embedding
    from headstart.engine.engine import Engine

    embeddings = [
        parse_embedding(option) if isinstance(option, str) else option for option in args.embedding
    ]
    options: dict[str, Any] = {name: getattr(args, name) for name in _OF_ANY}
    options |= {"device": read_device(args.device), "embeddings": embeddings}
    if uses_bundled(args):
        return Engine.demo(**options)
    options |= {name: getattr(args, name) for name in _OF_FILES}
    options["prediction"] = read_predictions(args.prediction)
    options["exclamation"] = args.exclamation or "openclip"
    return Engine.load(args.base, args.distilled, **options)


def report(args: argparse.Namespace, trajectory: Trajectory, result: str) -> None:
    """Print what a run was and took, as one line or as JSON."""
    latency = {stage: round(ms, 2) for stage, ms in trajectory.latency_ms.items()}
    methods = [*map(str, trajectory.diversify)]
    facts: dict[str, Any] = {
        "out": None if args.out is None else str(args.out),
        "images": len(trajectory),
        "prompts": trajectory.prompts,
        "seeds": trajectory.seeds,
        "plan": trajectory.table.name,
        "passes": trajectory.passes,
        "latency_ms": latency,
        **({"diversify": methods} if methods else {}),
        **({} if trajectory.chosen is None else {"chosen": trajectory.chosen}),
    }
    times = ", ".join(f"{stage} {ms / 1e3:.2f} s" for stage, ms in latency.items() if ms)
    how = ", ".join([f"plan {trajectory.table.name}", *methods])
    answer(args, facts, f"{result} · {how}, {trajectory.passes} passes · {times}")
