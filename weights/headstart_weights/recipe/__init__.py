"""Training recipe of the bundled pair: `python -m headstart_weights.recipe <stage> --work DIR`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOptions:
    """The options of every stage; a stage without a time limit or randomness ignores the rest.

    work     folder of inputs and results, made when absent
    minutes  wall-clock limit of a training stage
    steps    ends it after so many steps instead: the same on every machine
    seed     every random choice of the stage derives from it
    keep     a student's weights are also kept after every so many steps; 0: only the last ones
    """

    work: Path
    minutes: float = 0.0
    steps: int | None = None
    seed: int = 0
    keep: int = 0
