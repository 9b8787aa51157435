"""Every way we know to spoil a capture is caught, and a clean step is not accused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evidence.audit import Hazard, Report, audit
from evidence.fake_tensors import DEVICE
from headstart_kernels import ops

SIGMAS = (14.6, 9.0, 5.0)


class Bench:
    """A step of a sampler on a fake device: state, tables, a network, and what is not declared."""

    def __init__(self, fake: Any) -> None:
        self.fake = fake
        with fake:
            self.net = nn.Conv2d(4, 4, 3, padding=1, device=DEVICE)
            self.x = torch.empty(2, 4, 8, 8, device=DEVICE)
            self.table = torch.empty(10, 8, device=DEVICE)
            self.step = torch.empty((), dtype=torch.int64, device=DEVICE)
            self.hidden = torch.empty(2, 4, 8, 8, device=DEVICE)
        self.on_host = torch.linspace(999.0, 99.0, 10)
        self.kept: Tensor | None = None

    def audit(self, body: Callable[[Bench, int], object]) -> Report:
        declared = [self.x, self.table, self.step, *self.net.parameters()]
        return audit(lambda i: body(self, i), [0, 1], fake=self.fake, declared=declared)


def clean(b: Bench, i: int) -> None:
    """Row by a device-side step, state in place, noise from counters."""
    f = b.net(ops.scale_input(b.x, b.table, b.step, torch.float32))
    seeds = b.step.expand(2).contiguous()
    noise = ops.philox_normal(seeds, seeds, b.step, (4, 8, 8))
    x, x0 = ops.fused_step(b.x, f, b.table, b.step, noise=noise, x0_prev=b.x)
    b.x.copy_(torch.where(x0.abs().amax() > 0, x, b.x))
    ops.decode_u8(x[:, :3])
    b.step.add_(1)


def item(b: Bench, i: int) -> object:
    return b.x * b.table[0, 0].item()


def to_float(b: Bench, i: int) -> object:
    return b.x * float(b.step)


def branch(b: Bench, i: int) -> object:
    return b.x if b.x.sum() > 0 else b.net(b.x)


def to_list(b: Bench, i: int) -> object:
    return b.table[0].tolist()


def to_numpy(b: Bench, i: int) -> object:
    return b.x.cpu().numpy()


def compare(b: Bench, i: int) -> object:
    return torch.equal(b.x, b.hidden)


def mask(b: Bench, i: int) -> object:
    return b.x[b.x > 0]


def put_by_mask(b: Bench, i: int) -> object:
    b.x[b.x > 0] = torch.zeros((), device=DEVICE)
    return b.x


def select_by_mask(b: Bench, i: int) -> object:
    return torch.masked_select(b.x, b.x > 0)


def nonzero(b: Bench, i: int) -> object:
    return (b.table == 3).nonzero()


def unique(b: Bench, i: int) -> object:
    return torch.unique(b.x)


def repeat_by_value(b: Bench, i: int) -> object:
    return b.x.repeat_interleave(b.step.expand(2), dim=0)


def index_by_scalar(b: Bench, i: int) -> object:
    return b.table[b.step]


def wait(b: Bench, i: int) -> object:
    torch.cuda.synchronize()
    return b.x * 2


def down(b: Bench, i: int) -> object:
    return b.net(b.x).to("cpu")


def up(b: Bench, i: int) -> object:
    return b.x * b.on_host.to(DEVICE)[0]


def up_anywhere(b: Bench, i: int) -> object:
    return b.x * b.on_host.to("cuda").sum()


def literal(b: Bench, i: int) -> object:
    return b.x * torch.tensor([0.5], device=DEVICE)


def copy_in(b: Bench, i: int) -> object:
    b.table[:, 7].copy_(b.on_host)
    return b.table


def host_scalar(b: Bench, i: int) -> object:
    return b.x * torch.tensor(SIGMAS[i])


def host_index(b: Bench, i: int) -> object:
    return b.table[torch.tensor([0, 1])]


def random_like(b: Bench, i: int) -> object:
    return b.x + torch.randn_like(b.x)


def dropout(b: Bench, i: int) -> object:
    return F.dropout(b.x, 0.1)


def undeclared(b: Bench, i: int) -> object:
    return b.x + b.hidden


def kept_from_before(b: Bench, i: int) -> None:
    """State that a run leaves for the next one, in memory of the graph."""
    before, b.kept = b.kept, b.x * 2
    b.x.add_(b.x if before is None else before)


def host_number(b: Bench, i: int) -> object:
    return b.x.add_(b.net(b.x), alpha=SIGMAS[i + 1] - SIGMAS[i])


def host_timestep(b: Bench, i: int) -> object:
    return b.net(b.x) + torch.full((2, 1, 1, 1), 999 - 250 * i, device=DEVICE)


def host_row(b: Bench, i: int) -> object:
    return b.x * b.table[i, 0]


def shape(b: Bench, i: int) -> object:
    return b.x[: i + 1] * 2


def path(b: Bench, i: int) -> object:
    return b.x.sin() if i else b.x.cos()


def longer_path(b: Bench, i: int) -> object:
    return [b.x * 2 for _ in range(i + 1)]


PLANTED = {
    Hazard.WAITS: (
        *(item, to_float, branch, to_list, compare, mask, put_by_mask, select_by_mask),
        *(nonzero, unique, repeat_by_value, index_by_scalar, wait),
    ),
    Hazard.HOST_COPY: (down, to_numpy, up, up_anywhere, literal, copy_in),
    Hazard.HOST_TENSOR: (host_scalar, host_index),
    Hazard.RANDOM: (random_like, dropout),
    Hazard.UNDECLARED: (undeclared, kept_from_before),
    Hazard.BAKED_NUMBER: (host_number, host_timestep, host_row),
    Hazard.BAKED_SHAPE: (shape,),
    Hazard.BAKED_PATH: (path, longer_path),
}
CASES = [(hazard, body) for hazard, bodies in PLANTED.items() for body in bodies]


def test_a_clean_step_has_no_findings(gpu: Any) -> None:
    report = Bench(gpu.fake).audit(clean)
    assert report.findings == ()
    assert "fused_step" in {operator.name for operator in report.operators}


@pytest.mark.parametrize(("hazard", "body"), CASES, ids=[body.__name__ for _, body in CASES])
def test_a_planted_hazard_is_caught_where_it_was_planted(
    gpu: Any, hazard: Hazard, body: Callable[[Bench, int], object]
) -> None:
    findings = [f for f in Bench(gpu.fake).audit(body).findings if f.hazard is hazard]
    assert findings
    first = body.__code__.co_firstlineno
    lines = range(first, first + 7)
    assert all(f.where in {f"test_hazards.py:{line}" for line in lines} for f in findings), findings
    assert hazard.value in str(findings[0])


def test_an_error_without_values_is_a_finding_and_not_a_crash(gpu: Any) -> None:
    def body(b: Bench, i: int) -> object:
        raise KeyError("nothing here")

    (finding,) = Bench(gpu.fake).audit(body).findings
    assert finding.hazard is Hazard.REFUSED and "KeyError: 'nothing here'" in finding.detail
