"""What `bench/paper.py` found, as tables, plots and contact sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from paper_cases import Case
from paper_cells import Lab

from headstart.pictures.sheet import Row, draw_sheet

PAPER, INK, FAINT = "#fbfaf7", "#2b2926", "#e4e0d9"
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "base": ("base", "#33658a", ("base-unguided", "base", "base-8", "base-interval",
                                 "base-cads", "base-particle")),
    "distilled": ("distilled", "#c2410c", ("distilled", "skip-first", "replace-last",
                                           "replace-final")),
    "hybrid": ("hybrid, k = 1, 2, 3", "#7b2d8b", ("hybrid", "hybrid-k2", "hybrid-k3")),
    "hybrid-n": ("hybrid, base sub-steps", "#b06fc0", ("hybrid", "hybrid-n8", "hybrid-n12",
                                                        "hybrid-n16", "hybrid-n20", "hybrid-n40")),
    "guided": ("hybrid, base step guided", "#d6a5de", ("hybrid", "hybrid-g1.5", "hybrid-g2",
                                                       "hybrid-g3", "hybrid-g5", "hybrid-g7")),
    "cads": ("CADS", "#3f7d20", ("distilled", "cads-0.1", "cads-0.25", "cads-0.5")),
    "particle": ("particle guidance", "#a98467", ("distilled", "particle-64", "particle-96",
                                                  "particle-128", "particle-192")),
    "pink": ("pink noise", "#e56b9d", ("distilled", "pink-0.5", "pink-1")),
    "select": ("candidates", "#6b6e70", ("distilled", "select-2", "select-4")),
    "global": ("adapter, all steps", "#1b998b", ("global-1", "global-0.75", "global-0.5",
                                                 "global-0.25")),
    "first": ("adapter, first step", "#7bd3c8", ("global-1", "first-0.75", "first-0.5",
                                                  "first-0.25", "first-0")),
}  # fmt: skip
"""Legend, colour, and the cases that a line goes through, weakest first."""
LABELS: dict[str, tuple[str, int, int]] = {
    "base": ("base", 10, 7), "base-unguided": ("base, unguided", 10, 4),
    "base-8": ("base, 8 steps", -4, -17), "base-interval": ("base, interval", 1, -25),
    "base-cads": ("base, CADS", 10, 4), "base-particle": ("base, particle", 10, 6),
    "distilled": ("distilled", 10, -7), "skip-first": ("skip first", -8, 5),
    "hybrid": ("hybrid", -8, 6), "hybrid-k2": ("k=2", 8, -4), "hybrid-k3": ("k=3", 9, -1),
    "hybrid-n40": ("n=40", 8, 3), "replace-final": ("replace final", 8, -16),
}  # fmt: skip
"""Case -> its label on the plot, and how far from the dot, in points; a negative dx ends there."""
SHEETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sheet": ("The paper's cases", ("base", "distilled", "hybrid", "hybrid-k2", "skip-first",
                                    "replace-final", "progressive-distilled",
                                    "progressive-hybrid")),
    "methods": ("Other methods", ("hybrid", "cads-0.25", "cads-0.5", "particle-96",
                                  "particle-192", "pink-1", "select-4", "global-0.5", "first-0")),
}  # fmt: skip


def tables(report: Mapping[str, Any]) -> str:
    """Markdown: every case, then figures 5 and 7's numbers as sentences."""
    lines = [
        "| case | passes | diversity [95 %] | recovered | Vendi | top-1 | score | Frechet [95 %] | "
        "precision | recall | held-out Frechet |",
        "|" + "---|" * 11,
    ]
    for name, row in report["rows"].items():
        lines.append("| " + " | ".join([f"{name}: {row['about']}", *_cells(row)]) + " |")
    timed = report["seconds"]
    if timed:
        told = [f"{k} {v['p50']:.2f}" for k, v in timed.items() if isinstance(v, Mapping)
                and "p50" in v]  # fmt: skip
        lines.append(f"\nseconds for {timed['images']} images, all included: {', '.join(told)}")
    if report["figure 5"]:
        lines.append(f"\nbase steps to match a first step: {report['figure 5']['matches']}")
    for found in report["adaptive"] or ():
        lines.append(
            f"\nadaptive, mean k {found['mean_k']:.2f}: diversity {found['diversity']} (dealt "
            f"{found['dealt_diversity']}, p {found['p_diversity']:.3f}), Frechet "
            f"{found['frechet']} (dealt {found['dealt_frechet']}, p {found['p_frechet']:.3f})"
        )
    if report["missing"]:
        lines.append(f"\nnot drawn: {', '.join(report['missing'])}")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    spread, back = row["diversity"], row.get("recovered")
    low, high = spread["over_prompts_95"] or spread["over_seeds_95"]
    near, apart = row.get("neighbours"), row["frechet"]
    return [
        f"{row['passes']:g}",
        f"{spread['value']:.3f} [{low:.3f}, {high:.3f}]",
        "" if back is None else f"{100 * back[0]:.0f} % [{100 * back[1]:.0f}, {100 * back[2]:.0f}]",
        f"{row['vendi']['value']:.2f}",
        f"{100 * row['top1']['value']:.1f} %",
        f"{row['score']['value']:.3f}",
        f"{apart[0]:.4f} [{apart[1]:.4f}, {apart[2]:.4f}]",
        "" if near is None else f"{near['precision']:.2f}",
        "" if near is None else f"{near['recall']:.2f}",
        f"{row['frechet_held_out']:.3f}" if "frechet_held_out" in row else "",
    ]


def plot_all(report: Mapping[str, Any], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
         "figure.facecolor": PAPER, "axes.facecolor": PAPER, "text.color": INK}
    )  # fmt: skip
    _plot_trade(plt, report, out.with_suffix(".png"))
    if {"hybrid-g2", "hybrid-k2", "hybrid-n8"} <= set(report["rows"]):
        _plot_figure_7(plt, report, out.with_name(f"{out.stem}_figure7.png"))
    plt.close("all")


def _plot_trade(plt: Any, report: Mapping[str, Any], path: Path) -> None:
    """Diversity against Frechet; the area of a dot is its network passes."""
    rows = report["rows"]
    figure, axis = plt.subplots(figsize=(10.5, 7.2))
    for label, colour, names in FAMILIES.values():
        own = [rows[name] for name in names if name in rows]
        if len(own) < 2:
            continue
        x = [row["diversity"]["value"] for row in own]
        y = [row["frechet"][0] for row in own]
        sizes = [_area(row["passes"]) for row in own]
        if label != "base":
            axis.plot(x, y, color=colour, linewidth=1.2, alpha=0.6, zorder=1)
        axis.scatter(x, y, s=sizes, color=colour, label=label, edgecolor=PAPER, zorder=2)
    for name, (label, *away) in LABELS.items():
        if name in rows:
            at = rows[name]["diversity"]["value"], rows[name]["frechet"][0]
            side = "right" if away[0] < 0 else "left"
            axis.annotate(label, at, xytext=away, textcoords="offset points", fontsize=9, ha=side)
    axis.set_yscale("log")
    axis.invert_yaxis()
    ticks = [v for v in (0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5) if _inside(v, axis.get_ylim())]
    axis.set_yticks(ticks, [f"{v:g}" for v in ticks])
    axis.minorticks_off()
    axis.set_xlabel("diversity: mean cosine distance of two seeds of a prompt")
    axis.set_ylabel("Frechet distance to the training pictures (better is up)")
    axis.grid(color=FAINT)
    first = axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9.5)
    for handle in first.legend_handles:
        handle.set_sizes([45.0])
    axis.add_artist(first)
    dots = [
        axis.scatter([], [], s=_area(passes), color="#9b9791", label=f"{passes}")
        for passes in (3, 4, 8, 16, 60)
    ]
    axis.legend(
        handles=dots, title="network passes", frameon=False, loc="lower left",
        bbox_to_anchor=(1.0, 0.0), labelspacing=1.1, borderpad=1.0,
    )  # fmt: skip
    axis.set_title(
        f"Varied and right, at what cost: {len(report['prompts'])} prompts x "
        f"{1 + report['seeds'][1] - report['seeds'][0]} seeds, bundled pair", loc="left",
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _area(passes: float) -> float:
    return 14.0 * passes**0.75 + 10.0


def _inside(value: float, limits: tuple[float, float]) -> bool:
    return min(limits) <= value <= max(limits)


def _plot_figure_7(plt: Any, report: Mapping[str, Any], path: Path) -> None:
    rows = report["rows"]
    panels = (
        ("(a) guidance of the base step", ("hybrid", "hybrid-g1.5", "hybrid-g2", "hybrid-g3",
                                           "hybrid-g5", "hybrid-g7"), (1, 1.5, 2, 3, 5, 7)),
        ("(b) k, steps the base takes of 4", ("distilled", "hybrid", "hybrid-k2", "hybrid-k3",
                                              "hybrid-k4"), (0, 1, 2, 3, 4)),
        ("(c) base steps for the first one", ("hybrid", "hybrid-n8", "hybrid-n12", "hybrid-n16",
                                              "hybrid-n20", "hybrid-n40"), (1, 2, 3, 4, 5, 10)),
    )  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.2))
    twins = [axis.twinx() for axis in axes]
    for axis, other, (title, names, at) in zip(axes, twins, panels, strict=True):
        own = [rows[name] for name in names]
        values = np.array([row["diversity"]["value"] for row in own])
        ends = np.array([row["diversity"]["over_prompts_95"] for row in own]).T
        apart = np.array([row["frechet"] for row in own]).T
        axis.plot(at, values, color="#7b2d8b", marker="o", markersize=5)
        axis.fill_between(at, *ends, color="#7b2d8b", alpha=0.15, linewidth=0)
        other.plot(at, apart[0], color="#c2410c", marker="s", markersize=4, linestyle="--")
        other.fill_between(at, apart[1], apart[2], color="#c2410c", alpha=0.12, linewidth=0)
        axis.set_ylim(0, None)
        other.set_ylim(0, None)
        axis.set_xticks(at, [f"{v:g}" for v in at])
        axis.set_title(title, loc="left", fontsize=11.5)
        axis.grid(axis="y", color=FAINT)
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)
    axes[0].set_ylabel("diversity", color="#7b2d8b")
    twins[-1].set_ylabel("Frechet distance (dashed)", color="#c2410c")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def sheets(lab: Lab, wanted: Mapping[str, Case], out: Path) -> None:
    """Eight seeds of one prompt, a row a case; the prompt is the second one, whatever it shows."""
    prompt = lab.prompts[1]
    for suffix, (title, names) in SHEETS.items():
        rows: list[Row] = []
        for name in names:
            case = wanted.get(name)
            known = case is not None and case.student in lab.digests
            cell = lab.read(name, case, prompt) if case is not None and known else None
            if cell is not None and case is not None:
                notes = (f"{cell.passes:g} passes", *_wrapped(case.about))
                rows.append(Row(name=name, images=cell.rgb[:8], notes=notes))
        if rows:
            _sheet(rows, title, prompt, lab.seeds).save(out.with_name(f"{out.stem}_{suffix}.png"))


def _sheet(rows: Sequence[Row], title: str, prompt: str, seeds: Sequence[int]) -> Any:
    return draw_sheet(
        rows,
        title=title,
        subtitle=f"{prompt} · seeds {seeds[0]} to {seeds[7]}, the same in every row but select",
        columns=[str(seed) for seed in seeds[:8]],
        footer="the bundled pair, 64 px; drawn by python bench/paper.py",
    )


def _wrapped(text: str) -> tuple[str, ...]:
    """At most two notes of about 28 letters."""
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 27 and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return tuple(lines[:2])
