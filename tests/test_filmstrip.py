"""The sheet of a trace: which step stands in which column, and that everything drawn is legible."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from headstart import NoiseSchedule, preset
from headstart.metrics.metrics import pixel_extractor
from headstart.pictures.chart import Curve, draw_panel
from headstart.plan.table import StepTable
from headstart.traces.filmstrip import draw_filmstrip
from headstart.traces.strip import Strip, lay_out
from headstart.traces.structure import feature_space, measure
from headstart.traces.timeline import ConceptScorer, DecodedRun, watch

SCHEDULE = NoiseSchedule.scaled_linear()


def table(mode: str, steps: int = 4, k: int = 1) -> StepTable:
    return preset("turbo", mode=mode, steps=steps, k=k).compile(SCHEDULE)  # type: ignore[arg-type]


def strip(name: str, rows: StepTable, seeds: int = 2, size: int = 64, **options: object) -> Strip:
    rng = np.random.default_rng(len(rows))
    frames = rng.integers(0, 256, (len(rows), seeds, size, size, 3), dtype=np.uint8)
    good = np.ones((len(rows), seeds), np.bool_)
    scorer = ConceptScorer(
        name="red",
        score=lambda rgb, phrases: rgb.mean((1, 2))[:, [0] * len(phrases)] / 255,
        meaning="red",
        unasked=tuple(f"thing{number}" for number in range(12)),
    )
    blank = np.full((size, size, 3), 200, np.uint8)
    space = feature_space(pixel_extractor(8))
    decoded = DecodedRun("a red", frames, good)
    watched = watch(
        decoded, ["a red", "a green"], {"a red": decoded._replace(frames=255 - frames)}, scorer
    )
    options = {"timeline": watched} | options
    return Strip(
        name=name,
        prompt="a fox",
        seeds=tuple(range(seeds)),
        table=rows,
        rows=tuple(range(len(rows))),
        frames=frames,
        good=good,
        final=frames[-1],
        measured=measure(list(enumerate(rows)), frames, good, blank, space),
        **options,  # type: ignore[arg-type]
    )


def painted(strips: list[Strip], **options: object) -> np.ndarray:
    words = {"title": "a fox", "subtitle": "x0", "footer": "one · two"} | options
    return np.asarray(draw_filmstrip(strips, **words))  # type: ignore[arg-type]


def has(sheet: np.ndarray, picture: np.ndarray) -> bool:
    """Whether the picture lies in the sheet at twice its size, pixel for pixel."""
    big = picture.repeat(2, 0).repeat(2, 1)
    height, width = big.shape[:2]
    corners = zip(*np.nonzero((sheet == big[0, 0]).all(-1)), strict=True)
    return any(np.array_equal(sheet[y : y + height, x : x + width], big) for y, x in corners)


def test_short_plans_stand_under_the_nearest_noise_level_of_the_longest() -> None:
    """4 steps at 999 749 499 249 under columns at 999 866 732 599 432 299 166 32."""
    long, short = strip("base", table("base", 30)), strip("hybrid", table("hybrid"))
    count, (first, second) = lay_out([long, short], 8)
    assert count == 8
    assert first.columns == tuple(range(8))
    assert [round(long.steps[i].timestep) for i in first.indices] == [
        999, 866, 732, 599, 432, 299, 166, 32,
    ]  # fmt: skip
    assert second.indices == (0, 1, 2, 3)
    assert second.columns == (0, 2, 4, 5)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("lengths", [(30, 4), (4, 30), (5, 5), (1, 30), (7, 3)])
def test_columns_rise_and_fit_for_any_lengths(lengths: tuple[int, int], most: int) -> None:
    strips = [strip(str(n), table("base", n)) for n in lengths]
    count, layouts = lay_out(strips, most)
    assert count == min(most, max(lengths))
    for one, layout in zip(strips, layouts, strict=True):
        assert len(layout.indices) == len(layout.columns) == min(count, len(one.rows))
        assert list(layout.columns) == sorted(set(layout.columns))
        assert list(layout.indices) == sorted(set(layout.indices))
        assert layout.columns[-1] < count
        assert layout.indices[-1] == len(one.rows) - 1


def test_a_thinned_plan_still_shows_the_row_of_its_hand_off() -> None:
    one = strip("hybrid", table("hybrid", steps=50, k=9))
    (layout,) = lay_out([one], 6)[1]
    assert one.joints == (9,)
    assert 9 in layout.indices


def test_every_shown_picture_and_the_final_ones_are_on_the_sheet() -> None:
    one = strip("hybrid", table("hybrid"))
    sheet = painted([one])
    for picture in one.frames.reshape(-1, 64, 64, 3):
        assert has(sheet, picture)


def test_the_hand_off_is_a_line_in_the_accent_colour() -> None:
    plain = strip("distilled", table("distilled"), timeline=None)
    handed = strip("hybrid", table("hybrid"), timeline=None)
    accent = np.array([0xC2, 0x41, 0x0C])

    def tallest(sheet: np.ndarray) -> int:
        return int((sheet == accent).all(-1).sum(0).max())

    assert tallest(painted([handed])) > 2 * 128
    assert tallest(painted([plain])) < 128  # the model's bar alone


def test_a_branch_is_marked_where_it_begins() -> None:
    same = strip("hybrid", table("distilled"), timeline=None)
    other = strip("hybrid · fresh noise", table("distilled"), timeline=None, from_step=2)
    assert other.branches_at == 2
    ink = np.array([0x1C, 0x1B, 0x1A])
    columns = [(painted([s]) == ink).all(-1).sum(0).max() for s in (same, other)]
    assert columns[1] > columns[0] + 2 * 100


def test_a_missing_picture_is_a_grey_cell_and_not_a_black_one() -> None:
    whole = strip("hybrid", table("hybrid"))
    good = whole.good.copy()
    good[1, 0] = False
    missing = Strip(
        **{name: getattr(whole, name) for name in Strip.__slots__ if name != "good"}, good=good
    )
    sheet = painted([missing])
    assert not has(sheet, whole.frames[1, 0])
    assert has(sheet, whole.frames[1, 1])


def test_words_of_any_length_and_seeds_of_any_size_stay_inside_the_sheet() -> None:
    one = strip("hybrid · base from here, fresh noise, guidance 2, “a cat”" * 3, table("hybrid"))
    many = Strip(
        **{name: getattr(one, name) for name in Strip.__slots__ if name != "seeds"},
        seeds=(2**64 - 1, 7),
    )
    sheet = painted([many], title="fox " * 300, subtitle="y" * 500, footer="words " * 400)
    for edge in (sheet[:, :40], sheet[:, -40:], sheet[:30], sheet[-30:]):
        assert (edge == sheet[0, 0]).all()


@pytest.mark.parametrize("size", [8, 16, 96, 300])
def test_pictures_of_any_size_are_drawn_beside_final_ones_of_another(size: int) -> None:
    one = strip("hybrid", table("hybrid"), size=size)
    final = np.zeros((2, 64, 64, 3), np.uint8)
    mixed = Strip(
        **{name: getattr(one, name) for name in Strip.__slots__ if name != "final"}, final=final
    )
    assert painted([mixed]).shape[1] < 1400


def test_a_curve_is_broken_where_a_score_is_missing() -> None:
    points = [(10.0, 20.0), (60.0, 20.0), (110.0, float("nan")), (160.0, 20.0), (210.0, 20.0)]
    panel = np.asarray(draw_panel((220, 40), [Curve(points, "#000000", 4.0)]))
    row = (panel[20] < 100).all(-1)
    assert row[15:55].all() and row[165:205].all()
    assert not row[70:150].any()


def test_a_dashed_line_goes_across_and_leaves_gaps() -> None:
    panel = np.asarray(draw_panel((200, 40), [], 15.0))
    row = (panel[15] < 150).all(-1)
    assert 0.3 < row.mean() < 0.8


def test_a_sheet_of_eight_columns_stays_small_enough_to_share() -> None:
    sheet = draw_filmstrip([strip("base", table("base", 30), size=512)], title="", subtitle="",
                           footer="")  # fmt: skip
    assert isinstance(sheet, Image.Image)
    assert sheet.width < 2400
