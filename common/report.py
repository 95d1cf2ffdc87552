"""One self-contained report.html per run: figures and tables in a page that can be mailed."""

import base64
import dataclasses
import html
from pathlib import Path

from common.files import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px; }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and at will a table (first row = head), a picture and a preformatted text."""

    title: str
    text: str
    table: list[list[str]]
    picture: Path | None
    preformatted: str


def write_report(path: Path, title: str, sections: list[Section]) -> None:
    """Write the page; pictures are embedded, so the file stands alone."""
    body = "\n".join(_section(section) for section in sections)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    write_text(path, f"{head}<style>{STYLE}</style><h1>{html.escape(title)}</h1>\n{body}\n</html>\n")


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.table:
        head, *rows = section.table
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = ["".join(_cell(cell) for cell in row) for row in rows]
        parts.append(f"<table><tr>{cells}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>")
    if section.picture is not None:
        data = base64.b64encode(section.picture.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
    if section.preformatted:
        parts.append(f"<details><summary>show</summary><pre>{html.escape(section.preformatted)}</pre></details>")
    return "\n".join(parts)


def _cell(text: str) -> str:
    is_number = text[:1].isdigit() or text[:1] in ("-", "+")
    return f"<td{' class=number' if is_number else ''}>{html.escape(text)}</td>"
