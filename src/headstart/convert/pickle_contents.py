"""Pickles that are no table of named tensors: names for their tensors, or an error.

[up0, down0, up1, ...] -> unet:N:up, unet:N:down     a list that is a whole LoRA
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn, cast

from torch import Tensor

from headstart.errors import CheckpointError

_STATES: tuple[tuple[str, frozenset[str]], ...] = (
    ("an optimizer", frozenset({"state", "param_groups"})),
    ("a learning rate's schedule", frozenset({"last_epoch", "_step_count"})),
    ("a gradient scaler", frozenset({"growth_factor", "_growth_tracker"})),
    ("random number generators", frozenset({"random_state", "torch_manual_seed"})),  # accelerate
    ("random number generators", frozenset({"python", "numpy", "cpu"})),  # transformers
)
"""Trainers' files beside the weights, by keys that such a table has."""

_ATTENTION_LAYERS: Mapping[int, int] = {768: 48, 1024: 92}
"""Width of a text encoder -> its attention layers: 4 in each of 12 (SD 1) or 23 (SD 2)."""
_UNET_LAYERS = (128, 144)
"""16 blocks of attn1 and attn2, without and with ff: SD 1 and 2."""
_CONTEXTS = frozenset({768, 1024})
_STAGES = frozenset({"emb", "emb2", "clip_l", "clip_g"})
"""Names of tokens; XL-Textual-Inversion saves a list with one for each stage."""
_POSITIONS = 77


def check_weights(table: Mapping[object, object]) -> None:
    """Raise CheckpointError for the state of a trainer, and for nothing at all."""
    if not table:
        raise CheckpointError("it holds nothing")
    for state, names in _STATES:
        if names <= table.keys():
            raise CheckpointError(
                f"it is the state of {state}, with which a training goes on, and no weights: give "
                "the file of weights that lies beside it"
            )


def with_names(document: object, left_out: list[str]) -> object:
    """The document as a table, if it is tensors without names or a list of stages.

    Raises CheckpointError if the tensors cannot be identified.
    """
    if isinstance(document, Tensor):
        return _prompt(document)
    if not isinstance(document, list | tuple):
        return document
    items = cast("Sequence[object]", document)
    if not items:
        raise CheckpointError("it holds nothing")
    tables = [cast("Mapping[object, object]", item) for item in items if isinstance(item, Mapping)]
    if len(tables) == len(items) and all(_STAGES.issuperset(table) for table in tables):
        if len(items) > 1:
            left_out.append(f"0 to {len(items) - 2}: earlier stages of the last token")
        return items[-1]
    tensors = [item for item in items if isinstance(item, Tensor)]
    if len(tensors) < len(items):
        return items
    return _lora(tensors) or _nameless(f"{len(tensors)} tensors", tensors)


def _prompt(tensor: Tensor) -> dict[str, Tensor]:
    """An encoded prompt [77, D] or [1, 77, D] is called `cond`, as `Engine.sample` calls it."""
    shape = tuple(tensor.shape)
    if len(shape) in (2, 3) and shape[-2] == _POSITIONS and shape[:-2] in ((), (1,)):
        return {"cond": tensor}
    return _nameless("one tensor", [tensor])


def _nameless(title: str, tensors: Sequence[Tensor]) -> NoReturn:
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors[:3])
    more = ", ..." if len(tensors) > 3 else ""
    raise CheckpointError(
        f"it is {title} without a name ({shapes}{more}), so their use is unknown: vectors of "
        "CLIP's image space and statistics are saved so. A textual inversion has its token beside "
        "it, and a network has names: give such a file"
    )


def _lora(tensors: Sequence[Tensor]) -> dict[str, Tensor] | None:
    """cloneofsimo's list of a LoRA: [o, r] and [r, i] in turn, in the order of the layers.

    github.com/cloneofsimo/lora, lora.py, `save_lora_weight`. None for any other list.
    """
    pairs = list(zip(tensors[::2], tensors[1::2], strict=False))
    if len(tensors) % 2 or any(up.ndim != 2 or down.ndim != 2 for up, down in pairs):
        return None
    if any(up.shape[1] != down.shape[0] for up, down in pairs):
        return None
    sides = [(up.shape[0], down.shape[1]) for up, down in pairs]
    widths = {width for side in sides for width in side}
    if len(widths) == 1 and _ATTENTION_LAYERS.get(*widths) == len(pairs):
        network = "text_encoder"
    elif len(pairs) in _UNET_LAYERS and any(width in _CONTEXTS for _, width in sides):
        network = "unet"
    else:
        return None
    tensors_of = {f"{network}:{n}:up": up for n, (up, _) in enumerate(pairs)}
    return tensors_of | {f"{network}:{n}:down": down for n, (_, down) in enumerate(pairs)}
