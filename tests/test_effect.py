"""The shipped weights show what the package is for: other weights under these names turn this red.

Few prompts and seeds, and bounds far from what is measured (`bench/results/study.json`): this is no
measurement, it only has to fail for a pair without the effect.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from bundled import needs_pair

import headstart as hs
import headstart_weights
from headstart.metrics.features import open_features
from headstart.metrics.metrics import diversity

PROMPTS = ("a fox", "a ladybug", "a pumpkin", "an owl", "a mushroom", "a heart")
SEEDS = range(6)
SPACES = ("scorer", "structure")

pytestmark = needs_pair


def variety(engine: hs.Engine, plan: str) -> dict[str, float]:
    """Mean diversity over the prompts in both spaces, and the share whose subject ranks first."""
    judges = {space: open_features(space).extractor for space in SPACES}
    found: dict[str, list[float]] = {space: [] for space in (*SPACES, "right")}
    scorer = open_features("scorer").score
    assert scorer is not None
    for prompt in PROMPTS:
        rgb = engine.sample(prompt, plan=plan, seeds=SEEDS).rgb.numpy()
        for space, extractor in judges.items():
            found[space].append(diversity(extractor.features(rgb)))
        scores = np.stack([scorer(rgb, [other] * len(rgb)) for other in PROMPTS], axis=1)
        found["right"].append(float((scores.argmax(1) == PROMPTS.index(prompt)).mean()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def shows_the_effect(engine: hs.Engine) -> Mapping[str, bool]:
    """Distilling loses at least a third, one base step brings back half, pictures stay right."""
    base, distilled, hybrid = (variety(engine, p) for p in ("base", "distilled", "hybrid"))
    effects = {"right": min(p["right"] for p in (base, distilled, hybrid)) > 0.9}
    for space in SPACES:
        lost = base[space] - distilled[space]
        effects[f"lost, {space}"] = lost > base[space] / 3
        effects[f"recovered, {space}"] = hybrid[space] - distilled[space] > lost / 2
    return effects


def test_distilling_loses_variety_and_one_base_step_brings_most_of_it_back() -> None:
    effects = shows_the_effect(hs.Engine.demo(device="cpu"))
    assert all(effects.values()), effects


def test_a_pair_without_the_effect_is_noticed() -> None:
    """The base as its own student loses nothing."""
    base = headstart_weights.path("base")
    effects = shows_the_effect(hs.Engine.load(base, base, preset="demo", device="cpu"))
    assert not effects["lost, scorer"] and not effects["lost, structure"]
