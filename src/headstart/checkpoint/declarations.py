"""What a checkpoint declares about itself: in metadata, config files, or tensors.

Each declaration replaces a value of the family's row; metadata `headstart.*` wins over configs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, cast

from headstart.checkpoint import scheduler
from headstart.checkpoint.families import Family
from headstart.checkpoint.scheduler import EDMS, FLOWS, Json, number
from headstart.errors import CheckpointError, PlanError
from headstart.lazy import FloatArray, np
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.spacing import Process

T = TypeVar("T")

STATEMENTS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "scale_factor")
"""Tensors by which a single file declares what it is: Playground 2.5's mean and deviation of
latents (then it is EDM), CosXL's levels (then EDM's v), and the scale of ldm's `scale_by_std`."""
FLAGS = frozenset({"v_pred", "ztsnr"})
"""Marker tensors without numbers, for a prediction and a schedule (NoobAI, ComfyUI)."""
_PLAYGROUND_SCALE = 0.5
"""The scale factor of Playground 2.5 (its vae/config.json), which is its sigma_data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statements:
    """The sources of declarations of a checkpoint; each may be empty.

    metadata   the safetensors `__metadata__`; ours are the keys `headstart.*`
    unet, vae  the `config.json` of a diffusers folder
    scheduler  its `scheduler_config.json`
    alphas     `alphas_cumprod` of an LDM file and the relative rounding error of its dtype
    flags      names of marker tensors: `v_pred`, `ztsnr`
    tensors    the numbers of the tensors in `STATEMENTS`
    path       for errors
    """

    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    unet: Json = field(default_factory=dict[str, object])
    vae: Json = field(default_factory=dict[str, object])
    scheduler: Json = field(default_factory=dict[str, object])
    alphas: tuple[FloatArray, float] | None = None
    flags: frozenset[str] = frozenset()
    tensors: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    path: str | Path = "this model"

    @property
    def flows(self) -> bool:
        """Whether its scheduler is one of rectified flow, or another one with use_flow_sigmas."""
        return self.scheduler.get("use_flow_sigmas") is True or self.scheduler_class in FLOWS

    @property
    def scheduler_class(self) -> str | None:
        """The class in its `scheduler_config.json`, or None."""
        name = self.scheduler.get("_class_name")
        return None if name is None else str(name)

    @property
    def edm(self) -> Prediction | None:
        """The prediction that the tensors of an EDM model declare."""
        if {"edm_mean", "edm_std"} <= self.tensors.keys():
            return Prediction.EDM
        return Prediction.EDM_V if "edm_vpred.sigma_max" in self.tensors else None


def declared(family: Family, statements: Statements) -> Family:
    """`family` with all declarations of the file; metadata wins over config files.

    Raises CheckpointError for a value that cannot be read or that no network here implements.
    """
    fields: dict[str, object] = {}
    try:
        _refuse_unsupported(statements.unet)
        _from_tensors(statements.tensors, fields)
        _from_configs(family, statements, fields)
        _from_metadata(statements.metadata, fields)
        fields |= _prediction(statements)
        table = family.schedule
        assert isinstance(table, NoiseSchedule)  # every row of FAMILIES has one
        fields |= _schedule(table, statements)
    except PlanError as error:
        message = f"the checkpoint's own schedule is unusable: {error!s:.400}"
        raise CheckpointError(f"{statements.path}: {message}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{statements.path}: {error!s:.400}") from error
    return replace(family, declared=frozenset(fields), **fields)


def read_scheduler(config: Json) -> tuple[Process, Prediction]:
    """The noise schedule and the prediction of a diffusers scheduler's configuration.

    Raises CheckpointError for an unknown class, and for an unusable value.
    """
    if not config.get("_class_name"):
        raise CheckpointError(
            "expected a scheduler of diffusers, or its scheduler_config.json with a _class_name, "
            f"got {dict(config)!r:.80}"
        )
    statements = Statements(scheduler=config)
    try:
        fields = _schedule(NoiseSchedule.scaled_linear(), statements) | _prediction(statements)
    except PlanError as error:
        raise CheckpointError(f"the scheduler's own schedule is unusable: {error}") from error
    prediction = cast(Prediction, fields.get("prediction", Prediction.EPS))
    return cast(Process, fields["schedule"]), prediction


def _from_metadata(metadata: Mapping[str, str], fields: dict[str, object]) -> None:
    for name in ("norm_groups", "vae_norm_groups", "image_size", "scale_factor", "head_dim"):
        kind = float if name == "scale_factor" else int
        if (value := metadata_value(metadata, name, kind)) is not None:
            fields[name] = value
            fields |= {"heads": None} if name == "head_dim" else {}


def metadata_value(metadata: Mapping[str, str], name: str, kind: Callable[[str], T]) -> T | None:
    """`headstart.<name>` of the metadata as a positive number, or None when it is absent."""
    text = metadata.get(f"headstart.{name}")
    if text is None:
        return None
    try:
        value = kind(text)
        if not 0 < cast(float, value) < 2**31:
            raise ValueError("out of range")
    except ValueError as error:
        raise CheckpointError(
            f"metadata headstart.{name} = {text[:40]!r}: expected a positive number ({error})"
        ) from error
    return value


def _from_configs(family: Family, statements: Statements, fields: dict[str, object]) -> None:
    if statements.unet:
        fields |= _heads(statements.unet)
        fields["norm_groups"] = int(number(statements.unet, "norm_num_groups", 32, "unet"))
        size = statements.unet.get("sample_size")
        if isinstance(size, int):
            fields["image_size"] = size * family.downscale
    if statements.vae:
        # Configs of 2022 do not have it; those models were trained with diffusers' default.
        fields["scale_factor"] = float(number(statements.vae, "scaling_factor", 0.18215, "vae"))
        fields["vae_norm_groups"] = int(number(statements.vae, "norm_num_groups", 32, "vae"))
        if (shift := statements.vae.get("shift_factor")) is not None:
            (fields["shift_factor"],) = _finite("vae/config.json: shift_factor", [shift])
        mean, std = statements.vae.get("latents_mean"), statements.vae.get("latents_std")
        if mean is not None or std is not None:
            fields |= _latents("vae/config.json: latents_", mean, std)


def _from_tensors(tensors: Mapping[str, tuple[float, ...]], fields: dict[str, object]) -> None:
    if "scale_factor" in tensors:
        config = {"scale_factor": next(iter(tensors["scale_factor"]), None)}
        fields["scale_factor"] = float(number(config, "scale_factor", 0.0, "tensor"))
    if "edm_mean" in tensors or "edm_std" in tensors:
        fields |= _latents("edm_", tensors.get("edm_mean"), tensors.get("edm_std"))
        fields["scale_factor"] = _PLAYGROUND_SCALE


def _latents(where: str, mean: object, std: object) -> dict[str, object]:
    """Mean and deviation of each channel of a VAE's latents."""
    means, stds = _finite(f"{where}mean", mean), _finite(f"{where}std", std)
    if len(means) != len(stds) or min(stds) <= 0:
        raise CheckpointError(
            f"{where}mean and {where}std: expected as many numbers in both, and no deviation below "
            f"or at 0, got {list(means)[:4]} and {list(stds)[:4]}"
        )
    return {"latents_mean": means, "latents_std": stds}


def _finite(where: str, value: object) -> tuple[float, ...]:
    numbers = cast(list[object], value) if isinstance(value, list | tuple) else []
    plain = [x for x in numbers if isinstance(x, int | float) and not isinstance(x, bool)]
    sane = len(plain) == len(numbers) <= 1024 and all(abs(x) < 2**31 for x in plain)
    if not plain or not sane:
        raise CheckpointError(
            f"{where}: expected finite numbers, got {str(cast(object, value))[:80]}"
        )
    return tuple(float(x) for x in plain)


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


def _prediction(statements: Statements) -> dict[str, object]:
    if statements.edm is not None:
        return {"prediction": statements.edm}
    if statements.flows:
        return {"prediction": Prediction.FLOW}
    if statements.scheduler_class in EDMS:
        v = statements.scheduler.get("prediction_type") == "v_prediction"
        return {"prediction": Prediction.EDM_V if v else Prediction.EDM}
    value: object = (
        statements.metadata.get("headstart.prediction")
        or statements.metadata.get("modelspec.prediction_type")
        or statements.scheduler.get("prediction_type")
        or ("v" if "v_pred" in statements.flags else None)
    )
    return {} if value is None else {"prediction": Prediction(value)}


def _schedule(table: NoiseSchedule, statements: Statements) -> dict[str, object]:
    if statements.edm is not None:
        low, high = (
            next(iter(statements.tensors.get(f"edm_vpred.sigma_{end}", ())), usual)
            for end, usual in (("min", 0.002), ("max", 80.0))
        )
        # arXiv:2206.00364, table 1; CosXL's.
        data = 0.5 if statements.edm is Prediction.EDM else 1.0
        return {"schedule": NoiseSchedule.edm(low, high, data)}
    if statements.alphas is not None:
        values, rounding = statements.alphas
        alphas = table.alphas_cumprod
        # A rounded copy of the family's own schedule: prefer the float64 of the table.
        same = values.shape == alphas.shape and np.allclose(values, alphas, rtol=rounding, atol=0)
        schedule = table if same else NoiseSchedule.from_alphas_cumprod(values)
    elif statements.flows:
        return {"schedule": scheduler.flow(statements.scheduler)}
    elif statements.scheduler_class in EDMS:
        return {"schedule": scheduler.edm(statements.scheduler)}
    elif statements.scheduler:
        schedule = scheduler.table(statements.scheduler)
    else:
        schedule = None
    if "ztsnr" in statements.flags or statements.scheduler.get("rescale_betas_zero_snr") is True:
        schedule = (schedule or table).zero_terminal_snr()
    return {} if schedule is None else {"schedule": schedule}


# Options of diffusers that this UNet lacks -> the values that it has; an absent key is the first.
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
