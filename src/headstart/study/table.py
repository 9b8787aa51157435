"""The rows of a study as tables of text; the terminal, the page and the PDF print the same ones.

main   every plan, and of each grid the best case
best   the most diverse case whose score (else Frechet distance) is not worse than the distilled
       model's beyond their intervals; where all are worse, the least bad one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from headstart.metrics.resample import Interval
from headstart.study.digits import (
    NONE,
    Cell,
    branch,
    cell,
    entries,
    high_of,
    interval,
    less,
    look_up,
    low_of,
    places,
    plain,
    scaled,
)

Row = Mapping[str, Any]
Rows = Mapping[str, Row]
CONTROL = "-control"
"""How the name of a case ends that shows what a grid's model is not: it is never the best."""
WORSE = "clearly worse"
BEST = (
    "Best of a grid: the most diverse case that is not clearly worse than the distilled model by "
    "its score (without scores: by its Frechet distance). It is chosen on the same prompts that it "
    "is reported on, which flatters it a little."
)


class Line(NamedTuple):
    """One case: its name, what it is, and why it is here where that needs words."""

    case: str
    about: str
    cells: tuple[Cell, ...]
    why: str = ""


class Block(NamedTuple):
    title: str
    heads: tuple[str, ...]
    lines: tuple[Line, ...]


class Column(NamedTuple):
    """One number of a row."""

    head: str
    of: Callable[[Row], Interval | None]
    exact: bool = False
    """Counted, not measured: printed as it is."""


def subject_of(report: Mapping[str, Any]) -> str:
    """How much was drawn, and what it was measured with."""
    count, seeds = len(entries(report, "prompts")), look_up(report, "seeds", "count")
    parts = [
        f"{count} prompt{'s' * (count != 1)}, {NONE if seeds is None else seeds} seeds each",
        f"diversity by {', '.join(spaces_of(report)) or NONE}",
    ]
    if lineage := look_up(report, "pair", "lineage"):
        parts.insert(0, f"lineage {lineage}")
    if reference := branch(report, "reference"):
        images = reference.get("images")
        counted = f", {images} images" if images else ""
        parts.append(f"reference: {reference.get('name', NONE)}{counted}")
    return plain(" · ".join(parts), 600)


def rows_of(report: Mapping[str, Any]) -> Rows:
    return {case: own for case, own in branch(report, "rows").items() if branch(own)}


def spaces_of(report: Mapping[str, Any]) -> list[str]:
    """Feature spaces by name, the main one first."""
    return [str(space["name"]) for space in entries(report, "spaces") if look_up(space, "name")]


def part_of(report: Mapping[str, Any], *parts: str) -> dict[str, Row]:
    return {case: row for case, row in rows_of(report).items() if row.get("part") in parts}


def in_space(space: str, name: str, factor: float = 1.0) -> Callable[[Row], Interval | None]:
    def found(row: Row) -> Interval | None:
        return scaled(interval(look_up(row, "spaces", space, name)), factor)

    return found


def of_row(name: str) -> Callable[[Row], Interval | None]:
    return lambda row: interval(row.get(name))


def grid_of(case: str, row: Row) -> str:
    """The grid that a case lies on: its part, or the plan and method; "" for a plan."""
    part = str(row.get("part"))
    if part != "methods":
        return "" if part == "plans" else part
    plan, plus, _ = case.partition("+")
    method = str(row.get("method") or case)
    return f"{plan}+{method}" if plus else method


def best_cases(report: Mapping[str, Any]) -> dict[str, str]:
    """Grid -> its best case, in the order of the rows."""
    grids: dict[str, list[str]] = {}
    for case, row in rows_of(report).items():
        if (grid := grid_of(case, row)) and not case.endswith(CONTROL):
            grids.setdefault(grid, []).append(case)
    return {grid: _best(report, own) for grid, own in grids.items()}


def _best(report: Mapping[str, Any], cases: Sequence[str]) -> str:
    rows, measure, sign = rows_of(report), *_right(report, cases)
    if kept := [case for case in cases if not is_worse(report, case, cases)]:
        return min(kept, key=partial(_variety, report))
    return max(cases, key=lambda case: _value(scaled(measure(rows[case]), sign)))


def is_worse(report: Mapping[str, Any], case: str, among: Iterable[str]) -> bool:
    """Whether a case is worse than the distilled model: by the score, prompt by prompt, beyond the
    interval of the difference; beyond both intervals where only these are known, or by the Frechet
    distance where none of the cases `among` it has a score."""
    rows = rows_of(report)
    measure, sign = _right(report, among)
    if sign > 0 and (apart := interval(rows[case].get("score_less_distilled"))) is not None:
        return high_of(apart) < 0
    own, least = measure(rows[case]), measure(branch(rows, "distilled"))
    if own is None or least is None:
        return False
    return high_of(own) < low_of(least) if sign > 0 else low_of(own) > high_of(least)


def _right(
    report: Mapping[str, Any], cases: Iterable[str]
) -> tuple[Callable[[Row], Interval | None], float]:
    """What says how right these cases are, and whether more is better."""
    rows, spaces = rows_of(report), spaces_of(report)
    score = of_row("score")
    if not spaces or any(score(rows[case]) is not None for case in cases):
        return score, 1.0
    return in_space(spaces[0], "frechet"), -1.0


def _variety(report: Mapping[str, Any], case: str) -> float:
    """Sorts the most diverse first."""
    spaces = spaces_of(report)
    of = in_space(spaces[0], "diversity") if spaces else of_row("score")
    return -_value(of(rows_of(report)[case]))


def _value(found: Interval | None) -> float:
    return -math.inf if found is None else found.value


def main_cases(report: Mapping[str, Any]) -> dict[str, str]:
    """Case -> why it is in the main table; "" for a plan."""
    found = dict.fromkeys(part_of(report, "plans"), "")
    return found | {case: f"best of {grid}" for grid, case in best_cases(report).items()}


def blocks(report: Mapping[str, Any], cases: Mapping[str, str], *, counts: bool) -> list[Block]:
    """The tables of these cases (case -> why): one of the main space, one of each other.

    counts  with the number of images of each
    """
    spaces = spaces_of(report)
    first = [
        Column("passes", of_row("passes"), exact=True),
        Column("networks", of_row("networks"), exact=True),
        *[Column("images", of_row("images"), exact=True)] * counts,
        Column("s/image", of_row("seconds")),
    ]
    last = [
        Column("score", of_row("score")),
        Column("nearest", of_row("nearest")),
    ]
    main = _columns(spaces[0]) if spaces else []
    title = f"diversity by {spaces[0]}" if spaces else "cases"
    found = [block(report, cases, title, [*first, *main, *last])]
    found += [
        block(report, cases, f"diversity by {space}", _columns(space)) for space in spaces[1:]
    ]
    return [one for one in found if one.heads]


def _columns(space: str) -> list[Column]:
    return [
        Column("diversity", in_space(space, "diversity")),
        Column("recovered, %", in_space(space, "recovered", 100.0)),
        Column("Vendi", in_space(space, "vendi")),
        Column("Frechet", in_space(space, "frechet")),
    ]


def block(
    report: Mapping[str, Any], cases: Mapping[str, str], title: str, columns: Iterable[Column]
) -> Block:
    """A table of these columns, without those of which no case has a number."""
    rows = [rows_of(report)[case] for case in cases]
    values = [(column, [column.of(row) for row in rows]) for column in columns]
    kept = [(column, own) for column, own in values if any(v is not None for v in own)]
    cells = [[_exact(v) for v in own] if c.exact else _cells(own) for c, own in kept]
    lines = [
        Line(
            plain(case, 60),
            plain(row.get("about", "")),
            tuple(column[number] for column in cells),
            plain(why),
        )
        for number, ((case, why), row) in enumerate(zip(cases.items(), rows, strict=True))
    ]
    return Block(plain(title), tuple(column.head for column, _ in kept), tuple(lines))


def _cells(values: Sequence[Interval | None]) -> list[Cell]:
    write = partial(cell, digits=places(values))
    return [write(value) for value in values]


def _exact(value: Interval | None) -> Cell:
    return Cell(NONE if value is None else f"{value.value:.10g}")


def cost_groups(report: Mapping[str, Any]) -> list[Block]:
    """Methods and plans that cost the same stand together: networks in memory, then passes.

    Scores are less the base's, so that 0 is as right as the base.
    """
    spaces, rows = spaces_of(report), rows_of(report)
    cases = {**part_of(report, "plans", "methods")}
    cases |= {case: rows[case] for case in best_cases(report).values()}
    base = interval(look_up(rows, "base", "score"))
    columns = [
        *(Column(f"by {space}, %", in_space(space, "recovered", 100.0)) for space in spaces),
        Column("score - base's", less_than(base)),
        *(Column("Frechet", in_space(space, "frechet")) for space in spaces[:1]),
        Column("nearest", of_row("nearest")),
        Column("s/image", of_row("seconds")),
    ]  # fmt: skip
    costs: dict[tuple[float, float], dict[str, str]] = {}
    for case in sorted(cases, key=partial(_variety, report)):
        networks, passes = (interval(cases[case].get(name)) for name in ("networks", "passes"))
        if networks is not None and passes is not None:
            why = WORSE if is_worse(report, case, cases) else ""
            costs.setdefault((networks.value, round(passes.value, 2)), {})[case] = why
    return [
        block(report, dict(sorted(own.items(), key=lambda one: one[1])),
              f"recovered diversity: {_cost(*cost)}", columns)
        for cost, own in sorted(costs.items())
        if len(own) > 1 or "methods" in {cases[case].get("part") for case in own}
    ]  # fmt: skip


def less_than(base: Interval | None) -> Callable[[Row], Interval | None]:
    """The score less the base's, prompt by prompt where that is known."""

    def measure(row: Row) -> Interval | None:
        return interval(row.get("score_less_base")) or less(interval(row.get("score")), base)

    return measure


def _cost(networks: float, passes: float) -> str:
    kept = {1: "one network", 2: "two networks"}.get(int(networks), f"{networks:g} networks")
    return f"{kept} in memory, {passes:g} pass{'es' * (passes != 1)} an image"


def table(report: Mapping[str, Any]) -> str:
    """The main table for a terminal: one part for each feature space."""
    found: list[str] = []
    for own in blocks(report, main_cases(report), counts=False):
        found += [own.title, *aligned(own), ""]
    return "\n".join((*found, *legend_of(report)))


def legend_of(report: Mapping[str, Any]) -> list[str]:
    """What the numbers of the main table are."""
    found = [f"{intervals_of(report)} Recovered: 0 % is the distilled model, 100 % the base."]
    return [*found, BEST] if best_cases(report) else found


def intervals_of(report: Mapping[str, Any]) -> str:
    """One prompt has no interval over prompts; its diversity has one over its seeds."""
    over = "prompts" if len(entries(report, "prompts")) != 1 else "the seeds of the one prompt"
    return f"In brackets: 95 % intervals over {over}."


def aligned(own: Block) -> list[str]:
    """The lines of a table, its heads first, in columns of letters of one width."""
    names = [line.case + (f" ({line.why})" if line.why else "") for line in own.lines]
    body = [[str(found) for found in line.cells] for line in own.lines]
    wide = max(map(len, ("case", *names)))
    widths = [max(len(head), *(len(row[n]) for row in body)) for n, head in enumerate(own.heads)]
    lines = [["case", *own.heads], *([name, *row] for name, row in zip(names, body, strict=True))]
    return [
        "  ".join([first.ljust(wide), *(c.rjust(w) for c, w in zip(rest, widths, strict=True))])
        for first, *rest in lines
    ]
