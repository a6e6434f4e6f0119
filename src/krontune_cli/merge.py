"""`krontune merge`: an adapter merged into its base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krontune_cli.sources import ForceOption, JsonOption
from krontune_cli.tables import bar
from krontune_cli.terminal import console, one_line_errors, print_json, quiet_libraries

if TYPE_CHECKING:
    from krontune.convert import Merge


def command(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model. Default: the one that the adapter names.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: as the base is stored; float32 for GGUF.")
    ] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Also write model.gguf, where the base is a GGUF file.")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the logits with the adapter's; loads the whole model.")
    ] = True,
    another_base: Annotated[
        bool, typer.Option("--another-base", help="Merge though the base's weights are not those it was trained on.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a plain transformers folder: the base with the adapter's updates added, shard by shard.

    Each weight is summed in float32 and rounded once. The result is checked against the adapter's logits before it
    takes its name; nothing is left behind where that fails.
    """
    quiet_libraries(progress=False)
    with one_line_errors():
        from krontune.convert import merge

        result = merge(
            adapter,
            out,
            base=base,
            dtype=dtype,
            gguf=gguf,
            check=check,
            another_base=another_base,
            force=force,
            progress=bar("merging"),
        )
        if as_json:
            print_json(result.to_dict())
        else:
            _show(result)


def _show(result: Merge) -> None:
    from krontune.report.tables import human_bytes

    out = console()
    out.print(f"base             {result.base}", soft_wrap=True)
    out.print(f"merged           {result.n_merged} weights" + _besides(result.n_replaced))
    out.print(f"size             {human_bytes(result.n_bytes)}, {result.dtype}")
    if result.check is None:
        out.print("check            not made (--no-check)")
    else:
        c = result.check
        out.print(f"check            logits {c.difference:.1e} off the adapter's, which moves them by {c.effect:.1e}")
    for note in result.notes:
        out.print(f"note: {note}", soft_wrap=True)
    out.print(f"wrote {result.out}", soft_wrap=True)
    if result.gguf:
        out.print(f"wrote {result.gguf}", soft_wrap=True)


def _besides(n: int) -> str:
    return f", {n} tensors taken whole from the adapter" if n else ""
