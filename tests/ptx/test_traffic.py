"""How many bytes the emitted code moves: the least there are, and little more, sector by sector."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
# Of the least: the state read and written once. The rest is what each block reads of the table and
# of the map to colours, reading x twice to normalise it, the low rank between two kernels, and
# weight and bias for every row of a layer norm, which stay in a GPU's caches (5 KB for 1280).
MOST = {
    "fused_step fp32": 1.1,
    "fused_step fp16": 1.1,
    "fused_step drawn + preview": 1.1,
    "fused_step channels-last": 1.1,
    "scale_input": 1.1,
    "preview_rgb": 1.1,
    "decode_u8": 1.0,
    "decode_u8 channels-last": 1.0,
    "philox_normal": 1.1,
    "groupnorm_silu": 1.65,
    "groupnorm_silu channels-last": 1.75,
    "groupnorm_silu shifted": 1.65,
    "groupnorm channels-last": 1.75,
    "add_layernorm": 1.5,
    "geglu": 1.0,
    "low_rank_add": 1.5,
}


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest):
    """The benchmark's own module, which is a script beside others and not a package."""
    sys.path.insert(0, str(BENCH))
    request.addfinalizer(lambda: sys.path.remove(str(BENCH)))
    spec = importlib.util.spec_from_file_location("aot_benchmark", BENCH / "aot.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MOST)
def test_a_kernel_moves_little_more_than_it_must(bench, name: str) -> None:
    moved = bench.traffic(bench.runs()[name])
    assert 1.0 <= moved["moved_over_least"] <= MOST[name]
