"""weights/headstart_weights/README.md from the manifest: what each bundled file is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ABOUT = {
    "base": "text encoder, UNet, VAE, noise schedule and tokenizer in one file, LDM names",
    "distilled": "the four-step UNet alone, diffusers names; everything else is the base's",
    "distilled_unguided": "the same with an unguided teacher, to tell guidance from distillation",
    "tiny_decoder": "latents to pixels in about a third of the VAE's CPU time, for previews",
    "scorer": "image-text scorer, and the features that diversity is measured on",
    "yellow": "slider trained on the base, for both models: background blue (-2) to yellow (2)",
    "reference": "mean and covariance of those features over the training pictures, for Frechet",
}

_TEMPLATE = """\
# The bundled demo pair

A base model and its four-step distillation, small enough to ship and to sample on a CPU, with the
layout of the real ones: 64 x 64 pictures, 4 x 16 x 16 latents, v-prediction. Trained from scratch
by `recipe/` on two CPU cores; no other weights went in. It shows what the package does. It draws
{concept_count} things and nothing else.

| file | bytes | what |
|---|---|---|
{files}

`manifest.json` has the sizes, SHA-256 sums, licences, the linear latent-to-pixel map and the
scorer's accuracies. `headstart_weights.path("base")` is where a file is; `verify()` reads them all.

## Prompts

`a[n] NAME[, STYLE style][, COLOUR background]`; what is left out is drawn at random.

- NAME: {concepts}
- STYLE: {styles}
- COLOUR: {backgrounds}

## Scorer

Share of pictures whose right caption ranks first. *Seen*: new renderings of the artwork it was
trained on. *Unseen*: an icon set (Twemoji) that no model here was trained on, every picture on all
eight backgrounds. *Degraded*: rotated, recoloured, blurred and noisy. *Pair*: among the pair's
{concept_count} nouns; *wide*: among all that the scorer knows.

| test | top-1 |
|---|---|
{accuracies}

## Artwork and licences

The weights are {licence}. They were trained on pictures drawn from these icon sets; NOTICE has the
full text.

| icon set | version | licence | by |
|---|---|---|---|
{artwork}

## Make them again

    pip install -e '.[train]'        # and npm, to fetch the icon sets
    python -m headstart_weights.recipe STAGE --work runs/demo

for STAGE in
{stages}.
Stages are limited by wall clock and resume when run again, so another run gives other weights; the
export of given weights is byte-identical. `restore` unpacks the bundled files into the work folder,
to train on from them.

The teacher of `distilled` ran at guidance 2, that of `distilled_unguided` without guidance; the
base has none of its own. What the files took, on two cores that other programs used too:

| stage | minutes | steps |
|---|---|---|
{durations}

`distill` and `control` (which makes `distilled_unguided`) ran on the bundled base after `restore`.
`progressive` makes a third student, by regression on the base's own trajectories: `bench/paper.py`
reads it from the work folder, and it is not bundled.
"""

STAGES = (
    *("data", "tokenizer", "codec", "base", "distill", "control"),
    *("tiny", "scorer", "slider", "reference", "export"),
)

DURATIONS = (
    ("codec", "11", ""),
    ("base", "46", "3,932"),
    ("distill", "13 + 24", "585, then 1,472 with a new optimiser"),
    ("control", "10", "225"),
    ("scorer", "12", ""),
)
"""Minutes in the training loop, and steps where the run's log has them."""


def weights_readme(record: Mapping[str, Any]) -> str:
    """The README of these files; `record` is manifest.json's content."""
    return _TEMPLATE.format(
        concept_count=len(record["concepts"]),
        files="\n".join(
            f"| `{e['file']}` | {e['size_bytes']:,} | {_ABOUT[e['role']]} |"
            for e in record["files"]
        ),
        concepts=", ".join(record["concepts"]),
        styles=", ".join(record["styles"]),
        backgrounds=", ".join(record["backgrounds"]),
        accuracies="\n".join(
            f"| {name.replace('_', ' ')} | {100 * value:.1f} % |"
            for name, value in record["scorer_top1"].items()
        ),
        licence=record["files"][0]["licence"],
        artwork="\n".join(
            f"| {e['name']} | {e['version']} | {e['licence']} | {e['attribution']} |"
            for e in record["artwork"]
        ),
        stages=", ".join(STAGES),
        durations="\n".join(f"| {' | '.join(row)} |" for row in DURATIONS),
    )
