"""What `trace --watch` finds in the bundled pair, and how often it is wrong.

    python bench/timeline.py [--pairs 252] [--seeds 8] [--out bench/results/timeline.json]

Three questions, each with the command's own rule (`headstart.traces.timeline`):

power   every noun alone: is it there, from which step, in how many images?
false   phrases that nobody asked for, watched as if they had been: half of the nouns that a prompt
        does not have measure the margin, the other half are called there or dropped, or not
two     prompts "a X and a Y", of the 756 ordered pairs: is the second noun there, and is any noun
        there and then dropped?

The seeds are derived from the frozen weights (`harness.fresh_seeds`). Nothing is picked: the sheet
is of the prompt and the two seeds that an earlier version wrongly said to drop their pumpkin.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.pictures.sheet import encode_png
from headstart.traces.decoders import Decoder
from headstart.traces.timeline import ConceptScorer, Course, Pictures, phrase_of, watch
from headstart.traces.traces import demo_scorer, trace

PLANS = ("base", "distilled", "hybrid")
SHOWN = ("a ladybug", "a pumpkin")
SHOWN_SEEDS = (0, 3)


class Count(NamedTuple):
    """Of courses: how many, there at some step, and dropped; the steps at which they appear."""

    courses: int
    there: int
    dropped: int
    appears: dict[int, int]

    @staticmethod
    def of(courses: Sequence[Course]) -> Count:
        first = [course.appears for course in courses if course.appears is not None]
        steps = {step: first.count(step) for step in sorted(set(first))}
        return Count(len(courses), len(first), sum(c.dropped for c in courses), steps)

    def to_json(self) -> dict[str, Any]:
        return {
            **self._asdict(),
            "there_share": round(self.there / self.courses, 4),
            "dropped_share": round(self.dropped / self.courses, 5),
        }


class Lab:
    """Pictures of every step of a prompt, made once."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.engine = hs.Engine.demo()
        self.decoder: Decoder = hs.decoder(self.engine, "tiny")
        self.scorer = demo_scorer()
        self.seeds = tuple(seeds)
        self._seen: dict[tuple[str, str], Pictures] = {}

    def see(self, prompt: str, plan: str) -> Pictures:
        run = self.engine.sample(prompt, plan=plan, seeds=self.seeds, keep_x0=True)
        assert run.x0 is not None
        frames: NDArray[np.uint8] = np.stack([self.decoder(x0).rgb.numpy() for x0 in run.x0])
        return Pictures(prompt, frames, np.ones(frames.shape[:2], np.bool_))

    def kept(self, prompt: str, plan: str) -> Pictures:
        """The same, kept: a control is used by many prompts."""
        if (prompt, plan) not in self._seen:
            self._seen[prompt, plan] = self.see(prompt, plan)
        return self._seen[prompt, plan]

    def courses(
        self, seen: Pictures, phrases: Sequence[str], control: Pictures, scorer: ConceptScorer
    ) -> list[Course]:
        line = watch(seen, phrases, dict.fromkeys(phrases, control), scorer)
        return [course for seed in line.courses for course in seed]


def main() -> None:
    options = _parse()
    seeds = harness.fresh_seeds("timeline", options.seeds)
    lab = Lab(seeds)
    nouns = headstart_weights.manifest().concepts
    pairs = _pairs(nouns, options.pairs)
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "command": f"python bench/timeline.py --pairs {options.pairs} --seeds {options.seeds}",
        "weights": {f.file: f.sha256 for f in headstart_weights.manifest().files},
        "seeds": [seeds[0], seeds[-1]],
        "power": {plan: _power(lab, plan, nouns) for plan in PLANS},
        "false": {plan: _false(lab, plan, pairs[:: options.thin], nouns) for plan in PLANS},
        "two": {
            plan: _two(lab, plan, pairs if plan != "base" else pairs[:: options.thin])
            for plan in PLANS
        },
        "trace": _sheet(lab, options.out.with_suffix(".png")),
    }
    harness.write_json(options.out, report)
    for question in ("power", "false", "two"):
        for plan, found in report[question].items():
            print(question, plan, found)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=252, help="of all 756")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument(
        "--thin", type=int, default=9, help="every n-th pair for the slow questions"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/timeline.json"))
    return parser.parse_args()


def _pairs(nouns: Sequence[str], count: int) -> list[tuple[str, str]]:
    couples = list(itertools.permutations(nouns, 2))
    order = np.random.default_rng(0).permutation(len(couples))[:count]
    return [(phrase_of(couples[i][0]), phrase_of(couples[i][1])) for i in order.tolist()]


def _power(lab: Lab, plan: str, nouns: Sequence[str]) -> dict[str, Any]:
    blank = lab.kept("", plan)
    courses: list[Course] = []
    for noun in tqdm(nouns, desc=f"{plan}: alone"):
        phrase = phrase_of(noun)
        courses += lab.courses(lab.kept(phrase, plan), [phrase], blank, lab.scorer)
    return Count.of(courses).to_json()


def _false(
    lab: Lab, plan: str, pairs: Sequence[tuple[str, str]], nouns: Sequence[str]
) -> dict[str, Any]:
    """Controls of both kinds: a prompt of one noun beside none, and of two beside one."""
    cases = [(f"{a} and {b}", a) for a, b in pairs] + [(phrase_of(noun), "") for noun in nouns]
    courses: list[Course] = []
    for prompt, control in tqdm(cases, desc=f"{plan}: not asked for"):
        named = set(prompt.split())
        others = [p for p in map(phrase_of, nouns) if not (set(p.split()) - {"a", "an"}) & named]
        seen = lab.kept(prompt, plan) if not control else lab.see(prompt, plan)
        for half in (others[::2], others[1::2]):
            rest = tuple(phrase for phrase in lab.scorer.unasked if phrase not in half)
            own = ConceptScorer(
                name=lab.scorer.name, score=lab.scorer.score, meaning="", unasked=rest
            )
            courses += lab.courses(seen, half, lab.kept(control, plan), own)
    return Count.of(courses).to_json()


def _two(lab: Lab, plan: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    courses: tuple[list[Course], list[Course]] = ([], [])
    for first, second in tqdm(pairs, desc=f"{plan}: two nouns"):
        seen = lab.see(f"{first} and {second}", plan)
        for number, (phrase, rest) in enumerate(((first, second), (second, first))):
            courses[number].extend(lab.courses(seen, [phrase], lab.kept(rest, plan), lab.scorer))
    names = ("first noun", "second noun")
    return {
        "prompts": len(pairs),
        "images": len(pairs) * len(lab.seeds),
        **{name: Count.of(own).to_json() for name, own in zip(names, courses, strict=True)},
    }


def _sheet(lab: Lab, path: Path) -> dict[str, Any]:
    prompt = " and ".join(SHOWN)
    runs: dict[str, dict[str, hs.Trajectory]] = {
        text: {p: lab.engine.sample(text, plan=p, seeds=SHOWN_SEEDS, keep_x0=True) for p in PLANS}
        for text in (prompt, *SHOWN)
    }
    controls = dict(zip(SHOWN, (runs[SHOWN[1]], runs[SHOWN[0]]), strict=True))
    shown = trace(runs[prompt], lab.decoder, phrases=SHOWN, controls=controls)
    path.write_bytes(encode_png(shown.sheet()))
    print(shown)
    return shown.to_json()


if __name__ == "__main__":
    main()
