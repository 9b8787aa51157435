"""What does starting cost? Seconds from nothing to an answer, in fresh interpreters.

Commands are interleaved, so that a busy moment of the machine is shared by all of them; a median
over rounds is reported. Each process pays for reading its own files, from a warm disk cache.

    python bench/import_time.py [--rounds 15] [--out bench/results/import_time.json]
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import harness

COMMANDS: dict[str, tuple[str, ...]] = {
    "python -c pass": ("-c", "pass"),
    "import numpy": ("-c", "import numpy"),
    "import torch": ("-c", "import torch"),
    "import headstart": ("-c", "import headstart"),
    "headstart --version": ("-m", "headstart", "--version"),
    "headstart plan": ("-m", "headstart", "plan"),
    "hs.Conditioning (loads torch)": ("-c", "import headstart; headstart.Conditioning"),
}


def main() -> None:
    options = harness.options(__doc__, "import_time.json", rounds=15).parse_args()
    where = harness.machine()
    calls = {name: partial(harness.run_python, *words) for name, words in COMMANDS.items()}
    summaries = {"median_s": statistics.median, "fastest_s": min, "slowest_s": max}
    rows: list[dict[str, Any]] = []
    for name, turns in harness.in_turns(calls, options.rounds).items():
        seconds = [turn.wall_s for turn in turns]
        numbers = {key: round(of(seconds), 4) for key, of in summaries.items()}
        rows.append({"command": name, **numbers})
    harness.write_json(options.out, {"machine": where, "rounds": options.rounds, "rows": rows})
    for row in rows:
        print(f"{row['median_s']:8.3f} s  {row['command']}")


if __name__ == "__main__":
    main()
