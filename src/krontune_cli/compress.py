"""`krontune compress`: any LoRA as an LSR adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krontune_cli.sources import ForceOption, JsonOption
from krontune_cli.tables import bar, make_table
from krontune_cli.terminal import console, one_line_errors, print_json, quiet_libraries

if TYPE_CHECKING:
    from krontune.convert import Compression


def command(
    adapter: Annotated[Path, typer.Argument(help="A LoRA adapter's folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    separation_rank: Annotated[int | None, typer.Option(help="Terms of each factor, s.")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="N", help="0.25x of the LoRA's parameters, or a number such as 20k.")
    ] = None,
    sweeps: Annotated[int, typer.Option(min=0, help="Sweeps of alternating least squares, at most.")] = 8,
    curve: Annotated[bool, typer.Option("--curve/--no-curve", help="Show the error of other separation ranks.")] = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a LoRA into LSR: both factors become short sums of Kronecker products.

    Shows what that loses, at this and at other sizes. `krontune export --to lora` goes back.
    """
    quiet_libraries(progress=False)
    with one_line_errors():
        from krontune.convert import compress

        result = compress(
            adapter,
            out,
            separation_rank=separation_rank,
            budget=budget,
            sweeps=sweeps,
            curve=curve,
            force=force,
            progress=bar("separating"),
        )
        if as_json:
            print_json(result.to_dict())
        else:
            _show(result)


def _show(result: Compression) -> None:
    from krontune.report.tables import human_bytes
    from krontune.report.words import by_kind, error_text, short_names

    groups = by_kind(result.modules, lambda module: module.name)
    names = short_names(groups)
    rows = [
        [names[k], str(len(g)), str(g[0].r), error_text(max(m.error for m in g)), f"{max(m.condition for m in g):.1f}"]
        for k, g in groups.items()
    ]
    header = ["module", "modules", "r", "largest error", "condition"]
    out = console()
    out.print(make_table(header, rows, f"LoRA to LSR, s = {result.separation_rank}"))
    if result.curve:
        points = [
            [str(p.separation_rank), f"{p.n_params:,}", human_bytes(p.n_bytes), error_text(p.error)]
            for p in result.curve
        ]
        out.print(make_table(["s", "parameters", "bytes", "error"], points, "Error against size", text_columns=0))
    share = result.n_params / result.n_params_before
    out.print(f"parameters       {result.n_params:,}, {share:.2f}x of the LoRA's {result.n_params_before:,}")
    out.print(f"error of dW      {error_text(result.error)}; none from s = {result.exact_rank} on")
    out.print(f"condition        {result.condition:.1f} (times 1e-7: what float32 adds to the error)")
    for note in result.notes:
        out.print(f"note: {note}", soft_wrap=True)
    if share >= 1:
        out.print("note: this is no smaller than the LoRA. Lower the separation rank.")
    out.print(f"wrote {result.out}", soft_wrap=True)
