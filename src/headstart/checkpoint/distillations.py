"""The known distillations, one row each, with the pair that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

EULER, ANCESTRAL, RENOISE = "euler", "ancestral", "renoise"
"""Update rules, by their names in `headstart.Update`."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """One distillation: how its models are recognised by name, and how they were trained.

    pattern    found in its published names, lower case; the first row that matches counts
    pair       its name in `headstart.preset`; `by_steps`: step count -> another pair, for counts
               with a network of their own
    timesteps  of its training, if they are more than the steps of its pair
    updates    the rules of its training; () if any will do
    jumps      whether it was trained for exactly the steps of its grid
    any_steps  whether it runs with other step counts than the one in its name
    """

    name: str
    pattern: str
    pair: str
    by_steps: Mapping[int, str] = field(default_factory=dict[int, str])
    timesteps: tuple[float, ...] = ()
    updates: tuple[str, ...] = ()
    jumps: bool = False
    any_steps: bool = False

    def preset(self, steps: int | None) -> str:
        """The pair that runs its network of that many steps."""
        return self.pair if steps is None else self.by_steps.get(steps, self.pair)


_LCM_STEPS = tuple(float(t) for t in range(999, 0, -20))
"""arXiv:2310.04378: consistency on the 50 steps of a DDIM teacher, 19, 39, ... 999."""
_ADD_STEPS = (999.0, 749.0, 499.0, 249.0)
"""arXiv:2311.17042, section 4: adversarial diffusion distillation trains at four timesteps."""


def _word(text: str) -> str:
    return rf"(?<![a-z]){text}(?![a-z])"


DISTILLATIONS: tuple[Distillation, ...] = (
    # arXiv:2405.14867 and its model card; 759 and 259 are of the paper this package follows
    # (arXiv:2503.10637, its notebooks). The 1-step UNet was trained at 399 alone.
    Distillation(
        "DMD2",
        _word("dmd2?"),
        "dmd2",
        {1: "dmd2-1step"},
        timesteps=(999.0, 759.0, 749.0, 499.0, 259.0, 249.0),
        updates=(RENOISE,),
    ),
    # arXiv:2402.13929: one network for each step count, on the trailing grid of that count.
    Distillation(
        "Lightning", "lightning", "lightning", {1: "lightning-1step"}, updates=(EULER,), jumps=True
    ),
    # arXiv:2404.13686 and its model card. The unified LoRA is called 1-step, and run at 1 to 8.
    Distillation("Hyper-SD CFG", r"hyper[-_ ]?sd.*cfg", "hyper-sd-cfg"),
    Distillation(
        "Hyper-SD unified",
        r"hyper[-_ ]?sd.*(?<![0-9])1[-_ ]?steps?[-_ ]?lora",
        "hyper-sd-unified",
        any_steps=True,
    ),
    Distillation(
        "Hyper-SD",
        r"hyper[-_ ]?sd",
        "hyper-sd",
        {1: "hyper-sd-1step"},
        updates=(EULER,),
        jumps=True,
    ),
    Distillation("PCM CFG", _word("pcm") + ".*normalcfg", "pcm-cfg"),
    Distillation("PCM", _word("pcm"), "pcm"),
    Distillation("TCD", _word("tcd"), "tcd"),
    Distillation(
        "NitroFusion Vibrant",
        r"nitro[-_ ]?(sd|fusion).*vibrant",
        "nitrofusion-vibrant",
        updates=(RENOISE,),
    ),
    Distillation("NitroFusion", r"nitro[-_ ]?(sd|fusion)", "nitrofusion", updates=(RENOISE,)),
    Distillation("SDXL-Flash", r"sdxl[-_ ]?flash", "sdxl-flash"),
    Distillation(
        "LCM-LoRA",
        r"lcm[-_ ]?lora|vega[-_ ]?rt",
        "lcm-lora",
        timesteps=_LCM_STEPS,
        updates=(RENOISE,),
    ),
    Distillation("LCM", _word("lcm"), "lcm", timesteps=_LCM_STEPS, updates=(RENOISE,)),
    # The cards run Euler and ancestral, training renoised.
    Distillation("SD-Turbo", r"(?<![a-z])sd[-_ ]?turbo", "sd-turbo", timesteps=_ADD_STEPS),
    Distillation("Turbo", "turbo", "turbo", timesteps=_ADD_STEPS),
)
