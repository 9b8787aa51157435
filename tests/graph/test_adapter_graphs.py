"""Adapters and graphs: strengths are copies, swaps in place are seen, what moved is captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stand import SHAPE, Emulated, Stand, hybrid
from torch import Tensor, nn

from headstart.adapters.adapters import AdapterSet
from headstart.interfaces import Conditioning
from headstart.networks.fusion import fusion
from headstart.noise import Philox
from headstart.runner.runner import EagerRunner
from headstart.sampler import sample

T = torch.tensor
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(network, name, rank, seed, part) -> a LoRA file in kohya's names, alpha = rank."""

    def write(
        network: nn.Module, name: str = "age", rank: int = 4, seed: int = 0, part: str = "attn"
    ) -> Path:
        draw, tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
        for path, layer in network.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and part in path:
                key, weight = "lora_unet_" + path.replace(".", "_"), layer.weight
                down = 0.3 * torch.randn(rank, *weight.shape[1:], generator=draw)
                up = 0.3 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=draw)
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                tensors[f"{key}.alpha"] = T(float(rank))
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    return write


def adapters(stand: Stand) -> AdapterSet:
    return AdapterSet(stand.denoisers)


def cond_of(stand: Stand, *strengths: tuple[float, ...], seed: int = 0) -> Conditioning:
    """The conditioning of a sample for each of `strengths`, which are by adapter."""
    return replace(stand.words(len(strengths), seed), strengths=T(strengths))


def run(stand: Stand, cond: Conditioning, model: str = "base") -> Tensor:
    """F by the graph, which must have every bit of F by Python."""
    x, t = stand.latent(len(cond)), T([7] * len(cond))
    got = stand.runner(model)(x, t, cond)
    assert torch.equal(got, EagerRunner(stand.denoisers[model])(x, t, cond))
    return got


def test_a_strength_is_a_copy_also_one_for_each_sample(stand: Stand, make: Make) -> None:
    adapters(stand).attach(make(stand.denoisers["base"], part=""))
    each = [((1.0,), (1.0,)), ((-0.5,), (2.0,)), ((0.0,), (0.0,)), ((0.0,), (1.0,))]
    got = [run(stand, cond_of(stand, *strengths)) for strengths in each]
    assert stand.site.captures == 1
    assert not any(torch.equal(got[0], other) for other in got[1:3])
    assert torch.equal(got[0][1], got[3][1]) and torch.equal(got[2][0], got[3][0])


@pytest.mark.parametrize("rank", [4, 2])
def test_a_swap_for_one_of_no_larger_rank_is_seen_by_the_graph_there_is(
    stand: Stand, make: Make, rank: int
) -> None:
    adapter_set, network = adapters(stand), stand.denoisers["base"]
    adapter_set.attach(make(network), name="age")
    before = run(stand, cond_of(stand, (1.0,)))
    adapter_set.attach(make(network, "other", rank, seed=1), name="age", replace=True)
    after = run(stand, cond_of(stand, (1.0,)))
    assert stand.site.captures == 1 and not torch.equal(before, after)


def test_a_larger_rank_and_more_layers_are_captured_anew(stand: Stand, make: Make) -> None:
    adapter_set, network = adapters(stand), stand.denoisers["base"]
    adapter_set.attach(make(network), name="age")
    run(stand, cond_of(stand, (1.0,)))
    adapter_set.attach(make(network, "large", 8, seed=1), name="age", replace=True)
    run(stand, cond_of(stand, (1.0,)))
    assert (stand.site.captures, stand.site.graph_count) == (2, 1)
    adapter_set.attach(make(network, "wide", 8, seed=2, part=""), name="age", replace=True)
    run(stand, cond_of(stand, (1.0,)))
    assert (stand.site.captures, stand.site.graph_count) == (3, 1)


def test_detaching_gives_back_the_graph_from_before(stand: Stand, make: Make) -> None:
    adapter_set = adapters(stand)
    before = run(stand, stand.words(1))
    adapter_set.attach(make(stand.denoisers["base"]))
    assert not torch.equal(run(stand, cond_of(stand, (1.0,))), before)
    adapter_set.detach("age")
    assert torch.equal(run(stand, stand.words(1)), before)
    assert stand.site.captures == 2
    adapter_set.attach(make(stand.denoisers["base"], seed=3))
    run(stand, cond_of(stand, (1.0,)))


def test_a_column_that_became_another_adapters_is_captured_anew(stand: Stand, make: Make) -> None:
    """`base` keeps its one adapter, whose column moves as others come and go elsewhere."""
    adapter_set, network = adapters(stand), stand.denoisers["base"]
    adapter_set.attach(make(network, "b"))
    adapter_set.attach(make(network, "a", seed=1), to=["distilled"])
    one = run(stand, cond_of(stand, (0.0, 1.0)))
    adapter_set.detach("a")
    adapter_set.attach(make(network, "c", seed=2), to=["distilled"])
    assert adapter_set.columns == ("b", "c")
    assert torch.equal(run(stand, cond_of(stand, (1.0, 0.0))), one)


@pytest.fixture
def full(tmp_path: Path) -> Callable[[nn.Module], Path]:
    """full(network) -> a file with a difference of one whole weight."""

    def write(network: nn.Module) -> Path:
        layer = "mid_block.attentions.0.proj_in"
        weight: Any = network.get_submodule(layer).weight
        key = f"lora_unet_{layer.replace('.', '_')}.diff"
        save_file({key: 0.1 * torch.ones(weight.shape)}, tmp_path / "full.safetensors")
        return tmp_path / "full.safetensors"

    return write


def test_an_adapter_that_is_merged_changes_its_strength_in_place(
    stand: Stand, full: Callable[[nn.Module], Path]
) -> None:
    """W' = W + strength*change, as for forms that no low-rank path computes."""
    adapter_set, network = adapters(stand), stand.denoisers["base"]
    plain = run(stand, stand.words(1))
    adapter_set.attach(full(network))
    one = run(stand, stand.words(1))
    assert stand.site.captures == 2, "the weight is a sum now, in memory of its own"
    adapter_set["full"].strength = 3.0
    three = run(stand, stand.words(1))
    assert not torch.equal(three, one) and stand.site.captures == 2
    snapshot = adapter_set.now()
    adapter_set["full"].strength = 1.0
    assert torch.equal(run(stand, replace(stand.words(1), adapters=snapshot)), three)
    assert stand.site.captures == 2, "who has the sum at 3 still finds its graph"
    assert torch.equal(run(stand, stand.words(1)), one)
    assert stand.site.captures == 3, "and the sum at 1 is elsewhere as long as that is so"
    adapter_set.detach("full")
    assert torch.equal(run(stand, stand.words(1)), plain)


def test_a_whole_run_takes_strengths_of_every_row_and_sample(stand: Stand, make: Make) -> None:
    adapter_set = adapters(stand)
    adapter_set.attach(make(stand.denoisers["base"]))
    table, cond, noise = hybrid(1, 2, guidance=3.0), stand.words(2), Philox([3, 4])
    runners = {name: EagerRunner(network) for name, network in stand.denoisers.items()}
    options = {"uncond": stand.words(2, 9), "shape": SHAPE}
    latents: list[Tensor] = []
    for strength in (1.0, [0.0, 2.0], [[1.0, 0.0], [0.0, 0.5], [-1.0, 1.0]]):
        adapter_set["age"].strength = strength
        grid = adapter_set.strengths(table, 2)
        assert grid is not None
        expected = list(sample(table, runners, cond, noise, strengths=grid, **options))
        got = stand.trajectory()(table, cond, noise, by_row={"strengths": grid}, **options)
        assert torch.equal(got.latents, expected[-1].x)
        latents.append(got.latents)
    assert stand.site.captures == 2, "strengths that change with the row are another graph"
    assert not torch.equal(latents[0], latents[1]) and not torch.equal(latents[1], latents[2])


def test_the_kernel_that_adds_an_adapter_is_in_the_graph(
    emulated_stand: Emulated, make: Make
) -> None:
    """Emulated PTX, one strength a sample; within float32 of torch's own operators."""
    stand = emulated_stand
    adapters(stand).attach(make(stand.denoisers["base"], part="attn1"))
    strengths = ((1.0,), (0.0,)), ((0.25,), (-1.0,))
    plain = [run(stand, cond_of(stand, *each)) for each in strengths]
    captures = stand.site.captures
    with stand.launching(), fusion(True):
        first, second = (cond_of(stand, *each) for each in strengths)
        again = stand.runner("base")(stand.latent(2), T([7, 7]), second)
        for got, expected in zip((run(stand, first), again), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert stand.gpu is not None
        names = [name for name, _ in stand.gpu.launches]
        # The kernels ran; and torch's low-rank products, which they replace, are not in the graph.
        assert names.count("down_kernel") == names.count("up_kernel") > 10
    assert stand.site.captures == captures + 1


def hooked(network: Any) -> None:
    network.conv_out.register_forward_hook(lambda layer, args, y: y * 2)


def trained(network: Any) -> None:
    network.train()


@pytest.mark.parametrize("change", [hooked, trained])
def test_what_a_graph_cannot_see_makes_another(stand: Stand, change: Callable[[Any], None]) -> None:
    run(stand, stand.words(1))
    change(stand.denoisers["base"])
    run(stand, stand.words(1))
    assert stand.site.captures == 2
