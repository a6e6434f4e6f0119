"""Records of runs, and the tables, plots and pages made from them. Nothing here imports torch."""

from __future__ import annotations

from .records import RunRecord, final_loss, read_record, write_record
from .tables import markdown_table, rich_table

__all__ = ["RunRecord", "final_loss", "markdown_table", "read_record", "rich_table", "write_record"]
