"""Legs: what they say, how they print, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from plans import SD, TRAILING_TAIL, compiled

from headstart.errors import PlanError
from headstart.plan.plan import EPS_SIGMA_LIMIT, Leg, Plan, Update
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import Spacing

BAD_LEGS: list[tuple[str, Callable[[], object]]] = [
    ("needs steps=, or timesteps=", lambda: Leg(model="base")),
    ("not steps and timesteps", lambda: Leg(model="base", steps=4, timesteps=(999,))),
    ("steps of leg 'base' must be", lambda: Leg(model="base", steps=0)),
    ("steps of leg 'base' must be", lambda: Leg(model="base", steps=2.0)),  # type: ignore[arg-type]
    ("skip of leg 'base' must be", lambda: Leg(model="base", steps=4, skip=4)),
    ("spacing and skip belong to", lambda: Leg(model="base", timesteps=(9,), skip=1)),
    ("would run zero steps", lambda: Leg(model="base", timesteps=())),
    ("must fall, not", lambda: Leg(model="base", timesteps=(499, 749))),
    ("must fall, not", lambda: Leg(model="base", timesteps=(499, 499))),
    ("must be finite", lambda: Leg(model="base", timesteps=(math.nan,))),
    ("leave out the final 0", lambda: Leg(model="base", sigmas=(14.0, 1.0, 0.0))),
    ("as many timesteps as", lambda: Leg(model="base", timesteps=(9, 8), sigmas=(1.0,))),
    ("unknown update 'heun'", lambda: Leg(model="base", steps=4, update="heun")),  # type: ignore[arg-type]
    ("unknown spacing 'sgm'", lambda: Leg(model="base", steps=4, spacing="sgm")),  # type: ignore[arg-type]
    ("unknown prediction 'score'", lambda: Leg(model="base", steps=4, prediction="score")),  # type: ignore[arg-type]
    ("guidance of leg 'base'", lambda: Leg(model="base", steps=4, guidance=math.inf)),
    ("guidance of leg 'base'", lambda: Leg(model="base", steps=4, guidance=-0.1)),
    ("eta of leg 'base' must lie", lambda: Leg(model="base", steps=4, update=Update.DDIM, eta=2)),
    ("eta of leg 'base' must be a finite", lambda: Leg(model="base", steps=4, eta=math.nan)),
    ("eta=0.5 belongs to update 'ddim'", lambda: Leg(model="base", steps=4, eta=0.5)),
    ("gamma=0.5 belongs to update 'tcd'", lambda: Leg(model="base", steps=4, gamma=0.5)),
    ("boundary=True belongs to", lambda: Leg(model="base", steps=4, boundary=True)),
    ("needs the name of its model", lambda: Leg(model="", steps=4)),
    ("strengths must be finite", lambda: Leg(model="b", steps=4, adapters=(("a", math.nan),))),
    ("a plan needs at least one leg", lambda: Plan(())),
    ("start must be one of", lambda: Plan((TRAILING_TAIL,), start="pure")),  # type: ignore[arg-type]
    ("timesteps must lie in 0 .. 999", lambda: compiled(Leg(model="base", timesteps=(1000,)))),
    ("sigmas must lie in", lambda: compiled(Leg(model="base", sigmas=(20.0,)))),
    ("no prediction for model 'base'", lambda: compiled(Leg(model="base", steps=1), prediction={})),
    ("unknown prediction 'u'", lambda: compiled(Leg(model="base", steps=1), prediction="u")),
]


@pytest.mark.parametrize(("message", "call"), BAD_LEGS)
def test_a_leg_or_plan_without_meaning_is_refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        call()


def test_a_leg_prints_as_the_python_that_makes_it() -> None:
    leg = Leg(
        model="base",
        timesteps=(999, 12.5),
        update=Update.TCD,
        gamma=0.7,
        prediction=Prediction.V,
        adapters=(("age", 2.0),),
    )
    names = {"Leg": Leg, "Update": Update, "Prediction": Prediction}
    assert eval(repr(leg), names) == leg
    assert repr(Leg(model="base", steps=4)) == "Leg(model='base', steps=4)"


def test_enum_fields_take_their_strings() -> None:
    leg = Leg(model="base", steps=4, spacing="leading", update="ddim", prediction="v_prediction")  # type: ignore[arg-type]
    assert (leg.spacing, leg.update) == (Spacing.LEADING, Update.DDIM)
    assert leg.prediction is Prediction.V


def test_a_leg_says_what_its_model_predicts_or_the_caller_does() -> None:
    legs = (
        Leg(model="base", timesteps=(999,), prediction=Prediction.V),
        Leg(model="distilled", timesteps=(499,)),
    )
    table = compiled(*legs, prediction={"distilled": Prediction.X0})
    assert table[0][4:7] == Prediction.V.scalings(SD.sigma(999))
    assert table[1][4:7] == Prediction.X0.scalings(SD.sigma(499))


def test_eps_is_refused_only_where_no_signal_is_left() -> None:
    terminal = SD.zero_terminal_snr()
    with pytest.raises(PlanError, match=r"timestep 999 \(sigma 4096\) an eps prediction says"):
        compiled(Leg(model="base", steps=4), schedule=terminal)
    for leg, prediction in (
        (Leg(model="base", steps=4), Prediction.V),
        (Leg(model="base", timesteps=(997, 499)), Prediction.EPS),
    ):
        table = compiled(leg, schedule=terminal, prediction=prediction)
        assert np.all(np.isfinite(table.coefficients()))
    assert terminal.sigma(997) < EPS_SIGMA_LIMIT < terminal.sigma(998)
