"""Which attention a network runs: torch's own but for what the kernel in C is faster at."""

from __future__ import annotations

from collections.abc import Callable, Generator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evidence.bounds import attention_bound
from evidence.oracle import random_latents
from headstart.networks import attention as seam
from headstart.networks.attention import attend
from headstart.networks.bands import Bands
from headstart.networks.fusion import fusion
from headstart.networks.transformer import Attention
from headstart.networks.vae import Attention as VaeAttention
from headstart_kernels.native import library
from headstart_kernels.native.calls import TYPES
from headstart_kernels.recording.tape import Tape

in_c = pytest.mark.skipif(
    library.why_not() is not None or not library.calls().attends(TYPES[torch.float32]),
    reason="no C attention here",
)


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    """What a CPU runs; a GPU's is torch's own."""


@pytest.fixture
def small() -> Generator[None]:
    """The kernel from few products on, so that a test is quick."""
    with mock.patch.object(seam, "MOST", 0):
        yield


def heads(queries: int = 70, keys: int = 90, width: int = 16) -> list[Tensor]:
    return [
        random_latents(2, tokens, 3 * width, seed=seed).unflatten(-1, (3, width)).transpose(1, 2)
        for seed, tokens in enumerate((queries, keys, keys))
    ]


def kernels(body: Callable[[], object]) -> int:
    """How often `body` runs the kernel in C."""
    run = mock.Mock(wraps=library.calls().attention)
    with mock.patch(
        "headstart_kernels.impl.native_attention.calls",
        return_value=library.calls()._replace(attention=run),
    ):
        body()
    return run.call_count


@in_c
def test_much_is_the_kernels_and_little_is_torchs_to_the_bit() -> None:
    few = heads(64, 64, 64)  # more than any layer of the bundled pair's UNets
    assert kernels(lambda: attend(*few)) == 0
    assert torch.equal(attend(*few), F.scaled_dot_product_attention(*few))
    much = heads(65, 64, 64)
    assert kernels(lambda: attend(*much)) == 1
    attention_bound(*much).check(attend(*much))


@in_c
def test_it_lies_as_torchs_does(small: None) -> None:
    inputs = heads()
    assert attend(*inputs).stride() == F.scaled_dot_product_attention(*inputs).stride()


@in_c
def test_torchs_own_runs_for_gradients_compilers_and_where_it_is_asked_for(small: None) -> None:
    q, k, v = heads()
    assert kernels(lambda: attend(q, k, v)) == 1
    leaf = q.clone().requires_grad_()
    assert kernels(lambda: attend(leaf, k, v).sum().backward()) == 0
    exact = q.double().requires_grad_()
    F.scaled_dot_product_attention(exact, k.double(), v.double()).sum().backward()
    torch.testing.assert_close(leaf.grad, exact.grad.float(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert kernels(lambda: attend(leaf, k, v)) == 1
    with torch.inference_mode():
        assert kernels(lambda: attend(q, k, v)) == 1
    with mock.patch.object(seam, "is_compiling", lambda: True):
        assert kernels(lambda: attend(q, k, v)) == 0
    with fusion(False):
        assert kernels(lambda: attend(q, k, v)) == 0
    wide = [t.double() for t in (q, k, v)]
    assert kernels(lambda: attend(*wide)) == 0
    assert torch.equal(attend(*wide), F.scaled_dot_product_attention(*wide))
    bare = [t.to("meta") for t in (q, k, v)]
    assert attend(*bare).shape == q.shape


@in_c
def test_what_is_recorded_gives_the_bits_of_a_run(small: None) -> None:
    layer = Attention(48, 48, 3)
    x = random_latents(2, 70, 48)
    with torch.no_grad():
        first = layer(x, x)
        tape = Tape()
        with tape.recording():
            recorded = layer(x, x)
        assert torch.equal(recorded, first)
        assert "attention" in [call.name for call in tape.calls]
        x.copy_(random_latents(2, 70, 48, seed=9))
        tape.replay()
        assert not torch.equal(recorded, first)
        assert torch.equal(recorded, layer(x, x))


@in_c
def test_a_compiled_network_gives_what_it_gives_eagerly(small: None) -> None:
    q, k, v = heads()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


@in_c
def test_bands_of_queries_are_the_whole(small: None) -> None:
    layer = VaeAttention(32, 8)
    x = random_latents(1, 32, 9, 11)
    with torch.no_grad():
        whole = layer(x)
        banded = layer.banded(Bands([part.clone() for part in x.split(2, 2)], 2, 9))
    torch.testing.assert_close(banded.take(0, 9), whole, rtol=1e-5, atol=1e-5)
