"""The tables that several commands print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def make_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, text_columns: int = 1
) -> Table:
    """A table for a terminal: the first columns are text, flush left, and the others numbers, flush right."""
    from rich import box
    from rich.table import Table

    style: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "pad_edge": False}
    table = Table(title=title, box=box.SIMPLE_HEAD, min_width=len(title or "") + 1, **style)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < text_columns else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def bar(label: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A progress bar on standard error, gone when it is done; nothing where that is no terminal. Wraps a list."""

    def wrap(items: Iterable[Any]) -> Iterable[Any]:
        from rich.progress import track

        from krontune_cli.terminal import console

        listed, screen = list(items), console(stderr=True)
        return track(listed, label, console=screen, transient=True) if screen.is_terminal else listed

    return wrap
