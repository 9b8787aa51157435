"""A sweep's CSV: what is accepted, and every bad line told by its number before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.errors import InputError
from headstart.sweep.jobs import MAX_LINE_BYTES, MOST_MESSAGES, Case, batches, digest, read_cases

HEADER = b"case_number,prompt,evaluation_seed\n"


@pytest.fixture
def write(tmp_path: Path):
    def put(data: bytes) -> Path:
        path = tmp_path / "prompts.csv"
        path.write_bytes(data)
        return path

    return put


def refusal(path: Path, **options: str) -> str:
    with pytest.raises(InputError) as caught:
        read_cases(path, **options)
    return str(caught.value)


def test_the_papers_columns_are_read_in_any_order_with_others_beside_them(write) -> None:
    path = write(
        b"\xef\xbb\xbfcoco_id,evaluation_seed, prompt ,source,case_number\r\n"
        b'9,7,"a cat, on\na mat",coco,12\r\n'
        b"\r\n"
        b"8,18446744073709551615,\xc3\xa9toile,coco,3\r\n"
    )
    assert read_cases(path) == (
        Case(12, "a cat, on\na mat", 7),
        Case(3, "étoile", 2**64 - 1),
    )
    assert Case(12, "", 7).file == "000012.png"


def test_every_bad_line_is_told_by_its_number(write) -> None:
    path = write(
        HEADER
        + b"0,a fox,1\n"
        + b"1,a fox,-3\n"
        + b"2,  ,4\n"
        + b'3,"two\nlines",5\n'
        + b"0,a dog,6\n"
        + b"4,caf\xe9,7\n"
        + b"5,a cat, sitting,8\n"
        + b"6,a fox,1e3\n"
        + b"7,a fox,18446744073709551616\n"
        + b"x,a fox,1\n"
        + b'8,a "quoted" fox,2\n'
        + b'9,"a"b,2\n'
    )
    message = refusal(path).splitlines()
    assert message[0].endswith("has 9 bad lines; nothing was done:")
    assert [line.split(":")[0].strip() for line in message[1:]] == [
        f"line {n}" for n in (3, 4, 7, 8, 9, 10, 11, 12, 14)
    ]
    reasons = dict(zip((3, 4, 7, 8, 9, 10, 11, 12, 14), message[1:], strict=True))
    assert "evaluation_seed '-3'" in reasons[3]
    assert "prompt is empty" in reasons[4]
    assert "case_number 0 was given on line 2 already" in reasons[7]
    assert "not UTF-8 (byte 0xe9 at column 6)" in reasons[8]
    assert "4 fields, the header has 3" in reasons[9]
    assert "'1e3'" in reasons[10] and "18446744073709551616" in reasons[11]
    assert "case_number 'x'" in reasons[12] and "not CSV" in reasons[14]


def test_a_line_of_100_mb_is_one_bad_line_and_takes_no_such_memory(write) -> None:
    import tracemalloc

    path = write(HEADER + b"0," + b"x" * 100_000_000 + b",1\n1,a fox,2\n2,,3\n")
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "line 2: longer than 1048576 bytes" in message
    assert "line 4: the prompt is empty" in message
    assert peak < 8 * MAX_LINE_BYTES


def test_an_open_quote_is_told_where_it_opens(write) -> None:
    assert "line 3: not CSV" in refusal(write(HEADER + b'0,a,1\n1,"never closed,2\n3,b,4\n'))


def test_a_long_list_of_problems_is_cut_and_counted(write) -> None:
    message = refusal(write(HEADER + b"".join(b"%d,,1\n" % n for n in range(50)))).splitlines()
    assert len(message) == MOST_MESSAGES + 2
    assert message[-1].strip() == "and 30 more"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no column 'case_number'"),
        (b"case_number;prompt;evaluation_seed\n1;a;2\n", "separated by commas"),
        (b"case_number,prompt\n1,a\n", "no column 'evaluation_seed'"),
        (b"case_number,prompt,prompt,evaluation_seed\n", "more than one column 'prompt'"),
        (HEADER, "a header and no cases"),
        ("case_number,prompt\n".encode("utf-16"), "UTF-16"),
        (b"case_number,pr\xff,evaluation_seed\n", "line 1: not UTF-8"),
        (HEADER + b"0,a\0b,1\n", "1 bad line;"),
    ],
)
def test_a_file_that_is_no_such_csv_is_refused(write, data: bytes, says: str) -> None:
    assert says in refusal(write(data))


def test_an_absent_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "cannot read" in refusal(tmp_path / "absent.csv")
    assert "cannot read" in refusal(tmp_path)


def test_a_size_column_says_the_shape_of_each_case(write) -> None:
    data = b"case_number,prompt,evaluation_seed,px\n0,a,1,64\n1,b,2,64x96\n2,c,3,\n"
    assert [case.size for case in read_cases(write(data), size_column="px")] == [
        (64, 64),
        (64, 96),
        None,
    ]
    assert "line 2: size 'big'" in refusal(write(data.replace(b"64\n", b"big\n")), size_column="px")
    assert "no column 'side'" in refusal(write(data), size_column="side")


CASES = st.lists(
    st.tuples(st.text(min_size=1, max_size=20), st.integers(0, 2**64 - 1)), min_size=1, max_size=20
)


@settings(max_examples=60, deadline=None)
@given(CASES, st.integers(1, 7))
def test_what_is_written_as_csv_is_read_back(tmp_path_factory, found, size: int) -> None:
    import csv

    cases = [Case(n, p, s) for n, (p, s) in enumerate(found) if p.strip() and "\0" not in p]
    path = tmp_path_factory.mktemp("csv") / "p.csv"
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        out = csv.writer(file, quoting=csv.QUOTE_ALL)
        out.writerow(["case_number", "prompt", "evaluation_seed"])
        out.writerows([case[:3] for case in cases])
    if cases:
        again = read_cases(path)
        assert [(c.number, c.seed) for c in again] == [(c.number, c.seed) for c in cases]
        assert [c.prompt for c in again] == [
            c.prompt.encode("utf-8", "replace").decode() for c in cases
        ]
    parts = batches(cases, size)
    assert [case for part in parts for case in part] == cases
    assert all(1 <= len(part) <= size for part in parts)


def test_batches_are_of_one_shape_and_keep_the_order() -> None:
    shapes = [None, (64, 96), None, (64, 96), None, (96, 64)]
    cases = [Case(n, "a fox", n, shape) for n, shape in enumerate(shapes)]
    numbers = [[case.number for case in part] for part in batches(cases, 2)]
    assert numbers == [[0, 2], [4], [1, 3], [5]]
    with pytest.raises(InputError, match="at least 1"):
        batches(cases, 0)


def test_batches_of_whole_prompts_hold_all_cases_of_each_in_the_order_of_the_first() -> None:
    prompts = ["a", "b", "a", "c", "b", "c", "a", "d", "d"]
    cases = [Case(n, prompt, n) for n, prompt in enumerate(prompts)]
    numbers = [[case.number for case in part] for part in batches(cases, 5, 2)]
    assert numbers == [[0, 2, 6, 1, 4], [3, 5, 7, 8]]
    assert sorted(number for part in numbers for number in part) == list(range(9))
    sized = [case._replace(size=(64, 64) if case.prompt in "ad" else None) for case in cases]
    assert [[c.number for c in part] for part in batches(sized, 5, 2)] == [
        [0, 2, 6, 7, 8], [1, 4, 3, 5],
    ]  # fmt: skip
    for size, least, says in ((2, 2, "'a' has 3 cases.*--batch 3"), (5, 3, "'b' has 2 images")):
        with pytest.raises(InputError, match=says):
            batches(cases, size, least)
    with pytest.raises(InputError, match="several sizes"):
        batches([cases[0], cases[2]._replace(size=(8, 8))], 5, 2)
    with pytest.raises(InputError, match="'a' has 1 image, and needs 2"):
        batches([cases[0], cases[0]._replace(number=9)], 5, 2)  # the same image twice


def test_a_digest_is_of_what_the_cases_say() -> None:
    one = (Case(0, "a", 1), Case(1, "b", 2))
    assert digest(one) == digest(list(one))
    assert digest(one) != digest(one[:1]) != digest((Case(0, "a", 2),))
