"""The text encoder beside transformers' CLIPTextModel: the same weights, hidden states and ends.

In float64 both are the formula, so a difference is one of formula and not of rounding; in fewer
bits ours may be as far from float64 as theirs is.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from encoders import BOS_ID, EOS_ID, ONE, TWO, VOCABULARY, reference, tower
from torch import Tensor

from headstart.checkpoint.families import TextRule
from headstart.checkpoint.params import ClipParams
from headstart.networks.casting import keep_stored
from headstart.networks.tower import Tower

pytest.importorskip("transformers")

RAW = TextRule("quick_gelu", -1, normed=False, pad="eot")
A = VOCABULARY["a</w>"]
TEXTS = {
    "padded with the end": [[BOS_ID, A, A + 1, EOS_ID] + [EOS_ID] * 12, [BOS_ID] + [EOS_ID] * 15],
    "padded with zero": [[BOS_ID, A, A + 1, EOS_ID] + [0] * 12, [BOS_ID, EOS_ID] + [0] * 14],
    "as long as it goes": [[BOS_ID, *range(A, A + 14), EOS_ID], [BOS_ID, *[A] * 14, EOS_ID]],
    "shorter than the positions": [[BOS_ID, A, EOS_ID], [BOS_ID, A + 2, EOS_ID]],
}
ROUNDINGS = 2.0**-53 * 16 * 64
"""Of a relative difference in float64: at most 64 terms a sum, 16 sums one behind the other."""


def theirs(encoder: Tower, ids: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Hidden states, the last one normed, and the projected end."""
    model = reference(encoder).to(next(encoder.parameters()).dtype)
    with torch.no_grad():
        out: Any = model(ids, output_hidden_states=True)
    return out.hidden_states, out.last_hidden_state, out.text_embeds


def far(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("params", [ONE, TWO, replace(TWO, act="quick_gelu", projection=40)])
def test_every_hidden_state_and_the_end_are_those_of_transformers(
    params: ClipParams, text: str
) -> None:
    encoder = tower(params, RAW).double()
    ids = torch.tensor(TEXTS[text])
    states, normed, ends = theirs(encoder, ids)
    layers = params.layers
    for hidden in range(-layers - 1, layers + 1):
        context, pooled = encoder(ids, hidden)
        assert far(context, states[hidden]) <= ROUNDINGS
        assert (pooled is None) == (params.projection is None)
        assert pooled is None or far(pooled, ends) <= ROUNDINGS
    encoder.rule = RAW._replace(normed=True)
    assert far(encoder(ids)[0], normed) <= ROUNDINGS


def test_a_place_sees_itself_and_those_before_it() -> None:
    encoder = tower(TWO, RAW).double()
    ids = torch.tensor(TEXTS["as long as it goes"][:1])
    other = ids.clone()
    other[0, 9] += 1
    changed = (encoder(ids)[0] != encoder(other)[0]).any(dim=-1)[0]
    assert changed.tolist() == [False] * 9 + [True] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("params", [ONE, TWO])
def test_in_fewer_bits_it_is_as_near_to_float64_as_transformers(
    params: ClipParams, dtype: torch.dtype
) -> None:
    """To a unit in the last place more: their sums are the same, and may have another order."""
    encoder = tower(params, RAW).to(dtype)
    ids = torch.tensor(TEXTS["padded with the end"])
    exact, exact_normed, exact_ends = theirs(deepcopy(encoder).double(), ids)
    states, _, ends = theirs(encoder, ids)
    room = torch.finfo(dtype).eps
    for hidden in (-1, -2):
        context, pooled = encoder(ids, hidden)
        assert context.dtype == dtype
        assert far(context, exact[hidden]) <= far(states[hidden], exact[hidden]) + room
        assert pooled is None or far(pooled, exact_ends) <= far(ends, exact_ends) + room
    assert far(exact[-1], exact_normed) > 0.1, "the norm is no small thing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_weights_compute_as_float32_ones_do_to_the_bit(dtype: torch.dtype) -> None:
    half = tower(TWO, RAW).to(dtype)
    wide = deepcopy(half).float()
    ids = torch.tensor(TEXTS["padded with zero"])
    for got, want in zip(keep_stored(half)(ids), wide(ids), strict=True):
        assert torch.equal(got, want)
    assert far(wide(ids)[1], theirs(wide, ids)[2]) <= 64 * torch.finfo(torch.float32).eps
