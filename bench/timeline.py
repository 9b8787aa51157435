"""Which concept does a model begin to draw, and then drop? Two-noun prompts, searched and shown.

    python bench/timeline.py [--pairs 756] [--seeds 8] [--out bench/results/timeline.json]

The pair draws one thing a picture. Prompts "a X and a Y" are sampled by the hybrid, and what the
timeline calls dropped (its score reached the scorer's threshold, and ended below it) is counted.
Traced by all three plans is the prompt in which the dropped concept was once farthest ahead of the
one that stayed, with the two seeds where it was. The sheet is that of
`headstart trace PROMPT --watch X --watch Y --seeds A,B --out bench/results/timeline.png`.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.pictures.sheet import encode_png
from headstart_weights.recipe.dataset import compose_caption

PLANS = ("base", "distilled", "hybrid")
FIRST_SEED = 0


class Drop(NamedTuple):
    """A concept that was there and went, in which prompt and seed.

    lead  its score above that of the other concept, at the step where this is most
    fall  its highest score above its last
    """

    lead: float
    fall: float
    phrases: tuple[str, str]
    dropped: str
    seed: int


def main() -> None:
    options = _parse()
    engine = hs.Engine.demo()
    decoder = hs.decoder(engine, "tiny")
    drops, prompts = _search(engine, decoder, options.pairs, options.seeds)
    if not drops:
        raise SystemExit("no concept was dropped: search more --pairs")
    best = max(drops)
    own = sorted((d for d in drops if d.phrases == best.phrases), reverse=True)
    seeds = sorted({drop.seed for drop in own[:2]})
    prompt = " and ".join(best.phrases)
    runs = {p: engine.sample(prompt, plan=p, seeds=seeds, keep_x0=True) for p in PLANS}
    shown = hs.trace(runs, decoder, phrases=best.phrases)
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "command": f"python bench/timeline.py --pairs {options.pairs} --seeds {options.seeds}",
        "sheet": _command(prompt, best.phrases, seeds),
        "weights": {f.file: f.sha256 for f in headstart_weights.manifest().files},
        "searched": {
            "plan": "hybrid",
            "prompts": prompts,
            "images": prompts * options.seeds,
            "images_with_a_dropped_concept": len({(d.phrases, d.seed) for d in drops}),
        },
        "dropped": [
            {"prompt": " and ".join(d.phrases), "phrase": d.dropped, "seed": d.seed,
             "lead": round(d.lead, 4), "fall": round(d.fall, 4)}
            for d in sorted(drops, reverse=True)
        ],
        "trace": shown.to_json(),
    }  # fmt: skip
    harness.write_json(options.out, report)
    options.out.with_suffix(".png").write_bytes(encode_png(shown.sheet()))
    found = report["searched"]
    print(f"{found['images_with_a_dropped_concept']} of {found['images']} images drop a concept")
    told = f"{best.dropped!r} in {prompt!r}: once {best.lead:+.2f} ahead, fell by {best.fall:.2f}"
    print(f"{told}\n{report['sheet']}\n\n{shown}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=756, help="of all 756")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("bench/results/timeline.json"))
    return parser.parse_args()


def _search(engine: hs.Engine, decoder: Any, pairs: int, seeds: int) -> tuple[list[Drop], int]:
    nouns = headstart_weights.manifest().concepts
    couples = list(itertools.permutations(nouns, 2))
    order = np.random.default_rng(0).permutation(len(couples))[:pairs]
    drops: list[Drop] = []
    for index in tqdm(order.tolist(), desc="prompts"):
        first, second = (compose_caption(noun) for noun in couples[index])
        run = engine.sample(
            f"{first} and {second}",
            seeds=range(FIRST_SEED, FIRST_SEED + seeds),
            keep_x0=True,
        )
        (strip,) = hs.trace([run], decoder, phrases=(first, second)).strips
        assert strip.timeline is not None
        for seed, courses in zip(strip.seeds, strip.timeline.courses, strict=True):
            for course, other in zip(courses, reversed(courses), strict=True):
                if course.dropped:
                    lead = float((course.scores - other.scores).max())
                    fall = float(course.scores.max() - course.scores[-1])
                    drops.append(Drop(lead, fall, (first, second), course.phrase, seed))
    return drops, len(order)


def _command(prompt: str, phrases: tuple[str, str], seeds: list[int]) -> str:
    watched = " ".join(f'--watch "{phrase}"' for phrase in phrases)
    told = ",".join(map(str, seeds))
    return f'headstart trace "{prompt}" {watched} --seeds {told} --out bench/results/timeline.png'


if __name__ == "__main__":
    main()
