"""The base model takes the first step, the distilled model runs the rest."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headstart.adapters.adapters import AdapterSet as AdapterSet
    from headstart.adapters.report import AdapterReport as AdapterReport
    from headstart.adapters.strength import Strength as Strength
    from headstart.batch import Batch as Batch
    from headstart.by_level import ByLevel as ByLevel
    from headstart.call import Call as Call
    from headstart.checkpoint.checkpoint import inspect_checkpoint as inspect_checkpoint
    from headstart.engine.engine import Engine as Engine
    from headstart.engine.engine import Trajectory as Trajectory
    from headstart.engine.rerun import replay as replay
    from headstart.errors import AdapterError as AdapterError
    from headstart.errors import CaptureError as CaptureError
    from headstart.errors import CheckpointError as CheckpointError
    from headstart.errors import HeadstartError as HeadstartError
    from headstart.errors import InputError as InputError
    from headstart.errors import PlanError as PlanError
    from headstart.interfaces import Conditioning as Conditioning
    from headstart.interfaces import X0Denoiser as X0Denoiser
    from headstart.networks.load import load_text as load_text
    from headstart.networks.load import load_unet as load_unet
    from headstart.networks.load import load_vae as load_vae
    from headstart.networks.packed import pack as pack
    from headstart.noise import Given as Given
    from headstart.noise import Philox as Philox
    from headstart.plan.pair import Pair as Pair
    from headstart.plan.pairs import presets as presets
    from headstart.plan.plan import Leg as Leg
    from headstart.plan.plan import Plan as Plan
    from headstart.plan.plan import Step as Step
    from headstart.plan.plan import StepTable as StepTable
    from headstart.plan.plan import Update as Update
    from headstart.plan.prediction import Prediction as Prediction
    from headstart.plan.preset import preset as preset
    from headstart.plan.schedule import NoiseSchedule as NoiseSchedule
    from headstart.plan.schedule import Spacing as Spacing
    from headstart.run import Run as Run
    from headstart.run import State as State
    from headstart.run import from_latent as from_latent
    from headstart.sampler import sample as sample
    from headstart.traces.branches import Branch as Branch
    from headstart.traces.branches import branch as branch
    from headstart.traces.decoders import decoder as decoder
    from headstart.traces.preview import Preview as Preview
    from headstart.traces.traces import Trace as Trace
    from headstart.traces.traces import trace as trace

__version__ = "0.1.0"

# A name is imported from its module on first use (PEP 562), so that `import headstart` loads
# neither torch nor numpy and `headstart plan` answers at once.
_MODULE_OF = {
    "AdapterError": "headstart.errors",
    "AdapterReport": "headstart.adapters.report",
    "AdapterSet": "headstart.adapters.adapters",
    "Batch": "headstart.batch",
    "Branch": "headstart.traces.branches",
    "ByLevel": "headstart.by_level",
    "CaptureError": "headstart.errors",
    "CheckpointError": "headstart.errors",
    "Conditioning": "headstart.interfaces",
    "Engine": "headstart.engine.engine",
    "Given": "headstart.noise",
    "HeadstartError": "headstart.errors",
    "InputError": "headstart.errors",
    "Leg": "headstart.plan.plan",
    "NoiseSchedule": "headstart.plan.schedule",
    "Philox": "headstart.noise",
    "Plan": "headstart.plan.plan",
    "PlanError": "headstart.errors",
    "Preview": "headstart.traces.preview",
    "Prediction": "headstart.plan.prediction",
    "Spacing": "headstart.plan.schedule",
    "Call": "headstart.call",
    "X0Denoiser": "headstart.interfaces",
    "Run": "headstart.run",
    "State": "headstart.run",
    "from_latent": "headstart.run",
    "Step": "headstart.plan.plan",
    "StepTable": "headstart.plan.plan",
    "Strength": "headstart.adapters.strength",
    "Trace": "headstart.traces.traces",
    "Trajectory": "headstart.engine.engine",
    "Update": "headstart.plan.plan",
    "branch": "headstart.traces.branches",
    "decoder": "headstart.traces.decoders",
    "inspect_checkpoint": "headstart.checkpoint.checkpoint",
    "load_text": "headstart.networks.load",
    "load_unet": "headstart.networks.load",
    "load_vae": "headstart.networks.load",
    "pack": "headstart.networks.packed",
    "preset": "headstart.plan.preset",
    "presets": "headstart.plan.pairs",
    "Pair": "headstart.plan.pair",
    "replay": "headstart.engine.rerun",
    "sample": "headstart.sampler",
    "trace": "headstart.traces.traces",
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
