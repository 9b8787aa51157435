"""Nodes for ComfyUI: a plan's rows through SamplerCustomAdvanced, on two of its MODELs.

`custom_nodes/headstart.py` is two lines:

    from headstart.bridges.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

Headstart Plan makes the SIGMAS and the table, Headstart Guider the GUIDER, Headstart Sampler the
SAMPLER. NOISE, LATENT, previews, masks, interrupts and SplitSigmas are ComfyUI's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headstart.bridges.comfy_guider import Guider, RowSampler
from headstart.bridges.comfy_model import (
    CompiledPlan,
    ModelInfo,
    agree,
    compile_plan,
    levels_of,
    listed,
    with_row_sampling,
)
from headstart.errors import InputError, PlanError
from headstart.plan.by_name import MODES, PRESETS
from headstart.plan.pairs import CUSTOM, PAIRS
from headstart.plan.plan import Plan
from headstart.plan.preset import preset
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.table import StepTable
from headstart.plan.toml_plan import plan_of_toml

MODELS = ("base", "distilled")
CATEGORY = "sampling/custom_sampling/headstart"


class HeadstartPlan:
    """A preset, or a plan in TOML -> its table, its SIGMAS and the table as text."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES = ("HEADSTART_TABLE", "SIGMAS", "STRING")
    RETURN_NAMES = ("table", "sigmas", "text")
    DESCRIPTION = "Which model takes which step, at which noise level; 0 is the preset's own."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "preset": (list(PRESETS), {"default": "lightning"}),
                "mode": (list(MODES), {"default": "hybrid"}),
                "steps": _count("of the distilled model's grid, or of the base alone"),
                "k": _count("steps that the base takes first"),
                "n": _count("the base takes its part in the steps of an n-step grid"),
                "handoff": _number("noise level (sigma) at which the distilled model takes over"),
                "base_guidance": _number("of the base's rows; 1 is the prompt alone, one pass"),
                "distilled_guidance": _number("of the distilled model's rows"),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}),
            },
            "optional": {
                "toml": ("STRING", {"default": "", "multiline": True, "tooltip": _TOML}),
                "base": ("MODEL", {"tooltip": _MODEL}),
                "distilled": ("MODEL", {"tooltip": _MODEL}),
            },
        }

    def make(
        self,
        preset: str,
        mode: str,
        denoise: float = 1.0,
        toml: str = "",
        base: Any = None,
        distilled: Any = None,
        **settings: float,
    ) -> tuple[CompiledPlan, Tensor, str]:
        plan = _plan(preset, mode, toml, {name: value for name, value in settings.items() if value})
        pair = CUSTOM if toml.strip() else PAIRS[preset]
        schedules, predictions = pair.schedules, pair.predictions
        defaults = {name: ModelInfo(schedules[name], predictions[name]) for name in MODELS}
        compiled = compile_plan(plan, defaults, {"base": base, "distilled": distilled})
        rows = max(1, round(denoise * len(compiled.table)))
        levels = levels_of(compiled.table, compiled.flow)[-rows - 1 :]
        return compiled, torch.tensor(levels, dtype=torch.float32), str(compiled.table)


_TOML = (
    "a plan written down ([[leg]] tables with model, steps, guidance ...) in place of the preset"
)
_MODEL = "for models with a noise schedule of their own (v-prediction, zero terminal SNR, EDM)"


def _count(tooltip: str) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": 0, "min": 0, "max": 1000, "tooltip": tooltip}


def _number(tooltip: str) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": 0.0, "min": 0.0, "max": 1e4, "step": 0.1, "tooltip": tooltip}


def _plan(name: str, mode: str, toml: str, settings: Mapping[str, Any]) -> Plan:
    if toml.strip():
        if settings:
            raise PlanError(
                f"a plan in TOML states its own {', '.join(settings)}: set them to 0, or empty toml"
            )
        plan = plan_of_toml(toml, "toml")
        if unknown := sorted({leg.model for leg in plan.legs} - {*MODELS}):
            raise PlanError(f"toml: models here are 'base' and 'distilled', not {unknown}")
    else:
        plan = preset(name, mode=mode, **settings)  # pyright: ignore[reportArgumentType]
        prediction = PAIRS[name].distilled_prediction  # in no file, so unknown to ComfyUI
        if prediction is not None:
            legs = [
                replace(leg, prediction=prediction) if leg.model == "distilled" else leg
                for leg in plan.legs
            ]
            plan = replace(plan, legs=tuple(legs))
    if any(leg.adapters for leg in plan.legs):
        raise PlanError("a plan's adapters are no part of a MODEL: load them with LoraLoader")
    return plan


class HeadstartGuider:
    """Two MODELs and a table -> a GUIDER that runs each row on its model with its guidance."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES = ("GUIDER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {"table": ("HEADSTART_TABLE",), "positive": ("CONDITIONING",)},
            "optional": {
                "base": ("MODEL",),
                "distilled": ("MODEL",),
                "negative": ("CONDITIONING", {"tooltip": "needed by rows with guidance above 1"}),
            },
        }

    def make(
        self,
        table: CompiledPlan,
        positive: Any,
        base: Any = None,
        distilled: Any = None,
        negative: Any = None,
    ) -> tuple[Guider]:
        connected = {"base": base, "distilled": distilled}
        models = {name: connected[name] for name in table.table.models}
        for name, model in models.items():
            if model is None:
                raise InputError(
                    f"plan {table.table.name!r} has rows of the {name} model, and Headstart Guider "
                    f"has no {name} MODEL: connect one, or give Headstart Plan a mode without it"
                )
        conds = {"positive": positive}
        if negative is None and table.table.passes() > len(table.table):
            raise InputError(
                f"plan {table.table.name!r} has guided rows, and Headstart Guider has no negative "
                "CONDITIONING: connect one (an empty prompt will do), or set the guidance of both "
                "models to 1"
            )
        if negative is not None:
            conds["negative"] = negative
        _check_latents(models)
        compiled = compile_plan(table.plan, table.models, models)
        _check_levels(table.table, compiled.table)
        for name, model in compiled.models.items():
            if isinstance(model.process, NoiseSchedule):  # else ComfyUI's formulas are exact
                row = next(step for step in compiled.table if step.model == name)
                models[name] = with_row_sampling(models[name], row)
        return (Guider(compiled.table, compiled.flow, models, conds),)


def _check_latents(models: Mapping[str, Any]) -> None:
    formats = {type(model.get_model_object("latent_format")).__name__ for model in models.values()}
    if len(formats) > 1:
        raise InputError(
            f"the base and the distilled MODEL have latents of two kinds, {' and '.join(formats)}, "
            "so neither can go on from the other's: give two models of one family"
        )


def _check_levels(table: StepTable, compiled: StepTable) -> None:
    """Raise PlanError unless the plan has the same levels on these models."""
    expected, levels = levels_of(table, False), levels_of(compiled, False)
    if len(expected) != len(levels) or not agree(expected, levels):
        raise PlanError(
            f"table {table.name!r} was made for noise levels {listed(expected)}, and the MODELs of "
            f"Headstart Guider have {listed(levels)} there: connect the same MODELs to Headstart "
            "Plan too, or choose a preset of theirs"
        )


class HeadstartSampler:
    """A SAMPLER for a GUIDER of Headstart Guider: it runs the rows that its SIGMAS name."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES = ("SAMPLER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        seed = {"default": 0, "min": 0, "max": 2**64 - 1, "forceInput": True, "tooltip": _SEED}
        return {"required": {}, "optional": {"noise_seed": ("INT", seed)}}

    def make(self, noise_seed: int | None = None) -> tuple[RowSampler]:
        return (RowSampler(noise_seed),)


_SEED = "of the noise that rows add; the seed of NOISE, unless connected. Give both parts of split \
SIGMAS the same"


NODE_CLASS_MAPPINGS = {
    node.__name__: node for node in (HeadstartPlan, HeadstartGuider, HeadstartSampler)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    name: name.replace("Headstart", "Headstart ") for name in NODE_CLASS_MAPPINGS
}
