"""`krontune demo`: LoRA, LSR and SoKA side by side on a small language model, without a network."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krontune_cli.terminal import console, one_line_errors, print_json, quiet_libraries

if TYPE_CHECKING:
    from krontune.recipes.demo import DemoResult, DemoSettings, Watcher

OUTPUT_HELP = "Folder of the report; by default runs/demo, or runs/demo-2 and so on if that exists."


def command(
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help=OUTPUT_HELP)] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, max=1000, help="Training steps of each method.")] = 40,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the orders, the starts, and their sequence.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the demo that is in the output folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON on standard output.")] = False,
) -> None:
    """Teach a small language model to write orders as JSON with LoRA, LSR and SoKA, and compare them.

    Takes a few minutes on two CPU cores and needs no network. Prints a table and writes a report with curves.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet_libraries(progress=False)
    with one_line_errors():
        from krontune.recipes.demo import DemoSettings, run_demo
        from krontune.recipes.demo_report import write_demo_report

        settings = DemoSettings(output=output or _free_folder(Path("runs/demo")), steps=steps, seed=seed)
        if force:
            _drop_demo(settings.output)
        result = run_demo(settings, _watcher())
        page = write_demo_report(result, settings)
        _show(result, settings, page, as_json)


def _free_folder(wanted: Path) -> Path:
    candidates = itertools.chain([wanted], (wanted.with_name(f"{wanted.name}-{i}") for i in itertools.count(2)))
    return next(path for path in candidates if not path.exists())


def _drop_demo(folder: Path) -> None:
    """Remove a folder that a demo wrote, and nothing else."""
    if (folder / "train.jsonl").is_file() and (folder / "test.jsonl").is_file():
        shutil.rmtree(folder)


def _watcher() -> Watcher:
    from krontune.recipes.callbacks import StepBar
    from krontune.recipes.demo import Watcher

    screen = console(stderr=True)

    class Screen(Watcher):
        def phase(self, text: str) -> None:
            screen.print(f"[dim]·[/dim] {text}")

        def callbacks(self, name: str) -> list[StepBar]:
            return [StepBar(screen, name)] if screen.is_terminal else []

    return Screen()


def _show(result: DemoResult, settings: DemoSettings, page: Path, as_json: bool) -> None:
    if as_json:
        records = [dataclasses.asdict(record) for record in result.records]
        print_json({"output": str(settings.output), "seconds": result.seconds, "records": records})
        return
    from rich.text import Text

    from krontune.report import rich_table

    out = console()
    sample = result.answers[0]
    lines = {"an unseen order": sample["prompt"], "untrained": sample["untrained"]}
    lines |= {record.name: sample[record.name] for record in result.records}
    out.print()
    for name, text in lines.items():
        out.print(Text.assemble((f"{name:>15}  ", "dim"), " ".join(text.split())), no_wrap=True, overflow="ellipsis")
    out.print(rich_table(result.records))
    out.print(f"{result.seconds / 60:.1f} minutes in all. Report: {page}")
