"""Layers of one input as one product: the same numbers, never those of weights that are gone."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.networks import joint_linear
from headstart.networks.casting import StoredLinear
from headstart.networks.joint_linear import (
    join,
    joint_weights,
    project_each,
    project_together,
    split_joint,
)
from headstart.networks.state import Watch

X = torch.linspace(-2, 3, 2 * 5 * 6).view(2, 5, 6).double()


def layers(*widths: int, bias: bool = False) -> list[nn.Linear]:
    torch.manual_seed(0)
    made = [nn.Linear(6, width, bias=bias) for width in widths]
    return [layer.double().requires_grad_(False) for layer in made]


def joint(*widths: int, bias: bool = False) -> list[nn.Linear]:
    made = layers(*widths, bias=bias)
    join(made)
    return made


def expected(own: list[nn.Linear]) -> list[Tensor]:
    return [F.linear(X, layer.weight, layer.bias) for layer in own]


def products(body: Callable[[], object]) -> int:
    """How many matrix products one call makes of `project_each`'s layers."""
    with mock.patch.object(F, "linear", wraps=F.linear) as linear:
        body()
    return linear.call_count


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_gives_what_each_layer_gives(bias: bool) -> None:
    plain, own = layers(4, 8, 3, bias=bias), joint(4, 8, 3, bias=bias)
    assert (
        products(lambda: project_each(plain, X)) == 3
        and products(lambda: project_each(own, X)) == 1
    )
    for got, want in zip(project_each(own, X), project_each(plain, X), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_parameters_keep_their_values_and_become_views_of_one_buffer() -> None:
    plain, own = layers(4, 8, bias=True), joint(4, 8, bias=True)
    for one, other in zip(plain, own, strict=True):
        assert all(map(torch.equal, one.parameters(), other.parameters()))
    storages = {layer.weight.untyped_storage().data_ptr() for layer in own}
    assert len(storages) == 1
    assert own[0].weight.untyped_storage().nbytes() == 12 * 6 * 8, "there is no second copy"
    before = own[0].weight.data_ptr()
    join(own)
    assert own[0].weight.data_ptr() == before, "what is joined stays where it is"


def _write(own: list[nn.Linear]) -> None:
    own[1].weight.mul_(2.0)


def _other_data(own: list[nn.Linear]) -> None:
    own[1].weight.data = torch.ones_like(own[1].weight)


def _other_parameter(own: list[nn.Linear]) -> None:
    own[1].weight = nn.Parameter(torch.ones(8, 6, dtype=torch.float64), requires_grad=False)


def _assigned(own: list[nn.Linear]) -> None:
    own[0].load_state_dict({"weight": torch.ones(4, 6, dtype=torch.float64)}, assign=True)


def _copied_in(own: list[nn.Linear]) -> None:
    own[2].load_state_dict({"weight": torch.ones(3, 6, dtype=torch.float64)})


def _swapped(own: list[nn.Linear]) -> None:
    own[0].weight, own[2].weight = own[2].weight, own[0].weight
    for layer in own:
        layer.out_features = len(layer.weight)


def _moved(own: list[nn.Linear]) -> None:
    own[1].float().double()


CHANGES = [_write, _other_data, _other_parameter, _assigned, _copied_in, _swapped, _moved]


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_was_changed_in_any_way_is_never_stale(
    change: Callable[[list[nn.Linear]], None],
) -> None:
    own = joint(4, 8, 3)
    project_each(own, X)
    before, written = Watch().state(own), change in (_write, _copied_in)
    change(own)
    assert (joint_weights(own) is not None) == written
    assert Watch().state(own) != before, "and whoever kept what they gave sees that it is old"
    for got, want in zip(project_each(own, X), expected(own), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_neighbours_in_memory_are_not_enough() -> None:
    """Two tensors of two storages, or in another order, are no matrix."""
    own = joint(4, 4)
    assert joint_weights(own[::-1]) is None
    whole = torch.zeros(8, 6, dtype=torch.float64)
    own[0].weight.data, own[1].weight.data = whole[:4], whole[4:].clone()
    assert joint_weights(own) is None
    own[1].weight.data = whole[3:7]
    assert joint_weights(own) is None


def test_a_hook_or_a_method_of_its_own_is_called() -> None:
    for_hook, for_pre, for_own = joint(4, 8), joint(4, 8), joint(4, 8)
    seen: list[object] = []
    for_hook[0].register_forward_hook(lambda *_: seen.append("hook"))
    for_pre[1].register_forward_pre_hook(lambda *_: seen.append("pre"))
    under = for_own[0].forward
    for_own[0].forward = lambda input: (seen.append("own"), under(input))[1]
    for own in (for_hook, for_pre, for_own):
        assert Watch().state(own) is None
        project_each(own, X)
    assert seen == ["hook", "pre", "own"]


def test_a_layer_that_widens_its_weight_is_left_alone() -> None:
    own = layers(4, 8)
    own[1].__class__ = StoredLinear
    places = [layer.weight.data_ptr() for layer in own]
    join(own)
    assert [layer.weight.data_ptr() for layer in own] == places
    assert joint_weights(own) is None and Watch().state(own) is not None


def test_layers_of_other_dtypes_or_with_other_biases_are_not_joined() -> None:
    for own in ([*layers(4), layers(8)[0].float()], [*layers(4), *layers(8, bias=True)], []):
        join(own)
        assert not own or joint_weights(own) is None


def test_a_copy_of_the_layers_has_weights_of_its_own() -> None:
    own = joint(4, 8)
    other = deepcopy(own)
    own[1].weight.zero_()
    for got, want in zip(project_each(other, X), project_each(layers(4, 8), X), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_gradients_reach_every_layer() -> None:
    own = joint(4, 8)
    for layer in own:
        layer.requires_grad_(True)
    torch.cat([y.flatten() for y in project_each(own, X)]).sum().backward()
    for layer in own:
        assert layer.weight.grad is not None
        assert torch.allclose(layer.weight.grad, X.sum((0, 1)).expand_as(layer.weight))


@pytest.mark.parametrize("made", [layers, joint])
def test_what_is_put_together_comes_apart_again(made: Callable[..., list[nn.Linear]]) -> None:
    own = made(4, 8, 3)
    whole = project_together(own, X)
    assert len(whole) == len(X) and whole.ndim == (3 if made is joint else 2)
    for number, (got, want) in enumerate(zip(split_joint(own, whole), expected(own), strict=True)):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
        assert torch.equal(split_joint(own, whole[1:])[number], got[1:])
    if made is layers:
        assert all(map(torch.equal, split_joint(own, whole), project_each(own, X))), (
            "the bits of the layers"
        )


def test_a_compiler_is_not_asked_where_tensors_lie() -> None:
    own = joint(4, 8)
    with mock.patch.object(joint_linear, "is_compiling", return_value=True):
        assert joint_weights(own) is None
