"""`bench/serve.py` on the loopback: requests share network calls and disturb nobody."""

from __future__ import annotations

import base64
import io
import json
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_samples import random_lora
from bundled import needs_pair
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import headstart as hs
from headstart.interfaces import Conditioning

pytest.importorskip("starlette", reason="of the test extra")
uvicorn = pytest.importorskip("uvicorn", reason="of the test extra")
BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import serve  # noqa: E402

sys.path.remove(str(BENCH))

pytestmark = needs_pair
REQUESTS: list[dict[str, Any]] = [
    {"prompts": "a fox", "seeds": 1},
    {"prompts": "an owl", "seeds": [2, 3], "k": 2},
    {"prompts": "a cactus", "seeds": 4, "plan": "distilled"},
    {"prompts": ["a crab", ""], "seeds": [5, 6], "plan": "distilled"},
    {"prompts": "a rocket", "seeds": 7, "plan": "base", "steps": 6, "base_guidance": 4.0},
    {"prompts": "a fox", "seeds": 8, "negative": "blue", "base_guidance": 2.0},
]
SECONDS = 120
"""After which a server that does not answer fails the test."""


class Watched(hs.Batch):
    """Its runs in the order of their coming, its calls, and how many calls may begin by now."""

    def __init__(self, engine: hs.Engine, runs: int, spoil: float = 0.0) -> None:
        super().__init__({model: self.network(engine, model) for model in engine.denoisers})
        self.expected, self.spoil = runs, spoil
        self.runs: list[hs.Run] = []
        self.calls: list[tuple[str, int]] = []
        self.here, self.free, self.held_from = threading.Event(), threading.Event(), 10**9

    def network(self, engine: hs.Engine, model: str) -> Any:
        def recorded(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            assert self.here.wait(SECONDS)  # the first call waits until all requests are there
            self.calls.append((model, len(x_in)))
            if len(self.calls) > self.held_from:
                assert self.free.wait(SECONDS)
            return engine.denoisers[model](x_in, timestep, cond) / (1.0 - self.spoil)

        return recorded

    def add(self, run: hs.Run) -> None:
        super().add(run)
        if run not in self.runs:
            self.runs.append(run)
        if len(self.runs) == self.expected:
            self.here.set()


@contextmanager
def serving(engine: hs.Engine, batch: hs.Batch | None = None) -> Iterator[int]:
    """The port on which the example serves until the block ends and every answer is given."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(serve.app(engine, batch), log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def post(port: int, body: object) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.request("POST", "/sample", body if isinstance(body, bytes) else json.dumps(body))
    answer = connection.getresponse()
    status, text = answer.status, answer.read().decode()
    connection.close()
    return status, text


def answered(port: int, body: object) -> list[dict[str, Any]]:
    status, text = post(port, body)
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def pictures(rows: list[dict[str, Any]]) -> Tensor:
    files = [io.BytesIO(base64.b64decode(png)) for png in rows[-1]["png"]]
    return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])


def levels_apart(one: Tensor, other: Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


def seed_of(run: hs.Run) -> int:
    return getattr(run.noise, "distinct", run.noise).seeds[0]  # type: ignore[attr-defined]


def by_seed(batch: Watched) -> dict[int, hs.Run]:
    return {seed_of(run): run for run in batch.runs}


@pytest.fixture(scope="module")
def engine() -> hs.Engine:
    return hs.Engine.demo(device="cpu", runner="eager")


@pytest.fixture(scope="module")
def port(engine: hs.Engine) -> Iterator[int]:
    with serving(engine) as number:
        yield number


def in_float64(engine: hs.Engine, request: dict[str, Any]) -> Tensor:
    """The last x where the networks, whose rounding alone depends on the company, do not round."""
    run = engine.begin(**request)
    while (call := run.call) is not None:
        network: Any = deepcopy(engine.denoisers[call.model])
        cond = call.cond.to("cpu", torch.float64)
        run.advance(network.double()(call.x_in.double(), call.timestep, cond).float())
    return run.state.x


def test_requests_that_share_calls_get_what_they_get_alone(engine: hs.Engine) -> None:
    """Alone and shared are two float32 evaluations of one exact run, each with rounding errors of
    the same size in many numbers, so neither is much further from it than the other."""
    batch = Watched(engine, len(REQUESTS))
    with serving(engine, batch) as port, ThreadPoolExecutor(len(REQUESTS)) as clients:
        answers = [*clients.map(lambda body: answered(port, body), REQUESTS)]
    tables = [engine.compile(**_plan(request)) for request in REQUESTS]
    for rows, request, table in zip(answers, REQUESTS, tables, strict=True):
        alone, exact = engine.sample(**request), in_float64(engine, request)
        state = by_seed(batch)[alone.seeds[0]].state
        near = float((alone.latents - exact).norm())
        assert 0.0 < near < 1e-4 * float(exact.norm())
        assert float((state.x - exact).norm()) < 4.0 * near
        assert levels_apart(pictures(rows), alone.rgb) <= 1
        assert [(row["step"], row["model"], row["sigma"]) for row in rows[:-1]] == [
            (number, step.model, step.sigma) for number, step in enumerate(table)
        ]
        assert sorted(row["ms"] for row in rows[:-1]) == [row["ms"] for row in rows[:-1]]
    assert len(batch.calls) < sum(map(len, tables)) and len(batch) == 0
    assert sum(count for _, count in batch.calls) == sum(
        table.passes() * len(rows[-1]["png"]) for table, rows in zip(tables, answers, strict=True)
    )


def _plan(request: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key not in _NO_PLAN}


_NO_PLAN = ("prompts", "seeds", "negative")


def test_a_client_that_leaves_is_asked_no_more_and_changes_nobody(engine: hs.Engine) -> None:
    leaves = {"prompts": "a fox", "seeds": 1, "plan": "base"}
    batch = Watched(engine, 1 + len(REQUESTS[1:]))
    batch.held_from = batch.expected  # each has had a row by then, and waits for the leaving
    with serving(engine, batch) as port, ThreadPoolExecutor(len(REQUESTS)) as clients:
        others = [clients.submit(answered, port, body) for body in REQUESTS[1:]]
        connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        connection.request("POST", "/sample", json.dumps(leaves))
        answer = connection.getresponse()
        assert json.loads(answer.readline())["step"] == 0
        answer.close()
        connection.close()
        batch.free.set()
        for request, other in zip(REQUESTS[1:], others, strict=True):
            alone = engine.sample(**request)
            assert levels_apart(pictures(other.result(SECONDS)), alone.rgb) <= 1
        answered(port, leaves | {"seeds": 9})  # time enough for the other's rows, were they asked
    left = by_seed(batch)[1]
    assert len(batch) == 0 and all(run.row is None for run in batch.runs if run is not left)
    assert left.state.step < len(left.table) // 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is no JSON"),
        (b'{"prompts": "a fox"', "the body is no JSON"),
        (b"\xff\xfe", "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        ([], "expected a JSON object with prompts"),
        (None, "expected a JSON object with prompts"),
        ({}, "expected a JSON object with prompts"),
        ({"prompt": "a fox"}, "no other names than adapters"),
        ({"prompts": "a fox", "batch": 1}, "no other names than adapters"),
        ({"prompts": []}, "0 prompts"),
        ({"prompts": 3}, "a string or a list of strings"),
        ({"prompts": {"a": 1}}, "a string or a list of strings"),
        ({"prompts": ["a", None]}, "a prompt is a string"),
        ({"prompts": "\ud800"}, "half of a surrogate pair"),
        ({"prompts": "a", "negative": [3], "plan": "base"}, "a prompt is a string"),
        ({"prompts": "a", "negative": "b"}, "the negative prompt would do nothing"),
        ({"prompts": "a", "seeds": []}, "0 seeds"),
        ({"prompts": "a", "seeds": "1"}, "a seed is a whole number"),
        ({"prompts": "a", "seeds": [1, 1]}, "given twice"),
        ({"prompts": "a", "seeds": -1}, "out of range"),
        ({"prompts": "a", "seeds": list(range(17))}, "17 images"),
        ({"prompts": "a", "negative": ["b"] * 17, "plan": "base"}, "17 images"),
        ({"prompts": "a", "plan": "hybird"}, "unknown plan 'hybird'"),
        ({"prompts": "a", "plan": 3}, "a plan is a name"),
        ({"prompts": "a", "plan": "/etc/passwd.toml"}, "cannot read files of the server"),
        ({"prompts": "a", "steps": "4"}, "steps must be a whole number"),
        ({"prompts": "a", "k": [1]}, "k must be a whole number"),
        (b'{"prompts": "a", "base_guidance": NaN}', "guidance of leg 'base' must be a finite"),
        ({"prompts": "a", "adapters": {"ink": 1}}, "no adapter 'ink' is attached"),
        ({"prompts": "a", "adapters": 3}, "strengths by name or a list of names"),
    ],
)
def test_a_bad_request_is_told_why_and_the_server_goes_on(
    port: int, body: object, message: str
) -> None:
    status, text = post(port, body)
    assert (status, message in text) == (400, True), text
    assert answered(port, {"prompts": "a fox", "plan": "distilled"})[-1]["png"]


def test_a_run_that_goes_bad_ends_with_its_reason(engine: hs.Engine) -> None:
    with serving(engine, Watched(engine, 1, spoil=1.0)) as port:
        (only,) = answered(port, REQUESTS[0])
    assert "NaN or infinity" in only["error"]


def test_a_request_has_its_own_strength_of_an_attached_adapter(tmp_path: Path) -> None:
    engine = hs.Engine.demo(device="cpu", runner="eager")
    network: Any = engine.denoisers["base"]
    save_file(random_lora(network, size=0.3), tmp_path / "ink.safetensors")
    engine.attach(tmp_path / "ink.safetensors")
    bodies = [{"prompts": "a fox", "seeds": 1, "adapters": {"ink": value}} for value in (0, 2.5)]
    with serving(engine) as port, ThreadPoolExecutor(2) as clients:
        none, strong = (pictures(rows) for rows in clients.map(lambda b: answered(port, b), bodies))
    for body, latents in zip(bodies, (none, strong), strict=True):
        assert levels_apart(latents, engine.sample(**body).rgb) <= 1
    assert levels_apart(none, strong) > 8
