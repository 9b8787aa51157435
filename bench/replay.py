"""What does replaying recorded operators save on a CPU? The bundled base, in turns with eager.

F = network(x_in, t, cond): the same bits both ways; memory that the recording holds beside them

python bench/replay.py [--rounds 41] [--out bench/results/replay.json]
"""

from __future__ import annotations

import time
from typing import Any

import harness
import torch

from headstart.engine.pair import load_demo
from headstart.runner.capture import Site
from headstart.runner.graph import GraphRunner
from headstart.runner.runner import EagerRunner
from headstart_kernels import philox_normal
from headstart_kernels.recording.host import Host

BATCHES = (1, 4, 16)
LATENT = (4, 16, 16)


def main() -> None:
    options = harness.options(__doc__, "replay.json", rounds=41).parse_args()
    torch.set_num_threads(1)
    pair = load_demo(device="cpu")
    network, words = pair.denoisers["base"], pair.text.encode(["a fox"], size=(64, 64))
    report = {
        "question": "seconds of one pass of the bundled base, eager and replayed",
        "evidence": "measured",
        "threads": 1,
        "rounds": options.rounds,
        "machine": harness.machine(),
        "rows": [measure(network, words, batch, options.rounds) for batch in BATCHES],
    }
    harness.write_json(options.out, report)


def measure(network: Any, words: Any, batch: int, rounds: int) -> dict[str, object]:
    """Wall seconds in turns, and processor seconds, which a busy machine disturbs less."""
    x = philox_normal(range(batch), [0] * batch, 0, LATENT)
    call = (x, torch.full((batch,), 999), words.expand(batch))
    site = Site(torch.device("cpu"), Host(), warmups=0)
    eager, replay = EagerRunner(network), GraphRunner(network, site)
    begin = time.perf_counter()
    same = torch.equal(replay(*call), eager(*call))
    recorded = time.perf_counter() - begin
    cases = {"eager": lambda: eager(*call), "replay": lambda: replay(*call)}
    seconds = harness.interleaved(cases, rounds)
    busy = {
        name: min(harness.seconds_of(case, time.process_time) for _ in range(rounds))
        for name, case in cases.items()
    }
    return {
        "batch": batch,
        "same_bits": same,
        "seconds": seconds,
        "ratio_of_medians": round(seconds["replay"]["p50"] / seconds["eager"]["p50"], 3),
        "processor_seconds": busy,
        "processor_ratio": round(busy["replay"] / busy["eager"], 3),
        "record_seconds": round(recorded, 3),
        "held_bytes": site.size_bytes,
    }


if __name__ == "__main__":
    main()
