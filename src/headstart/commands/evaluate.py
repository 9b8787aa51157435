"""`headstart evaluate`: numbers of folders that sample or sweep wrote."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headstart.commands.arguments import REFERENCE, add_features, every
from headstart.commands.console import note, progress
from headstart.commands.parser import Command, add_options
from headstart.commands.width import answer
from headstart.errors import counted

if TYPE_CHECKING:
    from headstart.metrics.judges import PictureSource
    from headstart.metrics.resample import Interval, Paired
    from headstart.sweep.evaluation import Contrast, Evaluation, Row, Spread
    from headstart.sweep.gallery import Gallery
    from headstart.sweep.gallery_features import Reference


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="of `sample` or `sweep`, to compare"
    )
    add_features(parser)
    add_options(parser, REFERENCE)


def _run(args: argparse.Namespace) -> int:
    from headstart.sweep.gallery import read_gallery

    galleries = [read_gallery(folder) for folder in args.folders]

    from headstart.metrics.judges import choose_judge
    from headstart.sweep.evaluation import evaluate
    from headstart.sweep.gallery_features import check_reference, extract_features, read_reference

    judge, notes = choose_judge(_sources(galleries, args.reference), args.features)
    for line in notes:
        note(line)
    if args.reference is not None:
        check_reference(judge)
    with progress(sum(len(gallery.pictures) for gallery in galleries), "features") as bar:
        features = [extract_features(gallery, judge, bar.update) for gallery in galleries]
    reference = None
    if args.reference is not None:
        with progress(None, "reference"):
            reference = read_reference(args.reference, judge)
    with progress(None, "intervals"):
        evaluation = evaluate(features, judge, reference)
    answer(args, evaluation.to_json(), _text(evaluation))
    return 0


def _sources(galleries: Sequence[Gallery], reference: str | None) -> list[PictureSource]:
    """What folders say of their pictures, a reference folder's too."""
    from headstart.metrics.judges import PictureSource
    from headstart.sweep.gallery import picture_sizes, read_lineage, read_pictures

    sources = [
        PictureSource(own.name, own.lineage, picture_sizes([p.path for p in own.pictures]))
        for own in galleries
    ]
    if reference not in (None, "bundled", *(source.name for source in sources)):
        folder = Path(reference)
        sizes = picture_sizes(read_pictures(folder))
        sources.append(PictureSource(reference, read_lineage(folder), sizes))
    return sources


def _text(evaluation: Evaluation) -> str:
    """The table for a terminal, what its numbers are, and the paired comparisons."""
    lines = [_header(evaluation), *(_line(row) for row in evaluation.rows)]
    further = zip(evaluation.words[1:], evaluation.spaces[1:], strict=True)
    spaces = " · ".join(f"{word}: diversity of {space} features" for word, space in further)
    lines += ["", f"features: {evaluation.spaces[0]} · {spaces} · 95 % "
              "intervals over prompts, or over seeds where there is one prompt"]  # fmt: skip
    if evaluation.scored_by not in (None, evaluation.spaces[0]):
        lines.append(f"score: by {evaluation.scored_by}")
    if evaluation.reference is not None:
        lines.append(_reference_line(evaluation.reference, evaluation.frechet))
    for row in evaluation.rows:
        gallery = row.gallery
        if gallery.missing:
            lines.append(f"{gallery.name}: not finished: {counted(gallery.missing, 'case')}")
        if row.varied < len(gallery.prompts):
            prompts = f"the {row.varied} prompts with two images"
            lines.append(f"{gallery.name}: diversity is of {prompts}")
    for contrast in evaluation.contrasts:
        lines += _contrast(contrast, evaluation.words)
    return "\n".join(lines)


def _reference_line(reference: Reference, word: str) -> str:
    features = reference.features
    images = "" if features is None else f", {counted(len(features), 'image')}"
    fid = "; papers take an FID of 30,000 to 50,000" if word == "FID" else ""
    return (
        f"reference: {reference.name}{images} · Frechet distances are too large at few "
        f"images: compare equal numbers only{fid}"
    )


def _header(evaluation: Evaluation) -> str:
    head = f"{'folder':<20}{'plan':<18}{'passes':>7}{'images':>8}{'prompts':>8}"
    head += "".join(f"{word:>11}{'95 %':>16}" for word in evaluation.words)
    head += f"{'Vendi':>8}{'score':>8}"
    if evaluation.reference is not None:
        head += f"{evaluation.frechet:>10}{'95 %':>20}"
        if evaluation.reference.features is not None:
            head += f"{'KID':>10}{'95 %':>22}{'prec.':>7}{'recall':>7}{'cover.':>7}"
    return head


def _line(row: Row) -> str:
    gallery = row.gallery
    line = f"{_tail(gallery.name, 19):<20}{_tail(gallery.plan, 17):<18}{gallery.passes:>7}"
    line += f"{len(gallery.pictures):>8}{len(gallery.prompts):>8}"
    for space in row.spaces.values():
        line += f"{_value(space.diversity, 3):>11}"
        line += f"{_spread(None if space.diversity is None else space.diversity.best, 3):>16}"
    line += f"{_value(row.variety.vendi, 2):>8}{_value(row.score, 3):>8}"
    if row.frechet is not None:
        digits = 4 if row.frechet.value < 10.0 else 2  # an FID is tens, of short features it is not
        line += f"{row.frechet.value:>10.4g}{_spread(row.frechet.best, digits):>20}"
    if row.kid is not None:
        line += f"{row.kid.value:>10.5f}{_spread(row.kid.best, 5):>22}"
    if row.neighbours is not None:
        values = [row.neighbours[name].value for name in ("precision", "recall", "coverage")]
        line += "".join(f"{value:>7.2f}" for value in values)
    return line


def _contrast(contrast: Contrast, words: Sequence[str]) -> list[str]:
    prompts, images = counted(contrast.prompts, "prompt"), counted(contrast.images, "image")
    lines = [f"\n{contrast.a} minus {contrast.b}, {prompts}, {images} each"]
    pairs = zip((*words, "score"), (*contrast.spaces.values(), contrast.score), strict=True)
    lines += [f"  {name:<10}{_paired(pair)}" for name, pair in pairs if pair is not None]
    return lines


def _paired(paired: Paired) -> str:
    interval = paired.over_prompts or paired.over_seeds
    if interval is None or interval.low == interval.high:  # of one image
        return f"{paired.difference:+.4f}"
    p = "" if paired.p_value is None else f"   p = {paired.p_value:.2g} (sign flips over prompts)"
    return f"{interval.value:+.4f}  [{interval.low:+.4f}, {interval.high:+.4f}]{p}"


def _value(spread: Spread | None, digits: int) -> str:
    return "-" if spread is None else f"{spread.value:.{digits}f}"


def _spread(interval: Interval | None, digits: int) -> str:
    return "-" if interval is None else f"{interval.low:.{digits}f} .. {interval.high:.{digits}f}"


def _tail(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]


EVALUATE = Command(
    "evaluate",
    "diversity, scores and distances of folders that sample or sweep wrote, with intervals",
    (every(),),
    _add_options,
    _run,
    ("headstart evaluate hybrid distilled", "headstart evaluate hybrid --reference bundled"),
)
