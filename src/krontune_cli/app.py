"""The commands. Each imports what it needs when it runs."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from krontune_cli import compare, compress, demo, eval, export, info, merge, plan, spectrum, train

app = typer.Typer(
    name="krontune",
    help="Kronecker-structured fine-tuning of language models: LSR-Adapt and SoKA as PEFT methods.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("train")(train.command)
app.command("eval")(eval.command)
app.command("demo")(demo.command)
app.command("compare")(compare.command)
app.command("plan")(plan.command)
app.command("spectrum")(spectrum.command)
app.command("export")(export.command)
app.command("merge")(merge.command)
app.command("compress")(compress.command)
app.command("info")(info.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"krontune {importlib.metadata.version('krontune')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """What holds for every command."""


def main() -> None:
    """Entry point of the console script. Exit codes: 0 done, 1 failed, 2 wrong use, 130 and 143 stopped by a signal."""
    app()
