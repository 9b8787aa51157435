r"""Who gives variety back? The hybrid beside trained and training-free rivals, equal in passes.

    torchrun --nproc-per-node 2 bench/head_to_head.py [--work runs/demo] [--seeds 12]
    python bench/head_to_head.py --report

hybrid      one base step, then the student (arXiv:2503.10637)
dp          a student whose first step is trained to land where the teacher does (arXiv:2602.03139)
variety     a LoRA on the student, trained for the same afterwards, acting on its first step alone
others      training-free: CADS, particles, pink noise, embedding noise, candidates, LoRA strength

Three training seeds each, for a student that is sampled with Euler's rule and one that draws new
noise between its steps, all from the bundled base and with equal training steps:

    python -m headstart_weights.recipe {data,restore} --work runs/demo     the extra `train`, npm
    for seed in 1 2 3; do for stage in distill dp renoise renoise-dp variety; do
        python -m headstart_weights.recipe $stage --work runs/demo --seed $seed --steps 500
    done; done                                                             variety: --steps 200

Every second prompt of the pair. Seeds are drawn from the bundled files' digests: nobody can have
chosen anything on them. It is one study in WORK/head-to-head: ended at any time, it goes on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
from reporting import bracketed, markdown, pyplot
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.adapters.extract import extract
from headstart.metrics.features import open_features
from headstart.metrics.resample import percentiles
from headstart.plan.by_name import PlanSettings
from headstart.plan.pairs import DEMO_TIMESTEPS
from headstart.plan.update import Update
from headstart.study.cases import Case
from headstart.study.digits import interval
from headstart.study.lab import Lab
from headstart.study.labels import Spot, name_spots
from headstart.study.lists import DEMO, read_prompts
from headstart.study.store import FORMAT, open_store
from headstart.study.study import Study, draw, missing, report_of, share
from headstart.sweep.gallery_features import read_reference
from headstart.sweep.ledger import Shard
from headstart_weights.recipe.dataset import load_dataset

RUNS = (1, 2, 3)
SAMPLERS = {"euler": "student", "renoise": "renoise"}
"""How a student is sampled, and the name of the one that is trained for it."""
METHODS = (
    *("cads:0.1", "embedding-noise:2", "embedding-noise:4", "particles:128", "pink:1", "select:4"),
)
RANK = 128
"""No matrix of the pair's UNet has a higher rank: the LoRA is the student."""
RESAMPLES = 5000
Json = dict[str, Any]


class Way(NamedTuple):
    """One way to variety on one student: which weights, and what is done with them.

    weights   "student", "dp", "variety" or "lora" of `Labs`
    networks  UNets in memory
    """

    weights: str
    plan: str = "distilled"
    method: str | None = None
    about: str = ""


WAYS: dict[str, Way] = {
    "distilled": Way("student", about="the student alone"),
    "hybrid": Way("student", "hybrid", about="hybrid, k=1"),
    "skip-first": Way("student", "skip-first", about="student without its first step"),
    "dp": Way("dp", about="student with the teacher's first step (DP-DMD)"),
    "dp-hybrid": Way("dp", "hybrid", about="hybrid of that student"),
    "variety": Way("variety", about="diversity LoRA on the first step"),
    "dial:0.5": Way("lora", method="dial:0.5", about="the student as a LoRA at half strength"),
    **{m: Way("student", method=m, about=m) for m in METHODS},
}


def main() -> None:
    parser = harness.options(__doc__, "head_to_head.json", seeds=12, work=Path("runs/demo"))
    parser.add_argument("--report", action="store_true", help="draw nothing")
    options = parser.parse_args()
    shard = Shard.of_environment(os.environ)
    labs = Labs(options.work, harness.fresh_seeds("head-to-head", options.seeds))
    study = study_of(labs)
    folder = options.work / "head-to-head"
    with open_store(folder, settings_of(labs), shard) as store:
        if not options.report:
            with tqdm(desc=f"rank {shard.rank}", unit=" cell") as bar:
                draw(share(study, store), store, lambda job, left: bar.update())
            if missing(study, store):  # other ranks are not done
                return
        numbers, rows = report_of(study, store)
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "command": f"bench/head_to_head.py --seeds {options.seeds}",
        "seeds": [labs.seeds[0], labs.seeds[-1]],
        "weights": {path.stem: harness.sha256(path) for path in labs.files()},
        **numbers,
        "ways": summary(numbers["rows"], rows, [space["name"] for space in numbers["spaces"]]),
    }
    harness.write_json(options.out, report)
    print(table(report))
    plot(report, options.out.with_suffix(".png"))


class Labs:
    """The networks of every student, loaded when first used; one set of prompts and seeds."""

    def __init__(self, work: Path, seeds: range) -> None:
        self.work, self.seeds = work, seeds
        self.prompts = read_prompts(DEMO).prompts[::2]
        self.judge = open_features("scorer", "structure", "imagenet")
        self.pictures = load_dataset(work).images
        self.of = cache(self._of)

    def files(self) -> list[Path]:
        """All students and adapters."""
        return [
            self._file(weights, sampler, run)
            for sampler in SAMPLERS
            for weights in ("student", "dp", "variety")
            for run in RUNS
        ]

    def _of(self, weights: str, sampler: str, run: int) -> Lab:
        engine = self._engine(weights, sampler, run)
        settings: PlanSettings = {"update": "renoise"} if sampler == "renoise" else {}
        files = {role: files for role, (_, files) in engine.weights.files.items()}
        digests = {role: harness.sha256(paths[0]) for role, paths in files.items()}
        if weights == "variety":
            digests["adapter"] = harness.sha256(self._file("variety", sampler, run))
        return Lab(
            engine=engine, judge=self.judge, prompts=self.prompts, seeds=self.seeds,
            settings=settings, reference=self.pictures, weights=digests, keep=0,
        )  # fmt: skip

    def _file(self, weights: str, sampler: str, run: int) -> Path:
        prefix = "renoise-" if sampler == "renoise" else ""
        name = SAMPLERS[sampler] if weights == "student" else f"{prefix}{weights}"
        return self.work / f"{name}-{run}.safetensors"

    def _engine(self, weights: str, sampler: str, run: int) -> hs.Engine:
        base, student = headstart_weights.path("base"), self._file("student", sampler, run)
        if weights == "lora":
            lora = self.work / f"{student.stem}-lora.safetensors"
            if not lora.exists():
                extract(base, student, lora, rank=RANK)
            return hs.Engine.load(base, distilled_lora=lora, preset="demo")
        file = self._file("dp", sampler, run) if weights == "dp" else student
        engine = hs.Engine.load(base, file, preset="demo", prediction="v", head_dim=32)
        if weights == "variety":
            engine.attach(self._file("variety", sampler, run), to=("distilled",), name="variety")
        return engine


def study_of(labs: Labs) -> Study:
    """The base once, and every way on every student."""
    against = f"{next(iter(SAMPLERS))}-{RUNS[0]}-distilled"
    cases = {"base": Case(name="base", part="plans", about="base", plan="base", against=against)}
    owner: dict[str, tuple[str, str, int]] = {"base": ("student", "euler", 1)}
    for sampler in SAMPLERS:
        for run in RUNS:
            for name, way in WAYS.items():
                case = f"{sampler}-{run}-{name}"
                owner[case] = (way.weights, sampler, run)
                cases[case] = Case(
                    name=case, part="methods", about=way.about, plan=_plan(way, sampler),
                    diversify=() if way.method is None else (way.method,),
                    method=name, against=f"{sampler}-{run}-distilled",
                )  # fmt: skip
    main_space = labs.judge.spaces[0]
    return Study(
        cases=cases,
        prompts=labs.prompts,
        lab_of=lambda case: labs.of(*owner[case.name]),
        references={main_space.name: read_reference("bundled", labs.judge)},
    )


def _plan(way: Way, sampler: str) -> str | hs.Plan:
    """An adapter that acts on the student's first step alone is named on that leg alone."""
    if way.weights != "variety":
        return way.plan
    update = Update.RENOISE if sampler == "renoise" else Update.EULER
    times = DEMO_TIMESTEPS
    legs = (
        hs.Leg(model="distilled", timesteps=times[:1], update=update, adapters=(("variety", 1.0),)),
        hs.Leg(model="distilled", timesteps=times[1:], update=update),
    )
    return hs.Plan(legs, start="unit", name="distilled-with-variety-first")


def settings_of(labs: Labs) -> Json:
    return {
        "format": FORMAT,
        "weights": {path.stem: harness.sha256(path) for path in labs.files()},
        "prompts": list(labs.prompts),
        "numbers": [str(seed) for seed in labs.seeds],
    }


def summary(rows: Mapping[str, Json], each: Sequence[Json], spaces: Sequence[str]) -> Json:
    """A line a way and sampler: means over prompts and training runs, both drawn for intervals."""
    prompts = list(dict.fromkeys(row["prompt"] for row in each))
    values: dict[tuple[str, str, str], np.ndarray] = {}
    for row in each:
        for key in ("diversity", "score", "nearest"):
            of_case = values.setdefault(
                (row["case"], row["space"], key), np.full(len(prompts), np.nan)
            )
            of_case[prompts.index(row["prompt"])] = row[key]
    rng = np.random.default_rng(0)
    picks = rng.integers(len(prompts), size=(RESAMPLES, len(prompts)))
    runs = rng.integers(len(RUNS), size=(RESAMPLES, len(RUNS)))
    draws = (runs[:, :, None], picks[:, None, :])
    lines: Json = {}
    for sampler in SAMPLERS:
        for name, way in WAYS.items():
            own, alone, hybrid = (
                [f"{sampler}-{run}-{of}" for run in RUNS] for of in (name, "distilled", "hybrid")
            )

            def stacked(cases: Sequence[str], space: str, key: str) -> np.ndarray:
                return np.stack([values[case, space, key] for case in cases])

            frechets = [rows[case]["spaces"][spaces[0]]["frechet"]["value"] for case in own]
            line: Json = {
                "sampler": sampler,
                "way": name,
                "about": way.about,
                "passes": rows[own[0]]["passes"],
                "networks": rows[own[0]]["networks"],
                "frechet": {
                    "value": float(np.mean(frechets)), "low": min(frechets), "high": max(frechets),
                    "each": [round(v, 5) for v in frechets],
                },
            }  # fmt: skip
            for space in spaces:
                ways = (own, alone, hybrid, ["base"] * len(RUNS))
                mine, least, rival, most = (stacked(cases, space, "diversity") for cases in ways)
                line[f"diversity@{space}"] = _mean(mine, draws)
                line[f"recovered@{space}"] = _ratio(mine - least, most - least, draws)
                line[f"less_hybrid@{space}"] = _ratio(mine - rival, most - least, draws)
            score = stacked(own, spaces[0], "score") - values["base", spaces[0], "score"]
            line["score_less_base"] = _mean(score, draws)
            line["nearest"] = _mean(stacked(own, spaces[0], "nearest"), draws)
            lines[f"{sampler} {name}"] = line
    return lines


def _mean(values: np.ndarray, draws: tuple[np.ndarray, ...]) -> Json:
    """values [runs, prompts]"""
    each = values.mean(1)
    mean = percentiles(float(each.mean()), values[draws].mean((1, 2)))
    return {**mean._asdict(), "each": [round(float(v), 5) for v in each]}


def _ratio(back: np.ndarray, lost: np.ndarray, draws: tuple[np.ndarray, ...]) -> Json:
    """back / lost, of means; prompts and runs are drawn for both together."""
    ratios = back[draws].mean((1, 2)) / lost[draws].mean((1, 2))
    share = percentiles(float(back.mean() / lost.mean()), ratios)
    each = back.mean(1) / lost.mean(1)
    return {**share._asdict(), "each": [round(float(v), 4) for v in each]}


def table(report: Json) -> str:
    """The lines for a terminal, and for a page."""
    spaces = [space["name"] for space in report["spaces"]]
    heads = ["passes", "UNets", *(f"recovered, {name.partition('-')[0]}" for name in spaces)]
    heads += ["score less the base's, 1/1000", "Frechet", "nearest"]
    blocks: list[str] = []
    for sampler in SAMPLERS:
        rows = [
            [
                line["about"], f"{line['passes']:g}", line["networks"],
                *(bracketed(line[f"recovered@{name}"], 100) for name in spaces),
                bracketed(line["score_less_base"], 1000, ".1f"), f"{line['frechet']['value']:.3f}",
                bracketed(line["nearest"], 1, ".1f"),
            ]
            for line in report["ways"].values()
            if line["sampler"] == sampler
        ]  # fmt: skip
        blocks.append(markdown([f"{sampler}: way", *heads], rows))
    return "\n\n".join(blocks)


def plot(report: Json, path: Path) -> None:
    """Recovered diversity against Frechet distance, a panel a sampler."""
    space = report["spaces"][0]["name"]
    figure, axes = pyplot().subplots(1, 2, figsize=(13, 5.6), sharex=True, sharey=True)
    spots: dict[str, list[Spot]] = {sampler: [] for sampler in SAMPLERS}
    for line in report["ways"].values():
        x, y = interval(line[f"recovered@{space}"], 100.0), interval(line["frechet"])
        two = line["networks"] > 1
        colour = "#7b2d8b" if two else "#33658a" if line["passes"] <= 4 else "#b7791f"
        axis = axes[[*SAMPLERS].index(line["sampler"])]
        axis.errorbar(
            x.value, y.value, xerr=[[x.value - x.low], [x.high - x.value]],
            yerr=[[y.value - y.low], [y.high - y.value]],
            fmt="s" if two else "o", color=colour, ms=5, lw=0.8,
        )  # fmt: skip
        spots[line["sampler"]].append(Spot(x, y, colour, line["way"]))
    for axis, sampler in zip(axes, SAMPLERS, strict=True):
        axis.set_title(f"students sampled with {sampler}", fontsize=10, loc="left")
        axis.set_xlabel("lost diversity that comes back, %, with 95 % interval")
        axis.axvline(100, color="#999", lw=0.7, ls="--")
    axes[0].set_ylabel("Frechet distance to the training pictures; range of three runs")
    figure.tight_layout()
    for axis, sampler in zip(axes, SAMPLERS, strict=True):
        name_spots(figure, axis, spots[sampler])
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
