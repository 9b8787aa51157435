"""One compiled function: what a compiler lacks is said, and what inductor made is found on disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from regional import Counting, Tokens, agree, call_of

from headstart.errors import CaptureError, InputError
from headstart.runner import compiled
from headstart.runner.compiled_function import CompiledFunction
from headstart.runner.runner import CompiledRunner, EagerRunner

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture
def backend() -> Counting:
    """Its own for each test: what is compiled is kept by backend."""
    return Counting()


@pytest.fixture
def network() -> Tokens:
    return Tokens(1).eval()


def no_compiler() -> Exception:
    from torch._inductor.exc import InvalidCxxCompiler

    return InvalidCxxCompiler("/nope")


def no_gcc() -> Exception:
    return RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


def no_triton() -> Exception:
    from torch._inductor.exc import TritonMissing

    return TritonMissing(None)


def no_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (no_compiler, r"InvalidCxxCompiler: .*install a C\+\+ compiler \(g\+\+\)"),
        (no_gcc, r"Failed to find C compiler.*install a C compiler \(gcc\)"),
        (no_triton, "install triton"),
        (no_memory, "ask for a smaller batch"),
    ],
)
def test_what_a_compiler_lacks_is_said_with_the_fix(
    network: Tokens, make: Callable[[], Exception], fix: str
) -> None:
    def fails(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        raise make()

    with pytest.raises(CaptureError, match=f"Block could not be compiled for .*{fix}.*'eager'"):
        agree(network, fails)


def test_only_errors_of_the_compiler_are_taken_for_such(network: Tokens) -> None:
    """A launch that looks for gcc is one; a wrong input, or a device that fails, is not."""

    def fails(error: Exception) -> Any:
        def backend_of(graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
            def run(*_: object) -> None:
                raise error

            return run

        return backend_of

    for error in (ValueError("of the device"), InputError("of ours")):
        with pytest.raises(type(error), match=r"^of"):
            agree(network, fails(error))
    with pytest.raises(CaptureError, match="install a C compiler"):
        agree(network, fails(no_gcc()))


def test_a_compiler_that_is_switched_off_is_noticed(
    network: Tokens, backend: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.compiler.set_stance("force_eager"):
        agree(network, backend)
    assert backend.count == 0
    assert any("torch.compile is switched off" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("device", "options"),
    [("cuda", {"max_autotune": True, "coordinate_descent_tuning": True}), ("cpu", {})],
)
def test_inductor_measures_kernels_on_a_gpu_and_captures_nothing(
    device: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mode "max-autotune-no-cudagraphs"; what it generated is kept on disk by default."""
    import torch._inductor.compile_fx

    options_of: list[dict[str, Any]] = []

    def compile_fx(graph: torch.fx.GraphModule, _: list[Any], *, config_patches: Any) -> Any:
        options_of.append(config_patches)
        return graph.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    x = torch.ones(3)
    assert torch.equal(CompiledFunction(torch.neg, "inductor", device)([x], x), -x)
    assert options_of == [options] and torch._inductor.config.fx_graph_cache


def test_threads_that_ask_at_once_compile_once(network: Tokens, backend: Counting) -> None:
    runner, calls = (
        CompiledRunner(network, backend=backend),
        [call_of(seed=seed) for seed in range(4)],
    )
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda call: runner(*call), calls))
    assert backend.count == 1
    for call, got in zip(calls, outputs, strict=True):
        assert torch.equal(got, EagerRunner(network)(*call))


def test_inductor_compiles_blocks_and_finds_them_on_disk(
    network: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real compilation. Of 3 blocks, the longest path has about 40 roundings each (norm 20,
    product 9, gelu 8, the rest 3), of numbers no larger than `scale` on the way."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    import torch._inductor.config

    counters: Any = torch._dynamo.utils.counters
    counters.clear()
    call = call_of()
    exact = EagerRunner(Tokens(1).eval().double())(*call)
    scale = 4 * float(exact.abs().max())

    def close() -> None:
        got = CompiledRunner(network)(*call)
        assert got.dtype == torch.float32
        assert float((got - exact).abs().max()) <= 3 * 40 * 2**-24 * scale

    # In this process, and without headers precompiled for one small file.
    with torch._inductor.config.patch(compile_threads=1, cpp_cache_precompile_headers=False):
        close()
        assert counters["inductor"]["fxgraph_cache_miss"] == 1
        compiled._block_cache.cache_clear()
        torch._dynamo.reset()
        close()
    assert counters["inductor"]["fxgraph_cache_hit"] == 1, "as a second process would"
    assert counters["inductor"]["fxgraph_cache_miss"] == 1
