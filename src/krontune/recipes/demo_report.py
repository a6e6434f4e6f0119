"""The demo's report folder: records and answers as JSON, the table as Markdown, curves as PNG, and one HTML page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from krontune.report import html, markdown_table
from krontune.report.files import write_json, write_text
from krontune.report.plots import comparison

from .demo import METRIC, DemoResult, DemoSettings
from .orders import is_exact

SHOWN_ANSWERS = 5


def write_demo_report(result: DemoResult, settings: DemoSettings) -> Path:
    """Write the report of a finished demo into its output folder.

    Returns:
        The path of the HTML page.
    """
    folder = settings.output
    page, picture = folder / "report.html", folder / "comparison.png"
    write_json(folder / "records.json", [dataclasses.asdict(record) for record in result.records])
    write_json(folder / "answers.json", result.answers)
    write_text(folder / "table.md", markdown_table(result.records))
    comparison(result.records, METRIC, picture)
    environment = result.records[0].environment
    sections = [
        html.paragraph(_summary(result, settings)),
        html.records_table(result.records),
        html.image(picture, "training loss, trainable parameters, exact match before and after, by method"),
        html.heading(f"The first {min(SHOWN_ANSWERS, len(result.answers))} unseen orders"),
        *_answer_tables(result),
        html.heading("Settings and machine"),
        html.table(["method", "settings", "learning rate"], _settings_rows(result), [False, False, True]),
        html.code("\n".join(f"{key}: {_plain(value)}" for key, value in environment.items())),
    ]
    html.write_page(page, "krontune demo: orders to JSON", sections)
    return page


def _summary(result: DemoResult, settings: DemoSettings) -> str:
    return (
        f"{settings.model} learned to write spoken coffee orders as one line of JSON: {settings.steps} steps of "
        f"{settings.batch_size} orders with each method, the same orders in the same sequence (seed {settings.seed}). "
        f"Exact match is measured on {len(result.answers)} orders that are not among the training items, before "
        "training and with the saved adapter loaded onto a fresh copy of the model. "
        f"Everything took {result.seconds / 60:.1f} minutes."
    )


def _answer_tables(result: DemoResult) -> list[str]:
    """One table an order: what each model replied, and whether that is exact."""
    names = ["untrained", *(record.name for record in result.records)]
    tables = []
    for item in result.answers[:SHOWN_ANSWERS]:
        rows = [[name, "✓" if is_exact(item[name], item["wanted"]) else "✗", _short(item[name])] for name in names]
        tables.append(html.table(["", "", item["prompt"]], rows, [False] * 3))
    return tables


def _settings_rows(result: DemoResult) -> list[list[str]]:
    return [
        [r.name, ", ".join(f"{key}={value}" for key, value in r.settings.items()), f"{r.learning_rate:g}"]
        for r in result.records
    ]


def _short(text: str, limit: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}…"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return " ".join(value) if isinstance(value, list) else str(value)
