"""A diffusers `scheduler_config.json` as a noise schedule: a table of alphas, a flow, or EDM."""

from __future__ import annotations

from collections.abc import Mapping

from headstart.errors import CheckpointError
from headstart.lazy import np
from headstart.plan.edm import EdmSchedule
from headstart.plan.flow import FlowSchedule
from headstart.plan.schedule import NoiseSchedule

Json = Mapping[str, object]

FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""diffusers' schedulers of rectified flow."""
EDMS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
"""EDM schedulers; their `prediction_type` epsilon means EDM's own prediction."""
TABLES = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDPM", "PNDM", "LCM", "TCD", "LMSDiscrete", "UniPCMultistep", "DEISMultistep"),
        *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete"),
        *("KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE"),
        *("SASolver", "DDIMParallel", "DDPMParallel", "CogVideoXDDIM"),
    )
)
"""Schedulers whose models are trained on a table of alphas_cumprod."""


def number(config: Json, key: str, default: float, part: str = "scheduler") -> float:
    """A positive number of a configuration. Raises CheckpointError."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 2**16:
        files = {"scheduler": "scheduler_config.json", "tensor": "the file"}
        file = files.get(part, f"{part}/config.json")
        raise CheckpointError(f"{file}: {key} = {value!r:.80}: expected a number in (0, 65536]")
    return value


def flow(config: Json) -> FlowSchedule:
    """Of diffusers' FlowMatch schedulers. Raises for a shift that depends on the size."""
    if config.get("use_dynamic_shifting") not in (None, False):
        raise CheckpointError(
            "scheduler_config.json: use_dynamic_shifting makes the grid depend on the picture's "
            "size, which is not implemented: set it to false and `shift` to a number"
        )
    if (trained := config.get("num_train_timesteps", 1000)) != 1000:
        raise CheckpointError(
            f"scheduler_config.json: num_train_timesteps = {trained!r:.40} of a flow: only "
            "1000 is implemented, which all known flows have"
        )
    terminal = config.get("shift_terminal")
    shift = "shift" if "shift" in config else "flow_shift"
    return NoiseSchedule.flow(
        number(config, shift, 1.0),
        terminal=None if terminal is None else number(config, "shift_terminal", 0.0),
    )


def edm(config: Json) -> EdmSchedule:
    """Of diffusers' EDM schedulers; missing values are those of Karras et al."""
    return NoiseSchedule.edm(
        number(config, "sigma_min", 0.002),
        number(config, "sigma_max", 80.0),
        number(config, "sigma_data", 0.5),
        number(config, "rho", 7.0),
    )


def table(config: Json) -> NoiseSchedule:
    """The schedule of a diffusers `scheduler_config.json`.

    Raises CheckpointError for a class that is not known to have this parametrisation: with a wrong
    one a model draws noise.
    """
    name = config.get("_class_name")
    if name is not None and str(name) not in TABLES:
        raise CheckpointError(
            f"scheduler_config.json: {name!r} is not known to use a table of alphas_cumprod, as "
            f"{', '.join(sorted(TABLES)[:3])} ... do, nor to be a flow ({', '.join(FLOWS)}) or EDM "
            f"({', '.join(EDMS)}): name the class of these that its model was trained for"
        )
    if isinstance(betas := config.get("trained_betas"), list):
        try:
            return NoiseSchedule.from_betas(np.asarray(betas, dtype=np.float64))
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"scheduler_config.json: trained_betas must be a list of numbers: {error}"
            ) from error
    steps = int(number(config, "num_train_timesteps", 1000))
    start, end = number(config, "beta_start", 0.0001), number(config, "beta_end", 0.02)
    match config.get("beta_schedule", "linear"):
        case "scaled_linear":
            return NoiseSchedule.scaled_linear(steps, start, end)
        case "linear":
            return NoiseSchedule.linear(steps, start, end)
        case "squaredcos_cap_v2":
            return NoiseSchedule.cosine(steps)
        case other:
            raise CheckpointError(
                f"scheduler_config.json: beta_schedule = {other!r}: expected scaled_linear, linear "
                "or squaredcos_cap_v2"
            )
