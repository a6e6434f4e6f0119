"""`krontune compare`: methods against each other, at equal parameters, over tasks and seeds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krontune_cli.terminal import console, one_line_errors, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from krontune.recipes.compare.grid import Grid
    from krontune.report.compared import ComparedRun


def command(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="The grid; docs/compare.md lists its settings.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as --set training.steps=50."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the records and reports [runs/NAME].")
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Processes [one a core].")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0, help="Start no run after so long.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try the runs again that failed.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the reports from the records.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the methods and their sizes; run nothing.")] = False,
) -> None:
    """Train every method of a grid at its budget, on every task and seed, and report where they stand.

    Learning rates are tuned first, with the same number of trials for each method. Every finished run is one line in
    OUTPUT/runs.jsonl; after a stop or a kill, the same command goes on.
    """
    screen = console(stderr=True)
    quiet_libraries(progress=False)
    with one_line_errors():
        from krontune.recipes.compare.grid import Grid
        from krontune.recipes.compare.workers import compare, labels

        wanted = Grid.load(grid, overrides or ())
        folder = output or Path("runs") / wanted.name
        if dry_run:
            _show_methods(wanted)
            return
        if not report_only:
            compare(
                wanted,
                folder,
                jobs=jobs,
                minutes=minutes,
                retry=retry,
                on_run=lambda run, n: _line(screen, run, n),
                prepare=partial(quiet_libraries, progress=False),
            )
        from krontune.report.comparison import write_comparison

        for path in write_comparison(folder, wanted.name, wanted.reference, labels(wanted, folder)):
            typer.echo(path)


def _line(screen: Console, run: ComparedRun, left: int) -> None:
    result = f"{run.metric} {run.score:.4f}" if run.score is not None else run.error or "diverged"
    screen.print(
        f"{run.phase:5} {run.task:7} {run.label:32} lr {run.learning_rate:<8g} seed {run.seed:<5} {result}  "
        f"{run.wall_s:.0f} s  ({left} due)",
        soft_wrap=True,
    )


def _show_methods(grid: Grid) -> None:
    from rich.table import Column, Table

    from krontune.recipes.compare.grid import resolve_methods, sizes

    methods = resolve_methods(grid)
    counts = sizes(grid, methods)
    reference = counts[grid.reference]
    table = Table("method", "parameters", "of reference", "first rate", Column("settings", overflow="fold"), box=None)
    for method in methods:
        shown = (f"{name}={value}" for name, value in method.settings.items() if name != "target_modules")
        count = counts.get(method.label)
        size = (f"{count:,}", f"{count / reference:.3f}x") if count is not None else ("by the weights", "")
        table.add_row(method.label, *size, f"{method.rate:g}", " ".join([method.name, *shown]))
    console().print(table)
    trials = grid.tuning.trials * len(grid.tuning.seeds) * len(grid.tuning.tasks or grid.tasks)
    tuned = sum(method.tuned for method in methods)
    final = len(methods) * len(grid.tasks) * len(grid.seeds)
    typer.echo(f"{tuned * trials} runs to tune the learning rates, {final} final runs")
