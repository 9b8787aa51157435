"""Reports of studies that never ran, with every part or with next to none."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
EXPERIMENTS = ("curve", "control", "timeline")
MAIN, SECOND = "scorer-128", "structure-482"
HOSTILE = '</td>$x_1$漢<script>alert("1")</script> & שלום \u202e 😀'


def about(value: float | None, half: float | None = None) -> Json | None:
    """A value with an interval of `half` to both sides."""
    if value is None:
        return None
    low, high = (None, None) if half is None else (value - half, value + half)
    return {"value": value, "low": low, "high": high}


def row(part: str, diversity: float, **fields: Any) -> Json:
    """One case, from 0.1 (the distilled model) to 0.3 (the base)."""
    back = (diversity - 0.1) / 0.2
    return {
        "part": part,
        "about": fields.get("about", "what it is"),
        "at": fields.get("at"),
        "method": fields.get("method"),
        "passes": fields.get("passes", 4.0),
        "networks": fields.get("networks", 1),
        "images": 48,
        "seconds": fields.get("seconds", 0.084),
        "spaces": {
            MAIN: {
                "diversity": about(diversity, 0.011),
                "vendi": about(1 + 8 * diversity, 0.21),
                "recovered": about(back, 0.07),
                "frechet": about(fields.get("frechet", 0.061), 0.0042),
            },
            SECOND: {
                "diversity": about(diversity / 3, 0.004),
                "vendi": about(2.5, 0.3),
                "recovered": about(0.8 * back, 0.12),
                "frechet": None,
            },
        },
        "score": about(fields.get("score", 0.72), 0.008),
        "nearest": about(fields.get("nearest", 23.4), 1.3),
    }


def full() -> Json:
    """Every part is there; two spaces, a reference."""
    rows = {
        "base": row("plans", 0.3, passes=60.0, seconds=1.26),
        "distilled": row("plans", 0.1, frechet=0.2),
        "hybrid": row("plans", 0.31, networks=2),
        "skip-first": row("plans", 0.15, passes=3.0),
        "guidance-2": row("guidance", 0.29, at=2.0, networks=2, passes=5.0),
        "guidance-7": row("guidance", 0.27, at=7.0, networks=2, passes=5.0, score=0.71),
        "k-1": row("k", 0.312, at=1.0, networks=2),
        "k-2": row("k", 0.32, at=2.0, networks=2),
        "n-8": row("n", 0.325, at=8.0, networks=2, passes=5.0),
        "level-12": row("handoff", 0.302, at=12.3, networks=2),
        "level-12-control": row("handoff", 0.33, at=12.3),
        "level-4": row("handoff", 0.21, at=4.56, networks=2),
        "cads:0.1": row("methods", 0.25, method="cads"),
        "cads:0.5": row("methods", 0.42, method="cads", score=0.6),
        "pink:1": row("methods", 0.19, method="pink"),
        "hybrid+select:2": row("methods", 0.33, method="select", networks=2, passes=5.0),
    }
    return {
        "format": "headstart.study/1",
        "versions": {"headstart": "0.1.0"},
        "machine": {"device": "cpu", "threads": 2},
        "command": "headstart study --out runs/study",
        "pair": {
            "preset": "demo",
            "lineage": "headstart-demo",
            "weights": {"base": {"file": "base.safetensors", "sha256": "ab" * 32}},
        },
        "prompts": [f"prompt {n}" for n in range(12)],
        "seeds": {"first": 7, "last": 10, "count": 4},
        "spaces": [
            {"name": MAIN, "distance": "cosine"},
            {"name": SECOND, "distance": "squared"},
        ],
        "reference": {"name": "training pictures", "images": 960},
        "rows": rows,
        "curve": _curve(),
        "control": _control(),
        "timeline": _timeline(),
        "notes": ["k-4 is left out: the distilled model has four steps"],
    }


def few() -> Json:
    """Plans of SDXL and DMD2 alone, in the paper's own space, without text or reference."""
    whole = full()
    rows = {case: whole["rows"][case] for case in ("base", "distilled", "hybrid")}
    for row_ in rows.values():
        row_["spaces"] = {"dreamsim": {**row_["spaces"][MAIN], "frechet": None}}
        row_ |= {"score": None, "nearest": None}
    return {
        **whole,
        "pair": {"preset": "dmd2", "lineage": "sdxl", "weights": {}},
        "prompts": whole["prompts"][:5],
        "spaces": [{"name": "dreamsim", "distance": "cosine"}],
        "reference": None,
        "rows": rows,
        **dict.fromkeys(EXPERIMENTS),
        "notes": [],
    }


def tiny() -> Json:
    """One prompt, two seeds: no interval anywhere, and a NaN."""
    report = few()
    for row_ in report["rows"].values():
        for space in row_["spaces"].values():
            for name, value in space.items():
                space[name] = None if value is None else about(value["value"])
            space["recovered"] = None
    report["rows"]["hybrid"]["seconds"] = float("nan")
    return {**report, "prompts": ["a fox"], "seeds": {"first": 0, "last": 1, "count": 2}}


def empty() -> Json:
    """What a report must have, and nothing in it."""
    return {"format": "headstart.study/1", "prompts": [], "spaces": [], "rows": {}}


def hostile() -> Json:
    """Every text that somebody may have chosen is markup, right-to-left, or no text at all."""
    report = full()
    report["rows"] = {
        case + ("" if row_["part"] == "plans" else HOSTILE): {**row_, "about": HOSTILE}
        for case, row_ in report["rows"].items()
    }
    report["prompts"] = [HOSTILE, 'a "fox"\r\n, red', "nul \0 half \ud800"]
    report["control"]["adapters"][0]["name"] = HOSTILE
    report["pair"]["preset"] = report["command"] = HOSTILE
    report["notes"] = [HOSTILE]
    report["pair"]["weights"] = {HOSTILE: {"file": HOSTILE, "sha256": HOSTILE}}
    return report


def many(count: int) -> Json:
    """`count` cases of ten methods."""
    report = full()
    for number in range(count):
        diversity = 0.1 + 0.3 * ((number * 37) % 101) / 101
        report["rows"][f"way{number % 10}:{number}"] = row(
            "methods", diversity, method=f"way{number % 10}", frechet=0.05 + 0.001 * (number % 97)
        )
    return report


def only(report: Json, *parts: str) -> Json:
    """The report with no other parts than these."""
    experiments = {name: report[name] for name in EXPERIMENTS if name in parts}
    rows = {case: row_ for case, row_ in report["rows"].items() if row_["part"] in parts}
    return {**report, **dict.fromkeys(EXPERIMENTS), **experiments, "rows": rows}


def _curve() -> Json:
    shares = {"base": [0.62, 0.71, 0.83, 0.92, 0.98, 1.0], "distilled": [0.86, 1.0]}
    return {
        "space": MAIN,
        "seeds": 4,
        "plans": {
            plan: {
                "passes": [n + 1 for n in range(len(share))],
                "share": [about(s, 0.03) for s in share],
            }
            for plan, share in shares.items()
        },
        "matches": {"distilled": 4},
        "matches_95": {"distilled": [3, 5]},
    }


def _control() -> Json:
    changes = {"base": (-8.1, 0.0, 17.5), "distilled": (-6.2, 0.0, 15.3)}
    rows = {
        plan: [
            {"strength": s, "change": about(c, 2.2)}
            for s, c in zip((-1.0, 0.0, 1.0), change, strict=True)
        ]
        for plan, change in changes.items()
    }
    return {"judge": "clip", "seeds": 4, "adapters": [{"name": "yellow", "plans": rows}]}


def _timeline() -> Json:
    def kind(there: float, dropped: float) -> Json:
        return {
            "courses": 96,
            "there": [about(there * share, 0.04) for share in (0.5, 1.0)],
            "ever": about(there, 0.02),
            "dropped": about(dropped, 0.006),
        }

    return {
        "judge": "clip",
        "seeds": 4,
        "plans": {
            plan: {
                "passes": [1, 2],
                "missing": 0,
                "asked": kind(0.88, 0.031),
                "unasked": kind(0.02, 0.017),
                "dropped_more": about(0.014, 0.009),
            }
            for plan in ("base", "distilled")
        },
        "concepts": [],
    }
