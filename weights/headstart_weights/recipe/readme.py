"""weights/headstart_weights/README.md from the manifest: what each bundled file is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headstart_weights.recipe.stages import Stage

_ABOUT = {
    "base": "text encoder, UNet, VAE, noise schedule and tokenizer in one file, LDM names",
    "distilled": "the four-step UNet alone, diffusers names; everything else is the base's",
    "distilled_unguided": "the same with an unguided teacher, after 225 steps of training",
    "tiny_decoder": "latents to pixels in 0.5 to 0.6 of the VAE's CPU time, for previews",
    "scorer": "image-text scorer, and the features that diversity is measured on",
    "yellow": "slider trained on the base, for both models: background blue (-2) to yellow (2)",
    "reference": "mean and covariance of those features over the training pictures, for Frechet",
}

_TEMPLATE = """\
# The bundled demo pair

A base model and its four-step distillation, small enough to ship and to sample on a CPU, with the
layout of the real ones: 64 x 64 pictures, 4 x 16 x 16 latents, v-prediction. Trained from scratch
by `recipe/` on two CPU cores; no other weights went in. It shows what the package does. It draws
{concept_count} things and nothing else: a second noun in a prompt is there in 2 % of pictures, as
often as one that nobody asked for.

Its noise levels are matched to its small latent: every sigma is 0.4 of Stable Diffusion's, and the
four steps lie lower than SDXL's would. Without that, one base step of four brings back much less
(`bench/README.md`). When the student is trained at its second, third or fourth step, half of its
inputs are noised training pictures, the other half its own earlier steps.

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

    pip install -c constraints.txt -e '.[train]'        # and npm, to fetch the icon sets
    python -m headstart_weights.recipe STAGE --work runs/demo

for STAGE in the order of the table. Ended at any moment, a stage goes on where it was when it is
run again. It is limited by minutes (`--minutes`), so another machine gives other weights, or by
steps (`--steps`), which repeats on the same machine; the export of given weights is byte-identical.
`restore` unpacks the bundled files into the work folder, to train on from them: `data` and
`restore` are all that a student needs.

| stage | minutes by default | what the bundled files took, on two cores that others used too |
|---|---|---|
{durations}

The teacher of `distilled` ran at guidance 2, that of `distilled_unguided` without guidance; the
base has none of its own. `distill` and `control` (which makes `distilled_unguided`) ran on the
bundled base after `restore`: first 585 steps, which shipped, then 1,472 more.

Not bundled, read by `bench/` from the work folder: `distill --seed N` (other training runs),
`unnoised` (without noised pictures), `renoise` and `renoise-unnoised` (new noise between steps, as
DMD2's is sampled), `progressive` (regression on the base's own trajectories), `dp` and `renoise-dp`
(the first step is given the base's target, as in DP-DMD), `variety` (after `distill` and `renoise`
of the same seed: low-rank adapters that teach their first step that target).
"""

STAGES = (
    *("data", "tokenizer", "codec", "base", "distill", "control"),
    *("tiny", "scorer", "slider", "reference", "export"),
)

TOOK = {
    "data": "14 seconds, with the icon sets' downloads",
    "tokenizer": "half a second",
    "codec": "11 minutes",
    "base": "46 minutes, 3,932 steps",
    "distill": "13 and 24 minutes: 585 steps, then 1,472 with a new optimiser",
    "control": "10 minutes, 225 steps",
    "scorer": "12 minutes",
}
"""Of each stage, where a log of it is left; minutes are of the training loop."""


def weights_readme(record: Mapping[str, Any], stages: Mapping[str, Stage]) -> str:
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
        durations="\n".join(
            f"| `{name}` | {_minutes(stages[name])} | {TOOK.get(name, '')} |" for name in STAGES
        ),
    )


def _minutes(stage: Stage) -> str:
    return f"{stage.minutes:g}" if stage.minutes else ""
