"""A graph's look at what it is bound to: what is noticed at once, what late, at what cost."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from headstart.runner.binding import FULL_CHECK, Binding


def network() -> Any:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))


def test_a_network_that_is_left_alone_holds() -> None:
    """Also one whose weights are changed in place."""
    one = network()
    bound = Binding([one])
    one[0].weight.data.mul_(2)
    one.load_state_dict(network().state_dict())
    assert all(bound.is_valid() for _ in range(3 * FULL_CHECK)) and bound.is_valid(fully=True)


def replaced(one: Any) -> None:
    one[1][0].weight = nn.Parameter(torch.zeros(4, 4, 3, 3))


def data_replaced(one: Any) -> None:
    one[1][0].bias.data = one[1][0].bias.data.clone()


def swapped(one: Any) -> None:
    torch.utils.swap_tensors(one[0].bias, nn.Parameter(torch.zeros(4)))


def set_elsewhere(one: Any) -> None:
    with torch.no_grad():
        one[0].weight.set_(torch.zeros(4, 4))


def converted(one: Any) -> None:
    one.double()


def moved(one: Any) -> None:
    one.to("meta")


def part_converted(one: Any) -> None:
    one[1][1].half()


def laid_out(one: Any) -> None:
    one[1].to(memory_format=torch.channels_last)


def assigned(one: Any) -> None:
    one.load_state_dict(network().state_dict(), assign=True)


def buffer_set(one: Any) -> None:
    one[1][1].running_mean = torch.zeros(4)


def buffer_gone(one: Any) -> None:
    one[1][1].running_mean = None


def registered(one: Any) -> None:
    one[0].register_parameter("extra", nn.Parameter(torch.zeros(1)))


def module_set(one: Any) -> None:
    one[1][0] = nn.Conv2d(4, 4, 3)


def module_gone(one: Any) -> None:
    one[1].relu = nn.ReLU()


def grown(one: Any) -> None:
    one.append(nn.Identity())


def hooked(one: Any) -> None:
    one[1][0].register_forward_hook(lambda layer, args, y: y * 2)


def hooked_before(one: Any) -> None:
    one[0].register_forward_pre_hook(lambda layer, args: args)


AT_ONCE = [
    replaced, data_replaced, swapped, set_elsewhere, converted, moved, part_converted, laid_out,
    assigned, buffer_set, buffer_gone, registered, module_set, module_gone, grown, hooked,
    hooked_before,
]  # fmt: skip


@pytest.mark.parametrize("change", AT_ONCE)
def test_what_users_do_to_a_module_is_noticed_at_once(change: Callable[[Any], None]) -> None:
    one = network()
    bound = Binding([one])
    assert bound.is_valid()
    change(one)
    assert not bound.is_valid()


def test_a_hook_that_goes_is_noticed_at_once() -> None:
    one = network()
    handle = one[0].register_forward_hook(lambda layer, args, y: y * 2)
    bound = Binding([one])
    assert bound.is_valid()
    handle.remove()
    assert not bound.is_valid()


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook"])
def test_a_hook_on_all_modules_is_noticed_when_it_comes_and_when_it_goes(kind: str) -> None:
    one = network()
    bound = Binding([one])
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda *_: None)
    try:
        assert not bound.is_valid(), "a recording does not run it"
        again = Binding([one])
    finally:
        handle.remove()
    assert bound.is_valid(fully=True) and not again.is_valid(fully=True)


def test_a_hook_whose_doing_is_in_the_key_may_come_and_go() -> None:
    def hook(layer: Any, args: Any, y: Any) -> Any:
        return y

    hook.in_key = True  # type: ignore[attr-defined]
    one = network()
    bound = Binding([one])
    handle = one[0].register_forward_hook(hook)
    assert bound.is_valid()
    handle.remove()
    assert bound.is_valid(fully=True)


def written_past_torch(one: Any) -> None:
    one[1][0]._parameters["weight"] = nn.Parameter(torch.zeros(4, 4, 3, 3))


def module_written_past_torch(one: Any) -> None:
    one._modules["0"] = nn.Linear(4, 4)


def deleted(one: Any) -> None:
    del one[1][0].bias


def bias_gone(one: Any) -> None:
    one[1][0].bias = None


def flipped(one: Any) -> None:
    one[0].weight.data = one[0].weight.data.t()


def forward_replaced(one: Any) -> None:
    under = one[0].forward
    one[0].forward = lambda x: 2 * under(x)


LATE = [
    written_past_torch, module_written_past_torch, deleted, bias_gone, flipped, forward_replaced,
]  # fmt: skip


@pytest.mark.parametrize("change", LATE)
@pytest.mark.parametrize("cause", ["launches", "prepare", "another module"])
def test_the_rest_is_noticed_late(change: Callable[[Any], None], cause: str) -> None:
    """Within so many launches, when it is prepared, or with any registration in the process."""
    one = network()
    bound = Binding([one])
    change(one)
    if cause == "launches":
        assert not all(bound.is_valid() for _ in range(FULL_CHECK))
    elif cause == "prepare":
        assert not bound.is_valid(fully=True)
    else:
        nn.Linear(1, 1)
        assert not bound.is_valid()


def test_a_module_made_where_another_was_is_not_taken_for_it() -> None:
    """Python's allocator likes to hand out the address of what has just gone."""
    one = nn.Sequential(nn.Identity())
    bound, address = Binding([one]), id(one[0])
    one._modules["0"] = None
    others: list[nn.Module] = []
    while len(others) < 1000 and (not others or id(others[-1]) != address):
        others.append(nn.Identity())
    if id(others[-1]) != address:
        pytest.skip("Python used other memory")
    one._modules["0"] = others[-1]
    assert not bound.is_valid(fully=True)


def test_a_network_that_its_own_hook_holds_is_freed() -> None:
    """As adapters' hooks do: else a network that once had some would never give its memory back."""
    one = network()
    one.register_forward_hook(lambda layer, args, y, module=one: y)
    bound, gone = Binding([one]), weakref.ref(one)
    assert bound.is_valid()
    del one
    gc.collect()
    assert gone() is None and not bound.is_valid(fully=True)


def test_a_launch_looks_at_no_table_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 layers the weights are asked for their addresses, and nothing else."""
    one = nn.Sequential(*(nn.Linear(1, 1, device="meta") for _ in range(1000)))
    bound = Binding([one])
    fully: list[Binding] = []
    look = Binding._full_state
    monkeypatch.setattr(
        Binding, "_full_state", lambda binding: fully.append(binding) or look(binding)
    )
    assert all(bound.is_valid() for _ in range(FULL_CHECK - 1)) and not fully
    assert bound.is_valid() and bound.is_valid(fully=True) and len(fully) == 2
