"""Controls: low-rank adapters trained on one model of the pair, to be used on both.

A slider (arXiv:2311.12092, eq. 8) learns a direction between two captions: at strength s

    v_s(x_t, c) = v(x_t, c) + s*eta*(v(x_t, c plus) - v(x_t, c minus))

for every s in -REACH .. REACH, the strengths it is used at; the paper's pair of losses is s = 1 and
-1. From c to either end is about half of that difference: with an eta of 1 pictures were at
the end at a strength of 1/2, and a scorer cannot tell anything beyond it.
A style learns the pictures of one artist under captions that do not name the style:

    E |v_1(x_t, c) - v|^2            (a LoRA of arXiv:2106.09685 on the loss of the base)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from headstart.adapters.delta import LowRank
from headstart.adapters.file import layer_shapes
from headstart.adapters.slots import Slots
from headstart.adapters.snapshot import Snapshot, from_deltas
from headstart.interfaces import Conditioning
from headstart_weights.recipe import StageOptions, codec, language
from headstart_weights.recipe.base import load_unet
from headstart_weights.recipe.dataset import STYLES, Dataset, compose_caption, load_dataset
from headstart_weights.recipe.diffusion import GRID, add_noise, stratified_timesteps
from headstart_weights.recipe.training import Average, Run, descend, write_tensors

SCALE = 0.25  # alpha/rank: the released sliders have alpha 1 and rank 4
REACH = 2.0
_BATCH, _STYLE_BATCH = 8, 24  # a slider's step has three more predictions to make
_LR, _STYLE_LR = 2e-3, 4e-3
SHIPPED = ("yellow",)
_NAME = "control"  # of the adapter in its slots, while it is trained

log = logging.getLogger(__name__)


class Control(NamedTuple):
    """What a control is trained to do.

    model        "base" or "student", whose file in the work folder it is trained on
    plus, minus  of a slider: what captions end with at strength 1 and -1
    eta          of a slider: how far strength 1 goes along the difference of the two
    style        of a style: the one whose pictures it learns
    rank         of every layer's change
    """

    name: str
    model: Literal["base", "student"]
    plus: Mapping[str, str] = {}
    minus: Mapping[str, str] = {}
    style: str | None = None
    eta: float = 0.3
    rank: int = 4


_YELLOW, _BLUE = {"colour": "yellow"}, {"colour": "blue"}
CONTROLS: dict[str, Control] = {
    control.name: control
    for control in (
        Control("yellow", "base", _YELLOW, _BLUE),
        Control("light", "base", {"colour": "white"}, {"colour": "gray"}),
        Control("paper", "base", style="paper", rank=16),
        Control("yellow-reverse", "student", _YELLOW, _BLUE),
    )
}


class Trainer:
    """One control in the slots of its network, and the loss of one training step."""

    def __init__(self, options: StageOptions, control: Control) -> None:
        self.control = control
        self.unet = load_unet(options.work / f"{control.model}.safetensors").requires_grad_(False)
        self.adapters, self.slots = train_slots(self.unet, control.rank)
        self.data = load_dataset(options.work)
        self.latents = codec.Posterior.of(codec.load(options.work), self.data.images)
        self.text = language.load(options.work).requires_grad_(False)
        self.pictures = torch.tensor(pictures_of(self.data, control.style))

    def loss(self) -> Tensor:
        batch = _BATCH if self.control.style is None else _STYLE_BATCH
        indices = self.pictures[torch.randint(len(self.pictures), (batch,))]
        x0, timestep = self.latents.draw(indices), self._timesteps(batch)
        x, target = add_noise(x0, timestep)
        concepts = [self.data.items[i].concept for i in indices.tolist()]
        strength = torch.ones(batch, 1)
        if self.control.style is None:
            strength = REACH * (2 * torch.rand(batch, 1) - 1)
            target = self._slider_target(x, timestep, concepts, strength)
        context = self._context(concepts, {})
        cond = Conditioning(context, strengths=strength, adapters=self.adapters)
        return (self.unet(x, timestep, cond) - target).square().mean()

    def _timesteps(self, batch: int) -> Tensor:
        """A student is trained on its own grid only."""
        if self.control.model == "base":
            return stratified_timesteps(batch)
        return torch.tensor(GRID)[torch.randint(len(GRID), (batch,))]

    def _context(self, concepts: list[str], ending: Mapping[str, str]) -> Tensor:
        with torch.no_grad():
            return self.text([compose_caption(name, **ending) for name in concepts])

    @torch.no_grad()
    def _slider_target(
        self, x: Tensor, timestep: Tensor, concepts: list[str], strength: Tensor
    ) -> Tensor:
        """The slider's target, from the network without it: three captions in one call."""
        endings = ({}, self.control.plus, self.control.minus)
        context = torch.cat([self._context(concepts, ending) for ending in endings])
        zeros = torch.zeros(3 * len(x), 1)
        cond = Conditioning(context, strengths=zeros, adapters=self.adapters)
        neutral, plus, minus = self.unet(x.repeat(3, 1, 1, 1), timestep.repeat(3), cond).chunk(3)
        return neutral + self.control.eta * strength[:, :, None, None] * (plus - minus)


def train_slots(unet: nn.Module, rank: int) -> tuple[Snapshot, nn.ModuleDict]:
    """Slots on the attention and the resnets' convolutions ("c3lier"), with `up` at zero."""
    deltas = {
        path: LowRank(
            nn.init.kaiming_uniform_(torch.empty(rank, *shape[1:]), a=5**0.5),
            torch.zeros(shape[0], rank),
            SCALE,
        )
        for path, shape in layer_shapes(unet).items()
        if ".attn" in path or (".resnets." in path and len(shape) == 4)
    }
    adapters = from_deltas(unet, _NAME, deltas)
    (slots,) = adapters.parts(unet)
    assert isinstance(slots, Slots)
    for slot in slots.by_path.values():
        for name in ("down", "up"):
            values = getattr(slot, name)
            delattr(slot, name)
            slot.register_parameter(name, nn.Parameter(values))
    return adapters, nn.ModuleDict({k.replace(".", "_"): s for k, s in slots.by_path.items()})


def pictures_of(data: Dataset, style: str | None) -> list[int]:
    """The numbers of the pictures in a style, or of all."""
    styles = [style if style is None else STYLES.get(item.vendor) for item in data.items]
    return [number for number, item_style in enumerate(styles) if item_style == style]


def kohya_tensors(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as released sliders have them: lora_unet_<path>.lora_down.weight, .lora_up, .alpha."""
    tensors: dict[str, Tensor] = {}
    for key, value in values.items():
        path, _, matrix = key.rpartition(".")
        name, down = "lora_unet_" + path, values[f"{path}.down"]
        if matrix == "up" and down.ndim == 4:
            value = value[:, :, None, None]
        tensors[f"{name}.lora_{matrix}.weight"] = value
        tensors[f"{name}.alpha"] = torch.tensor(SCALE * len(down))
    return tensors


def train_adapter(
    options: StageOptions, name: str, slots: nn.Module, loss_of: Callable[[], Tensor], lr: float,
    trained_on: str,
) -> None:  # fmt: skip
    """Train slots for `options.minutes` or `.steps`, resuming; writes `<name>.safetensors`."""
    optimiser = torch.optim.Adam(slots.parameters(), lr=lr, betas=(0.9, 0.99))
    average = Average(slots, 0.98)
    run = Run(name, options, {"slots": slots}, [optimiser], average)

    def step(index: int, fraction: float) -> dict[str, float]:
        loss = loss_of()
        descend(optimiser, loss, lr * min(1.0, (index + 1) / 20, (1.0 - fraction) / 0.5 + 0.02))
        return {"loss": loss.item()}

    run.loop(step, log_every=20)
    metadata = {"steps": str(run.step), "headstart.trained_on": trained_on}
    write_tensors(kohya_tensors(average.values), options.work / f"{name}.safetensors", metadata)
    log.info("%s: %d steps on %s", name, run.step, trained_on)


def train(options: StageOptions, name: str) -> None:
    """One of CONTROLS."""
    torch.manual_seed(options.seed)
    control = CONTROLS[name]
    trainer = Trainer(options, control)
    lr = _LR if control.style is None else _STYLE_LR
    train_adapter(options, name, trainer.slots, trainer.loss, lr, control.model)


def sliders(options: StageOptions) -> None:
    """The `slider` stage: the two that are trained on the base."""
    for name in ("yellow", "light"):
        train(options, name)


style = partial(train, name="paper")
reverse = partial(train, name="yellow-reverse")
