"""Devices other than CUDA run eagerly, without float64; bad options are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_memory_residency import PLAN
from tiny_pair import tiny_engine
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import headstart as hs
from headstart import noise
from headstart.commands.values import read_device
from headstart.diversify.particles import repulsion
from headstart.engine.devices import choose_device, choose_devices
from headstart.noise import OnHost, Philox, has_float64, noise_on
from headstart.runner.runner import choose_runner

MPS = torch.device("mps")


class WithoutFloat64(TorchDispatchMode):
    """A device that refuses float64 as Apple's does, besides what is drawn on the host."""

    host = 0
    kinds: tuple[str, ...] = ("cpu",)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            is_double = isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64
            if is_double and leaf.device.type in self.kinds and not self.host:
                raise TypeError(f"{func}: the MPS framework doesn't support float64")
        return result


@pytest.mark.parametrize("diversify", [(), ["cads:0.5", "embedding-noise:0.2", "pink:1"]])
def test_a_run_makes_float64_of_nothing_but_its_noise(
    monkeypatch: pytest.MonkeyPatch, diversify: Any
) -> None:
    """On a CPU that refuses it as such a device would; the bits are those of any other run."""
    engine = tiny_engine("sdxl")
    want = engine.sample("a cat", plan=PLAN, seeds=[1, 2], diversify=diversify)
    refusing = WithoutFloat64()

    def on_host(draw: Any) -> Any:
        def drawn(*args: Any) -> Any:
            refusing.host += 1
            try:
                return draw(*args)
            finally:
                refusing.host -= 1

        return drawn

    with refusing, pytest.raises(TypeError, match="float64"):
        engine.sample("a cat", plan=PLAN, seeds=[1, 2], diversify=diversify)
    monkeypatch.setattr(noise, "has_float64", lambda _: False)
    monkeypatch.setattr(OnHost, "initial", on_host(OnHost.initial))
    monkeypatch.setattr(OnHost, "step", on_host(OnHost.step))
    with refusing:
        got = engine.sample("a cat", plan=PLAN, seeds=[1, 2], diversify=diversify)
    assert torch.equal(got.rgb, want.rgb)


def test_images_that_push_each_other_apart_do_so_without_float64_of_the_device() -> None:
    with FakeTensorMode():
        x = torch.empty(3, 4, 8, 8, device=MPS)
        with WithoutFloat64() as refusing:
            refusing.kinds = ("mps",)
            push = repulsion(x)
    assert (push.device.type, push.dtype, push.shape) == ("mps", torch.float32, x.shape)


def test_a_run_that_is_batched_draws_on_the_host_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "has_float64", lambda _: False)
    assert isinstance(tiny_engine("sd15").begin("a cat", plan=PLAN, seeds=1).noise, OnHost)


def test_noise_of_the_host_is_the_same_to_the_bit_and_for_such_devices_alone() -> None:
    source, cpu = Philox([3, 4]), torch.device("cpu")
    assert noise_on(cpu, source) is source
    noise = noise_on(MPS, source)
    assert isinstance(noise, OnHost) and len(noise) == 2
    for actual, other in zip(
        (noise.initial((4, 8), cpu), noise.step(2, (4, 8), cpu)),
        (source.initial((4, 8), cpu), source.step(2, (4, 8), cpu)),
        strict=True,
    ):
        assert torch.equal(actual, other)


def test_mps_and_some_of_xpu_have_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_float64(MPS) and has_float64(torch.device("cuda", 0))
    for answer in (True, False):
        properties = type("Properties", (), {"has_fp64": answer})()
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _, value=properties: value)
        assert has_float64(torch.device("xpu", 0)) is answer


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_they_run_eagerly_and_one_that_is_not_there_is_refused_in_one_line(kind: str) -> None:
    assert choose_runner("auto", kind).name == "eager"
    with pytest.raises(hs.HeadstartError, match="exists on cuda alone"):
        choose_runner("graph", kind)
    if not getattr(torch, kind).is_available():
        with pytest.raises(hs.InputError, match=f"device '{kind}' cannot be used") as caught:
            choose_device(kind)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"base": "cpu"}, "one for each of base, distilled"),
        ({"base": "cpu", "distilled": "meta"}, "'meta' cannot be used: its tensors have no values"),
        ("meta", "'meta' cannot be used"),
        (0, "device 0 cannot be used"),
        (None, "device None cannot be used"),
        ({"base": "cpu", "distilled": "abacus"}, "'abacus' cannot be used"),
    ],
)
def test_devices_that_do_not_go_together_are_refused_in_one_line(option: Any, message: str) -> None:
    with pytest.raises(hs.InputError, match=message) as caught:
        choose_devices(option, ("base", "distilled"))
    assert "\n" not in str(caught.value)


def test_a_device_for_each_model_may_be_typed() -> None:
    assert read_device("cuda:1") == "cuda:1"
    assert read_device("base=cuda:0,distilled=cuda:1") == {"base": "cuda:0", "distilled": "cuda:1"}
    for typed in ("base=", "base=cpu,base=cuda"):
        with pytest.raises(hs.InputError, match=f"device '{typed}': expected auto"):
            read_device(typed)


@pytest.mark.parametrize("option", [torch.device("cpu"), {"base": "cpu", "distilled": "cpu:0"}])
def test_a_device_may_be_one_of_torch_and_one_twice(option: Any) -> None:
    assert set(choose_devices(option, ("base", "distilled")).values()) == {torch.device("cpu")}


def test_two_kinds_of_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.engine.devices.choose_device", torch.device)
    with pytest.raises(hs.InputError, match="one kind of device"):
        choose_devices({"base": "cpu", "distilled": "cuda:0"}, ("base", "distilled"))
