from __future__ import annotations

import dataclasses
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from krontune.errors import CheckpointError
from krontune.report import RunRecord, final_loss, html, markdown_table, read_record, rich_table, write_record
from krontune.report.files import whole_file, whole_folder, write_json, write_text
from krontune.report.plots import comparison, loss_curve
from krontune.report.tables import human_bytes


def record(name: str = "LSR", n: int = 1234567, **changes: object) -> RunRecord:
    made = RunRecord(
        name=name,
        method=name.lower(),
        settings={"r": 16},
        model="tiny",
        seed=0,
        learning_rate=1e-3,
        n_trainable=n,
        n_base=10 * n,
        adapter_bytes=4 * n,
        steps=30,
        step_ms=1234.5,
        wall_s=60.0,
        loss=0.123,
        scores={"exact_match_before": 0.0, "exact_match_after": 0.975},
        history=[{"step": i, "loss": 1.0 / i} for i in range(1, 31)],
        environment={"python": "3"},
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_a_record_reads_back(tmp_path: Path) -> None:
    write_record(record(), tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == record()


def test_a_loss_that_is_no_number_is_null_in_the_file(tmp_path: Path) -> None:
    write_record(record(loss=math.nan), tmp_path / "record.json")
    assert "NaN" not in (tmp_path / "record.json").read_text()
    assert math.isnan(read_record(tmp_path / "record.json").loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "has record version 99"),
        ({"version": None}, "has record version None"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_record_of_another_kind(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "record.json"
    write_json(path, {**dataclasses.asdict(record()), **change})
    with pytest.raises(CheckpointError, match=message):
        read_record(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_file_that_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"record\.json"):
        read_record(tmp_path / "record.json")


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60))
def test_final_loss_is_a_mean_of_the_tail(losses: list[float]) -> None:
    value = final_loss([{"step": i, "loss": loss} for i, loss in enumerate(losses)])
    tail = losses[-max(1, len(losses) // 10) :]
    assert min(tail) - 1e-9 <= value <= max(tail) + 1e-9
    assert math.isnan(final_loss([{"step": 1, "eval_loss": 2.0}]))


def test_tables_show_the_record_and_nothing_else() -> None:
    records = [record(), record("LoRA", 2_000, scores={"exact_match_after": 1.0})]
    lines = markdown_table(records).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["method", "parameters", "adapter", "step", "loss", "exact match before", "exact match after"]
    assert cells[2] == ["LSR", "1,234,567", "4.9 MB", "1.23 s", "0.123", "0.0%", "97.5%"]
    assert cells[3] == ["LoRA", "2,000", "8.0 kB", "1.23 s", "0.123", "-", "100.0%"]
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(rich_table(records))
    text = console.export_text()
    assert all(cell in text for row in cells[2:] for cell in row)


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (7.2e12, "7200.0 GB")]
)
def test_bytes_for_people(n: float, text: str) -> None:
    assert human_bytes(n) == text


def test_plots_are_pictures(tmp_path: Path) -> None:
    few = record("few", history=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}])
    loss_curve([record(), few, record("none", history=[])], tmp_path / "loss.png")
    comparison([record(), record("LoRA")], "exact_match", tmp_path / "comparison.png")
    for name in ("loss.png", "comparison.png"):
        with Image.open(tmp_path / name) as picture:
            picture.verify()
            assert picture.width > picture.height > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.png", "loss.png"]


class Page(HTMLParser):
    """Collects the text and what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_page_is_complete_and_escaped(tmp_path: Path) -> None:
    loss_curve([record()], tmp_path / "x.png")
    sections = [
        html.paragraph("a < b & c"),
        html.records_table([record("<b>")]),
        html.image(tmp_path / "x.png", '"alt"'),
    ]
    html.write_page(tmp_path / "page.html", "A <title>", [*sections, html.heading("h"), html.code("<pre>")])
    page = Page()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert len(page.loads) == 1
    assert {"a < b & c", "<b>", "A <title>", "<pre>", "1,234,567"} <= set(page.text)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), whole_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with whole_folder(folder) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(folder) as partial:
        (partial / "a").write_text("half")
        raise RuntimeError("killed")
    assert (folder / "a").read_text() == "old"
    with whole_folder(folder) as partial:
        (partial / "b").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_files_get_the_usual_mode(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


def test_html_has_no_address_in_it() -> None:
    assert not re.search(r"https?://", html.page("t", [html.records_table([record()])]))
