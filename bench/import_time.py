"""What does starting cost? Seconds from nothing to an answer, in fresh interpreters.

Commands are interleaved, so that a busy moment of the machine is shared by all of them; a median
over rounds is reported. Each process pays for reading its own files, from a warm disk cache.

    python bench/import_time.py [--rounds 15] [--out bench/results/import_time.json]
"""

from __future__ import annotations

import statistics
from functools import partial

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
    rows: list[dict[str, float | str]] = []
    for name, taken in harness.in_turns(calls, options.rounds).items():
        seconds = [own.wall_s for own in taken]
        rows.append(
            {
                "command": name,
                "median_s": round(statistics.median(seconds), 4),
                "fastest_s": round(min(seconds), 4),
                "slowest_s": round(max(seconds), 4),
            }
        )
    result = {"machine": where, "rounds": options.rounds, "rows": rows}
    harness.write_json(options.out, result)
    for row in rows:
        print(f"{row['median_s']:8.3f} s  {row['command']}")


if __name__ == "__main__":
    main()
