"""Training recipe of the bundled pair: `python -m headstart_weights.recipe <stage> --work DIR`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOptions:
    """What every stage is told; a stage without a time limit or randomness ignores the rest.

    work     folder of inputs and results, made when absent
    minutes  wall-clock limit of a training stage
    seed     every random choice of the stage derives from it
    """

    work: Path
    minutes: float = 0.0
    seed: int = 0
