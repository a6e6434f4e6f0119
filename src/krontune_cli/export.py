"""`krontune export`: an adapter in a format that others read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krontune_cli.sources import ForceOption, JsonOption
from krontune_cli.tables import bar, make_table
from krontune_cli.terminal import console, one_line_errors, print_json, quiet_libraries

if TYPE_CHECKING:
    from krontune.convert import Export


def command(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder, or a LyCORIS file.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    to: Annotated[str, typer.Option(help="lora, soka (from LoKr), lokr or lycoris.")] = "lora",
    rank: Annotated[int | None, typer.Option(help="The largest rank of the LoRA.")] = None,
    error: Annotated[
        float | None, typer.Option(help="The largest relative error of a module's update. Default for SoKA: 0.001.")
    ] = None,
    vllm_rank: Annotated[
        bool, typer.Option("--vllm-rank", help="Pad all modules to one rank that vLLM takes (1, 8, 16, 32, ..., 512).")
    ] = False,
    base: Annotated[str | None, typer.Option(help="The base model of a LyCORIS file.")] = None,
    each: Annotated[
        bool, typer.Option("--modules", help="Show one row for each module, in place of each kind.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter as a stock LoRA, which every server runs; or LoKr as SoKA and back.

    LSR is a LoRA, so that its export is exact. SoKA gets the nearest LoRA of a rank or of an error. What is lost is
    shown for each kind of module, or with --modules for each.
    """
    quiet_libraries(progress=False)
    with one_line_errors():
        from krontune.convert import export

        result = export(
            adapter,
            out,
            to,
            rank=rank,
            error=error,
            vllm_rank=vllm_rank,
            base=base,
            force=force,
            progress=bar("exporting"),
        )
        if as_json:
            print_json(result.to_dict())
        else:
            _show(result, each)


def _show(result: Export, each: bool) -> None:
    from krontune.report.tables import human_bytes
    from krontune.report.words import by_kind, error_text, range_text, short_names

    if each:
        header = ["module", "rank", "error"]
        rows = [[m.name, str(m.rank), error_text(m.error)] for m in result.modules]
    else:
        groups = by_kind(result.modules, lambda module: module.name)
        names, header = short_names(groups), ["module", "modules", "rank", "largest error"]
        rows = [
            [names[k], str(len(g)), range_text([m.rank for m in g]), error_text(max(m.error for m in g))]
            for k, g in groups.items()
        ]
    out = console()
    out.print(make_table(header, rows, f"{result.method} to {result.to}"))
    if result.curve:
        points = [[str(rank), error_text(error)] for rank, error in result.curve]
        out.print(make_table(["rank", "error"], points, "Error against rank", text_columns=0))
    exact = result.error == 0
    out.print(f"error of dW      {'none: it is the same product' if exact else error_text(result.error)}")
    if result.padded_rank:
        out.print(f"padded rank      {result.padded_rank}, for every module")
    out.print(f"size             {result.n_params:,} parameters, {human_bytes(result.n_bytes)}")
    for note in result.notes:
        out.print(f"note: {note}", soft_wrap=True)
    out.print(f"wrote {result.out}", soft_wrap=True)
