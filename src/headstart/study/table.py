"""The rows of a study as tables of text; the terminal, the page and the PDF print the same ones.

main   every plan, and of each grid the best case
best   the most diverse case whose score (else Frechet distance) is not worse than the distilled
       model's beyond their intervals; where all are worse, the least bad one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

from headstart.metrics.resample import Interval
from headstart.study.digits import NONE, Cell, branch, cells, entries, interval, look_up, plain

Report = Mapping[str, Any]
Row = Mapping[str, Any]
Measure = Callable[[Row], Interval | None]
"""One number of a row."""
COUNTS = ("passes", "networks", "images")
"""Not measured: printed without rounding."""
CONTROL = "-control"
"""The end of the name of a case that is a control, and so never the best of its grid."""
WORSE = "clearly worse"
BEST = (
    "Best of a grid: the most diverse case that is not clearly worse than the distilled model by "
    "its score (without scores: by its Frechet distance). It is chosen on the same prompts that it "
    "is reported on, which flatters it a little."
)


class Line(NamedTuple):
    """One case, or a row of the paper's: why it is here where that needs words, and what it is."""

    case: str
    cells: tuple[Cell, ...]
    why: str = ""
    about: str = ""


class Block(NamedTuple):
    """A table. groups: (heading, the number of columns under it)."""

    title: str
    heads: tuple[str, ...]
    lines: tuple[Line, ...]
    first: str = "case"
    groups: tuple[tuple[str, int], ...] = ()


def subject_of(report: Report) -> str:
    """Lineage, prompts and seeds, feature spaces and reference, on one line."""
    prompts, seeds = len(entries(report, "prompts")), look_up(report, "seeds", "count")
    parts = [
        f"{prompts} prompt{'s' * (prompts != 1)}, {NONE if seeds is None else seeds} seeds each",
        f"diversity by {', '.join(spaces_of(report)) or NONE}",
    ]
    if lineage := look_up(report, "pair", "lineage"):
        parts.insert(0, f"lineage {lineage}")
    if reference := branch(report, "reference"):
        images = reference.get("images")
        count = f", {images} images" if images else ""
        parts.append(f"reference: {reference.get('name', NONE)}{count}")
    return plain(" · ".join(parts), 600)


def rows_of(report: Report) -> dict[str, Row]:
    return {case: row for case, row in branch(report, "rows").items() if branch(row)}


def spaces_of(report: Report) -> list[str]:
    """Feature spaces by name, the main one first."""
    return [str(space["name"]) for space in entries(report, "spaces") if look_up(space, "name")]


def part_rows(report: Report, *parts: str) -> dict[str, Row]:
    return {case: row for case, row in rows_of(report).items() if row.get("part") in parts}


def in_space(space: str, name: str) -> Measure:
    """A number of one feature space; what was recovered in per cent."""
    factor = 100.0 if name == "recovered" else 1.0
    return lambda row: interval(look_up(row, "spaces", space, name), factor)


def of_row(name: str) -> Measure:
    return lambda row: interval(row.get(name))


def grid_of(case: str, row: Row) -> str:
    """The grid that a case lies on: its part, or the plan and method; "" for a plan."""
    part = str(row.get("part"))
    if part != "methods":
        return "" if part == "plans" else part
    plan, plus, _ = case.partition("+")
    method = str(row.get("method") or case)
    return f"{plan}+{method}" if plus else method


def best_cases(report: Report) -> dict[str, str]:
    """Grid -> its best case, in the order of the rows."""
    grids: dict[str, list[str]] = {}
    for case, row in rows_of(report).items():
        if (grid := grid_of(case, row)) and not case.endswith(CONTROL):
            grids.setdefault(grid, []).append(case)
    return {grid: _best(report, cases) for grid, cases in grids.items()}


def _best(report: Report, cases: Sequence[str]) -> str:
    if candidates := [case for case in cases if not is_worse(report, case, cases)]:
        return min(candidates, key=partial(_variety, report))
    measure, sign = _quality(report, cases)
    return max(cases, key=lambda case: _value(report, case, measure, sign))


def is_worse(report: Report, case: str, among: Iterable[str]) -> bool:
    """Whether a case is worse than the distilled model: by the score, prompt by prompt, beyond the
    interval of the difference; beyond both intervals where only these are known, or by the Frechet
    distance where none of the cases `among` it has a score."""
    rows = rows_of(report)
    measure, sign = _quality(report, among)
    if sign > 0 and (difference := interval(rows[case].get("score_less_distilled"))) is not None:
        return difference.span[1] < 0
    number, distilled = measure(rows[case]), measure(branch(rows, "distilled"))
    if number is None or distilled is None:
        return False
    lower, higher = (number, distilled) if sign > 0 else (distilled, number)
    return lower.span[1] < higher.span[0]


def _quality(report: Report, cases: Iterable[str]) -> tuple[Measure, float]:
    """The measure of these cases' quality, and 1.0 where more is better, else -1.0."""
    rows, spaces = rows_of(report), spaces_of(report)
    score = of_row("score")
    if not spaces or any(score(rows[case]) is not None for case in cases):
        return score, 1.0
    return in_space(spaces[0], "frechet"), -1.0


def _variety(report: Report, case: str) -> float:
    """Sorts the most diverse first."""
    spaces = spaces_of(report)
    measure = in_space(spaces[0], "diversity") if spaces else of_row("score")
    return -_value(report, case, measure)


def _value(report: Report, case: str, measure: Measure, sign: float = 1.0) -> float:
    number = measure(rows_of(report)[case])
    return -math.inf if number is None else sign * number.value


def main_cases(report: Report) -> dict[str, str]:
    """Case -> why it is in the main table; "" for a plan."""
    plans = dict.fromkeys(part_rows(report, "plans"), "")
    return plans | {case: f"best of {grid}" for grid, case in best_cases(report).items()}


def blocks(report: Report, cases: Mapping[str, str], *, counts: bool) -> list[Block]:
    """The tables of these cases (case -> why it is in them), one for each feature space.

    counts  with the number of images of each
    """
    spaces = {
        f"diversity by {space}": {
            "diversity": in_space(space, "diversity"),
            "recovered, %": in_space(space, "recovered"),
            "Vendi": in_space(space, "vendi"),
            "Frechet": in_space(space, "frechet"),
        }
        for space in spaces_of(report)
    }
    (title, main), *others = (spaces or {"cases": dict[str, Measure]()}).items()
    first = {head: of_row(head) for head in (COUNTS if counts else COUNTS[:2])}
    last = {head: of_row(head) for head in ("score", "nearest")}
    tables = [(title, {**first, "s/image": of_row("seconds"), **main, **last}), *others]
    all_blocks = (block(report, cases, title, columns) for title, columns in tables)
    return [block for block in all_blocks if block.heads]


def block(
    report: Report, cases: Mapping[str, str], title: str, columns: Mapping[str, Measure]
) -> Block:
    """A table of these columns, without those of which no case has a number."""
    rows = [rows_of(report)[case] for case in cases]
    texts: dict[str, list[Cell]] = {}
    for head, measure in columns.items():
        values = [measure(row) for row in rows]
        if head in COUNTS and any(values):
            texts[head] = [Cell(NONE if n is None else f"{n.value:.10g}") for n in values]
        elif any(values):
            texts[head] = cells(values)
    lines: list[Line] = []
    for number, ((case, why), row) in enumerate(zip(cases.items(), rows, strict=True)):
        row_cells = tuple(column[number] for column in texts.values())
        lines.append(Line(plain(case, 60), row_cells, plain(why), plain(row.get("about", ""))))
    return Block(plain(title), tuple(texts), tuple(lines))


def cost_groups(report: Report) -> list[Block]:
    """Tables of methods and plans of equal cost: by networks in memory, then passes.

    Scores are less the base's, so that 0 is as good as the base.
    """
    spaces, rows = spaces_of(report), rows_of(report)
    cases = part_rows(report, "plans", "methods")
    cases |= {case: rows[case] for case in best_cases(report).values()}
    columns = {
        **{f"by {space}, %": in_space(space, "recovered") for space in spaces},
        "score - base's": score_less_base(report),
        "Frechet": in_space(spaces[0] if spaces else "", "frechet"),
        "nearest": of_row("nearest"),
        "s/image": of_row("seconds"),
    }
    costs: dict[tuple[float, float], dict[str, str]] = {}
    for case in sorted(cases, key=partial(_variety, report)):
        networks, passes = (interval(cases[case].get(name)) for name in ("networks", "passes"))
        if networks is not None and passes is not None:
            why = WORSE if is_worse(report, case, cases) else ""
            costs.setdefault((networks.value, round(passes.value, 2)), {})[case] = why
    groups: list[Block] = []
    for (networks, passes), group in sorted(costs.items()):
        if len(group) > 1 or "methods" in {cases[case].get("part") for case in group}:
            words = {1: "one network", 2: "two networks"}
            count = words.get(int(networks), f"{networks:g} networks")
            title = f"recovered diversity: {count} in memory, {passes:g} pass"
            title += f"{'es' * (passes != 1)} an image"
            clearly_worse_last = dict(sorted(group.items(), key=itemgetter(1)))
            groups.append(block(report, clearly_worse_last, title, columns))
    return groups


def score_less_base(report: Report) -> Measure:
    """The score less the base's: prompt by prompt where the report has that, else with the interval
    of the score instead of that of the difference."""
    base = interval(look_up(report, "rows", "base", "score"))

    def measure(row: Row) -> Interval | None:
        difference, score = interval(row.get("score_less_base")), interval(row.get("score"))
        if difference is not None or base is None or score is None:
            return difference
        return Interval(*(number - base.value for number in score))

    return measure


def table(report: Report) -> str:
    """The main table for a terminal, one for each feature space."""
    tables = blocks(report, main_cases(report), counts=False)
    lines = [line for block in tables for line in (block.title, *aligned(block), "")]
    return "\n".join((*lines, *legend_of(report)))


def legend_of(report: Report) -> list[str]:
    """Explanations of the numbers of the main table."""
    first = f"{intervals_of(report)} Recovered: 0 % is the distilled model, 100 % the base."
    return [first, BEST] if best_cases(report) else [first]


def intervals_of(report: Report) -> str:
    """One prompt has no interval over prompts; its diversity has one over its seeds."""
    over = "prompts" if len(entries(report, "prompts")) != 1 else "the seeds of the one prompt"
    return f"In brackets: 95 % intervals over {over}."


def aligned(table: Block) -> list[str]:
    """The lines of a table, its heads first, in columns for a monospaced font."""
    names = [line.case + (f" ({line.why})" if line.why else "") for line in table.lines]
    lines = [[table.first, *table.heads]]
    lines += [[name, *map(str, line.cells)] for name, line in zip(names, table.lines, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])])
        for name, *numbers in lines
    ]
