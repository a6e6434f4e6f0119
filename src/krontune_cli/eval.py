"""`krontune eval`: a task's score of a model with an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krontune_cli.terminal import console, one_line_errors, print_json, quiet_libraries

if TYPE_CHECKING:
    from krontune.recipes.evaluate import EvalResult


class Harness(str, Enum):
    """Who asks the questions."""

    krontune = "krontune"
    lm_eval = "lm-eval"


AdapterArgument = Annotated[
    str | None, typer.Argument(metavar="[ADAPTER]", help="The adapter's folder or Hub id; none for the base alone.")
]
TaskOption = Annotated[
    str, typer.Option("--task", "-t", help="gsm8k, math, mbpp, humaneval, or a GLUE or SuperGLUE task; docs/eval.md.")
]


def command(
    task: TaskOption,
    adapter: AdapterArgument = None,
    base: Annotated[str | None, typer.Option("--base", help="The base model [the one the adapter names].")] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Folder of TASK/SPLIT.jsonl [the data set on the Hub].")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="The split [the task's own].")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many rows, always the same.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="A template over a row's fields.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Through the tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Of an answer.")] = None,
    max_length: Annotated[int, typer.Option("--max-length", min=8, help="Tokens of a row to classify.")] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows at a time.")] = 8,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder [runs/eval/NAME-TASK].")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another evaluation in the folder.")] = False,
    weaker: Annotated[
        bool, typer.Option("--allow-weaker-sandbox", help="Run programs where they cannot be confined fully.")
    ] = False,
    harness: Annotated[Harness, typer.Option("--harness", help="lm-eval: the standard harness.")] = Harness.krontune,
    include: Annotated[Path | None, typer.Option("--include-path", help="lm-eval: a folder of tasks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> None:
    """Score a model on a task, with an adapter or without: answers are generated greedily, or classes predicted.

    Every row is one line of OUTPUT/items.jsonl as soon as its batch is done; after a stop or a kill, the same command
    goes on. Programs are run in a sandbox.
    """
    quiet_libraries(progress=False)
    with one_line_errors():
        own = {
            "--data-dir": data_dir,
            "--split": split,
            "--prompt": prompt,
            "--chat": chat,
            "--max-new-tokens": max_new_tokens,
            "--output": output,
            "--force": force,
            "--allow-weaker-sandbox": weaker,
        }
        _check_options(harness, own if harness is Harness.lm_eval else {"--include-path": include})
        if harness is Harness.lm_eval:
            from krontune.recipes.harness import run_harness

            print_json(run_harness(task.split(","), adapter, base, limit, batch_size, dtype, include))
            return
        from krontune.recipes.evaluate import EvalSettings, evaluate

        settings = EvalSettings(
            task,
            adapter,
            base,
            data_dir,
            split,
            limit,
            prompt,
            chat,
            max_new_tokens,
            max_length,
            dtype,
            batch_size,
            weaker,
        )
        folder = output or Path("runs/eval") / f"{_name(adapter or base or 'model')}-{task}"
        with _bar(task) as done:
            result = evaluate(settings, folder, force=force, done=done)
        _show(result, folder, as_json)


def _check_options(harness: Harness, foreign: dict[str, Any]) -> None:
    """Refuse options that the chosen harness would ignore."""
    from krontune.errors import ConfigError

    given = [option for option, value in foreign.items() if value]
    if given:
        raise ConfigError(f"{', '.join(given)} has no effect with --harness {harness.value}; leave it out.")


def _name(model: str) -> str:
    """runs/orders-lsr/adapter -> orders-lsr; packaged:smollm2 -> smollm2."""
    parts = [part for part in model.replace(":", "/").split("/") if part not in ("", ".", "..")]
    return parts[-2] if len(parts) > 1 and parts[-1] == "adapter" else parts[-1]


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as progress:
        bar = progress.add_task(label, total=None)
        yield lambda n, of: progress.update(bar, completed=n, total=of)


def _show(result: EvalResult, folder: Path, as_json: bool) -> None:
    values: dict[str, Any] = {"output": str(folder), **vars(result)}
    if as_json:
        print_json(values)
        return
    from krontune_cli.tables import make_table

    error = "" if result.stderr is None else f" ± {result.stderr:.4f}"
    rows = [(name, f"{value:.4f}{error}") for name, value in result.scores.items()]
    model = result.base if result.adapter is None else f"{result.adapter} on {result.base}"
    out = console()
    out.print(f"{model}, {result.task}, {result.n_items} rows, {result.dtype}", soft_wrap=True)
    out.print(make_table(["metric", "value"], rows))
    out.print(f"{folder}/items.jsonl  every row\n{folder}/result.json  the result", soft_wrap=True)
