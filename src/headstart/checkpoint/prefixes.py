"""Prefixes that tools put before the names of a network, for checkpoints and adapters.

name = prefix ++ ... ++ prefix ++ the network's own name of the tensor or module
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from headstart.checkpoint.keymap import PartName


class Reading(NamedTuple):
    """One way to read a name: the network that its prefixes name, if any, and the rest."""

    network: PartName | None
    rest: str


PREFIXES: tuple[tuple[str, PartName | None], ...] = (
    # The original layout (CompVis, Stability's ldm and sgm).
    ("model.diffusion_model.", "unet"),
    ("first_stage_model.", "vae"),
    ("conditioner.embedders.0.transformer.", "text"),
    ("conditioner.embedders.1.model.", "text_2"),
    ("conditioner.embedders.0.model.", "text_2"),  # SDXL's refiner, which has this encoder alone
    ("cond_stage_model.transformer.", "text"),
    ("cond_stage_model.model.", "text"),
    # diffusers' components, and ComfyUI's and trainers' names for the same.
    ("unet.", "unet"),
    ("transformer.", "unet"),
    ("diffusion_model.", "unet"),
    ("vae.", "vae"),
    ("text_encoder.", "text"),
    ("text_encoder_2.", "text_2"),
    ("text_encoders.clip_l.transformer.", "text"),
    ("text_encoders.clip_g.transformer.", "text_2"),
    ("text_encoders.clip_h.transformer.", "text"),
    ("clip_l.transformer.", "text"),
    ("clip_g.transformer.", "text_2"),
    ("clip_l.", "text"),
    ("clip_g.", "text_2"),
    ("clip_h.", "text"),
    # Adapters: kohya's, with underscores for dots; cloneofsimo's, with a number behind.
    ("lora_unet_", "unet"),
    ("oft_unet_", "unet"),
    ("lora_transformer_", "unet"),
    ("lora_te1_", "text"),
    ("lora_te2_", "text_2"),
    ("lora_te_", "text"),
    ("lycoris_", None),
    ("unet_", "unet"),
    ("text_encoder_", "text"),
    ("text_encoder_2_", "text_2"),
    ("unet:", "unet"),
    ("text_encoder:", "text"),
    # Wrappers, which say nothing about the network: torch.compile, DataParallel, averages, PEFT.
    ("_orig_mod.", None),
    ("_orig_mod_", None),
    ("module.", None),
    ("ema.", None),
    ("model.", None),
    ("base_model.model.", None),
)


SINGLE_FILE = ("model.diffusion_model.", "first_stage_model.", "conditioner.", "cond_stage_model.")
"""The prefixes of the original layout, in which one file has all networks."""
DEEPEST = 4
"""Most prefixes that are removed from a name; known files have up to three."""

_BY_LETTER = {
    letter: [row for row in PREFIXES if row[0].startswith(letter)]
    for letter in {prefix[0] for prefix, _ in PREFIXES}
}


def readings(name: str) -> Iterator[Reading]:
    """Every way to read a name, from the whole name to the rest after all prefixes.

    A prefix may belong to the network's own names (OpenCLIP's layers begin with `transformer.`), so
    the reading that a network knows counts. A prefix that names a network wins over earlier ones.
    """
    queue = [(Reading(None, name), 0)]
    for reading, depth in queue:
        yield reading
        for prefix, network in _BY_LETTER.get(reading.rest[:1], ()) if depth < DEEPEST else ():
            if reading.rest.startswith(prefix) and len(reading.rest) > len(prefix):
                inner = Reading(network or reading.network, reading.rest[len(prefix) :])
                if all(inner != queued for queued, _ in queue):
                    queue.append((inner, depth + 1))
