"""`krontune train`: fine-tune a model as a YAML file says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krontune_cli.terminal import console, one_line_errors, print_json, quiet_libraries

if TYPE_CHECKING:
    from krontune.recipes import Interrupted, RunConfig
    from krontune.report import RunRecord

SET_HELP = "Change one setting, as in training.max_steps=10; may be repeated."


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run config; docs/train.md lists its settings.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's latest checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is already in the run folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's record as JSON on standard output.")] = False,
) -> None:
    """Fine-tune a language model, or a classifier on a GLUE task, with LSR, SoKA or any PEFT method.

    Writes a run folder: the adapter, the config as resolved, metrics as JSON lines, the environment, the loss curve.
    Ctrl-C and SIGTERM leave a checkpoint to go on from. On several devices: `accelerate launch -m krontune_cli train`.
    """
    screen = console(stderr=True)
    quiet_libraries(progress=screen.is_terminal)
    with one_line_errors():
        from krontune.recipes import Interrupted, load_config, train
        from krontune.recipes.callbacks import StepBar

        extra = ["resume=true"] if resume else []
        config = load_config(run, [*(overrides or []), *extra])
        screen.print(f"[dim]·[/dim] Loading {config.model.path} and {config.data.source}")
        try:
            record = train(config, force=force, callbacks=[StepBar(screen, config.method.name.lower())])
        except Interrupted as stop:
            _explain(stop, run, config)
            raise
        _show(record, config, as_json)


def _show(record: RunRecord, config: RunConfig, as_json: bool) -> None:
    if as_json:
        print_json({"output": str(config.output), **dataclasses.asdict(record)})
        return
    from krontune.report import rich_table

    out = console()
    out.print(rich_table([record]))
    out.print(f"{config.output}/adapter  the adapter\n{config.output}/loss.png  the loss curve")


def _explain(stop: Interrupted, run: Path, config: RunConfig) -> None:
    """Tell a person how to go on."""
    if stop.step is not None:
        screen = console(stderr=True)
        screen.print(f"Checkpoint of step {stop.step} is in {config.output}. To go on: krontune train {run} --resume")
