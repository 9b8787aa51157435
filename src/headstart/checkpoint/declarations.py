"""What a checkpoint says about itself, in metadata, config files or its own schedule tensor.

Each statement replaces a value of the family's row; metadata `headstart.*` wins over config files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from headstart.checkpoint.families import Family
from headstart.errors import CheckpointError, PlanError
from headstart.later import Later
from headstart.plan.edm import EdmSchedule
from headstart.plan.flow import FlowSchedule
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import FloatArray, NoiseSchedule
from headstart.plan.spacing import Process

if TYPE_CHECKING:
    import numpy as np
else:
    np = Later("numpy")

Json = Mapping[str, object]
T = TypeVar("T")


FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""diffusers' schedulers of rectified flow."""
EDMS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
"""Those of EDM, whose `prediction_type` is epsilon where they mean EDM's own."""
TABLES = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDPM", "PNDM", "LCM", "TCD", "LMSDiscrete", "UniPCMultistep", "DEISMultistep"),
        *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete"),
        *("KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE"),
        *("SASolver", "DDIMParallel", "DDPMParallel", "CogVideoXDDIM"),
    )
)
"""Those whose models are trained on a table of alphas_cumprod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Everything besides tensors that came with a checkpoint; each may be empty.

    metadata   the safetensors `__metadata__`; ours are the keys `headstart.*`
    unet, vae  the `config.json` of a diffusers folder
    scheduler  its `scheduler_config.json`
    alphas     `alphas_cumprod` of an LDM file and the relative rounding error of its dtype
    flags      names of marker tensors: `v_pred`, `ztsnr`
    path       where it is, for errors
    """

    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    unet: Json = field(default_factory=dict[str, object])
    vae: Json = field(default_factory=dict[str, object])
    scheduler: Json = field(default_factory=dict[str, object])
    alphas: tuple[FloatArray, float] | None = None
    flags: frozenset[str] = frozenset()
    path: str | Path = "this model"

    @property
    def flows(self) -> bool:
        """Whether its scheduler is one of rectified flow, or another one that is set to it."""
        others = self.scheduler.get("use_flow_sigmas") is True
        return others or self.scheduler_class in FLOWS

    @property
    def scheduler_class(self) -> str | None:
        """Of a diffusers folder, where it says one."""
        name = self.scheduler.get("_class_name")
        return None if name is None else str(name)


def declared(family: Family, said: Said) -> Family:
    """`family` with everything the file says about itself; metadata wins over config files.

    Raises CheckpointError for a value that cannot be read or that no network here implements.
    """
    found: dict[str, object] = {}
    try:
        _refuse_unsupported(said.unet)
        _from_configs(family, said, found)
        _from_metadata(said.metadata, found)
        found |= _prediction(said)
        table = family.schedule
        assert isinstance(table, NoiseSchedule)  # every row of FAMILIES has one
        found |= _schedule(table, said)
    except PlanError as error:
        told = f"the checkpoint's own schedule is unusable: {error!s:.400}"
        raise CheckpointError(f"{said.path}: {told}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{said.path}: {error!s:.400}") from error
    return replace(family, declared=frozenset(found), **found)


def read_scheduler(config: Json) -> tuple[Process, Prediction]:
    """The noise schedule and the prediction that a diffusers scheduler's configuration says.

    Raises CheckpointError for a class that is none of those here, and for an unusable value.
    """
    if not config.get("_class_name"):
        raise CheckpointError(
            "expected a scheduler of diffusers, or its scheduler_config.json with a _class_name, "
            f"got {dict(config)!r:.80}"
        )
    said = Said(scheduler=config)
    try:
        found = _schedule(NoiseSchedule.scaled_linear(), said) | _prediction(said)
    except PlanError as error:
        raise CheckpointError(f"the scheduler's own schedule is unusable: {error}") from error
    prediction = cast(Prediction, found.get("prediction", Prediction.EPS))
    return cast(Process, found["schedule"]), prediction


_METADATA: dict[str, Callable[[str], object]] = {
    "norm_groups": int,
    "vae_norm_groups": int,
    "scale_factor": float,
    "image_size": int,
}


def _from_metadata(metadata: Mapping[str, str], found: dict[str, object]) -> None:
    for name, read in _METADATA.items():
        if (value := metadata_value(metadata, name, read)) is not None:
            found[name] = value
    head_dim = metadata_value(metadata, "head_dim", int)
    if head_dim is not None:
        found |= {"head_dim": head_dim, "heads": None}


def metadata_value(metadata: Mapping[str, str], name: str, read: Callable[[str], T]) -> T | None:
    """`headstart.<name>` of the metadata as a positive number, or None when it is absent."""
    text = metadata.get(f"headstart.{name}")
    if text is None:
        return None
    try:
        value = read(text)
        if not 0 < cast(float, value) < 2**31:
            raise ValueError("out of range")
    except ValueError as error:
        raise CheckpointError(
            f"metadata headstart.{name} = {text[:40]!r}: expected a positive number ({error})"
        ) from error
    return value


def _from_configs(family: Family, said: Said, found: dict[str, object]) -> None:
    if said.unet:
        found |= _heads(said.unet)
        found["norm_groups"] = int(_number(said.unet, "norm_num_groups", 32, "unet"))
        size = said.unet.get("sample_size")
        if isinstance(size, int):
            found["image_size"] = size * family.downscale
    if said.vae:
        # Configs of 2022 leave it out; diffusers' default is what those models were trained with.
        found["scale_factor"] = float(_number(said.vae, "scaling_factor", 0.18215, "vae"))
        found["vae_norm_groups"] = int(_number(said.vae, "norm_num_groups", 32, "vae"))


def _heads(config: Json) -> dict[str, object]:
    """diffusers' `attention_head_dim` is, despite its name, the NUMBER of heads, for each level."""
    counts = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    if isinstance(counts, int):
        return {"heads": counts, "head_dim": None}
    widths = config.get("block_out_channels")
    if isinstance(counts, list) and isinstance(widths, list):
        pairs = list(zip(cast(list[int], widths), cast(list[int], counts), strict=False))
        if all(type(number) is int and number > 0 for pair in pairs for number in pair):
            if len(dims := {width / count for width, count in pairs}) == 1:
                return {"heads": None, "head_dim": int(dims.pop())}
            if len(same := {count for _, count in pairs}) == 1:
                return {"heads": same.pop(), "head_dim": None}
    raise CheckpointError(
        f"config.json: {counts!r} heads for widths {widths!r}: expected one count for all levels, "
        "or counts that give every level the same head width"
    )


def _number(config: Json, key: str, default: float, part: str = "scheduler") -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 2**16:
        file = "scheduler_config.json" if part == "scheduler" else f"{part}/config.json"
        raise CheckpointError(f"{file}: {key} = {value!r:.80}: expected a number in (0, 65536]")
    return value


def _prediction(said: Said) -> dict[str, object]:
    if said.flows:
        return {"prediction": Prediction.FLOW}
    if said.scheduler_class in EDMS:
        v = said.scheduler.get("prediction_type") == "v_prediction"
        return {"prediction": Prediction.EDM_V if v else Prediction.EDM}
    value: object = (
        said.metadata.get("headstart.prediction")
        or said.metadata.get("modelspec.prediction_type")
        or said.scheduler.get("prediction_type")
        or ("v" if "v_pred" in said.flags else None)
    )
    return {} if value is None else {"prediction": Prediction(value)}


def _schedule(table: NoiseSchedule, said: Said) -> dict[str, object]:
    if said.alphas is not None:
        values, rounding = said.alphas
        known = table.alphas_cumprod
        # A rounded copy of the family's own schedule: the float64 of the table is the better one.
        if values.shape == known.shape and np.allclose(values, known, rtol=rounding, atol=0):
            schedule = table
        else:
            schedule = NoiseSchedule.from_alphas_cumprod(values)
    elif said.flows:
        return {"schedule": _flow(said.scheduler)}
    elif said.scheduler_class in EDMS:
        return {"schedule": _edm(said.scheduler)}
    elif said.scheduler:
        schedule = _from_scheduler(said.scheduler)
    else:
        schedule = None
    if "ztsnr" in said.flags or said.scheduler.get("rescale_betas_zero_snr") is True:
        schedule = (schedule or table).zero_terminal_snr()
    return {} if schedule is None else {"schedule": schedule}


def _flow(config: Json) -> FlowSchedule:
    """Of diffusers' FlowMatch schedulers. A shift that depends on the size is refused."""
    if config.get("use_dynamic_shifting") not in (None, False):
        raise CheckpointError(
            "scheduler_config.json: use_dynamic_shifting makes the grid depend on the picture's "
            "size, which is not implemented: set it to false and `shift` to a number"
        )
    if (trained := config.get("num_train_timesteps", 1000)) != 1000:
        raise CheckpointError(
            f"scheduler_config.json: num_train_timesteps = {trained!r:.40} of a flow: its network "
            "would be told 1000*t, as all known flows are; others are not implemented"
        )
    terminal = config.get("shift_terminal")
    shift = "shift" if "shift" in config else "flow_shift"
    return NoiseSchedule.flow(
        _number(config, shift, 1.0),
        terminal=None if terminal is None else _number(config, "shift_terminal", 0.0),
    )


def _edm(config: Json) -> EdmSchedule:
    return NoiseSchedule.edm(
        _number(config, "sigma_min", 0.002),
        _number(config, "sigma_max", 80.0),
        _number(config, "sigma_data", 0.5),
        _number(config, "rho", 7.0),
    )


def _from_scheduler(config: Json) -> NoiseSchedule:
    """The schedule of a diffusers `scheduler_config.json`.

    Raises CheckpointError for a class that is not known to share this parametrisation: a model
    run as what it is not draws noise.
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
    steps = int(_number(config, "num_train_timesteps", 1000))
    start, end = _number(config, "beta_start", 0.0001), _number(config, "beta_end", 0.02)
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


# What diffusers can be asked for and this UNet does not do; an absent key means the first value.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default", None),
    "center_input_sample": (False, None),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False, None),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-5,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False, None),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False, None),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional", None),
    "timestep_post_act": (None,),
}


def _refuse_unsupported(config: Json) -> None:
    for key, allowed in _SUPPORTED.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise CheckpointError(
                f"config.json: {key} = {value!r}: this UNet implements {allowed[0]!r} only, "
                "so the file belongs to another kind of network"
            )
