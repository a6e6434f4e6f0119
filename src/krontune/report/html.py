"""A report as one HTML file with everything inside it: no script, no network, pictures embedded."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .files import write_text
from .records import RunRecord
from .tables import run_columns

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin-bottom: 1rem; }
td:last-child { overflow-wrap: anywhere; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
.scroll { overflow-x: auto; } img { max-width: 100%; background: #fff; border-radius: 6px; }
code, pre { font: .86em/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .8rem; border-radius: 6px; white-space: pre-wrap; }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """A complete HTML document; `sections` are fragments made by the functions below."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def paragraph(text: str) -> str:
    """Running text."""
    return f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{escape(text)}</h2>"


def code(text: str) -> str:
    """Text as it stands, in a fixed-width face."""
    return f"<pre>{escape(text)}</pre>"


def image(png: Path, alt: str) -> str:
    """The picture itself, embedded."""
    data = base64.b64encode(png.read_bytes()).decode("ascii")
    return f'<img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """A table of plain-text cells; `numeric` says which columns are set flush right."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if flush else ''}>{escape(cell)}</{tag}>"
            for cell, flush in zip(row, numeric, strict=True)
        )

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{cells(header, "th")}</tr>\n{body}\n</table></div>'


def records_table(records: Sequence[RunRecord]) -> str:
    """The comparison table of `krontune.report.tables`, in HTML."""
    columns = run_columns(records)
    rows = [[column.cell(record) for column in columns] for record in records]
    return table([column.title for column in columns], rows, [column.numeric for column in columns])


def write_page(path: Path, title: str, sections: Sequence[str]) -> None:
    """Write a page, whole or not at all."""
    write_text(path, page(title, sections))
