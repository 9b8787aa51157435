"""A grid, levels or a rule in place of a pair's, for a plan by name."""

from __future__ import annotations

from typing import Any

import pytest
from plans import SD, times

from headstart.errors import PlanError
from headstart.plan.by_name import named_plan
from headstart.plan.pairs import PAIRS
from headstart.plan.plan import Update
from headstart.plan.preset import preset

# ------------------------------------------------------- the grid said by hand


def test_naming_the_pairs_own_rule_changes_nothing() -> None:
    for name in ("hyper-sd-unified", "pcm", "lcm", "tcd"):
        rule = PAIRS[name].update.value
        assert named_plan("hybrid", {"update": rule}, name) == preset(name)


def test_timesteps_levels_and_rule_may_be_given_in_a_pairs_place() -> None:
    plan = named_plan("hybrid", {"timesteps": [999, 600, 200], "update": "renoise"}, "lightning")
    assert [(leg.model, leg.timesteps, leg.update) for leg in plan.legs][1] == (
        "distilled",
        (600.0, 200.0),
        Update.RENOISE,
    )
    table = plan.compile(SD)
    assert times(table) == [999, 600, 200]
    assert table.handoffs == (1,)
    by_level = named_plan("hybrid", {"sigmas": [14.0, 3.0, 1.0]}).compile(SD)
    assert [step.sigma for step in by_level][1:] == [3.0, 1.0]
    assert by_level.name == "custom-hybrid"
    alone = named_plan("distilled", {"timesteps": [999, 499]}).compile(SD)
    assert times(alone) == [999, 499]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": "999"}, "must be a list of numbers"),
        ({"timesteps": ["a"]}, "must be numbers"),
        ({"timesteps": [1, 2]}, "must fall"),
        ({"timesteps": []}, "timesteps must list at least one step"),
        ({"sigmas": [3.0, 0.0]}, "leave out the final 0"),
        ({"update": "heun"}, "unknown update 'heun'"),
        ({"preset": "sdxl"}, "unknown preset 'sdxl': `headstart presets` lists"),
        ({"preset": "lightnin"}, "unknown preset 'lightnin': did you mean 'lightning' or "),
    ],
)
def test_a_grid_without_meaning_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        named_plan("distilled", {"preset": "lightning"} | settings)
