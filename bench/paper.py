"""The paper's experiments on the bundled pair, and what other methods do at the same cost.

    python bench/paper.py --quick                      2 minutes: 4 prompts x 16 seeds, main cases
    python bench/paper.py                              12 prompts x 64 seeds, every case
    python bench/paper.py --seconds                    times table 3 again, on an idle machine
    python bench/paper.py --report                     tables and pictures from what is drawn

Tables 2, 3 and E.1, figures 5 and 7 of arXiv:2503.10637, and CADS (2310.17347), interval guidance
(2404.07724), particle guidance (2310.13102), pink noise, candidate selection, adapter strength and
an adaptive hand-off. Every case of every prompt is a file under --work: kill it at any time, run
it again, and it goes on. The seeds are the script's own; what was chosen on them: paper_cases.

Pictures to compare with, and students that are not bundled, are in --data:

    python -m headstart_weights.recipe data --work runs/demo           the extra `train`, npm
    python -m headstart_weights.recipe {tokenizer,restore,progressive} --work runs/demo
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import harness
import numpy as np
import paper_numbers as numbers
import paper_pictures as drawings
import torch
from numpy.typing import NDArray
from paper_cases import QUICK, Case, cases
from paper_cells import Cell, Lab, features_of, make_adapter, read_pictures, write_arrays
from safetensors.numpy import load_file
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.errors import InputError
from headstart.metrics.features import open_features
from headstart.metrics.fidelity import Moments
from headstart.study import curve
from headstart_weights.recipe.dataset import compose_caption

FIRST_SEED, FIRST_TRACED_SEED, TRACED = 20_000, 21_000, 8
TIMED = {
    "base": {},
    "distilled": {},
    "hybrid": {},
    "skip-first": {},
    "replace-final": {"k": 3, "n": 40, "base_guidance": 2.0},
}
SECOND = ("base", "distilled", "hybrid", "skip-first")
"""Cases that a second extractor looks at, where the extra `features` is installed."""


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    lab = _lab(options)
    wanted = {name: case for name, case in cases().items() if not options.quick or name in QUICK}
    make_adapter(lab)
    if options.seconds:
        _time(lab)
    elif not options.report:
        _draw(lab, wanted, options.threads)
        _trace(lab)
        if not (lab.work / "seconds.json").exists():
            _time(lab)
    report = _report(lab, wanted, options)
    harness.write_json(options.out, report)
    drawings.plot_all(report, options.out)
    drawings.sheets(lab, wanted, options.out)
    print(drawings.tables(report))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="4 prompts x 16 seeds, main cases")
    parser.add_argument("--prompts", type=int, help="default: 12")
    parser.add_argument("--seeds", type=int, help="default: 64")
    parser.add_argument("--work", type=Path, help="cells; default: runs/paper, runs/paper-quick")
    parser.add_argument("--data", type=Path, default=Path("runs/demo"), help="the recipe's folder")
    parser.add_argument("--no-pictures", action="store_true", help="only the bundled reference")
    parser.add_argument("--seconds", action="store_true", help="time table 3 again, draw nothing")
    parser.add_argument("--report", action="store_true", help="draw nothing, report what is there")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1,
        help="each draws in a process of its own; default: every core",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: bench/results/paper.json, or in --work")
    options = parser.parse_args()
    quick = options.quick
    options.prompts = options.prompts or (4 if quick else 12)
    options.seeds = options.seeds or (16 if quick else 64)
    options.work = options.work or Path("runs/paper-quick" if quick else "runs/paper")
    own = options.work / "paper.json"
    options.out = options.out or (own if quick else Path("bench/results/paper.json"))
    return options


def _lab(options: argparse.Namespace) -> Lab:
    names = [compose_caption(name) for name in headstart_weights.manifest().concepts]
    picked = np.linspace(0, len(names) - 1, options.prompts).round().astype(int)
    return Lab(
        work=options.work,
        data=options.data,
        names=names,
        prompts=[names[i] for i in picked.tolist()],
        seeds=range(FIRST_SEED, FIRST_SEED + options.seeds),
    )


def _draw(lab: Lab, wanted: Mapping[str, Case], threads: int) -> None:
    """Every cell that is missing, the cases in their order, each in one thread of one process.

    Threads that share a cell wait for each other at every layer; on a busy machine most of it.
    """
    missing = [
        (name, case, prompt)
        for name, case in wanted.items()
        if case.student in lab.digests
        for prompt in lab.prompts
        if lab.read(name, case, prompt) is None
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(threads, context, torch.set_num_threads, (1,)) as pool:
        asked = [pool.submit(_measure, lab, *cell) for cell in missing]
        for done in tqdm(as_completed(asked), total=len(asked), unit=" cell"):
            done.result()


def _measure(lab: Lab, name: str, case: Case, prompt: str) -> None:
    """In a process of its own, which keeps its networks from cell to cell."""
    _own(lab).measure(name, case, prompt)


_LABS: dict[str, Lab] = {}


def _own(lab: Lab) -> Lab:
    """The lab of these settings that this process has used before."""
    return _LABS.setdefault(repr(lab), lab)


def _trace(lab: Lab) -> None:
    """Figure 5: the share of the finished picture after each step, one file a prompt."""
    seeds = range(FIRST_TRACED_SEED, FIRST_TRACED_SEED + TRACED)
    judge = open_features("scorer")
    for prompt in tqdm(lab.prompts, desc="figure 5"):
        path = lab.cell_path("figure-5", prompt)
        if _traced(lab, prompt) is not None:
            continue
        found: dict[str, NDArray[Any]] = {"identity": np.array(_trace_identity(lab, prompt))}
        for student in ("distilled", "progressive"):
            if student not in lab.digests:
                continue
            engine = lab.engine(student)
            plans = ("base", "distilled", "hybrid") if student == "distilled" else ("distilled",)
            tables = {plan: engine.compile(plan) for plan in plans}
            full = hs.decoder(engine, "full")
            own = curve.measure(engine, prompt, seeds, tables, judge, full)
            prefix = "" if student == "distilled" else f"{student}-"
            found |= {f"{prefix}{plan}": own[f"{plan}/share"].T for plan in plans}
        write_arrays(path, found)


def _time(lab: Lab) -> None:
    """Seconds of 16 images, text encoding, every base step and decoding included."""
    engine, prompt = lab.engine("distilled"), lab.prompts[0]
    runs = {
        name: lambda name=name, settings=settings: engine.sample(
            prompt, plan=name, seeds=range(16), **settings
        )
        for name, settings in TIMED.items()
    }
    taken = harness.interleaved(runs, rounds=5)
    machine = harness.machine() | {"threads": torch.get_num_threads()}
    harness.write_json(lab.work / "seconds.json", {"machine": machine, "images": 16, **taken})


def _report(lab: Lab, wanted: Mapping[str, Case], options: argparse.Namespace) -> dict[str, Any]:
    references = _references(lab, options.no_pictures)
    found = {name: own for name, case in wanted.items() if (own := lab.cells(name, case))}
    rows: dict[str, Any] = {}
    for name, own in tqdm(found.items(), desc="numbers"):
        rows[name] = {"about": wanted[name].about, "student": wanted[name].student}
        rows[name] |= numbers.row(own, references)
        if {"base", "distilled"} <= set(found):
            rows[name]["recovered"] = numbers.recovered(own, found["base"], found["distilled"])
            rows[name]["minus_distilled"] = numbers.contrast(own, found["distilled"])
            rows[name]["minus_base"] = numbers.contrast(own, found["base"])
    by_k = {k: found.get("hybrid" if k == 1 else f"hybrid-k{k}") for k in (1, 2, 3)}
    told = " --quick" if options.quick else ""
    return {
        "question": (__doc__ or "").splitlines()[0],
        "command": f"python bench/paper.py{told}",
        "machine": harness.machine(),
        "prompts": list(lab.prompts),
        "seeds": [lab.seeds[0], lab.seeds[-1]],
        "features": "headstart-demo-scorer; pixel_diversity: colours-8x8",
        "reference": {
            "name": references.name,
            "pictures": None if references.pictures is None else len(references.pictures),
            "held_out": None if references.held_out is None else len(references.held_out),
            "nearest": numbers.NEAREST,
        },
        "weights": {f.file: f.sha256 for f in headstart_weights.manifest().files} | lab.digests,
        "paper": numbers.PAPER,
        "missing": [name for name in wanted if name not in found],
        "rows": rows,
        "prompt_diversity": _by_prompt(found),
        "second_extractor": _second(lab, found),
        "adaptive": numbers.adaptive(by_k, references) if all(by_k.values()) else None,
        "figure 5": _figure_5(lab),
        "seconds": _json(lab.work / "seconds.json"),
    }


def _references(lab: Lab, bundled_only: bool) -> numbers.References:
    if bundled_only:
        held = load_file(headstart_weights.path("reference"))
        moments = Moments(*(held[key].astype(np.float64) for key in ("mean", "covariance")))
        return numbers.References(moments, "bundled moments of all 28 things' training pictures")
    pictures = read_pictures(lab.data, lab.prompts)
    training, held_out = (features_of(lab.scorer, own) for own in pictures.values())
    name = "training pictures of these prompts; held out: Twemoji, never trained on"
    return numbers.References(Moments.of(training), name, training, held_out)


def _by_prompt(found: Mapping[str, Sequence[Cell]]) -> dict[str, list[float]]:
    return {
        name: [round(float(v), 4) for v in numbers.each_diversity(found[name])]
        for name in SECOND
        if name in found
    }


def _second(lab: Lab, found: Mapping[str, Sequence[Cell]]) -> dict[str, Any] | None:
    """Diversity of the kept pictures in ImageNet features, kept beside the cells."""
    path, identity = lab.work / "second.json", [list(lab.prompts), list(lab.seeds), lab.digests]
    known = _json(path)
    if known is None or known["identity"] != identity:
        try:
            judge = open_features("imagenet")
        except InputError:
            return None
        rows: dict[str, Any] = {}
        for name in SECOND:
            if name in found:
                groups = [judge.extractor.features(cell.rgb) for cell in found[name]]
                rows[name] = numbers.spread_of(groups)
        report = {
            "identity": identity,
            "features": judge.extractor.name,
            "rows": rows,
        }
        harness.write_json(path, report)
    return _json(path)


def _figure_5(lab: Lab) -> dict[str, Any] | None:
    parts = [_traced(lab, prompt) for prompt in lab.prompts]
    return None if None in parts else numbers.figure_5([part for part in parts if part])


def _traced(lab: Lab, prompt: str) -> dict[str, NDArray[np.float64]] | None:
    """One prompt's shares [B, S] by plan; None where they are missing, or of other weights."""
    path = lab.cell_path("figure-5", prompt)
    if not path.exists():
        return None
    with path.open("rb") as stream, np.load(stream) as held:
        found: dict[str, Any] = dict(held)
    identity = str(found.pop("identity", ""))
    return found if identity == _trace_identity(lab, prompt) else None


def _trace_identity(lab: Lab, prompt: str) -> str:
    return json.dumps([prompt, FIRST_TRACED_SEED, TRACED, lab.digests], sort_keys=True)


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    main()
