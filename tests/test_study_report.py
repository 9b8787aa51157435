"""The report of a study as files: page, PDF, numbers by prompt, JSON."""

from __future__ import annotations

import base64
import csv
import io
import random
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_reports as reports
from PIL import Image

from headstart.errors import InputError
from headstart.input import loads
from headstart.study import page as pages
from headstart.study.figures import Figure
from headstart.study.page import write_page
from headstart.study.paper import PAPER, comparable
from headstart.study.pdf import table_pdf
from headstart.study.report import COLUMNS, finite, prompts_csv, write_report
from headstart.study.table import blocks, cost_groups, main_cases, rows_of, table

VOID = {"meta", "img", "br", "hr", "link", "input"}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><title>a curve</title></svg>'
FIGURES = [Figure("curve", "When a picture is decided", "A caption.", SVG)]


class Tree(HTMLParser):
    """Tags that open and close in turn, what they carry, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, Mapping[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def page_of(report: reports.Json, pictures: pages.PictureFiles | None = None) -> str:
    return write_page(finite(report), FIGURES, pictures or {}, ("report.json",))


KINDS = {
    "full": reports.full,
    "few": reports.few,
    "tiny": reports.tiny,
    "empty": reports.empty,
    "hostile": reports.hostile,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_sound_and_asks_for_nothing_outside_itself(kind: str) -> None:
    page = page_of(KINDS[kind]())
    tree = Tree(page)
    ids = [attributes["id"] for _, attributes in tree.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] or "" for tag, attributes in tree.tags if tag == "a"]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert {link for link in links if not link.startswith("#")} == {
        "report.json", "figures/curve.svg",
    }  # fmt: skip
    assert not {"script", "link", "iframe", "object", "base", "form"} & {t for t, _ in tree.tags}
    sources = [attributes["src"] or "" for _, attributes in tree.tags if "src" in attributes]
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"@import|url\(", page)
    assert not any(name.startswith("on") for _, attributes in tree.tags for name in attributes)
    (policy,) = [attributes["content"] for _, attributes in tree.tags if "http-equiv" in attributes]
    assert policy is not None and policy.startswith("default-src 'none'")
    assert SVG.decode() in page


def test_a_page_shows_every_number_of_every_case() -> None:
    report = reports.full()
    text = Tree(page_of(report)).text
    every = dict.fromkeys(rows_of(report), "")
    groups = [*blocks(report, main_cases(report), counts=False), *cost_groups(report)]
    for group in (*groups, *blocks(report, every, counts=True)):
        assert group.title in text
        for line in group.lines:
            assert line.case in text
            for cell in line.cells:
                assert f"{cell.value} [{cell.ends}]" in text if cell.ends else cell.value in text
    assert "The hybrid brings back 105 % [98, 112]" in text
    assert "cads:0.1 brings back most without being clearly worse by its score: 75 %" in text


def test_a_page_shows_the_papers_numbers_beside_ours_and_how_they_compare() -> None:
    report = reports.full()
    tree = Tree(page_of(report))
    row = "hybrid 0.350 118 0.350 10.79 32.12 0.64 0.310 [0.299, 0.321] 105 [98, 112]"
    assert row in tree.text
    assert "skip-first - - - 10.12 31.71 0.53" in tree.text
    for name in ("table 1", "table 2", "table D.1"):
        assert PAPER[name]["what"] in tree.text
    assert "yellow 17.5 [15.3, 19.7] 15.3 [13.1, 17.5]" in tree.text
    assert all(sentence in tree.text for sentence in comparable(report))
    assert "at step 4 [3, 5]" in tree.text and PAPER["figure 7"] in tree.text


def test_a_page_says_how_it_was_made() -> None:
    report = reports.full()
    text = Tree(page_of(report)).text
    for expected in (report["command"], "ab" * 32, "7 to 10 (4)", "device: cpu · threads: 2",
                 "headstart: 0.1.0", *report["prompts"], *report["notes"]):  # fmt: skip
        assert expected in text


def test_what_is_not_there_has_no_section() -> None:
    tree = Tree(page_of(reports.tiny()))
    ids = {attributes.get("id") for _, attributes in tree.tags}
    assert {"main", "paper", "rows", "made"} <= ids and not {"costs", "pictures"} & ids
    assert "nan" not in tree.text.lower() and "None" not in tree.text


def test_anybodys_text_is_shown_as_it_is_and_does_nothing() -> None:
    report = reports.hostile()
    tree = Tree(page_of(report))
    assert tree.text.count('<script>alert("1")</script> & שלום \\u202e 😀') > 20
    assert 'a "fox"\\r\\n, red' in tree.text and "nul \\x00 half \\ud800" in tree.text
    isolated = sum(tag == "bdi" for tag, _ in tree.tags)
    assert isolated > len(report["rows"]) + len(report["prompts"])


def test_pictures_are_inside_the_page_small_and_those_of_the_main_cases_first(
    tmp_path: Path,
) -> None:
    pictures: dict[str, list[Path]] = {}
    for case in ("cads:0.5", "hybrid"):
        pictures[case] = [tmp_path / f"{case[:4]}-{n:03d}-7.png" for n in range(12)]
        for number, path in enumerate(pictures[case]):
            Image.new("RGB", (300, 200), (number * 20, 90, 40)).save(path)
    pictures["hybrid"][1].write_bytes(b"no picture")
    pictures["base"] = [tmp_path / "missing.png"]
    tree = Tree(page_of(reports.full(), pictures))
    shown = [attributes for tag, attributes in tree.tags if tag == "img"]
    assert [attributes["alt"] for attributes in shown][:2] == [
        "hybrid, hybr-000-7",
        "hybrid, hybr-002-7",
    ]
    assert len(shown) == 7 + 8 and tree.text.count("cannot be read") == 2
    data = (shown[0]["src"] or "").removeprefix("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (128, 85)


def test_a_page_stays_small_however_many_pictures_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path := tmp_path / "000-7.png")
    report = reports.full()
    monkeypatch.setattr(pages, "MOST_PICTURES", 400_000)
    sheets, unseen = pages.sheets_of(report, dict.fromkeys(report["rows"], [path] * 8))
    letters = sum(len(uri or "") for sheet in sheets for _, uri in sheet.pictures)
    assert sheets[0].case == "base" and letters <= 400_000
    assert len(sheets) + unseen == len(report["rows"]) and unseen > 0
    text = Tree(page_of(report, dict.fromkeys(report["rows"], [path] * 8))).text
    assert f"{unseen} more cases have pictures in the folder" in text


def test_hundreds_of_cases_and_prompts_make_a_page() -> None:
    report = {**reports.many(200), "prompts": [f"{n} {reports.HOSTILE}" for n in range(500)]}
    text = Tree(page_of(report)).text
    assert "216 cases" in text and "500 prompts" in text and "way3:193" in text


def test_a_report_with_anything_missing_or_of_another_kind_is_still_a_report() -> None:
    rng = random.Random(0)
    for _ in range(40):
        report = reports.full()
        for _ in range(rng.randint(1, 4)):
            *way, last = rng.choice([*_paths(report)])
            inner: Any = report
            for name in way:
                inner = inner[name]
            if (value := rng.choice(ODD)) is ODD:
                del inner[last]
            else:
                inner[last] = value
        assert "In brackets" in table(report)
        Tree(page_of(report))


ODD: list[Any] = [None, float("nan"), float("inf"), -1.0, 0, 1e300, 10**400, "text", [], {}]
ODD.append(ODD)  # stands for: not there


def _paths(tree: Any) -> Iterator[tuple[Any, ...]]:
    """Every place in a report, from the outside in."""
    if isinstance(tree, dict | list):
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for name, inner in parts:
            yield (name,)
            yield from ((name, *rest) for rest in _paths(inner))


def letters_of(pdf: bytes) -> str:
    """What a PDF without compression shows, a line for each text; ligatures are left out."""
    texts: list[str] = []
    for block in re.findall(rb"BT\n(.*?)\nET", pdf, re.DOTALL):
        parts = re.findall(rb"\(((?:\\.|[^\\)])*)\)", block, re.DOTALL)
        raw = re.sub(rb"\\(.)", rb"\1", b"".join(parts), flags=re.DOTALL)
        texts.append(raw.decode("utf-16-be" if raw[:1] == b"\0" else "cp1252"))
    return "\n".join(texts)


def test_the_pdf_has_every_number_of_the_main_table_as_letters() -> None:
    report = reports.full()
    pdf = table_pdf(report)
    assert pdf.startswith(b"%PDF") and pdf.rstrip().endswith(b"%%EOF")
    text = letters_of(pdf)
    for block in blocks(report, main_cases(report), counts=False):
        for line in block.lines:
            assert line.case.partition("-f")[0] in text
            assert all(str(cell) in text for cell in line.cells)
    assert "Best of a grid" in text and "12 prompts, 4 seeds each" in text


def test_the_pdf_is_the_same_bytes_every_time_and_has_as_many_pages_as_it_needs() -> None:
    assert table_pdf(reports.few()) == table_pdf(reports.few())
    report = reports.full()
    for number in range(40):
        report["rows"][f"way{number}:1"] = reports.row("methods", 0.2, method=f"way{number}")
    pdf = table_pdf(report)
    assert len(re.findall(rb"/Type /Page\b", pdf)) > 2
    assert all(f"way{number}:1" in letters_of(pdf) for number in range(40))


@pytest.mark.parametrize("kind", ["tiny", "empty", "hostile"])
def test_a_pdf_is_made_of_anything(kind: str) -> None:
    text = letters_of(table_pdf(finite(KINDS[kind]())))
    assert "In brackets" in text
    assert ("[U+6F22]" in text) == (kind == "hostile")  # a letter that the font lacks


def test_numbers_by_prompt_are_read_back_as_they_were() -> None:
    prompts = ["a fox", 'a "fox", red', "two\r\nlines", reports.HOSTILE, "=1+1", ""]
    rows: list[dict[str, Any]] = [
        {"case": "cads:0.1", "part": "methods", "at": None, "prompt": prompt, "space": "clip",
         "diversity": 0.1 + number, "vendi": float("nan"), "score": -0.25, "seconds": 1e-7,
         "other": 3}
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    data = prompts_csv(rows)
    assert data.endswith(b"\r\n") and data.split(b"\r\n")[0].decode() == ",".join(COLUMNS)
    lines = [*csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""))]
    assert [row["prompt"] for row in lines] == prompts
    assert [float(row["diversity"]) for row in lines] == [row["diversity"] for row in rows]
    assert {(row["vendi"], row["at"], row["nearest"]) for row in lines} == {("", "", "")}
    assert float(lines[0]["seconds"]) == 1e-7


def test_a_report_is_all_its_files_the_same_every_time(tmp_path: Path) -> None:
    report = reports.few()
    report["rows"]["hybrid"]["seconds"] = float("nan")
    rows = [{"case": "base", "prompt": "a fox", "space": "dreamsim", "diversity": 0.3}]
    seen: list[dict[str, bytes]] = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        written_files = write_report(folder, report, rows)
        files = {path.relative_to(folder).as_posix() for path in written_files}
        assert files == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        seen.append({name: (folder / name).read_bytes() for name in files})
    assert seen[0] == seen[1]
    assert [*seen[0]] and set(seen[0]) == {
        "report.html", "report.json", "table.pdf", "prompts.csv", "figures/diversity.svg",
    }  # fmt: skip
    document: Any = loads(seen[0]["report.json"])  # refuses NaN
    assert document["paper"] == PAPER and document["rows"]["hybrid"]["seconds"] is None
    assert document["rows"]["base"] == report["rows"]["base"]
    assert set(comparable(report)) <= set(document["notes"])
    assert seen[0]["figures/diversity.svg"] in seen[0]["report.html"]
    Tree(seen[0]["report.html"].decode())


def test_a_report_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    write_report(folder, reports.tiny(), [])
    before = (folder / "report.html").read_bytes()
    (folder / "report.json").unlink()
    (folder / "report.json").mkdir()  # a folder in its place: the rename fails
    with pytest.raises(InputError, match="could not write"):
        write_report(folder, reports.few(), [])
    assert (folder / "report.html").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.endswith(".partial")]
