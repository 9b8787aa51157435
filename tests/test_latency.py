"""`headstart bench`: what is counted, what is warm, and what the table and the JSON say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from bundled import needs_pair

import headstart as hs
import headstart_weights
from headstart.cli import main
from headstart.commands.arguments import RUNNERS
from headstart.compare.latency import STAGES, Case, latency, weights_bytes
from headstart.runner.runner import RunnerName

pytestmark = needs_pair


def test_cases_run_in_turns_after_their_warm_up(
    engine: hs.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    sample = hs.Engine.sample

    def spy(self: hs.Engine, *args: Any, **options: Any) -> Any:
        ran.append(f"{options['plan'].name} {self.runner}")
        return sample(self, *args, **options)

    monkeypatch.setattr(hs.Engine, "sample", spy)
    tables = [engine.compile(name) for name in ("distilled", "hybrid")]
    a, b = (Case(table.name, engine, table) for table in tables)
    latencies = latency([a, b], "a fox", [3, 4], rounds=2, warmup=2)
    order = [a, b, a, b, a, b, a, b]
    assert ran == [f"{case.plan} eager" for case in order]
    assert [cost.plan for cost in latencies.cases] == [a.plan, b.plan]
    assert [cost.images for cost in latencies.cases] == [2, 2]


def test_stages_add_up_and_p99_is_no_less_than_p50(engine: hs.Engine) -> None:
    case = Case("hybrid", engine, engine.compile("hybrid"))
    (cost,) = latency([case], "a fox", [1], rounds=3, warmup=1).cases
    assert tuple(cost.stages) == STAGES
    assert all(0 < spread.p50 <= spread.p99 for spread in cost.stages.values())
    assert sum(cost.stages[stage].p50 for stage in STAGES[:-1]) < 1.5 * cost.stages["total"].p99
    assert cost.passes == 4
    assert cost.images_per_s == pytest.approx(1e3 / cost.stages["total"].p50)
    assert cost.peak_bytes is None or cost.peak_bytes > weights_bytes(engine)


def test_weights_are_counted_once_however_many_names_they_have(engine: hs.Engine) -> None:
    network: Any = engine.denoisers["base"]
    size = sum(p.nbytes for p in network.parameters()) + sum(b.nbytes for b in network.buffers())
    assert size < weights_bytes(engine) < 4 * size
    assert weights_bytes(engine) == weights_bytes(engine.with_runner("replay"))


def test_two_runners_of_one_engine_share_weights_and_adapters(engine: hs.Engine) -> None:
    other = engine.with_runner("replay")
    assert other.runner == "replay" and engine.runner == "eager"
    assert other.weights is engine.weights
    engine.attach(headstart_weights.path("yellow"), name="yellow")
    assert "yellow" in other.adapters
    runs = [each.sample("a fox", seeds=5) for each in (engine, other)]
    engine.detach("yellow")
    plain = other.sample("a fox", seeds=5)
    assert torch.equal(runs[0].rgb, runs[1].rgb)
    assert not torch.equal(plain.rgb, runs[1].rgb)
    with pytest.raises(hs.CaptureError, match="exists on cuda alone"):
        engine.with_runner("graph")


def test_what_can_be_typed_is_what_there_is() -> None:
    assert get_args(RunnerName) == RUNNERS


def test_bench_prints_a_table_and_writes_the_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    words = ["bench", "--plan", "distilled,hybrid", "--versus", "replay", "--rounds", "2"]
    assert main([*words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [(case["plan"], case["runner"]) for case in report["cases"]] == [
        *(("distilled", "eager"), ("distilled", "replay")),
        *(("hybrid", "eager"), ("hybrid", "replay")),
    ]
    assert [len(line.split()) > 5 for line in printed.splitlines()[:5]] == [True] * 5
    for case in report["cases"]:
        assert set(case["latency_ms"]) == set(STAGES)
        assert case["first_ms"] > 0
    assert main([*words, "--rounds", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "hybrid,fastest"], "unknown plan 'fastest'"),
        (["--versus", "graph"], "exists on cuda alone"),
        (["--seeds", "0-"], "seeds"),
        (["--out", f"{__file__}/bench.json"], "is a file"),
    ],
)
def test_a_bad_request_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("headstart: error: ") and message in error and error.count("\n") == 1


def test_no_rounds_are_refused(engine: hs.Engine) -> None:
    case = Case("hybrid", engine, engine.compile("hybrid"))
    for cases, rounds, warmup in (([], 1, 1), ([case], 0, 1), ([case], 1, 0)):
        with pytest.raises(hs.InputError, match="at least one case, one round"):
            latency(cases, "a fox", [1], rounds=rounds, warmup=warmup)
