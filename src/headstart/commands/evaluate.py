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

    judge, notes = choose_judge(_known(galleries, args.reference), args.features)
    for line in notes:
        note(line)
    if args.reference is not None:
        check_reference(judge)
    with progress(sum(len(gallery.pictures) for gallery in galleries), "features") as bar:
        seen = [extract_features(gallery, judge, bar.update) for gallery in galleries]
    reference = None
    if args.reference is not None:
        with progress(None, "reference"):
            reference = read_reference(args.reference, judge)
    with progress(None, "intervals"):
        found = evaluate(seen, judge, reference)
    answer(args, found.to_json(), _told(found))
    return 0


def _known(galleries: Sequence[Gallery], reference: str | None) -> list[PictureSource]:
    """What folders say of their pictures, a reference folder's too."""
    from headstart.metrics.judges import PictureSource
    from headstart.sweep.gallery import picture_sizes, read_lineage, read_pictures

    found = [
        PictureSource(own.name, own.lineage, picture_sizes([one.path for one in own.pictures]))
        for own in galleries
    ]
    if reference is not None and reference != "bundled":
        folder = Path(reference)
        known = PictureSource(reference, read_lineage(folder), picture_sizes(read_pictures(folder)))
        found += [known] * all(reference != own.name for own in found)
    return found


def _told(found: Evaluation) -> str:
    """The table for a terminal, what its numbers are, and the paired comparisons."""
    lines = [_header(found), *(_line(row) for row in found.rows)]
    further = zip(found.words[1:], found.spaces[1:], strict=True)
    spaces = " · ".join(f"{word}: diversity of {space} features" for word, space in further)
    lines += ["", f"features: {found.spaces[0]} · {spaces} · 95 % "
              "intervals over prompts, or over seeds where there is one prompt"]  # fmt: skip
    if found.scored_by not in (None, found.spaces[0]):
        lines.append(f"score: by {found.scored_by}")
    if found.reference is not None:
        lines.append(_about(found.reference, found.frechet))
    for row in found.rows:
        own = row.gallery
        if own.missing:
            lines.append(f"{own.name}: not finished: {counted(own.missing, 'case')}")
        if row.varied < len(own.prompts):
            lines.append(f"{own.name}: diversity is of the {row.varied} prompts with two images")
    for apart in found.contrasts:
        lines += _contrast(apart, found.words)
    return "\n".join(lines)


def _about(reference: Reference, word: str) -> str:
    features = reference.features
    images = "" if features is None else f", {counted(len(features), 'image')}"
    fid = "; papers take an FID of 30,000 to 50,000" if word == "FID" else ""
    return (
        f"reference: {reference.name}{images} · Frechet distances are too large at few "
        f"images: compare equal numbers only{fid}"
    )


def _header(found: Evaluation) -> str:
    head = f"{'folder':<20}{'plan':<18}{'passes':>7}{'images':>8}{'prompts':>8}"
    head += "".join(f"{word:>11}{'95 %':>16}" for word in found.words)
    head += f"{'Vendi':>8}{'score':>8}"
    if found.reference is not None:
        head += f"{found.frechet:>10}{'95 %':>20}"
        if found.reference.features is not None:
            head += f"{'KID':>10}{'95 %':>22}{'prec.':>7}{'recall':>7}{'cover.':>7}"
    return head


def _line(row: Row) -> str:
    own = row.gallery
    line = f"{_cut(own.name, 19):<20}{_cut(own.plan, 17):<18}{own.passes:>7}"
    line += f"{len(own.pictures):>8}{len(own.prompts):>8}"
    for found in row.spaces.values():
        line += f"{_value(found.diversity, 3):>11}"
        line += f"{_spread(None if found.diversity is None else found.diversity.best, 3):>16}"
    line += f"{_value(row.variety.vendi, 2):>8}{_value(row.score, 3):>8}"
    if row.frechet is not None:
        digits = 4 if row.frechet.value < 10.0 else 2  # an FID is tens, of short features it is not
        line += f"{row.frechet.value:>10.4g}{_spread(row.frechet.best, digits):>20}"
    if row.kid is not None:
        line += f"{row.kid.value:>10.5f}{_spread(row.kid.best, 5):>22}"
    if row.neighbours is not None:
        shown = [row.neighbours[name].value for name in ("precision", "recall", "coverage")]
        line += "".join(f"{value:>7.2f}" for value in shown)
    return line


def _contrast(found: Contrast, words: Sequence[str]) -> list[str]:
    prompts, images = counted(found.prompts, "prompt"), counted(found.images, "image")
    lines = [f"\n{found.a} minus {found.b}, {prompts}, {images} each"]
    named = zip((*words, "score"), (*found.spaces.values(), found.score), strict=True)
    for name, one in named:
        if one is not None:
            lines.append(f"  {name:<10}{_paired(one)}")
    return lines


def _paired(found: Paired) -> str:
    interval = found.over_prompts or found.over_seeds
    if interval is None or interval.low == interval.high:  # of one image
        return f"{found.difference:+.4f}"
    p = "" if found.p_value is None else f"   p = {found.p_value:.2g} (sign flips over prompts)"
    return f"{interval.value:+.4f}  [{interval.low:+.4f}, {interval.high:+.4f}]{p}"


def _value(spread: Spread | None, digits: int) -> str:
    return "-" if spread is None else f"{spread.value:.{digits}f}"


def _spread(interval: Interval | None, digits: int) -> str:
    return "-" if interval is None else f"{interval.low:.{digits}f} .. {interval.high:.{digits}f}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]


EVALUATE = Command(
    "evaluate",
    "diversity, scores and distances of folders that sample or sweep wrote, with intervals",
    (every(),),
    _add_options,
    _run,
    ("headstart evaluate hybrid distilled", "headstart evaluate hybrid --reference bundled"),
)
