"""What plan and spectrum share: the model they look at, and the options that say which of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from torch import nn

    from krontune.weights import Source

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hub id, a model folder, a .gguf file, a config.json, `packaged:smollm2` or `packaged:minilm`.",
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target-modules",
        help="Names with commas between, a regex, or all-linear. Default: PEFT's for the model.",
    ),
]
ExcludeOption = Annotated[str | None, typer.Option("--exclude-modules", help="Names or a regex to leave alone.")]
LayersOption = Annotated[
    str | None,
    typer.Option("--layers", metavar="0-3,8", help="The layers to adapt; needs names as targets."),
]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="PEFT's task type, such as CAUSAL_LM or SEQ_CLS; adds the task's head.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


class Opened(NamedTuple):
    """A model without its weights."""

    source: Source
    model: nn.Module


def open_model(name: str, task: str | None = None) -> Opened:
    """Find a model and build its modules on the meta device."""
    from krontune.weights import find_model, load_config, meta_model

    source = find_model(name)
    return Opened(source, meta_model(load_config(source), task))


def matching(targets: str | None, exclude: str | None, layers: str | None, task: str | None) -> dict[str, Any]:
    """The settings of find_targets from the options above."""
    found: dict[str, Any] = {}
    if targets is not None:
        found["target_modules"] = _names(targets)
    if exclude is not None:
        found["exclude_modules"] = _names(exclude)
    if layers is not None:
        found["layers_to_transform"] = parse_indices(layers)
    if task is not None:
        found["task_type"] = task
    return found


def parse_indices(text: str) -> list[int]:
    """Indices from a command line.

    >>> parse_indices("0-2,7")
    [0, 1, 2, 7]
    """
    indices: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise typer.BadParameter(f"{part!r} is not an index or a range such as 0-3.", param_hint="--layers")
        if int(last or first) < int(first):
            raise typer.BadParameter(f"{part!r} holds nothing; write {last}-{first}.", param_hint="--layers")
        indices.extend(range(int(first), int(last or first) + 1))
    return indices


def _names(text: str) -> str | list[str]:
    """Names with commas between them; a word with any other sign is a regex, as PEFT takes it."""
    parts = [part.strip() for part in text.split(",")]
    plain = all(part.replace("_", "").replace(".", "").replace("-", "").isalnum() for part in parts)
    return parts if plain and text != "all-linear" else text
