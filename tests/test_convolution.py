"""Convolutions of small images and their enlarging: torch's numbers, in less time."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence.open_tape import poison
from headstart.adapters.layers import Weights, run_on
from headstart.networks import convolution
from headstart.networks.casting import keep_stored
from headstart.networks.convolution import Conv2d, nearest
from headstart.networks.numbers import sinusoid
from headstart_kernels.dispatch import has_c
from headstart_kernels.recording.tape import Tape

in_c = pytest.mark.skipif(not has_c(multiplies=True), reason="needs C with fast products")
FORMS: dict[str, Callable[[type[nn.Conv2d]], nn.Conv2d]] = {
    "3x3": lambda kind: kind(6, 5, 3, padding=1),
    "no bias": lambda kind: kind(6, 5, 3, padding=1, bias=False),
    "stride 2": lambda kind: kind(6, 5, 3, padding=1, stride=2),
    "another stride": lambda kind: kind(6, 5, 3, padding=1, stride=(2, 1)),
    "padded by whoever calls": lambda kind: kind(6, 5, 3, stride=2),
    "1x1": lambda kind: kind(6, 5, 1),
    "groups": lambda kind: kind(6, 4, 3, padding=1, groups=2),
    "dilated": lambda kind: kind(6, 5, 3, padding=1, dilation=2),
    "the same size": lambda kind: kind(6, 5, 3, padding="same"),
    "reflecting": lambda kind: kind(6, 5, 3, padding=1, padding_mode="reflect"),
}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often C was called."""
    original, calls = convolution.small_convolution, list[int]()

    def call(*args: Any) -> Tensor | None:
        output = original(*args)
        calls.extend([1] if output is not None else [])
        return output

    monkeypatch.setattr(convolution, "small_convolution", call)
    return calls


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_convolution_is_torchs(form: str) -> None:
    torch.manual_seed(0)
    layer, other = FORMS[form](Conv2d), FORMS[form](nn.Conv2d)
    other.load_state_dict(layer.state_dict())
    for x in (torch.randn(1, 6, 8, 9), torch.randn(2, 6, 8, 8), torch.randn(6, 8, 8)):
        with torch.no_grad():
            got, expected = layer(x), other(x)
            magnitude = 6 * 9 * layer.weight.abs().max() * x.abs().max()
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= 2 * 54 * 2.0**-24 * float(magnitude)


@in_c
def test_layers_adapters_and_stored_weights_have_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, layer, x = counted(monkeypatch), Conv2d(6, 5, 3, padding=1), torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        output = layer(x)
        again = run_on(layer, x, Weights(layer.weight, layer.bias))
        assert torch.equal(output, again) and len(calls) == 2
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), output)
        assert len(calls) == 4
        stored = keep_stored(nn.Sequential(copy.deepcopy(layer).half()))
        stored(x)
    assert len(calls) == 5


def test_a_gradient_is_recorded_and_hooks_are_called() -> None:
    layer, x, outputs = Conv2d(6, 5, 3, padding=1), torch.randn(1, 6, 8, 8), list[Tensor]()
    handle: Any = layer.register_forward_hook
    handle(lambda module, inputs, output: outputs.append(output))
    layer(x).sum().backward()
    assert layer.weight.grad is not None and len(outputs) == 1
    with torch.inference_mode():
        assert torch.equal(layer(x), outputs[1])


def test_weights_written_in_place_are_seen() -> None:
    layer, x = Conv2d(6, 5, 3, padding=1, bias=False), torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        assert torch.equal(layer(x), 2 * before)


def test_a_wrong_image_has_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        Conv2d(6, 5, 3, padding=1)(torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("size", [(10, 14), (9, 13), (5, 7), (20, 28)])
def test_the_nearest_pixel_is_torchs(size: tuple[int, int]) -> None:
    image = torch.randn(2, 3, 5, 7)
    large = torch.randn(1, 1, 1, (1 << 18) + 1)
    for x in (image, image.contiguous(memory_format=torch.channels_last), image.half()):
        assert torch.equal(nearest(x, size), F.interpolate(x, size, mode="nearest"))
    double = (2, 2 * large.shape[3])
    assert torch.equal(nearest(large, double), F.interpolate(large, double, mode="nearest"))


def test_enlarging_has_its_gradient() -> None:
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    nearest(x, (6, 6)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 4))


def test_frequencies_that_are_kept_are_those_that_are_made_and_no_recordings() -> None:
    values = torch.tensor([999.0, 3.0])
    tape = Tape()
    with tape.recording():
        embedding = sinusoid(values, 34)
    again = sinusoid(values, 34)
    poison(tape)
    tape.replay()
    assert torch.equal(embedding, again) and torch.equal(sinusoid(values, 34), again)
    with torch.inference_mode():
        sinusoid(values, 38)
    assert sinusoid(values.requires_grad_(), 38).requires_grad
