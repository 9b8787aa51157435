"""The numbers of arXiv:2503.10637 v4 (Gandikota and Bau), quoted, and what may be set against them.

SDXL and DMD2 unless a table says otherwise. The paper prints no intervals, seeds, hardware,
precision or batch size; figures 5 and 7 are plots without numbers, so they are described in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headstart.study.digits import entries, high_of, interval, look_up, low_of, plain
from headstart.study.table import part_of, rows_of, spaces_of

Report = Mapping[str, Any]

PAPER: dict[str, Any] = {
    "source": "arXiv:2503.10637 v4, quoted: SDXL and DMD2 unless said otherwise",
    "table 1": {
        "what": "change of the CLIP score in %, original to edited image, adapters trained on SDXL",
        "columns": ["base", "dmd", "lcm", "turbo", "lightning"],
        "slider, age": [20.4, 17.8, 27.1, 19.0, 24.8],
        "slider, smile": [19.7, 21.4, 19.5, 33.5, 14.0],
        "slider, muscular": [34.6, 26.7, 33.8, 39.0, 33.2],
        "customization, lego": [32.2, 26.8, 26.0, 30.3, 29.7],
        "customization, watercolor": [34.3, 31.4, 29.6, 27.5, 39.2],
        "customization, crayon": [32.7, 27.8, 24.7, 29.5, 32.5],
        "SliderSpace, direction 1": [29.3, 28.1, 24.1, 27.7, 22.4],
        "SliderSpace, direction 16": [32.9, 32.0, 33.4, 28.1, 29.9],
        "SliderSpace, direction 32": [30.7, 28.9, 29.3, 30.5, 31.4],
    },
    "table 2": {
        "what": "mean pairwise DreamSim distance, 100 images a prompt",
        "columns": ["base", "distilled", "hybrid"],
        "sunset beach": [0.396, 0.271, 0.373],
        "cute puppy": [0.233, 0.199, 0.265],
        "futuristic city": [0.237, 0.198, 0.283],
        "person": [0.484, 0.347, 0.461],
        "Van Gogh art": [0.337, 0.305, 0.366],
        "average": [0.337, 0.264, 0.350],
    },
    "table 3": {
        "what": "COCO-30k",
        "columns": ["steps", "FID", "IS", "CLIP", "seconds"],
        "base": [50, 12.74, 24.74, 31.83, 9.22],
        "distilled": [4, 15.52, 27.20, 31.69, 0.64],
        "hybrid": [4, 10.79, 26.13, 32.12, 0.64],
        "skip-first": [3, 10.12, 24.69, 31.71, 0.53],
    },
    "table D.1": {
        "what": "other pairs: mean pairwise DreamSim, 'image of a car', 100 images",
        "columns": ["base", "distilled", "hybrid", "base seconds", "distilled seconds"],
        "PixArt-alpha, PixArt-delta": [0.342, 0.198, 0.339, 4.1, 0.9],
        "SD 2.1, SD-Turbo": [0.298, 0.171, 0.294, 3.2, 0.7],
    },
    "table E.1": {
        "what": "mean pairwise DreamSim and seconds, 'image of a car', 100 images",
        "columns": ["diversity", "seconds"],
        "base": [0.357, 9.22],
        "distilled": [0.264, 0.64],
        "hybrid": [0.350, 0.64],
        "replace-final": [0.251, 6.61],
    },
    "figure 5": "the base needs about 30 % of its steps for what a distilled model shows after one "
    "(DreamSim between x0 and the finished picture, prompts of COCO-10k)",
    "figure 7": "best for DMD2: (a) no guidance on the base's step, (b) k = 1, (c) n = 4, the "
    "distilled model's own steps",
}
PLANS = ("base", "distilled", "hybrid", "skip-first", "replace-final")
FEW_PROMPTS = 10
"""Below this the percentile interval of a mean is known to be too narrow."""
WIDE = 1.0
"""A recovered share whose interval is wider than all that was lost."""
FID_IMAGES = 30_000


def quoted(plan: str) -> dict[str, float | None]:
    """What the paper prints of a plan in tables 2, 3 and E.1, by column."""

    def of(name: str, row: str, column: str) -> float | None:
        whole = PAPER[name]
        return whole[row][whole["columns"].index(column)] if row in whole else None

    averages = PAPER["table 2"]
    return {
        "DreamSim, table 2": of("table 2", "average", plan)
        if plan in averages["columns"]
        else None,
        "DreamSim, table E.1": of("table E.1", plan, "diversity"),
        "FID": of("table 3", plan, "FID"),
        "CLIP": of("table 3", plan, "CLIP"),
        "seconds": of("table E.1", plan, "seconds") or of("table 3", plan, "seconds"),
    }


def recovered(plan: str) -> float | None:
    """(diversity - distilled) / (base - distilled) of table 2's averages: our division."""
    own = quoted(plan)["DreamSim, table 2"]
    base, distilled = (quoted(name)["DreamSim, table 2"] for name in ("base", "distilled"))
    if own is None or base is None or distilled is None:
        return None
    return (own - distilled) / (base - distilled)


def comparable(report: Report) -> list[str]:
    """Sentences on what may be compared with what: as many as this report gives reason for."""
    return [
        *_networks(report),
        *_diversity(report),
        *_fidelity(report),
        *_costs(report),
        *_intervals(report),
        *_experiments(report),
    ]


def _networks(report: Report) -> list[str]:
    preset = str(look_up(report, "pair", "preset") or "")
    lineage = str(look_up(report, "pair", "lineage") or "")
    found = [
        "Within one table every case has the same prompts, seeds and weights: compare those freely."
    ]
    if lineage == "sdxl" and preset.removeprefix("paper-") == "dmd2":
        found.append(
            "The paper measured SDXL and DMD2 too, but prints neither its prompts in full nor its "
            "seeds: its numbers and ours should be near each other, not equal."
        )
    else:
        own = plain(preset or "this pair", 40)
        found.append(
            f"The paper's numbers are of SDXL and DMD2, ours of {own}: they stand beside each "
            "other, not against each other. Compare the order of plans, and how much comes back."
        )
        if {"turbo", "lightning", "lcm"} & {*preset.split("-")}:
            found.append(
                "For Turbo, Lightning and LCM the paper prints no diversity or FID of the hybrid; "
                "they are in its table 1 alone."
            )
    return found


def _diversity(report: Report) -> list[str]:
    spaces = spaces_of(report)
    known = [space for space in spaces if "dreamsim" in space.lower()]
    found = [
        "Diversities of two feature spaces have two scales: compare them within a space only; the "
        "share recovered is what can be read across."
    ] * (len(spaces) > 1)
    if known:
        found.append(
            f"{plain(known[0], 60)} is the paper's measure, if the same DreamSim networks are in "
            "it: of those columns alone the size may be set beside its tables 2, D.1 and E.1."
        )
    elif spaces:
        found.append(
            "The paper's diversity is a mean pairwise DreamSim distance. No column here is "
            "DreamSim, so no size here may be set against its tables 2, D.1 and E.1."
        )
    found.append(
        "A mean pairwise distance does not depend on the number of images; a Vendi score and a "
        "Frechet distance do: compare those at equal numbers of images only."
    )
    return [*found, *filter(None, (_weak(report, space) for space in spaces))]


def _weak(report: Report, space: str) -> str:
    """Recovered is a division by what distillation lost: nothing sure, if that is little."""
    back = interval(look_up(rows_of(report), "hybrid", "spaces", space, "recovered"))
    if back is None or not high_of(back) - low_of(back) > WIDE:
        return ""
    return (
        f"By {plain(space, 60)} the base and the distilled model differ too little, or too "
        "unevenly, for a share that came back: its interval says next to nothing."
    )


def _fidelity(report: Report) -> list[str]:
    rows, spaces = rows_of(report), spaces_of(report)
    found: list[str] = []
    if any(row.get("score") for row in rows.values()):
        found.append(
            "The paper's CLIP score is 100 times a cosine by a CLIP that it does not name; a score "
            "here is the cosine by the space that read the prompts, and compares with its own only."
        )
    inception = [space for space in spaces if "inception" in space.lower()]
    measured = {
        space
        for space in spaces
        for row in rows.values()
        if look_up(row, "spaces", space, "frechet") is not None
    }
    counts = [interval(row.get("images")) for row in rows.values()]
    most = max((count.value for count in counts if count is not None), default=0.0)
    if measured and not (measured & {*inception} and most >= FID_IMAGES):
        found.append(
            "A Frechet distance here is no FID: that needs Inception features and 30,000 images "
            f"against COCO, and here are {most:.0f} at most"
            + ("." if inception else ", in another feature space.")
            + " With few images it is too large for every case alike."
        )
    elif measured:
        found.append(
            "A Frechet distance by Inception on 30,000 images is an FID; it compares with the "
            "paper's if prompts and reference pictures are those of COCO-30k."
        )
    else:
        found.append(
            "Without reference pictures there is no Frechet distance, so nothing stands beside the "
            "paper's FID."
        )
    if any(row.get("nearest") for row in rows.values()):
        found.append(
            "The nearest-picture distance says how close images come to the reference pictures: "
            "one far below the base's would be copying. It depends on which pictures those are."
        )
    return found


def _costs(report: Report) -> list[str]:
    found = [
        "Seconds are of this machine and batch, text encoder and decoder included; the paper names "
        "no hardware. Network passes and networks in memory compare anywhere."
    ]
    if part_of(report, "methods"):
        found.append(
            "A method is fairly compared with what costs the same passes and keeps as many "
            "networks in memory; its strengths are a short grid, not tuned to these prompts."
        )
    return found


def _intervals(report: Report) -> list[str]:
    count = len(entries(report, "prompts"))
    if count == 1:
        return ["One prompt says nothing of other prompts: intervals there are are over its seeds."]
    found = [
        "Intervals are 95 % over prompts: two that overlap may still differ surely, as both cases "
        "have the same prompts and seeds. The paper prints no intervals."
    ]
    if count < FEW_PROMPTS:
        found.append(f"With {count} prompts an interval is narrower than it should be.")
    return found


def _experiments(report: Report) -> list[str]:
    found: list[str] = []
    if report.get("curve"):
        found.append(
            "The shares of a finished picture depend on the feature space; the paper's figure 5 is "
            "by DreamSim on prompts of COCO. Compare which step is reached when."
        )
    if report.get("control"):
        found.append(
            "The paper states neither prompts nor strengths of its table 1, and guidance differs "
            "between its columns: compare whether an adapter still acts, not by how many per cent."
        )
    if report.get("timeline"):
        found.append(
            "The paper shows one course of concepts, without a rate; here concepts that nobody "
            "asked for are counted beside those that were."
        )
    return found
