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
    linears = [nn.Linear(6, width, bias=bias) for width in widths]
    return [layer.double().requires_grad_(False) for layer in linears]


def joint(*widths: int, bias: bool = False) -> list[nn.Linear]:
    linears = layers(*widths, bias=bias)
    join(linears)
    return linears


def expected(linears: list[nn.Linear]) -> list[Tensor]:
    return [F.linear(X, layer.weight, layer.bias) for layer in linears]


def products(body: Callable[[], object]) -> int:
    """How many matrix products one call makes of `project_each`'s layers."""
    with mock.patch.object(F, "linear", wraps=F.linear) as linear:
        body()
    return linear.call_count


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_gives_what_each_layer_gives(bias: bool) -> None:
    plain, joined = layers(4, 8, 3, bias=bias), joint(4, 8, 3, bias=bias)
    assert (
        products(lambda: project_each(plain, X)) == 3
        and products(lambda: project_each(joined, X)) == 1
    )
    for got, want in zip(project_each(joined, X), project_each(plain, X), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_parameters_keep_their_values_and_become_views_of_one_buffer() -> None:
    plain, joined = layers(4, 8, bias=True), joint(4, 8, bias=True)
    for one, other in zip(plain, joined, strict=True):
        assert all(map(torch.equal, one.parameters(), other.parameters()))
    storages = {layer.weight.untyped_storage().data_ptr() for layer in joined}
    assert len(storages) == 1
    assert joined[0].weight.untyped_storage().nbytes() == 12 * 6 * 8, "there is no second copy"
    before = joined[0].weight.data_ptr()
    join(joined)
    assert joined[0].weight.data_ptr() == before, "what is joined stays where it is"


def _write(linears: list[nn.Linear]) -> None:
    linears[1].weight.mul_(2.0)


def _other_data(linears: list[nn.Linear]) -> None:
    linears[1].weight.data = torch.ones_like(linears[1].weight)


def _other_parameter(linears: list[nn.Linear]) -> None:
    linears[1].weight = nn.Parameter(torch.ones(8, 6, dtype=torch.float64), requires_grad=False)


def _assigned(linears: list[nn.Linear]) -> None:
    linears[0].load_state_dict({"weight": torch.ones(4, 6, dtype=torch.float64)}, assign=True)


def _copied_in(linears: list[nn.Linear]) -> None:
    linears[2].load_state_dict({"weight": torch.ones(3, 6, dtype=torch.float64)})


def _swapped(linears: list[nn.Linear]) -> None:
    linears[0].weight, linears[2].weight = linears[2].weight, linears[0].weight
    for layer in linears:
        layer.out_features = len(layer.weight)


def _moved(linears: list[nn.Linear]) -> None:
    linears[1].float().double()


CHANGES = [_write, _other_data, _other_parameter, _assigned, _copied_in, _swapped, _moved]


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_was_changed_in_any_way_is_never_stale(
    change: Callable[[list[nn.Linear]], None],
) -> None:
    joined = joint(4, 8, 3)
    project_each(joined, X)
    before, written = Watch().state(joined), change in (_write, _copied_in)
    change(joined)
    assert (joint_weights(joined) is not None) == written
    assert Watch().state(joined) != before, "and whoever kept what they gave sees that it is old"
    for got, want in zip(project_each(joined, X), expected(joined), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_neighbours_in_memory_are_not_enough() -> None:
    """Two tensors of two storages, or in another order, are no matrix."""
    joined = joint(4, 4)
    assert joint_weights(joined[::-1]) is None
    whole = torch.zeros(8, 6, dtype=torch.float64)
    joined[0].weight.data, joined[1].weight.data = whole[:4], whole[4:].clone()
    assert joint_weights(joined) is None
    joined[1].weight.data = whole[3:7]
    assert joint_weights(joined) is None


def test_a_hook_or_a_method_of_its_own_is_called() -> None:
    for_hook, for_pre, for_change = joint(4, 8), joint(4, 8), joint(4, 8)
    calls: list[object] = []
    for_hook[0].register_forward_hook(lambda *_: calls.append("hook"))
    for_pre[1].register_forward_pre_hook(lambda *_: calls.append("pre"))
    under = for_change[0].forward
    for_change[0].forward = lambda input: (calls.append("own"), under(input))[1]
    for joined in (for_hook, for_pre, for_change):
        assert Watch().state(joined) is None
        project_each(joined, X)
    assert calls == ["hook", "pre", "own"]


def test_a_layer_that_widens_its_weight_is_left_alone() -> None:
    linears = layers(4, 8)
    linears[1].__class__ = StoredLinear
    addresses = [layer.weight.data_ptr() for layer in linears]
    join(linears)
    assert [layer.weight.data_ptr() for layer in linears] == addresses
    assert joint_weights(linears) is None and Watch().state(linears) is not None


def test_layers_of_other_dtypes_or_with_other_biases_are_not_joined() -> None:
    for linears in ([*layers(4), layers(8)[0].float()], [*layers(4), *layers(8, bias=True)], []):
        join(linears)
        assert not linears or joint_weights(linears) is None


def test_a_copy_of_the_layers_has_weights_of_its_own() -> None:
    joined = joint(4, 8)
    other = deepcopy(joined)
    joined[1].weight.zero_()
    for got, want in zip(project_each(other, X), project_each(layers(4, 8), X), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_gradients_reach_every_layer() -> None:
    joined = joint(4, 8)
    for layer in joined:
        layer.requires_grad_(True)
    torch.cat([y.flatten() for y in project_each(joined, X)]).sum().backward()
    for layer in joined:
        assert layer.weight.grad is not None
        assert torch.allclose(layer.weight.grad, X.sum((0, 1)).expand_as(layer.weight))


@pytest.mark.parametrize("made", [layers, joint])
def test_what_is_put_together_comes_apart_again(made: Callable[..., list[nn.Linear]]) -> None:
    linears = made(4, 8, 3)
    whole = project_together(linears, X)
    assert len(whole) == len(X) and whole.ndim == (3 if made is joint else 2)
    for number, (got, want) in enumerate(
        zip(split_joint(linears, whole), expected(linears), strict=True)
    ):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
        assert torch.equal(split_joint(linears, whole[1:])[number], got[1:])
    if made is layers:
        assert all(map(torch.equal, split_joint(linears, whole), project_each(linears, X))), (
            "the bits of the layers"
        )


def test_a_compiler_is_not_asked_where_tensors_lie() -> None:
    joined = joint(4, 8)
    with mock.patch.object(joint_linear, "is_compiling", return_value=True):
        assert joint_weights(joined) is None
