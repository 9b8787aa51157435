"""A forked child either computes or says at once that it cannot; it never waits for ever."""

from __future__ import annotations

import json
import sys

import pytest
from bundled import needs_pair
from fresh import ROOT, python

pytestmark = [
    needs_pair,
    pytest.mark.skipif(sys.platform != "linux", reason="the OpenMP of other systems survives"),
]


def forks(parent: str) -> dict[str, str]:
    done = python(str(ROOT / "tests/forks.py"), parent, timeout=600, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_child_of_a_warm_parent_is_told_to_spawn_wherever_it_would_compute() -> None:
    """Without the check each of these waits for threads that the fork did not copy."""
    replies = forks("warm")
    may = ("one thread", "a new thread", "a plan", "a pool without us", "a loader's worker",
           "this process")  # fmt: skip
    assert {name: replies.pop(name) for name in may} == dict.fromkeys(may, "done")
    assert len(replies) == 9
    for name, message in replies.items():
        assert message.startswith("InputError: this process was forked"), (name, message)
        assert 'get_context("spawn")' in message and "torch.set_num_threads(1)" in message


@pytest.mark.parametrize("parent", ["cold", "alone"])
def test_a_child_of_a_parent_without_helper_threads_samples(parent: str) -> None:
    assert forks(parent) == {"sample": "done"}
