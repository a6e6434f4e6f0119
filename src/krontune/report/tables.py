"""Tables of run records: rich for a terminal, Markdown for a file. Both show the same cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from .records import RunRecord


@dataclass(frozen=True)
class Column:
    """A column's heading and how a record fills it."""

    title: str
    cell: Callable[[RunRecord], str]
    numeric: bool = True


def human_bytes(n: float) -> str:
    """Bytes in the unit a person would choose.

    >>> human_bytes(512), human_bytes(2_500_000)
    ('512 B', '2.5 MB')
    """
    if n < 1000:
        return f"{n:.0f} B"
    power = min(3, int(math.log10(n)) // 3)
    return f"{n / 1000**power:.1f} {' kMG'[power]}B"


def run_columns(records: Sequence[RunRecord]) -> list[Column]:
    """The columns of a comparison: size, cost, loss, then every score the records hold, in order of appearance."""
    columns = [
        Column("method", lambda r: r.name, numeric=False),
        Column("parameters", lambda r: f"{r.n_trainable:,}"),
        Column("adapter", lambda r: human_bytes(r.adapter_bytes)),
        Column("step", lambda r: f"{r.step_ms / 1000:.2f} s"),
        Column("loss", lambda r: f"{r.loss:.3f}"),
    ]
    names = list(dict.fromkeys(name for record in records for name in record.scores))
    return columns + [Column(name.replace("_", " "), _score(name)) for name in names]


def rich_table(records: Sequence[RunRecord], title: str | None = None) -> Table:
    """A table for a terminal."""
    columns = run_columns(records)
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    rows = [[column.cell(record) for column in columns] for record in records]
    for column, cells in zip(columns, zip(*rows, strict=True), strict=True):
        width = max(map(len, cells))  # a narrow terminal may break headings, never numbers
        table.add_column(column.title, justify="right" if column.numeric else "left", min_width=width)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(records: Sequence[RunRecord]) -> str:
    """The same table in Markdown, ending in a newline."""
    columns = run_columns(records)
    rows = [[column.title for column in columns], ["--:" if column.numeric else "---" for column in columns]]
    rows += [[column.cell(record).replace("|", r"\|") for column in columns] for record in records]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _score(name: str) -> Callable[[RunRecord], str]:
    form = ".3f" if name.endswith("loss") else ".1%"
    return lambda record: format(record.scores[name], form) if name in record.scores else "-"
