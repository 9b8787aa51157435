"""The text encoder by itself: which layers run, what it refuses, and whose learned vectors."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from encoders import BOS_ID, EOS_ID, ONE, TWO, tower
from torch import Tensor, nn

from headstart.checkpoint import blueprint
from headstart.checkpoint.families import FAMILIES, TextRule
from headstart.checkpoint.params import ClipParams
from headstart.errors import InputError
from headstart.networks.tower import Tower

FIRST, SECOND = FAMILIES["sdxl"].text
IDS = torch.tensor([[BOS_ID, 3, 5, EOS_ID, EOS_ID], [BOS_ID, EOS_ID, EOS_ID, EOS_ID, EOS_ID]])


@contextmanager
def layers_run(encoder: Tower) -> Iterator[list[str]]:
    """The layers and norms that run inside, by the end of their name."""
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in encoder.named_modules()
        if name.rpartition(".layers.")[2].isdecimal() or name.endswith("final_layer_norm")
    ]
    names = {name: name.rpartition(".")[2] for name, _ in encoder.named_modules()}
    yield ran
    ran[:] = [names[name] for name in ran]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("params", "rule", "hidden", "want"),
    [
        (ONE, FAMILIES["sd15"].text[0], None, ["0", "1", "2", "final_layer_norm"]),
        (ONE, FAMILIES["sd15"].text[0], -2, ["0", "1", "final_layer_norm"]),
        (ONE, FIRST, None, ["0", "1"]),
        (TWO, SECOND, None, ["0", "1", "2", "final_layer_norm"]),
        (TWO, SECOND, -3, ["0", "1", "2", "final_layer_norm"]),
        (TWO, SECOND._replace(normed=True), -1, ["0", "1", "2", "final_layer_norm"]),
    ],
)
def test_a_layer_runs_once_and_only_where_something_reads_it(
    params: ClipParams, rule: TextRule, hidden: int | None, want: list[str]
) -> None:
    encoder = tower(params, rule)
    with layers_run(encoder) as ran:
        encoder(IDS, hidden)
    assert ran == want


def test_a_pooled_text_has_the_same_bits_whichever_state_is_the_context() -> None:
    encoder = tower(TWO, SECOND)
    pooled = [encoder(IDS, hidden)[1] for hidden in (-1, -2, -3, -4)]
    assert all(torch.equal(pooled[0], other) for other in pooled)


def test_its_tensors_are_those_of_the_blueprint_and_it_has_no_buffer() -> None:
    for params, rule in ((ONE, FIRST), (TWO, SECOND)):
        encoder = tower(params, rule)
        shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
        assert shapes == blueprint.clip(params)
        assert not list(encoder.buffers())
        linear = [name for name, layer in encoder.named_modules() if type(layer) is nn.Linear]
        assert len(linear) == 6 * params.layers + (params.projection is not None)


@pytest.mark.parametrize("ids", [IDS[0], IDS[None], torch.zeros(1, 17, dtype=torch.int64)])
def test_ids_that_have_no_places_are_refused(ids: Tensor) -> None:
    with pytest.raises(InputError, match=r"ids: expected \[B, L\] with L at most 16, got \["):
        tower(ONE, FIRST)(ids)


def test_a_learned_vector_stands_where_its_id_does_and_takes_its_gradient() -> None:
    encoder, learned = tower(ONE, FIRST), torch.randn(2, 32)
    table = encoder.text_model.embeddings.token_embedding.weight
    learned[1] = table[5]
    ids = IDS.clone()
    ids[0, 2] = -2
    assert torch.equal(encoder(ids, token_vectors=learned)[0], encoder(IDS)[0])
    assert torch.equal(encoder(IDS, token_vectors=torch.empty(0, 32))[0], encoder(IDS)[0])
    learned.requires_grad_()
    encoder(ids, token_vectors=learned)[0].sum().backward()
    assert learned.grad is not None
    assert learned.grad[0].eq(0).all() and learned.grad[1].ne(0).any()


def _copied(encoder: Tower) -> Any:
    return deepcopy(encoder)


def _pickled(encoder: Tower) -> Any:
    return pickle.loads(pickle.dumps(encoder))


@pytest.mark.parametrize("again", [_copied, _pickled])
def test_a_copy_reads_as_it_does(again: Any) -> None:
    encoder = tower(TWO, SECOND)
    for got, want in zip(again(encoder)(IDS), encoder(IDS), strict=True):
        assert torch.equal(got, want)
