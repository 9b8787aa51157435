"""The base model takes the first step, the distilled model runs the rest.

engine = headstart.Engine.demo()                  # or Engine.load(base, distilled)
engine.sample("a fox", seeds=range(4)).rgb        # uint8 [4, 64, 64, 3]
for state in headstart.sample(table, denoisers, cond, noise): ...    # the loop itself
"""

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
    from headstart.sampler import sample as sample
    from headstart.state import State as State
    from headstart.state import from_latent as from_latent
    from headstart.traces.branches import Branch as Branch
    from headstart.traces.branches import branch as branch
    from headstart.traces.decoders import decoder as decoder
    from headstart.traces.preview import Preview as Preview
    from headstart.traces.traces import Trace as Trace
    from headstart.traces.traces import trace as trace

__version__ = "0.1.0"

# A name is imported from its module on first use (PEP 562), so that `import headstart` loads
# neither torch nor numpy and `headstart plan` answers at once.
_NAMES = {
    "adapters.adapters": "AdapterSet",
    "adapters.report": "AdapterReport",
    "adapters.strength": "Strength",
    "batch": "Batch",
    "by_level": "ByLevel",
    "call": "Call",
    "checkpoint.checkpoint": "inspect_checkpoint",
    "engine.engine": "Engine Trajectory",
    "engine.rerun": "replay",
    "errors": "AdapterError CaptureError CheckpointError HeadstartError InputError PlanError",
    "interfaces": "Conditioning X0Denoiser",
    "networks.load": "load_text load_unet load_vae",
    "networks.packed": "pack",
    "noise": "Given Philox",
    "plan.pair": "Pair",
    "plan.pairs": "presets",
    "plan.plan": "Leg Plan Step StepTable Update",
    "plan.prediction": "Prediction",
    "plan.preset": "preset",
    "plan.schedule": "NoiseSchedule Spacing",
    "run": "Run",
    "sampler": "sample",
    "state": "State from_latent",
    "traces.branches": "Branch branch",
    "traces.decoders": "decoder",
    "traces.preview": "Preview",
    "traces.traces": "Trace trace",
}
_MODULE_OF = {
    name: f"headstart.{module}" for module, names in _NAMES.items() for name in names.split()
}


def __getattr__(name: str) -> object:
    """Import a public name from its module the first time it is asked for."""
    if name == "__all__":  # what `help(headstart)` lists, and `from headstart import *` takes
        return sorted(_MODULE_OF)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'headstart' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_MODULE_OF, "__version__"])
