"""The report: one file that needs no other, and shows any text as it is."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from common.report import Section, write_report

NASTY = """<script>alert(1)</script> & "quotes" 'single' </pre></td> é Å"""
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser sees: texts by tag, attributes, and whether all tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def of(self, tag: str) -> list[str]:
        return [text for found, text in self.texts if found == tag]


def written(path: Path, title: str, sections: list[Section]) -> Page:
    write_report(path, title, sections)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == [], "all tags are closed"
    return page


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "figures" / "curve.png"
    path.parent.mkdir()
    Image.new("RGB", (3, 2), (200, 30, 30)).save(path)
    return path


def test_everything_appears_in_order(tmp_path: Path, picture: Path) -> None:
    table = [["figure", "value"], ["f2", "0.93"], ["name", "blob"]]
    page = written(
        tmp_path / "report.html",
        "A run",
        [Section("Figures", "Some text.", table, None, ""), Section("Curve", "", [], picture, "seed: 1\n  steps: 2")],
    )
    assert page.of("h1") == page.of("title") == ["A run"]
    assert page.of("h2") == ["Figures", "Curve"]
    assert page.of("p") == ["Some text."]
    assert page.of("th") == ["figure", "value"]
    assert page.of("td") == ["f2", "0.93", "name", "blob"]
    assert page.of("pre") == ["seed: 1\n  steps: 2"]


def test_numbers_stand_right_and_words_and_empty_cells_left(tmp_path: Path) -> None:
    row = ["0.93", "-1", "+2", "f2", "", "é"]
    page = written(tmp_path / "report.html", "A run", [Section("T", "", [["a"] * 6, row], None, "")])
    assert [value for tag, _, value in page.attributes if tag == "td"] == ["number"] * 3


def test_the_page_stands_alone(tmp_path: Path, picture: Path) -> None:
    page = written(tmp_path / "report.html", "A run", [Section("Curve", "", [], picture, "")])
    sources = [value or "" for _, name, value in page.attributes if name in ("src", "href", "data", "action", "srcset")]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not [
        word for word in ("http", "<link", "<script", "<iframe", "@import", "url(", str(tmp_path)) if word in text
    ]


def test_the_picture_is_inside_bit_for_bit(tmp_path: Path, picture: Path) -> None:
    import base64

    page = written(tmp_path / "report.html", "A run", [Section("Curve", "", [], picture, "")])
    (source,) = [value or "" for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert base64.b64decode(source.partition(",")[2], validate=True) == picture.read_bytes()


def test_no_text_is_taken_for_markup(tmp_path: Path, picture: Path) -> None:
    section = Section(NASTY, NASTY, [[NASTY], [NASTY]], picture, NASTY)
    page = written(tmp_path / "report.html", NASTY, [section])
    for tag in ("title", "h1", "h2", "p", "th", "td", "pre"):
        assert page.of(tag) == [NASTY], tag
    assert [value for _, name, value in page.attributes if name == "alt"] == [NASTY]
    assert {name for _, name, _ in page.attributes} == {"lang", "charset", "alt", "src"}


def test_what_is_not_given_leaves_no_trace(tmp_path: Path) -> None:
    page = written(tmp_path / "report.html", "A run", [Section("Only a heading", "", [], None, "")])
    assert [tag for tag, _ in page.texts if tag != "style"] == ["title", "h1", "h2"]
    assert "<p>" not in (tmp_path / "report.html").read_text()
