"""The base model takes the first step, the distilled model runs the rest."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headstart.attached import AdapterReport as AdapterReport
    from headstart.branches import Branch as Branch
    from headstart.branches import branch as branch
    from headstart.checkpoint import inspect_checkpoint as inspect_checkpoint
    from headstart.decoders import decoder as decoder
    from headstart.engine import Engine as Engine
    from headstart.engine import Trajectory as Trajectory
    from headstart.errors import AdapterError as AdapterError
    from headstart.errors import CaptureError as CaptureError
    from headstart.errors import CheckpointError as CheckpointError
    from headstart.errors import HeadstartError as HeadstartError
    from headstart.errors import InputError as InputError
    from headstart.errors import PlanError as PlanError
    from headstart.interfaces import Conditioning as Conditioning
    from headstart.load import load_text as load_text
    from headstart.load import load_unet as load_unet
    from headstart.load import load_vae as load_vae
    from headstart.noise import Given as Given
    from headstart.noise import Philox as Philox
    from headstart.plan import Leg as Leg
    from headstart.plan import Plan as Plan
    from headstart.plan import Step as Step
    from headstart.plan import StepTable as StepTable
    from headstart.plan import Update as Update
    from headstart.plan import preset as preset
    from headstart.prediction import Prediction as Prediction
    from headstart.preview import Preview as Preview
    from headstart.rerun import replay as replay
    from headstart.sampler import State as State
    from headstart.sampler import sample as sample
    from headstart.schedule import NoiseSchedule as NoiseSchedule
    from headstart.schedule import Spacing as Spacing
    from headstart.strength import Strength as Strength
    from headstart.traces import Trace as Trace
    from headstart.traces import trace as trace

__version__ = "0.1.0"

# A name is imported from its module on first use (PEP 562), so that `import headstart` loads
# neither torch nor numpy and `headstart plan` answers at once.
_MODULE_OF = {
    "AdapterError": "headstart.errors",
    "AdapterReport": "headstart.attached",
    "Branch": "headstart.branches",
    "CaptureError": "headstart.errors",
    "CheckpointError": "headstart.errors",
    "Conditioning": "headstart.interfaces",
    "Engine": "headstart.engine",
    "Given": "headstart.noise",
    "HeadstartError": "headstart.errors",
    "InputError": "headstart.errors",
    "Leg": "headstart.plan",
    "NoiseSchedule": "headstart.schedule",
    "Philox": "headstart.noise",
    "Plan": "headstart.plan",
    "PlanError": "headstart.errors",
    "Preview": "headstart.preview",
    "Prediction": "headstart.prediction",
    "Spacing": "headstart.schedule",
    "State": "headstart.sampler",
    "Step": "headstart.plan",
    "StepTable": "headstart.plan",
    "Strength": "headstart.strength",
    "Trace": "headstart.traces",
    "Trajectory": "headstart.engine",
    "Update": "headstart.plan",
    "branch": "headstart.branches",
    "decoder": "headstart.decoders",
    "inspect_checkpoint": "headstart.checkpoint",
    "load_text": "headstart.load",
    "load_unet": "headstart.load",
    "load_vae": "headstart.load",
    "preset": "headstart.plan",
    "replay": "headstart.rerun",
    "sample": "headstart.sampler",
    "trace": "headstart.traces",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module the first time it is asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'headstart' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_MODULE_OF, "__version__"])
