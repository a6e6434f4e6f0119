"""The report of a comparison: tables and plots in Markdown and HTML, from its records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from krontune.errors import CheckpointError

from . import comparison_plots as plots
from . import html
from .compared import ComparedRun, Journal
from .comparison_tables import Cells, Scale, all_tables
from .files import write_text
from .statistics import Summary, moving_tasks, summarise, tasks_of

CURVES = {"loss": "training loss", "held_out": "score on the way", "grad_norm": "gradient norm"}


def write_comparison(folder: Path, title: str, reference: str, labels: Mapping[str, str] | None = None) -> list[Path]:
    """Write report.md, report.html and the plots of FOLDER/runs.jsonl.

    Args:
        folder: a comparison's folder.
        title: the report's.
        reference: the method that differences refer to.
        labels: what tables call the method of every run to be reported, by the run's key; None: all, as recorded.

    Returns:
        The two reports.

    Raises:
        CheckpointError: no final run is recorded.
    """
    runs = Journal(folder / "runs.jsonl").read()
    if labels is not None:
        runs = [replace(run, label=labels[run.key]) for run in runs if run.key in labels]
    summaries = summarise(runs)
    if not summaries:
        raise CheckpointError(f"{folder} holds no final run yet; run the comparison first.")
    tables = all_tables(runs, summaries, reference)
    pictures = _draw(summaries, reference, folder / "plots")
    said = _about(runs)
    _write_markdown(folder / "report.md", title, said, tables, pictures)
    _write_html(folder / "report.html", title, said, tables, pictures)
    return [folder / "report.md", folder / "report.html"]


def _draw(summaries: Mapping[str, Summary], reference: str, folder: Path) -> dict[str, Path]:
    tasks = moving_tasks(summaries, tasks_of(summaries))
    scale = Scale(next(iter(summaries.values())).runs[0].higher_is_better)
    pictures = {"Parameters against score": folder / "pareto.png"}
    plots.pareto(summaries, tasks, scale, folder / "pareto.png")
    if reference in summaries and len(summaries) > 1:
        pictures[f"Differences to {reference}"] = folder / "differences.png"
        plots.differences(summaries, tasks, reference, scale, folder / "differences.png")
    for quantity, name in CURVES.items():
        path = folder / f"{quantity}.png"
        if plots.curves(summaries, tasks, quantity, name, path):
            pictures[name[0].upper() + name[1:]] = path
    return pictures


def _about(runs: Sequence[ComparedRun]) -> str:
    final = [run for run in runs if run.phase == "final"]
    failed = [run for run in runs if run.error]
    hours = sum(run.wall_s for run in runs) / 3600
    text = (
        f"{len(final)} final runs and {len(runs) - len(final)} to tune the learning rates, {hours:.1f} process hours."
    )
    if failed:
        kinds = "; ".join(sorted({f"{run.label}: {run.error}" for run in failed}))
        text += f" {len(failed)} runs failed: {kinds}"
    return text


def _write_markdown(path: Path, title: str, about: str, tables: Sequence[Cells], pictures: Mapping[str, Path]) -> None:
    parts = [f"# {title}", about, *(table.markdown().strip() for table in tables)]
    parts += [f"## {name}\n\n![{name}]({picture.relative_to(path.parent)})" for name, picture in pictures.items()]
    write_text(path, "\n\n".join(parts) + "\n")


def _write_html(path: Path, title: str, about: str, tables: Sequence[Cells], pictures: Mapping[str, Path]) -> None:
    sections = [html.paragraph(about)]
    for table in tables:
        numeric = [False] + [True] * (len(table.header) - 1)
        sections += [html.heading(table.title), html.paragraph(table.note)]
        sections.append(html.table(table.header, table.rows, numeric))
    for name, picture in pictures.items():
        sections += [html.heading(name), html.image(picture, name)]
    html.write_page(path, title, sections)
